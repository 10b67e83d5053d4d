"""Pools whose questions are made from the classes of pictures: COCO instances files, and folders that are named by their class.

coco, vhs   "For the image with the dog, is there a cat?"  yes, no        the form of Visual Haystacks' single-needle questions
classes     "Which of these is shown in one of the images: cat, dog, horse or sheep?"  the four
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.compose.facts import Sieve, read_pictures
from data_tools.compose.pool import YES_NO, Group, Picture, Pool, Row, normal
from data_tools.formats.fields import take
from data_tools.inputs import read_json, visible
from laid_ds.data.record import DataError

QUESTION = "For the image with the {anchor}, is there a {target}?"
WHICH = "Which of these is shown in one of the images: {classes}?"
LEAST_PICTURES = 2  # of a class, in train and in test


def read_instances(paths: Sequence[Path]) -> tuple[dict[str, set[str]], dict[int, set[str]]]:
    """(file name -> classes shown, image id -> its file names, of which several files may have others) of COCO instances files. A picture
    without annotations shows no class."""
    shown: dict[str, set[str]] = {}
    names: dict[int, set[str]] = defaultdict(set)
    for path in paths:
        tree = _tree(path, "categories")
        classes, here = _by_id(path, tree, "categories", "name"), _by_id(path, tree, "images", "file_name")
        for number, name in here.items():
            shown.setdefault(name, set())
            names[number].add(name)
        for place, (number, kind) in enumerate(_fields(path, tree, "annotations", image_id=int, category_id=int)):
            if number not in here or kind not in classes:
                raise DataError(f"{path}, annotations, entry {place}: the file does not list its image {number} or its category {kind}")
            shown[here[number]].add(normal(classes[kind]))
    return shown, names


def read_captions(paths: Sequence[Path]) -> dict[str, list[str]]:
    """File name -> captions, of COCO captions files."""
    said: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        tree = _tree(path)
        here = _by_id(path, tree, "images", "file_name")
        for place, (number, caption) in enumerate(_fields(path, tree, "annotations", image_id=int, caption=str)):
            if number not in here:
                raise DataError(f"{path}, annotations, entry {place}: the file does not list its image {number}")
            said[here[number]].append(caption)
    return said


def _by_id(path: Path, tree: dict[str, Any], part: str, field: str) -> dict[int, str]:
    """id -> a field, of a list of a COCO file, in which an id names one thing."""
    found: dict[int, str] = {}
    for place, (number, value) in enumerate(_fields(path, tree, part, id=int, **{field: str})):
        if number in found:
            raise DataError(f"{path}, {part}, entry {place}: id {number} names {value[:60]!r} here and {found[number][:60]!r} before")
        found[number] = value
    return found


def _fields(path: Path, tree: dict[str, Any], part: str, **kinds: type) -> Iterator[tuple[Any, ...]]:
    """Fields of each entry of a list of a COCO file, by their types."""
    for place, entry in enumerate(tree[part]):
        try:
            fields = tuple(take(entry, name, kind) for name, kind in kinds.items())
        except DataError as error:
            raise DataError(f"{path}, {part}, entry {place}: {error.reason}") from None
        yield fields


def _tree(path: Path, *more: str) -> dict[str, Any]:
    tree = read_json(path)
    try:
        for name in ("images", "annotations", *more):
            take(tree, name, list)
    except DataError as error:
        raise DataError(f"{path} is no COCO file: {error.reason}") from None
    return tree


def coco_pool(shown: dict[str, set[str]], read: Callable[[Any], bytes], prompt: str, skip_bad: bool, jobs: int) -> Pool:
    """Yes-or-no questions about an anchor, which only the needle shows, and a target. No distractor shows the anchor."""
    good = Sieve(skip_bad)
    rows = [Row("instances", name, shows=tuple(sorted(classes)), listed=True) for name, classes in shown.items()]
    found = read_pictures(rows, read, str, jobs, good)
    pictures = [
        replace(picture, bears=frozenset({"listed", *(f"class {name}" for name in shown[image])}), shows=frozenset(shown[image]))
        for image, picture in found.items()
    ]
    classes = sorted({name for picture in pictures for name in picture.shows})
    table = np.array([[name in picture.shows for picture in pictures] for name in classes], bool).reshape(len(classes), len(pictures))
    groups = [
        Group(
            prompt + QUESTION.format(anchor=anchor, target=target),
            YES_NO,
            YES_NO,
            _Pair(table, a, t),
            frozenset({f"class {anchor}"}),
            (target,),
            asks_whether_shown=True,
            often=True,
        )
        for a, anchor in enumerate(classes)
        for t, target in enumerate(classes)
        if a != t
    ]
    if not groups:
        raise DataError(f"{len(classes)} classes are shown in the pictures; a question needs an anchor and a target")
    return Pool(pictures, groups, lambda picture: read(picture.source), {}, good.rejected)


class _Pair:
    """Pictures with an anchor, and with or without a target."""

    def __init__(self, table: np.ndarray, anchor: int, target: int):
        self.table, self.anchor, self.target = table, anchor, target  # [classes, pictures]

    def __call__(self, answer: str) -> np.ndarray:
        return np.flatnonzero(self.table[self.anchor] & (self.table[self.target] == (answer == "yes")))


def class_folders(root: Path) -> Iterator[Row | DataError]:
    """A row for each file of each folder of `root`, whose name is its class."""
    for folder in visible(root, "*"):
        if not folder.is_dir():
            yield DataError(f"{folder} lies beside the folders of the classes; put it into one, or take it away")
            continue
        for path in visible(folder, "*"):
            if path.is_dir():
                yield DataError(f"{path} is a folder inside a class; pictures lie in the folder of their class")
                continue
            if any("\udc80" <= letter <= "\udcff" for letter in str(path)):
                yield DataError(f"{str(path)!a}: its name is no UTF-8, which a record cannot hold; rename it")
                continue
            yield Row(str(folder), f"{folder.name}/{path.name}", shows=(normal(folder.name.replace("_", " ")),), listed=True)


def classes_pool(root: Path, read: Callable[[Any], bytes], offered: int, questions: int, skip_bad: bool, jobs: int, seed: int) -> Pool:
    """Which of some classes is shown: one of them is, in one picture, and no distractor is of any of them. questions: how many will be
    asked at most; offered: classes to choose from."""
    good = Sieve(skip_bad)
    rows = good.keep(class_folders(root), lambda row: row)
    shown = {row.image: row.shows[0] for row in rows}
    found = read_pictures(rows, read, str, jobs, good)
    pictures = [_of_class(picture, shown[image]) for image, picture in found.items()]
    classes = sorted(set(shown.values()))
    if not 2 <= offered < len(classes):
        raise DataError(
            f"{root} holds {len(classes)} classes; a question that offers {offered} needs at least {offered + 1}, one for its distractors, "
            "and offers at least 2: give --choices"
        )
    numbers = {name: [i for i, picture in enumerate(pictures) if picture.stratum == name] for name in classes}
    sets = _sets(classes, offered, 4 * questions, random.Random(f"classes {seed}"))
    groups = [
        Group(
            WHICH.format(classes=_listed(some)),
            some,
            some,
            numbers.__getitem__,
            frozenset(f"class {name}" for name in some),
            tells_what_is_shown=True,
            often=True,
        )
        for some in sets
    ]
    return Pool(pictures, groups, lambda picture: read(picture.source), {}, good.rejected)


def _of_class(picture: Picture, name: str) -> Picture:
    return replace(picture, bears=frozenset({f"class {name}"}), shows=frozenset({name}), stratum=name)


def _sets(classes: Sequence[str], offered: int, most: int, rng: random.Random) -> list[tuple[str, ...]]:
    """Different sets of classes, each in a random order: all there are, or `most` of them."""
    wanted = min(most, comb(len(classes), offered))
    found: dict[frozenset[str], tuple[str, ...]] = {}
    while len(found) < wanted:
        some = tuple(rng.sample(classes, offered))
        found.setdefault(frozenset(some), some)
    return list(found.values())


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def check_classes(pictures: Sequence[Picture], test: np.ndarray, free: np.ndarray, parts: dict[str, bool]) -> None:
    """Raises DataError for a class (a stratum) of which a part has too few pictures. test, free: [pictures] bool; parts: name -> its value
    in `test`."""
    for part, value in parts.items():
        counts = Counter(pictures[number].stratum for number in np.flatnonzero(free & (test == value)))
        for name in sorted({picture.stratum for picture in pictures if picture.stratum}):
            if counts[name] < LEAST_PICTURES:
                raise DataError(
                    f"class {name!r} has {counts[name]} pictures for {part}, which needs at least {LEAST_PICTURES} of each class; "
                    "add pictures of it, or take its folder away"
                )
