"""`laid-data compose`: a pool from somebody's files, haystacks drawn from it, looked at for shortcuts, written as train and test set."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from data_tools.compose import classes, sources
from data_tools.compose.check import refuse_leaks, shortcuts
from data_tools.compose.draw import DEPTHS, Draft, Shape, draw, sides
from data_tools.compose.facts import Rule, Rules, pool_of
from data_tools.compose.pool import Pool, Row, normal
from data_tools.compose.writing import as_read, write
from data_tools.console import track
from data_tools.formats.visual_haystacks import PROMPT
from data_tools.image_root import ImageRoot
from laid_ds.data.dataset import Dataset
from laid_ds.data.record import DataError
from laid_ds.data.writer import write_whole
from laid_ds.disk import whole_folder

LISTS = ("questions", "llava", "vqa", "shards")
"""Formats that hold questions; the others make them of classes."""
PAPERS_SAMPLES, PAPERS_IMAGES = 5000, (2, 20)
SAMPLES, IMAGES, CHOICES = 1000, (20, 20), 4
TEST_SAMPLES, TEST_SHARE = 100, 0.2
UNKNOWN_TO = {
    **dict.fromkeys(("coco", "vhs"), "which makes its questions, and its rule, from classes"),
    "classes": "which makes its questions, and its rule, from the names of its folders",
    "shards": "whose records say what is known of their pictures, and hold them",
    "vqa": "whose entries are read by their known fields",
}
"""Why a format does not know an option."""
SHOWN_ANSWERS = 12
COMPOSED, REJECTED = "composed.json", "rejected.jsonl"
TRAIN, TEST = "train", "test"


@dataclass(frozen=True)
class Compose:
    """What is composed of what. `None` is the format's own default."""

    format: str
    files: tuple[Path, ...]
    images: Path | None
    train: Path | None = None
    test: Path | None = None
    samples: int | None = None
    size: tuple[int, int] | None = None
    questions: int = 1
    test_samples: int | None = None
    test_size: tuple[int, int] | None = None
    test_share: float | None = None
    rule: str | None = None
    lead: str = ""
    instances: tuple[Path, ...] = ()
    captions: tuple[Path, ...] = ()
    apart_from: tuple[Path, ...] = ()
    answers: tuple[str, ...] = ()
    choices: int | None = None
    seed: int = 0
    licence: str = ""
    source_name: str = ""
    skip_bad: bool = False
    ignore: tuple[str, ...] = ()
    decode: bool = True
    follow_links: bool = False
    jobs: int = 1

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of each part that is to be written."""
        papers = self.format == "vhs"
        size = self.size or (PAPERS_IMAGES if papers else IMAGES)
        test_size = self.test_size or (size[1], size[1])
        train = Shape(self.samples or (PAPERS_SAMPLES if papers else SAMPLES), size, self.questions)
        shapes = {TRAIN: (self.train, train), TEST: (self.test, Shape(self.test_samples or TEST_SAMPLES, test_size, self.questions))}
        return {name: shape for name, (folder, shape) in shapes.items() if folder is not None}


def compose(plan: Compose, dry_run: bool = False) -> dict[str, Any]:
    """Write the data sets, or with `dry_run` only say what they would be. Raises DataError, one sentence, for bad input and for leaks."""
    _check_plan(plan)
    pool = read_pool(plan)
    share = TEST_SHARE if plan.test_share is None else plan.test_share
    test = sides(pool.pictures, share, plan.seed) if plan.train and plan.test else np.full(len(pool.pictures), bool(plan.test))
    free = ~taken(pool, plan.apart_from)
    classes.check_classes(pool.pictures, test, free, {name: name == TEST for name in plan.shapes})
    if not free.all():
        pool.left_out["pictures of --apart-from"] = int((~free).sum())
    result: dict[str, Any] = {"format": plan.format, "pictures": len(pool.pictures), "questions_in_pool": len(pool.groups)}
    if pool.listed:
        result["listed"] = pool.listed
    if pool.left_out:
        result["left_out"] = pool.left_out
    if pool.rejected:
        result["rejected"] = len(pool.rejected)
    drafts = {}
    for name, shape in plan.shapes.items():
        members = free & (test == (name == TEST))
        drawn = draw(pool, members, shape, f"compose {name} {plan.seed}", f"{plan.format}-{name}")
        drafts[name] = list(track(drawn, f"draw {name}", shape.samples))
        if name == TEST:
            _check_scorable(drafts[name])
        result[name] = describe(drafts[name], int(members.sum()))
        found = shortcuts(drafts[name])
        result[name]["shortcuts"] = [baseline.row() for baseline in found]
        refuse_leaks(found, f"the {name} set")
    if not dry_run:
        _write_all(plan, pool, drafts, result)
    return result


def _check_plan(plan: Compose) -> None:
    """Raises ValueError for what cannot be meant."""
    if not plan.train and not plan.test:
        raise ValueError("say where to write: --train FOLDER, --test FOLDER, or both")
    for folder in (plan.train, plan.test):
        if folder is not None and folder.exists():
            raise ValueError(f"{folder} exists; choose another folder or remove it")
    if plan.train and plan.test:
        train, test = plan.train.resolve(), plan.test.resolve()
        if train == test:
            raise ValueError(f"--train and --test are both {plan.train}; give two folders")
        if train.is_relative_to(test) or test.is_relative_to(train):
            raise ValueError(f"of --train {plan.train} and --test {plan.test} one lies inside the other; give two folders side by side")
    if plan.rule is not None and plan.rule not in get_args(Rule):
        raise ValueError(f"--rule {plan.rule!r} is none of {', '.join(get_args(Rule))}")
    _refuse_what_changes_nothing(plan)
    if plan.answers and len({normal(answer) for answer in plan.answers} - {""}) < max(len(plan.answers), 2):
        raise ValueError(f"--answers {','.join(plan.answers)}: give two or more, each once, as yes,no")
    if plan.images is None and plan.format not in ("shards", "classes"):
        raise ValueError(f"say under which folder the pictures of {plan.files[0]} lie: --images FOLDER")
    for path in (*plan.files, *plan.instances, *plan.captions, *plan.apart_from):
        if not path.exists():
            raise ValueError(f"{path} does not exist")
    if plan.test_share is not None and not 0 < plan.test_share < 1:
        raise ValueError(f"--test-share {plan.test_share}: give a share of the pictures between 0 and 1")
    for shape in plan.shapes.values():
        if shape.questions > shape.images[0]:
            raise ValueError(
                f"--questions {shape.questions}: each needs a needle of its own, and there are haystacks of {shape.images[0]} images"
            )


def _refuse_what_changes_nothing(plan: Compose) -> None:
    """Raises ValueError for an option that the format does not know, or that is of a part which is not written."""
    files = ("questions", "llava", "vqa")
    known = {
        "--rule": (plan.rule, LISTS),
        "--lead": (plan.lead, LISTS),
        "--answers": (plan.answers, LISTS),
        "--captions": (plan.captions, files),
        "--instances": (plan.instances, files),
        "--choices": (plan.choices, (*LISTS, "classes")),
        "--ignore": (plan.ignore, ("questions", "llava")),
        "--images": (plan.images, (*files, "coco", "vhs")),
        "--no-decode": (not plan.decode, (*files, "coco", "vhs", "classes")),
        "--follow-links": (plan.follow_links, (*files, "coco", "vhs", "classes")),
    }
    for name, (value, formats) in known.items():
        if value and plan.format not in formats:
            raise ValueError(f"{name} is for {', '.join(formats)}; with {plan.format}, {UNKNOWN_TO[plan.format]}, it would change nothing")
    parts = {
        "--samples": (plan.samples, plan.train, "--train"),
        "--test-samples": (plan.test_samples, plan.test, "--test"),
        "--test-size": (plan.test_size, plan.test, "--test"),
        "--test-share": (plan.test_share, plan.train and plan.test, "both --train and --test"),
    }
    for name, (value, folder, wanted) in parts.items():
        if value is not None and not folder:
            raise ValueError(f"{name} would change nothing without {wanted}; give that too, or leave it out")


def read_pool(plan: Compose) -> Pool:
    """The pictures and questions of a plan's files. Each picture is read, and decoded, once; its bytes are copied later."""
    if plan.format == "shards":
        shards = sources.ShardPictures(plan.files)
        return pool_of(shards.rows(), shards.read, shards.name, _rules(plan))
    root = _one_folder(plan) if plan.format == "classes" else plan.images
    look, copy = (ImageRoot(root, decode=decode, follow_links=plan.follow_links).read for decode in (plan.decode, False))
    return replace(_pool_of_files(plan, look), read=lambda picture: copy(picture.source))


def _pool_of_files(plan: Compose, read: Callable[[str], bytes]) -> Pool:
    if plan.format == "classes":
        questions = sum(shape.samples * shape.questions for shape in plan.shapes.values())
        return classes.classes_pool(plan.files[0], read, plan.choices or CHOICES, questions, plan.skip_bad, plan.jobs, plan.seed)
    if plan.format in ("coco", "vhs"):
        shown, _ = classes.read_instances(plan.files)
        return classes.coco_pool(shown, read, PROMPT if plan.format == "vhs" else "", plan.skip_bad, plan.jobs)
    left_out, listed = Counter(), Counter()
    pool = pool_of(_rows(plan, left_out, listed), read, str, _rules(plan))
    return replace(pool, left_out=pool.left_out | +left_out, listed=dict(listed))


def _one_folder(plan: Compose) -> Path:
    if len(plan.files) != 1 or not plan.files[0].is_dir():
        raise ValueError(f"classes takes one folder of folders, not {', '.join(map(str, plan.files))}")
    return plan.files[0]


def taken(pool: Pool, folders: Sequence[Path]) -> np.ndarray:
    """[pictures] bool: which stand in data sets already, by the crc32 and length that their records declare."""
    datasets = [Dataset.open(folder) for folder in folders]
    records = (dataset.record(i) for dataset in datasets for i in range(len(dataset)))
    marks = {(image.crc32, image.num_bytes) for record in records for image in record.images}
    return np.array([picture.mark in marks for picture in pool.pictures], bool)


def _rules(plan: Compose) -> Rules:
    return Rules(plan.rule, plan.lead, plan.answers, plan.choices, plan.skip_bad, plan.jobs)


def _rows(plan: Compose, left_out: Counter[str], listed: Counter[str]) -> Iterable[Row | DataError]:
    """The rows of the list formats, with what COCO files know of their pictures. What is left out, and what they list, is counted."""
    shown, names = classes.read_instances(plan.instances)
    if plan.format == "vqa":
        rows = sources.vqa_rows(plan.files, names, left_out)
    else:
        read = sources.llava_rows if plan.format == "llava" else sources.question_rows
        rows = (row for path in plan.files for row in read(path, plan.ignore, plan.skip_bad))
    if plan.instances:
        rows = sources.with_instances(rows, shown, listed)
    if plan.captions:
        rows = sources.with_captions(rows, classes.read_captions(plan.captions), listed)
    return rows


def _check_scorable(drafts: Sequence[Draft]) -> None:
    """Raises DataError for a test set of which `laid eval` would not know the chance level."""
    counts = Counter(len(question.choices) for draft in drafts for question in draft.questions)
    if counts[0]:
        raise DataError(
            "a test needs answers to choose from, and questions of the same words have one answer each: give `choices` in the rows, or "
            "--answers; without --test the set is for training alone"
        )
    if len(counts) > 1:
        offers = ", ".join(f"{number} choices {count} times" for number, count in counts.most_common())
        raise DataError(f"a test needs one number of choices, and its questions offer {offers}; say which with --choices")


def describe(drafts: Sequence[Draft], pictures: int) -> dict[str, Any]:
    """What the haystacks are, in numbers."""
    questions = [(draft, question) for draft in drafts for question in draft.questions]
    answers = Counter(question.answer for _, question in questions)
    sizes = Counter(len(draft.pictures) for draft in drafts)
    depths = sum(_depth(question.needle, len(draft.pictures)) for draft, question in questions)
    return {
        "samples": len(drafts),
        "questions": len(questions),
        "images": sum(size * count for size, count in sizes.items()),
        "images_in_a_sample": [min(sizes), max(sizes)],
        "pictures_to_draw_from": pictures,
        "answers": dict(answers.most_common(SHOWN_ANSWERS)),
        "other_answers": sum(count for _, count in answers.most_common()[SHOWN_ANSWERS:]),
        "needles_by_tenth_of_depth": np.round(depths, 1).tolist(),
    }


def _depth(place: int, images: int) -> np.ndarray:
    """[10] The share of an image in each tenth of its haystack: in a short one it lies in several."""
    edges = np.arange(DEPTHS + 1) / DEPTHS
    start, end = place / images, (place + 1) / images
    return (np.minimum(edges[1:], end) - np.maximum(edges[:-1], start)).clip(0) * images


def _write_all(plan: Compose, pool: Pool, drafts: dict[str, list[Draft]], result: dict[str, Any]) -> None:
    """All folders, or none."""

    def facts(draft: Draft) -> dict[str, Any]:
        paths = [picture.name for picture in draft.pictures]
        return {"source": plan.source_name or plan.files[0].name, "licence": plan.licence, "meta": {"image_paths": paths}}

    with ExitStack() as stack:
        for name, some in drafts.items():
            folder = plan.train if name == TRAIN else plan.test
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = stack.enter_context(whole_folder(folder, f"the {name} set"))
            dataset = write(some, as_read(pool.read), facts, partial, f"write {name}")
            result[name] |= {"folder": str(folder), "fingerprint": dataset.fingerprint}
            write_whole(partial / COMPOSED, _record(plan, result[name]))
            if pool.rejected:
                lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in pool.rejected)
                write_whole(partial / REJECTED, "".join(lines).encode(errors="backslashreplace"))


def _record(plan: Compose, part: dict[str, Any]) -> bytes:
    """How a set was made and what was found in it, beside its shards. Files by their names: where they lay says nothing."""
    said = {name: value for name, value in plan.__dict__.items() if name not in ("train", "test", "jobs")}
    fields = {"compose": said, **{name: value for name, value in part.items() if name != "folder"}}
    return json.dumps(fields, indent=1, default=lambda path: path.name, ensure_ascii=False).encode() + b"\n"
