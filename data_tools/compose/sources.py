"""Rows from other people's files: question lists, LLaVA, VQA, shards of single images. All of it is untrusted."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_tools.compose.pool import Row
from data_tools.formats.fields import check_fields, is_empty, take, take_images, without
from data_tools.formats.llava import is_learned, role_of, take_content, take_turns
from data_tools.formats.marks import IMAGE_MARK, refuse_foreign_marks
from data_tools.inputs import entries, read_json
from laid_ds.data.dataset import Dataset
from laid_ds.data.record import DataError, Record

KNOWN = {"image", "images", "question", "answer", "choices", "about", "shows", "caption"}
KNOWN_LLAVA = {"about", "shows", "caption", "choices"}
SEPARATOR = "|"  # between several things in one cell of a table
TABLES = (".csv", ".tsv")


def question_rows(path: Path, ignore: Sequence[str] = (), keep_going: bool = False) -> Iterator[Row | DataError]:
    """`image`, and optional `question` with `answer` and `choices`, `about`, `shows`, `caption`: JSON, JSON lines, CSV or TSV."""
    for place, entry in _numbered(path, keep_going):
        yield _row(place, entry, ignore)


def _numbered(path: Path, keep_going: bool) -> Iterator[tuple[str, Any]]:
    if path.suffix.lower() in TABLES:
        found = _table(path)
    else:
        found = ((f"{path.name}, entry {number}", entry) for number, entry in enumerate(entries(path, keep_going=keep_going)))
    first = next(found, None)
    if first is None:
        raise DataError(f"{path} holds no rows")
    yield first
    yield from found


def _table(path: Path) -> Iterator[tuple[str, Any]]:
    """Lines of a table with a head, counted as an editor counts them."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            names = [name.strip() for name in lines.fieldnames or ()]
            if len(set(names)) != len(names):
                raise DataError(f"{path}: a column is named twice in its head ({', '.join(names)})")
            for line in lines:
                place = f"{path.name}, line {lines.line_num}"
                if None in line or None in line.values():
                    yield (
                        place,
                        DataError(f"{place}: the line has not as many cells as the head names ({', '.join(lines.fieldnames or ())})"),
                    )
                else:
                    yield place, {name.strip(): cell for name, cell in line.items()}
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    except csv.Error as error:
        raise DataError(f"{path}, line {lines.line_num}: {error}") from None


def _row(place: str, entry: Any, ignore: Sequence[str]) -> Row | DataError:
    try:
        if isinstance(entry, DataError):
            return entry
        entry = without(entry, ignore)
        question = take(entry, "question", str, "").removeprefix(IMAGE_MARK).strip()
        check_fields(entry, KNOWN)
        _refuse_marks(question)
        if question and is_empty(entry.get("answer")):
            raise DataError(f"the question {question[:60]!r} has no answer")
        return Row(place, _one_image(entry), question, take(entry, "answer", str, "").strip(), **_known(entry))
    except DataError as error:
        return DataError(f"{place}: {error.reason}")


def _known(entry: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    names = {"choices": "choices", "about": "about", "shows": "shows", "captions": "caption"}
    return {name: _several(entry, field) for name, field in names.items()}


def _several(entry: dict[str, Any], field: str) -> tuple[str, ...]:
    """A list of text, or one text; a caption is not cut."""
    value = entry.get(field)
    if isinstance(value, str):
        value = [value] if field == "caption" else value.split(SEPARATOR)
    if is_empty(value):
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise DataError(f"field {field!r} must be a text or a list of texts")
    return tuple(item.strip() for item in value if item.strip())


def _one_image(entry: dict[str, Any]) -> str:
    images = take_images(entry)
    if len(images) != 1 or not isinstance(images[0], str):
        raise DataError(f"{len(images)} images; a row to compose from names one picture, by its file")
    return images[0]


def _refuse_marks(text: str) -> None:
    refuse_foreign_marks(text)
    if IMAGE_MARK in text:
        raise DataError(f"{IMAGE_MARK} stands inside the question {text[:60]!r}; images of a haystack stand before it")


def llava_rows(path: Path, ignore: Sequence[str] = (), keep_going: bool = False) -> Iterator[Row | DataError]:
    """The first question of each LLaVA row with its answer; later ones may lean on it and are left out. Beside `image` and
    `conversations` may stand `about`, `shows`, `caption` and `choices`."""
    for place, entry in _numbered(path, keep_going):
        try:
            if isinstance(entry, DataError):
                raise entry
            yield _llava_row(place, entry, ignore)
        except DataError as error:
            yield error if isinstance(entry, DataError) else DataError(f"{place}: {error.reason}")


def _llava_row(place: str, entry: Any, ignore: Sequence[str]) -> Row:
    entry = without(entry, ignore)
    take(entry, "image", (str, list, dict), "")
    own = {name: value for name, value in entry.items() if name in KNOWN_LLAVA}
    said = take_turns({name: value for name, value in entry.items() if name not in KNOWN_LLAVA})
    roles, texts = [role_of(turn) for turn in said], [take_content(turn) for turn in said]
    if roles[:2] != ["user", "assistant"] or not all(isinstance(text, str) for text in texts):
        raise DataError("a row to compose from is a question and its answer, as text")
    learned = [is_learned(turn, role) for turn, role in zip(said, roles, strict=True)]
    if not learned[1]:
        raise DataError(f"the answer {texts[1][:40]!r} is not to be learned by its own word; leave the row out, or what says so (--ignore)")
    relevant = take(entry, "relevant_images", list, [])
    if relevant not in ([], [1]):
        raise DataError(f"relevant_images {str(relevant)[:60]} must be [1]: the one picture of a row answers its question")
    question = texts[0].removeprefix(IMAGE_MARK).removesuffix(IMAGE_MARK).strip()
    _refuse_marks(question)
    return Row(place, _one_image(entry), question, texts[1].strip(), **_known(own))


def vqa_rows(paths: Sequence[Path], names: Mapping[int, set[str]], left_out: Counter[str]) -> Iterator[Row | DataError]:
    """Questions and annotations files of VQA (v2), in pairs; `names`: image id -> its file name, where an instances file says it; what is
    left out is counted."""
    questions, annotations = {}, {}
    for path in paths:
        tree = read_json(path)
        for name, into in (("questions", questions), ("annotations", annotations)):
            for key, place, entry in _by_question(path, tree, name):
                if key in into:
                    raise DataError(f"{place}: question_id {key} is given twice")
                into[key] = (place, entry, tree.get("data_subtype") or "")
    if not questions or not annotations:
        lacking = "questions" if not questions else "annotations"
        raise DataError(f"none of {', '.join(map(str, paths))} holds {lacking}; give a VQA questions file and its annotations file")
    left_out["annotations of questions that no file asks"] += len(annotations.keys() - questions.keys())
    for key, (place, entry, subtype) in questions.items():
        try:
            if key not in annotations:
                raise DataError(f"no annotation answers it (question_id {key})")
            answered, annotation, _ = annotations[key]
            number, answer = take(entry, "image_id", int), take(annotation, "multiple_choice_answer", str)
            if (other := take(annotation, "image_id", int, number)) != number:
                raise DataError(
                    f"question_id {key} is of image {number} here and of image {other} at {answered}; give files that belong together"
                )
            if len(named := names.get(number, ())) > 1:
                raise DataError(
                    f"the --instances files call image {number} {' and '.join(map(repr, sorted(named)))}; give the file of these questions"
                )
            image = next(iter(named), None) or f"COCO_{subtype}_{number:012d}.jpg"
            yield Row(place, image, take(entry, "question", str).strip(), answer.strip())
        except DataError as error:
            yield DataError(f"{place}: {error.reason}")


def _by_question(path: Path, tree: Any, name: str) -> Iterator[tuple[int, str, Any]]:
    """(question_id, place for people, entry) of a list of a VQA file, if it has that list."""
    place = str(path)
    try:
        for number, entry in enumerate(take(tree, name, list, [])):
            place = f"{path.name}, {name}, entry {number}"
            yield take(entry, "question_id", int), place, entry
    except DataError as error:
        raise DataError(f"{place}: {error.reason}") from None


Place = tuple[int, int]
"""Number of a sample, and of its image."""


class ShardPictures:
    """Rows and images of data sets whose samples hold one image each. An image that stands in several samples is one picture."""

    def __init__(self, folders: Sequence[Path]):
        self.dataset = Dataset.open(list(folders))

    def rows(self) -> Iterator[Row | DataError]:
        """A row for each sample's first question; its `meta` may hold `about`, `shows` and `caption`."""
        first: dict[tuple[int, int], Place] = {}
        for number in range(len(self.dataset)):
            record, key = self.dataset.record(number), self.dataset.keys[number].decode()
            try:
                yield self._row(number, f"sample {key}", record, first)
            except DataError as error:
                yield DataError(f"sample {key}: {error.reason}")

    def _row(self, number: int, place: str, record: Record, first: dict[tuple[int, int], Place]) -> Row:
        if len(record.images) != 1:
            raise DataError(
                f"{len(record.images)} images; a sample to compose from has one: no record says what tells a needle from other pictures"
            )
        spoken = [turn for turn in record.turns if turn.role != "system"]
        if [turn.role for turn in spoken[:2]] != ["user", "assistant"]:
            raise DataError("it holds no question with an answer")
        image = first.setdefault((record.images[0].crc32, record.images[0].num_bytes), (number, 0))
        facts = _known({name: value for name, value in record.meta.items() if name in ("about", "shows", "caption")})
        return Row(place, image, spoken[0].text.strip(), spoken[1].text.strip(), **{**facts, "choices": spoken[0].choices})

    def read(self, place: Place) -> bytes:
        """The bytes of an image."""
        return bytes(self.dataset.parts(place[0])[1 + place[1]])

    def name(self, place: Place) -> str:
        """What an image is called in a sentence."""
        return f"{self.dataset.keys[place[0]].decode()}.{place[1]:03d}"


def with_instances(rows: Iterable[Row | DataError], shown: Mapping[str, set[str]], listed: Counter[str]) -> Iterator[Row | DataError]:
    """The rows with the classes that instances files record of their pictures."""
    for row, classes in _beside(rows, shown, "--instances", listed):
        yield row if classes is None else replace(row, shows=(*row.shows, *sorted(classes)), listed=True)


def with_captions(rows: Iterable[Row | DataError], said: Mapping[str, list[str]], listed: Counter[str]) -> Iterator[Row | DataError]:
    """The rows with the captions that captions files record of their pictures."""
    for row, captions in _beside(rows, said, "--captions", listed):
        yield row if captions is None else replace(row, captions=(*row.captions, *captions))


def _beside(
    rows: Iterable[Row | DataError], facts: Mapping[str, Any], option: str, listed: Counter[str]
) -> Iterator[tuple[Row | DataError, Any]]:
    """Each row with what the files of an option say of its picture: by its name, or without folders where that can be one picture alone.
    `listed` counts the pictures of which they say something; files that know none of them are others' files."""
    rows = list(rows)
    images = dict.fromkeys(row.image for row in rows if isinstance(row, Row) and isinstance(row.image, str))
    by_name, in_rows = _without_folders(facts), _without_folders(images)
    for row in rows:
        if not isinstance(row, Row) or row.image not in images or row.image in facts:
            yield row, facts.get(row.image) if isinstance(row, Row) else None
            continue
        name = row.image.rpartition("/")[2]
        found, asking = by_name.get(name, []), in_rows[name]
        if len(found) > 1 or (found and len(asking) > 1):
            names = ", ".join(map(repr, [*found[:2], *asking[:2]]))
            yield DataError(f"{row.place}: the {option} files list {name!r}, which may be any of {names}; give folders in both"), None
        else:
            yield row, facts[found[0]] if found else None
    known = sum(image in facts or image.rpartition("/")[2] in by_name for image in images)
    if images and not known:
        ours, theirs = next(iter(images)), next(iter(facts), "")
        raise DataError(f"the {option} files list none of the {len(images)} pictures of the rows: rows name {ours!r}, the files {theirs!r}")
    listed[option] = known


def _without_folders(names: Iterable[str]) -> dict[str, list[str]]:
    """The last part of a name -> the names that end in it."""
    found = defaultdict(list)
    for name in names:
        found[name.rpartition("/")[2]].append(name)
    return found
