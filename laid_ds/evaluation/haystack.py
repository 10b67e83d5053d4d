"""Ask a stock model about haystacks of growing size, and keep every answer.

A window of N images is drawn from each test sample, the same for every model, and its questions are asked as turns. An answer counts when
the model's greedy reply is exactly the true answer and its end mark; earlier turns hold their true answers. For replies of a few tokens
this is what `generate` would give, in one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from laid_ds.data.batch import Batch, collate
from laid_ds.data.dataset import Dataset
from laid_ds.data.haystack import draw_window
from laid_ds.data.record import Sample
from laid_ds.models.attention import last_hidden_state
from laid_ds.models.load import PreTrainedModel
from laid_ds.models.processor import Renderer

Answers = dict[str, dict[str, list[list[int]]]]


@torch.no_grad()
def ask(
    model: PreTrainedModel,
    renderer: Renderer,
    samples: Sequence[Sample],
    sizes: Sequence[int],
    questions: int,
    tokens_per_batch: int = 16384,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, list[list[int]]]:
    """Size -> for each haystack, 1 or 0 for each question (fewer than `questions` where the window is smaller than that)."""
    results: dict[str, list[list[int]]] = {}
    for size in sizes:
        windows = [draw_window(sample, size, questions, ("evaluation", size, sample.key)) for sample in samples]
        rows = [renderer(window) for window in windows]
        answers: list[list[int]] = []
        for part in _by_tokens([len(row.supervised) for row in rows], tokens_per_batch):
            batch = collate(rows[part], [window.key for window in windows[part]], renderer.processor.tokenizer.pad_token_id)
            answers += _correct(model, batch.to(model.device))
        results[str(size)] = answers
        tick()
    return results


def read_haystacks(dataset: Dataset, haystacks: int) -> list[Sample]:
    """The first samples of a data set. Raises ValueError when it has too few."""
    if haystacks > len(dataset):
        raise ValueError(f"{haystacks} haystacks asked for, the data set has {len(dataset)}")
    return [dataset.read(i) for i in range(haystacks)]


def choices_of(dataset: Dataset) -> int:
    """The number of choices that the data set's questions offer; chance is 1 / this. Raises ValueError when they differ."""
    counts = {len(turn.choices) for turn in dataset.read(0).turns if turn.role == "user"}
    if len(counts) != 1 or min(counts) < 2:
        raise ValueError(f"questions offer {sorted(counts)} choices; the chance level needs one number of at least 2")
    return counts.pop()


def _correct(model: PreTrainedModel, batch: Batch) -> list[list[int]]:
    """For each row, 1 or 0 for each answer: all its tokens are the most likely ones."""
    hidden = last_hidden_state(model, **batch.inputs)
    right = torch.zeros_like(batch.supervised)
    right[batch.supervised] = model.get_output_embeddings()(hidden[batch.supervised]).argmax(-1) == batch.labels[batch.supervised]
    return [_spans(row, hit) for row, hit in zip(batch.supervised.cpu(), right.cpu(), strict=True)]


def _spans(supervised: Tensor, right: Tensor) -> list[int]:
    """1 or 0 for each run of supervised positions: 1 when all of it is right."""
    starts = torch.nonzero(supervised & ~supervised.roll(1)).flatten().tolist()
    ends = torch.nonzero(supervised & ~supervised.roll(-1)).flatten().tolist()
    return [int(right[start : end + 1].all()) for start, end in zip(starts, ends, strict=True)]


def _by_tokens(lengths: Sequence[int], limit: int) -> Iterator[slice]:
    """Consecutive slices whose padded size stays within the limit (one row at least)."""
    start = 0
    for stop in range(1, len(lengths) + 1):
        full = stop == len(lengths) or max(lengths[start : stop + 1]) * (stop + 1 - start) > limit
        if full:
            yield slice(start, stop)
            start = stop
