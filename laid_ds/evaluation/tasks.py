"""What is asked: shards as tasks, a task's items in their order, and the questions of an item with what is known before any answer.

A data set of our own is asked in windows of growing size; an imported benchmark is asked as its file says, or with its needle placed at
each depth. An answer is a dictionary (see rules.py); `said` and what follows from it are filled in by asking.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from laid_ds.data.dataset import Dataset
from laid_ds.data.haystack import needle_at, why_needle_stays, why_whole
from laid_ds.data.record import DataError, Sample, Turn, num_pieces
from laid_ds.evaluation.haystack import Haystacks, number_of, read_haystacks, survey, window_of_size
from laid_ds.evaluation.rules import HAYSTACK, benchmark_of, kept

SIZES = (1, 2, 5, 10, 20, 50, 100, 150)
FORCED, GENERATE = MODES = ("teacher-forced", "generate")
NUM_HAYSTACKS = 100
MOST_CHARACTERS = 1000  # of a question, from its end: the whole text stands in the shards
Group = tuple[int, int | None, float | None]
Answer = dict[str, Any]


@dataclass(frozen=True)
class Wish:
    """What the user asked for; None leaves it to the task."""

    sizes: Sequence[int] | None = None
    """Numbers of images of the windows."""
    haystacks: int | None = None
    """How many samples of each task; default: 100 of our own haystacks (all where there are fewer), all of a benchmark."""
    questions: int = 1
    """Most questions of a window."""
    depths: int | None = None
    """How many places the needle takes, evenly from the first on."""
    mode: str | None = None


@dataclass(frozen=True)
class Task:
    """A data set and how it is asked."""

    name: str
    dataset: Dataset
    benchmark: str
    mode: str
    samples: int
    questions: int
    sizes: list[int] | None
    """Of the windows; None: samples are asked as they are."""
    depths: int | None
    choices: int | None
    """That every question offers, where all offer as many; chance is 1 / this."""
    left_out: Mapping[int, str] = field(default_factory=dict)
    """Sizes that were wished for and cannot be measured, and why."""

    @cached_property
    def unit(self) -> str:
        """What sizes count: images, or of haystacks without images their texts."""
        return "images" if self.dataset.record(0).images or self.sizes is None else "texts"

    def setting(self) -> dict[str, Any]:
        """What must be the same for answers to be kept."""
        facts = {
            "task": self.name,
            "shards": ", ".join(map(str, self.dataset.folders)),
            "fingerprint": self.dataset.fingerprint,
            "sizes": self.sizes,
            "haystacks": self.samples,
            "questions": self.questions,
            "choices": self.choices,
        }
        facts |= {"benchmark": self.benchmark, "mode": self.mode, "depths": self.depths}
        return facts if self.unit == "images" else facts | {"unit": self.unit}


@dataclass(frozen=True)
class Item:
    """One sample in one window: its questions are asked of the same images."""

    task: int
    index: int
    key: str
    size: int | None
    place: int | None
    """The number of the image that is to be the needle, in a sweep over depths."""
    depth: float | None
    """The same as a share of the images."""
    num_images: int

    @property
    def group(self) -> Group:
        """Items of one group come after each other and may share a batch."""
        return self.task, self.size, self.depth


def open_tasks(folders: Sequence[Path], wish: Wish) -> list[Task]:
    """Raises ValueError for two tasks of one name, and for a task that cannot be asked as wished."""
    if wish.mode not in (None, *MODES):
        raise ValueError(f"--mode {wish.mode!r} is none of {', '.join(MODES)}")
    names = [Path(folder).name or str(folder) for folder in folders]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two tasks are called {twice!r}; answers are kept by the name of the folder, so rename one")
    return [_open_task(name, folder, wish) for name, folder in zip(names, folders, strict=True)]


def _open_task(name: str, folder: Path, wish: Wish) -> Task:
    dataset = Dataset.open(folder)
    first = dataset.record(0)
    benchmark = benchmark_of(first.meta)
    ours = benchmark == HAYSTACK
    mode = wish.mode or (FORCED if ours else GENERATE)
    forced = mode == FORCED
    sizes = wish.sizes or (SIZES if forced or (ours and why_whole(first) is None) else None)
    samples = number_of(dataset, wish.haystacks, NUM_HAYSTACKS if ours and sizes else len(dataset))
    read_haystacks(dataset, samples)
    if wish.depths is not None:
        check_needles_move(dataset, samples, windows=sizes is not None, questions=wish.questions)
    if sizes is None:
        check_answers(dataset, samples)
        return Task(name, dataset, benchmark, mode, samples, wish.questions, None, wish.depths, _common_choices(dataset, samples))
    found = survey(dataset, samples, sizes, scored=forced)
    return Task(name, dataset, benchmark, mode, samples, wish.questions, found.sizes, wish.depths, found.choices, found.left_out)


def check_answers(dataset: Dataset, samples: int) -> None:
    """Raises DataError for a sample without a question, and for a question without an answer to compare with."""
    for i in range(samples):
        turns = dataset.record(i).turns
        asked = [number for number, turn in enumerate(turns) if turn.role == "user"]
        if not asked or any(number + 1 == len(turns) or turns[number + 1].role != "assistant" for number in asked):
            raise DataError("an evaluation needs questions that have answers").at(dataset.origin(i))


def check_needles_move(dataset: Dataset, samples: int, windows: bool, questions: int) -> None:
    """Raises ValueError where a sample, or a window of it that asks so many questions, is none in which one needle can be moved."""
    if windows and questions > 1:
        raise ValueError(f"--depths moves the needle of one question, and --questions {questions} asks several of the same images")
    for i in range(samples):
        record = dataset.record(i)
        needles = {len(turn.needles) for turn in record.turns if turn.role == "user"}
        reason = (None if needles == {1} else "has questions of other than one needle") if windows else why_needle_stays(record)
        if reason is not None:
            raise DataError(f"--depths: the needle cannot be moved: the sample {reason}").at(dataset.origin(i))


def _common_choices(dataset: Dataset, samples: int) -> int | None:
    counts = {len(set(turn.choices)) for i in range(samples) for turn in dataset.record(i).turns if turn.role == "user"}
    return counts.pop() if len(counts) == 1 and min(counts) > 1 else None


def items_of(number: int, task: Task) -> Iterator[Item]:
    """The items of task `number`, in their order: sizes, then depths, then samples."""
    for size in task.sizes or [None]:
        for depth in range(task.depths or 1):
            for i in range(task.samples):
                images = int(task.dataset.num_images[i]) if size is None else size
                key = task.dataset.keys[i].decode()
                if task.depths is None:
                    yield Item(number, i, key, size, None, None, images)
                elif (place := depth * images // task.depths) != (depth - 1) * images // task.depths or depth == 0:
                    yield Item(number, i, key, size, place, depth / task.depths, images)


def window_of(task: Task, item: Item) -> tuple[Sample, list[str | int]]:
    """What is shown, and which images of the sample these are: their names where the importer recorded them, else their numbers. Raises
    DataError for a sample that cannot be shown so."""
    sample = task.dataset.read(item.index)
    window = sample if item.size is None else window_of_size(sample, item.size, task.questions)
    if item.place is not None:
        try:
            window = needle_at(window, item.place)
        except DataError as error:
            raise error.at(sample.origin) from None
    number = {id(image): i for i, image in enumerate(sample.images)}
    names = sample.meta.get("image_paths") or []
    shown = [number[id(image)] for image in window.images]
    return window, [names[i] for i in shown] if len(names) == len(sample.images) else shown


def questions_of(task: Task, item: Item, window: Sample, shown: list[str | int]) -> list[tuple[int, Answer]]:
    """(turn number, answer without what is said) of each question of a window."""
    asked = [number for number, turn in enumerate(window.turns) if turn.role == "user"]
    return [
        (turn, _answer(task, item, window, shown, number, len(asked), window.turns[turn], window.turns[turn + 1].text))
        for number, turn in enumerate(asked)
    ]


def _answer(
    task: Task, item: Item, window: Sample, shown: list[str | int], number: int, questions: int, question: Turn, expected: str
) -> Answer:
    text = question.text if window.images or not num_pieces(window) else str(question.segments[-1])
    return {
        "model": None,
        "task": task.name,
        "benchmark": task.benchmark,
        "key": item.key,
        "cluster": item.key,
        "window_size": item.size,
        "needle_at": item.depth,
        "question_index": number,
        "questions": questions,
        "size": num_pieces(window),
        "depth": item.depth if item.depth is not None else _depth(window, question),
        "question": text if len(text) <= MOST_CHARACTERS else f"...{text[-MOST_CHARACTERS:]}",
        "shown": shown,
        "expected": _expected(window.meta, expected),
        "choices": list(question.choices) or None,
        "said": None,
        "said_choice": None,
        "ended": None,
        "meta": kept(window.meta),
    } | ({} if task.unit == "images" else {"unit": task.unit})


def _depth(window: Sample, question: Turn) -> float | None:
    """Where the needle lies, from 0 to 1: as the benchmark's entry says (the mean of several), else by the place of the one image."""
    told = (window.meta.get("mm_niah") or {}).get("meta", {}).get("placed_depth")
    told = told if isinstance(told, list) else [] if told is None else [told]
    if told:
        return round(sum(told) / len(told), 6)
    return round(question.needles[0] / num_pieces(window), 6) if len(question.needles) == 1 else None


def _expected(meta: Mapping[str, Any], answer: str) -> list[str]:
    """The texts that are right: MMLongBench accepts any of a list, but for documents, where a list is one answer."""
    entry = meta.get("mmlongbench") or {}
    told = [] if "answer_format" in entry else entry.get("answer")
    return list(told) if isinstance(told, list) and told and all(isinstance(text, str) for text in told) else [answer]


def task_samples(task: Task) -> Haystacks:
    """The samples that are asked."""
    return read_haystacks(task.dataset, task.samples)
