"""Haystacks of growing size: a window of N images is drawn from each test sample, the same for every model, at the sizes that all hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from laid_ds.data.dataset import Dataset
from laid_ds.data.haystack import draw_window, most_needed, why_whole
from laid_ds.data.record import DataError, Record, Sample, Turn, num_pieces
from laid_ds.evaluation.window import notes_on


class Haystacks(Sequence[Sample]):
    """Some samples of a data set, each read when it is asked for: together they may be larger than memory."""

    def __init__(self, dataset: Dataset, indices: Sequence[int]):
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Sample:
        return self.dataset.read(self.indices[i])


@dataclass(frozen=True)
class Survey:
    """What can be measured on a number of haystacks."""

    sizes: list[int]
    """Numbers of images that every one of the haystacks can show, with each of its questions."""
    left_out: dict[int, str]
    """The other sizes, and why not."""
    choices: int | None
    """That each question offers; chance is 1 / this. None where that was not asked."""


def window_of_size(sample: Sample, size: int, questions: int) -> Sample:
    """The window that every model is shown. Raises DataError when the sample has none of this size."""
    window = draw_window(sample, size, questions, ("evaluation", size, sample.key))
    if num_pieces(window) != size:
        raise DataError(f"asked for {size} images, but the haystack {_misfit(sample, size)}", key=sample.key).at(sample.origin)
    return window


def number_of(dataset: Dataset, asked: int | None, most: int) -> int:
    """How many haystacks are looked at: as many as were asked for, else `most`, or all of a smaller set."""
    return asked or min(most, len(dataset))


def read_haystacks(dataset: Dataset, haystacks: int) -> Haystacks:
    """The first samples of a data set. Raises ValueError when it has too few."""
    if haystacks > len(dataset):
        place = ", ".join(map(str, dataset.folders))
        raise ValueError(f"{haystacks} haystacks asked for, the data set {place} has {len(dataset)}")
    return Haystacks(dataset, range(haystacks))


def survey(dataset: Dataset, haystacks: int, sizes: Sequence[int], scored: bool = True) -> Survey:
    """What the first samples of a data set can be asked, by their records alone. scored: by the choices that every question offers.

    A size counts only if all of them can show it: else its accuracy would be over other haystacks, or over other questions, than those of
    the other sizes. Raises ValueError when no size is left, when a question cannot be scored, and when numbers of choices differ.
    """
    read_haystacks(dataset, haystacks)
    records = {dataset.keys[i].decode(): dataset.record(i) for i in range(haystacks)}
    choices = {key: _choices(key, record) if scored else None for key, record in records.items()}
    if len(set(choices.values())) > 1:
        fewest, most = min(choices, key=choices.get), max(choices, key=choices.get)
        raise ValueError(
            f"questions offer {choices[fewest]} choices in {fewest} and {choices[most]} in {most}; the chance level needs one number: "
            "put them into data sets of their own"
        )
    left_out = {size: reason for size in sizes if (reason := _why_left_out(records, size))}
    found = Survey([size for size in sizes if size not in left_out], left_out, next(iter(choices.values())))
    if not found.sizes:
        raise ValueError(f"nothing can be measured in {', '.join(map(str, dataset.folders))}: {'; '.join(notes_on(left_out))}")
    return found


def _why_left_out(records: dict[str, Record], size: int) -> str | None:
    misfits = {key: reason for key, record in records.items() if (reason := _misfit(record, size))}
    if not misfits:
        return None
    key, reason = next(iter(misfits.items()))
    return f"{len(misfits)} of {len(records)} haystacks do not allow it ({key} {reason})"


def _misfit(sample: Sample | Record, size: int) -> str | None:
    """Why a sample has no window of a size that may ask any of its questions."""
    total, whole = num_pieces(sample), why_whole(sample)
    if total < size:
        return f"has {total} images"
    if whole and total != size:
        return f"has {total} images, and none may be left out: it {whole}"
    if most_needed(sample) > size:
        return f"has a question that needs {most_needed(sample)} images"
    return None


def _choices(key: str, record: Record) -> int:
    """How many answers the questions of a record offer. Raises DataError when one offers none, has no answer, or another one."""
    counts = set()
    for number, turn in enumerate(record.turns):
        if turn.role == "user":
            answer = record.turns[number + 1] if number + 1 < len(record.turns) else None
            counts.add(_choices_of_question(key, turn, answer))
    if len(counts) != 1:
        raise DataError(f"its questions offer {sorted(counts) or 'no'} choices; the chance level needs one number", key=key)
    return counts.pop()


def _choices_of_question(key: str, question: Turn, answer: Turn | None) -> int:
    asked = " ".join(question.text.split())[-60:]
    if answer is None or answer.role != "assistant":
        raise DataError(f"the question {asked!r} has no answer; an evaluation needs one", key=key)
    if not answer.supervised:
        raise DataError(
            f"the answer to {asked!r} is marked as none to learn, and cannot be scored; mark it, or leave the sample out", key=key
        )
    offered = set(question.choices)
    if len(offered) < 2:
        raise DataError(f"the question {asked!r} offers no choices; the chance level needs at least 2", key=key)
    if answer.text not in offered:
        raise DataError(f"the answer {answer.text[:40]!r} to {asked!r} is none of its choices", key=key)
    return len(offered)
