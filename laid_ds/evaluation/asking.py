"""Ask a model: rows are rendered ahead by workers, batched by tokens, and answered by generation or by teacher forcing.

Teacher forcing reads question and true answer in one forward pass. An answer counts when the most likely tokens are exactly the true ones
and their end mark, earlier turns holding their true answers: where that holds, `generate` says the same, and where it does not, something
else. Generation says what the model says by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from laid_ds.data.batch import IGNORED, Batch, Rendered, collate, collate_prompts, render_named
from laid_ds.data.record import DataError, Sample
from laid_ds.data.slabs import Sender, Slabs
from laid_ds.evaluation.haystack import window_of_size
from laid_ds.evaluation.tasks import FORCED, Answer, Group, Item, Task, questions_of, window_of
from laid_ds.models.attention import group_of, last_hidden_state, whole_rows
from laid_ds.models.generate import Reply, generate
from laid_ds.models.load import PreTrainedModel
from laid_ds.models.processor import Renderer
from laid_ds.models.shared_tower import WAITING
from laid_ds.runtime import distributed

AHEAD = 2  # items that a worker renders ahead
WAITING_ROWS = 16  # of a batch that is being filled: more of them are copied once more
TOKENS_PER_BATCH = 16384


@dataclass(frozen=True)
class Row:
    """One row of a batch: the answers that it will give, in their order."""

    group: Group
    answers: list[Answer]
    rendered: Rendered


@dataclass(frozen=True)
class Asker:
    """A model, how it is asked, and how its questions are rendered."""

    model: PreTrainedModel
    renderer: Renderer
    device: torch.device
    max_new_tokens: int = 64
    tokens_per_batch: int = TOKENS_PER_BATCH
    workers: int = 0
    """Processes that read and render ahead; 0: none, and one batch and one item beyond it are in memory."""
    in_step: bool = False
    """The model is sharded: every rank must make as many forward passes as any other."""


@torch.no_grad()
def ask_items(asker: Asker, tasks: Sequence[Task], items: Sequence[Item], spare: Item | None = None) -> Iterator[list[Answer]]:
    """The answers to all questions of the items, in their order, batch by batch.

    spare: with `in_step`, what a rank without items of its own asks, uncounted, while others have some (one that has run out repeats a
    row). All items are then of one task, and have images or have none: ranks that run other modules would wait for ever. Raises DataError
    for an item that cannot be read, shown or answered.
    """
    batches = by_tokens(rows_ahead(asker, tasks, items), asker.tokens_per_batch)
    last: list[Row] = []
    while True:
        part = next(batches, None)
        if asker.in_step:
            (busy,) = distributed.largest([float(part is not None)])
            if not busy:
                return
            last = part[:1] if part else last or [next(rows_ahead(replace(asker, workers=0), tasks, [spare]))]
        elif part is None:
            return
        forced = tasks[(part or last)[0].group[0]].mode == FORCED
        answered = (_force if forced else _generate)(asker, part or list(last))
        if part is not None:
            yield answered


def rows_ahead(asker: Asker, tasks: Sequence[Task], items: Sequence[Item]) -> Iterator[Row]:
    """The rows of the items, in their order."""

    def rows(item: Item) -> list[Row]:
        return _rows(asker.renderer, tasks[item.task], item)

    if not asker.workers:
        for item in items:
            yield from rows(item)
        return

    def attempt(item: Item) -> tuple[list[Row], DataError | None]:
        """An error is a value: raised in a worker it would lose its fields."""
        try:
            return rows(item), None
        except DataError as error:
            return [], error

    slabs = Slabs(asker.workers * AHEAD + WAITING_ROWS)
    loader = DataLoader(
        Sender(attempt, slabs.memory),
        batch_size=None,
        sampler=((item, slabs.take()) for item in items),
        num_workers=asker.workers,
        prefetch_factor=AHEAD,
        collate_fn=_unchanged,
        multiprocessing_context="fork",  # the slabs are shared by inheritance
        generator=torch.Generator(),  # the global one is left alone
    )
    for parcel in loader:
        found, error = slabs.open(parcel)
        if error is not None:
            raise error
        while found:
            yield found.pop(0)


def _rows(renderer: Renderer, task: Task, item: Item) -> list[Row]:
    """One row with all questions as turns, or one for each, after the true answers to those before it."""
    window, shown = window_of(task, item)
    asked = questions_of(task, item, window, shown)
    if task.mode == FORCED:
        return [Row(item.group, [answer for _, answer in asked], render_named(renderer, window))]
    prompts = [replace(window, turns=window.turns[: turn + 1]) for turn, _ in asked]
    return [Row(item.group, [answer], render_named(renderer.prompt, p)) for p, (_, answer) in zip(prompts, asked, strict=True)]


def by_tokens(rows: Iterable[Row], limit: int) -> Iterator[list[Row]]:
    """Consecutive rows of one group whose padded size stays within the limit (one row at least). A list is the caller's, to empty as soon
    as it can."""
    part: list[Row] = []
    longest = 0
    for row in rows:
        length = len(row.rendered.supervised)
        longest = max(longest, length)
        if part and (longest * (len(part) + 1) > limit or row.group != part[0].group):
            yield part
            part, longest = [], length
        part.append(row)
        del row  # what is in the list alone goes with it
    if part:
        yield part


def _force(asker: Asker, part: list[Row]) -> list[Answer]:
    answers, keys = [row.answers for row in part], [row.answers[0]["key"] for row in part]
    batch = collate([row.rendered for row in part], keys, asker.renderer.processor.tokenizer.pad_token_id)
    part.clear()  # the batch holds copies of the pixels
    found = force(asker.model, batch.to(asker.device))
    for key, asked, said in zip(keys, answers, found, strict=True):
        _check_number(key, len(asked), len(said))
    tokenizer = asker.renderer.processor.tokenizer
    told = [(answer, *reply) for asked, said in zip(answers, found, strict=True) for answer, reply in zip(asked, said, strict=True)]
    return [_forced_answer(answer, tokenizer.decode(ids, skip_special_tokens=True), right) for answer, ids, right in told]


def _forced_answer(answer: Answer, said: str, right: int) -> Answer:
    """A reply whose every token is right is the true answer; one that is not may still read like it (its end is missing)."""
    return _told(answer, answer["expected"][0] if right else said, bool(right)) | {"right": right}


def _generate(asker: Asker, part: list[Row]) -> list[Answer]:
    answers, tokenizer = [row.answers[0] for row in part], asker.renderer.processor.tokenizer
    inputs = collate_prompts([row.rendered for row in part], tokenizer.pad_token_id or 0)
    part.clear()
    inputs = {name: tensor.to(asker.device) for name, tensor in inputs.items()}
    replies: list[Reply] = generate(asker.model, tokenizer, inputs, asker.max_new_tokens, asker.in_step)
    return [
        _told(answer, reply.said, reply.ended) | {"right": int(reply.ended and reply.said.strip() in answer["expected"])}
        for answer, reply in zip(answers, replies, strict=True)
    ]


def _told(answer: Answer, said: str, ended: bool) -> Answer:
    choices = [choice.strip().lower() for choice in answer["choices"] or []]
    bare = said.strip().rstrip(".").lower()
    return answer | {"said": said, "said_choice": choices.index(bare) if bare in choices else None, "ended": ended}


def _check_number(key: str, asked: int, said: int) -> None:
    if asked != said:
        raise DataError(f"{asked} questions were asked, and the rendered text holds {said} answers", key=key)


def force(model: PreTrainedModel, batch: Batch) -> list[list[tuple[list[int], int]]]:
    """For each row, (the most likely tokens, 1 or 0: they are the true ones) for each answer. Raises ValueError when the model computes
    NaN."""
    with whole_rows(model):  # what is padded stands behind its end
        hidden = last_hidden_state(model, **batch.inputs)
    group = group_of(model)
    said = group.own(batch.labels, 1).clone()  # of this rank's tokens
    answers = said != IGNORED
    likeliest = model.get_output_embeddings()(hidden[answers]).max(-1)
    if group.add((~likeliest.values.isfinite()).sum()):
        raise ValueError(f"the model gives numbers that are not finite for the answers of {', '.join(batch.keys)}; its weights are broken")
    said[answers] = likeliest.indices
    said = group.whole(said, 1)
    rows = zip(batch.supervised.cpu(), said.cpu(), batch.labels.cpu(), strict=True)
    return [[(one[span].tolist(), int(torch.equal(one[span], true[span]))) for span in _spans(mask)] for mask, one, true in rows]


def _spans(supervised: Tensor) -> list[slice]:
    """The runs of supervised positions of a row."""
    starts = torch.nonzero(supervised & ~supervised.roll(1)).flatten().tolist()
    ends = torch.nonzero(supervised & ~supervised.roll(-1)).flatten().tolist()
    return [slice(start, end + 1) for start, end in zip(starts, ends, strict=True)]


@torch.no_grad()
def ask(
    model: PreTrainedModel,
    renderer: Renderer,
    samples: Sequence[Sample],
    sizes: Sequence[int],
    questions: int,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> dict[str, list[list[int]]]:
    """Size -> for each haystack, 1 or 0 for each question (fewer than `questions` where the window is smaller than that), by teacher
    forcing: what a run in training measures on its own model.

    One batch of at most `tokens_per_batch` padded tokens, or of one haystack, is in memory at a time, and one haystack beyond it.
    Raises DataError for a haystack that cannot be shown at a size.
    """
    results: dict[str, list[list[int]]] = {}
    for size in sizes:
        answers = results[str(size)] = []
        for part in by_tokens(_haystack_rows(renderer, samples, size, questions), tokens_per_batch):
            asked = [(row.answers[0]["key"], row.answers[0]["questions"]) for row in part]
            rows, pad_token = [row.rendered for row in part], renderer.processor.tokenizer.pad_token_id
            batch = collate(rows, [key for key, _ in asked], pad_token, group_of(model).multiple)
            del rows
            part.clear()  # the batch holds copies of the pixels
            batch = batch.to(model.device, WAITING if group_of(model).size > 1 else ())
            for (key, number), said in zip(asked, force(model, batch), strict=True):
                _check_number(key, number, len(said))
                answers.append([right for _, right in said])
            del batch
    return results


def _haystack_rows(renderer: Renderer, samples: Iterable[Sample], size: int, questions: int) -> Iterator[Row]:
    for sample in samples:
        window = window_of_size(sample, size, questions)
        number = sum(turn.role == "user" for turn in window.turns)
        yield Row((0, size, None), [{"key": window.key, "questions": number}], render_named(renderer, window))


def _unchanged(item: Any) -> Any:
    return item
