"""Ask a stock model about haystacks of growing size, and keep every answer.

A window of N images is drawn from each test sample, the same for every model, and its questions are asked as turns. An answer counts when
the model's greedy reply is exactly the true answer and its end mark; earlier turns hold their true answers. For replies of a few tokens
this is what `generate` would give, in one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laid_ds.data.batch import Batch, Rendered, collate, render_named
from laid_ds.data.dataset import Dataset
from laid_ds.data.haystack import draw_window, most_needed, why_whole
from laid_ds.data.record import DataError, Record, Sample, Turn
from laid_ds.evaluation.window import notes_on
from laid_ds.models.attention import last_hidden_state
from laid_ds.models.load import PreTrainedModel
from laid_ds.models.processor import Renderer

Answers = dict[str, dict[str, list[list[int]]]]
Row = tuple[Sample, Rendered]


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
    choices: int
    """That each question offers; chance is 1 / this."""


@torch.no_grad()
def ask(
    model: PreTrainedModel,
    renderer: Renderer,
    samples: Sequence[Sample],
    sizes: Sequence[int],
    questions: int,
    tokens_per_batch: int = 16384,
    tick: Callable[[int, int], None] = lambda size, answered: None,
) -> dict[str, list[list[int]]]:
    """Size -> for each haystack, 1 or 0 for each question (fewer than `questions` where the window is smaller than that).

    One batch of at most `tokens_per_batch` padded tokens, or of one haystack, is in memory at a time, and one haystack beyond it.
    tick: is told the size and how many more haystacks have answered. Raises DataError for a haystack that cannot be shown at a size.
    """
    results: dict[str, list[list[int]]] = {}
    for size in sizes:
        answers = results[str(size)] = []
        rows = _rows(renderer, samples, size, questions)
        for part in _by_tokens(rows, tokens_per_batch):
            asked = [_number_of_questions(window) for window, _ in part]
            batch = collate([row for _, row in part], [window.key for window, _ in part], renderer.processor.tokenizer.pad_token_id)
            part.clear()  # the batch holds copies of the pixels
            found = _correct(model, batch.to(model.device))
            for key, number, hits in zip(batch.keys, asked, found, strict=True):
                if len(hits) != number:
                    raise DataError(f"{number} questions were asked, and the rendered text holds {len(hits)} answers", key=key)
            answers += found
            tick(size, len(found))
            del batch
    return results


def window_of_size(sample: Sample, size: int, questions: int) -> Sample:
    """The window that every model is shown. Raises DataError when the sample has none of this size."""
    window = draw_window(sample, size, questions, ("evaluation", size, sample.key))
    if len(window.images) != size:
        raise DataError(f"asked for {size} images, but the haystack {_misfit(sample, size)}", key=sample.key).at(sample.origin)
    return window


def _rows(renderer: Renderer, samples: Iterable[Sample], size: int, questions: int) -> Iterator[Row]:
    for sample in samples:
        window = window_of_size(sample, size, questions)
        yield window, render_named(renderer, window)


def read_haystacks(dataset: Dataset, haystacks: int) -> Haystacks:
    """The first samples of a data set. Raises ValueError when it has too few."""
    if haystacks > len(dataset):
        raise ValueError(f"{haystacks} haystacks asked for, the data set has {len(dataset)}")
    return Haystacks(dataset, range(haystacks))


def survey(dataset: Dataset, haystacks: int, sizes: Sequence[int]) -> Survey:
    """What the first samples of a data set can be asked, by their records alone.

    A size counts only if all of them can show it: else its accuracy would be over other haystacks, or over other questions, than those of
    the other sizes. Raises ValueError when no size is left, when a question cannot be scored, and when numbers of choices differ.
    """
    read_haystacks(dataset, haystacks)
    records = {dataset.keys[i].decode(): dataset.record(i) for i in range(haystacks)}
    choices = {key: _choices(key, record) for key, record in records.items()}
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
    total, whole = len(sample.images), why_whole(sample)
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


def _number_of_questions(sample: Sample) -> int:
    return sum(turn.role == "user" for turn in sample.turns)


def _correct(model: PreTrainedModel, batch: Batch) -> list[list[int]]:
    """For each row, 1 or 0 for each answer: all its tokens are the most likely ones. Raises ValueError when the model computes NaN."""
    hidden = last_hidden_state(model, **batch.inputs)
    right = torch.zeros_like(batch.supervised)
    likeliest = model.get_output_embeddings()(hidden[batch.supervised]).max(-1)
    if not likeliest.values.isfinite().all():
        raise ValueError(f"the model gives numbers that are not finite for the answers of {', '.join(batch.keys)}; its weights are broken")
    right[batch.supervised] = likeliest.indices == batch.labels[batch.supervised]
    return [_spans(row, hit) for row, hit in zip(batch.supervised.cpu(), right.cpu(), strict=True)]


def _spans(supervised: Tensor, right: Tensor) -> list[int]:
    """1 or 0 for each run of supervised positions: 1 when all of it is right."""
    starts = torch.nonzero(supervised & ~supervised.roll(1)).flatten().tolist()
    ends = torch.nonzero(supervised & ~supervised.roll(-1)).flatten().tolist()
    return [int(right[start : end + 1].all()) for start, end in zip(starts, ends, strict=True)]


def _by_tokens(rows: Iterable[Row], limit: int) -> Iterator[list[Row]]:
    """Consecutive rows whose padded size stays within the limit (one row at least). A list is the caller's, to empty as soon as it can."""
    part: list[Row] = []
    longest = 0
    for window, row in rows:
        longest = max(longest, len(row.supervised))
        if part and longest * (len(part) + 1) > limit:
            yield part
            part, longest = [], len(row.supervised)
        part.append((window, row))
        del window, row  # what is in the list alone goes with it
    if part:
        yield part
