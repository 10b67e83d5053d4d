"""Samples become tensors: window, render, pad or pack. The last thing a data worker does.

Rows are padded on the right and attention is causal, so padding changes nothing and no mask exists. Or samples lie end to end in one row,
told apart by position ids that start again, and nothing is padded. Letters: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from laid_ds.data.haystack import check_planned, draw_window, evidence, images_drawn
from laid_ds.data.record import DataError, Sample

IGNORED = -100


class Rendered(Protocol):
    """One sample as tensors (models.processor.Rendered is one)."""

    tokens: Mapping[str, Tensor]
    """What the model reads of every token, each [T]: input_ids, and whatever else its family wants."""
    images: list[dict[str, Tensor]]
    """What the model reads of each image."""
    image_axis: int
    """Along which axis images follow each other."""
    shows: Tensor
    """[T]: the number of the image that a token belongs to, or -1."""
    supervised: Tensor
    """[T] bool: the tokens of the answers."""
    trailing: int
    """Tokens after the sample itself: a stand-in image where it has none."""
    positions: Tensor | None
    """[axes, T] position ids, where samples are to be packed."""


@dataclass(frozen=True)
class Heads:
    """What a recorded lesson shows of one of the teacher's layers; zeros at padding, and at rows that were not recorded."""

    query: Tensor
    """[B, heads, T, D]"""
    key: Tensor
    """[B, key heads, T, D]"""
    lse: Tensor | None
    """[B, heads, T] float32"""
    scale: float
    window: int | None
    heads: tuple[int, ...] | None
    """Which of the layer's query heads these are; None: all."""
    key_of: list[int]
    """The place of each head's key among the key heads."""

    def to(self, device: torch.device) -> Heads:
        lse = None if self.lse is None else self.lse.to(device)
        return replace(self, query=self.query.to(device), key=self.key.to(device), lse=lse)


@dataclass(frozen=True)
class Recorded:
    """The recorded lessons of a micro-batch (data/lessons.py)."""

    hidden: Tensor
    """[R, C]: the teacher's last hidden states of all answer rows."""
    heads: dict[int, Heads]

    def to(self, device: torch.device) -> Recorded:
        return Recorded(self.hidden.to(device), {layer: heads.to(device) for layer, heads in self.heads.items()})


@dataclass(frozen=True)
class Batch:
    """One micro-batch. `inputs` are the keyword arguments of the model's own forward."""

    inputs: dict[str, Tensor]
    labels: Tensor
    """[B, T]: the token that position t must predict, IGNORED where there is none (already shifted by one, within its sample)."""
    segments: Tensor
    """[B, T]: the number of the token's sample within its row, and -1 for padding and stand-in images."""
    keys: tuple[str, ...]
    num_images: int
    most_images: int = 0
    """Of one sample, stand-ins not counted."""
    taught: Batch | None = None
    """What the teacher reads, where that is not the same: other images, the same answers in the same order."""
    lesson: Recorded | None = None
    """What the teacher showed, where that was recorded."""

    @property
    def for_teacher(self) -> Batch:
        return self if self.taught is None else self.taught

    @property
    def supervised(self) -> Tensor:
        """[B, T] bool."""
        return self.labels != IGNORED

    def counts(self) -> dict[str, int]:
        """What the sums of this micro-batch are divided by, once per optimizer step; and its size with padding ("places"). Where the
        teacher reads other rows, their tokens, too."""
        counted = {"rows": int(self.supervised.sum()), "tokens": int((self.segments >= 0).sum()), "samples": len(self.keys)}
        taught = {} if self.taught is None else {"teacher_tokens": int((self.taught.segments >= 0).sum())}
        return counted | {"images": self.num_images, "places": self.segments.numel()} | taught

    def longest(self) -> dict[str, int]:
        """Tokens and images of the samples that have most of them."""
        tokens = max((int(row[row >= 0].bincount().max()) for row in self.segments if (row >= 0).any()), default=0)
        return {"longest_tokens": tokens, "most_images": self.most_images}

    def to(self, device: torch.device, but: Collection[str] = ()) -> Batch:
        """but: the inputs that stay where they are."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name in ("labels", "segments")}
        others = {"taught": self.taught and self.taught.to(device, but), "lesson": self.lesson and self.lesson.to(device)}
        inputs = {name: tensor if name in but else tensor.to(device) for name, tensor in self.inputs.items()}
        return replace(self, inputs=inputs, **others, **moved)


def collate(rendered: list[Rendered], keys: list[str], pad_token: int, multiple: int = 1) -> Batch:
    """Stack rendered samples into right-padded rows of a multiple of so many tokens."""

    def padded(rows: list[Tensor], value: int) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value)

    names = rendered[0].tokens
    tokens = {name: padded([r.tokens[name] for r in rendered], pad_token if name == "input_ids" else 0) for name in names}
    batch = Batch(
        inputs=tokens | _images([image for r in rendered for image in r.images], rendered[0].image_axis),
        labels=padded([_labels(r) for r in rendered], IGNORED),
        segments=padded([_segments(r, 0) for r in rendered], -1),
        keys=tuple(keys),
        num_images=sum(len(r.images) for r in rendered),
        most_images=_most_images(rendered),
    )
    return lengthened(batch, set(names), pad_token, multiple)


def collate_prompts(rendered: list[Rendered], pad_token: int) -> dict[str, Tensor]:
    """Inputs of `generate`: prompts that end together, each [B, T], with "attention_mask" (1: not padding), and the images of all."""
    longest = max(len(r.supervised) for r in rendered)

    def padded(rows: list[Tensor], value: int) -> Tensor:
        return torch.stack([F.pad(row, (longest - len(row), 0), value=value) for row in rows])

    names, images = rendered[0].tokens, [image for r in rendered for image in r.images]
    tokens = {name: padded([r.tokens[name] for r in rendered], pad_token if name == "input_ids" else 0) for name in names}
    tokens["attention_mask"] = padded([torch.ones_like(r.tokens["input_ids"]) for r in rendered], 0)
    return tokens | (_images(images, rendered[0].image_axis) if images else {})


def pack(rendered: list[Rendered], keys: list[str], pad_token: int = 0, multiple: int = 1) -> Batch:
    """Lay rendered samples end to end in one row of a multiple of so many tokens. A stand-in image stays only where the row would have no
    image at all, at its end."""
    if any(not r.trailing for r in rendered):
        rendered = [_without_stand_in(r) for r in rendered]
    else:
        rendered = [*(_without_stand_in(r) for r in rendered[:-1]), rendered[-1]]
    tokens = {name: torch.cat([r.tokens[name] for r in rendered])[None] for name in rendered[0].tokens}
    positions = torch.cat([r.positions for r in rendered], 1)
    tokens["position_ids"] = positions if len(positions) == 1 else positions[:, None]  # [1, T], or [axes, 1, T]
    batch = Batch(
        inputs=tokens | _images([image for r in rendered for image in r.images], rendered[0].image_axis),
        labels=torch.cat([_labels(r) for r in rendered])[None],
        segments=torch.cat([_segments(r, number) for number, r in enumerate(rendered)])[None],
        keys=tuple(keys),
        num_images=sum(len(r.images) for r in rendered),
        most_images=_most_images(rendered),
    )
    return lengthened(batch, set(tokens), pad_token, multiple)


def lengthened(batch: Batch, names: Collection[str], pad_token: int, multiple: int) -> Batch:
    """The batch with padding to a multiple of so many tokens; names: the inputs [.., T] that hold something of every token."""
    more = -batch.labels.shape[1] % multiple
    if not more:
        return batch

    def longer(name: str, x: Tensor) -> Tensor:
        if name == "position_ids":  # the last sample's go on: padding begins no sample
            return torch.cat([x, x[..., -1:] + torch.arange(1, more + 1)], -1)
        return F.pad(x, (0, more), value=pad_token if name == "input_ids" else 0)

    inputs = {name: longer(name, x) if name in names else x for name, x in batch.inputs.items()}
    labels, segments = F.pad(batch.labels, (0, more), value=IGNORED), F.pad(batch.segments, (0, more), value=-1)
    return replace(batch, inputs=inputs, labels=labels, segments=segments)


def _most_images(rendered: list[Rendered]) -> int:
    return max((len(r.images) for r in rendered if not r.trailing), default=0)


def _labels(r: Rendered) -> Tensor:
    answers = torch.where(r.supervised, r.tokens["input_ids"], IGNORED)
    return torch.cat([answers[1:], answers.new_full((1,), IGNORED)])


def _segments(r: Rendered, number: int) -> Tensor:
    segments = torch.full_like(r.supervised, number, dtype=torch.long)
    segments[len(segments) - r.trailing :] = -1
    return segments


def _without_stand_in(r: Rendered) -> Rendered:
    if not r.trailing:
        return r
    own = len(r.supervised) - r.trailing
    tokens = {name: row[:own] for name, row in r.tokens.items()}
    return replace(
        r, tokens=tokens, images=[], shows=r.shows[:own], supervised=r.supervised[:own], trailing=0, positions=r.positions[:, :own]
    )


def _images(images: list[dict[str, Tensor]], axis: int) -> dict[str, Tensor]:
    """The images one after the other; where their other sizes differ, zeros fill up."""
    return {name: _join([image[name] for image in images], axis) for name in images[0]}


def _join(tensors: list[Tensor], axis: int) -> Tensor:
    axis = min(axis, tensors[0].ndim - 1)
    largest = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]

    def padded(tensor: Tensor) -> Tensor:
        missing = [0 if k == axis else size - tensor.shape[k] for k, size in enumerate(largest)]
        return F.pad(tensor, [n for more in reversed(missing) for n in (0, more)]) if any(missing) else tensor

    return torch.cat([padded(tensor) for tensor in tensors], axis)


def render_named(render: Callable[[Sample], Rendered], sample: Sample) -> Rendered:
    """The sample as tensors. Any ValueError becomes a DataError with shard, key and offset."""
    try:
        return render(sample)
    except DataError as error:
        raise error.at(sample.origin) from None
    except ValueError as error:
        raise DataError(str(error), key=sample.key).at(sample.origin) from error
    except Exception as error:
        error.add_note(f"while rendering {sample.origin or sample.key}")
        raise


def _evidence_of(sample: Sample, distractors: int, seed: tuple[object, ...]) -> Sample:
    try:
        return evidence(sample, distractors, seed)
    except DataError as error:
        raise error.at(sample.origin) from None


@dataclass(frozen=True)
class Prepare:
    """From (position, sample) pairs to a Batch, or from one list of such pairs, a pack; runs in a data worker. All randomness follows from
    (seed, position)."""

    render: Callable[[Sample], Rendered]
    pad_token: int
    seed: int = 0
    global_batch: int = 1
    """Samples per optimizer step over all ranks: position // global_batch is the step (without packing)."""
    image_range: Callable[[int], tuple[int, int] | None] = lambda step: None
    questions: int | None = None
    packs: bool = False
    """Whether items are packs: one list of pairs, to lie in one row."""
    distractors: int | None = None
    """Images beside the needles in what the teacher reads; None: it reads what the student reads."""
    lessons: Callable[[list[int], Batch], Recorded] | None = None
    """What the teacher showed of the samples at these positions."""
    multiple: int = 1
    """Rows are padded to a multiple of so many tokens."""

    def __call__(self, items: list) -> Batch:
        batch = self.batch(self.windows(items))
        return batch if self.lessons is None else replace(batch, lesson=self.lessons(self.positions(items), batch))

    def positions(self, items: list) -> list[int]:
        """Of each sample of the batch, in the stream."""
        return [position for position, _ in self._pairs(items)]

    def windows(self, items: list) -> list[Sample]:
        """The samples as they are to be seen."""
        return [self._window(position, sample) for position, sample in self._pairs(items)]

    def _pairs(self, items: list) -> list[tuple[int, Sample]]:
        return [pair for packed in items for pair in packed] if self.packs else items

    def batch(self, samples: list[Sample]) -> Batch:
        """The tensors of these samples: padded rows, or one row; and those of what the teacher reads, if it reads something else."""
        batch = self._laid(samples)
        return batch if self.distractors is None else replace(batch, taught=self._evidence(samples, batch))

    def _laid(self, samples: list[Sample]) -> Batch:
        rendered, keys = [render_named(self.render, sample) for sample in samples], [sample.key for sample in samples]
        return (pack if self.packs else collate)(rendered, keys, self.pad_token, self.multiple)

    def _evidence(self, samples: list[Sample], batch: Batch) -> Batch:
        """The same turns beside their needles. Raises DataError where the answers would not be the same tokens."""
        found = [_evidence_of(sample, self.distractors, ("evidence", self.seed, sample.key)) for sample in samples]
        taught = self._laid(found)
        if not torch.equal(batch.labels[batch.supervised], taught.labels[taught.supervised]):
            raise DataError(
                f"beside fewer images the chat template writes other answers of {', '.join(batch.keys)}: leave out teacher.sees"
            )
        return taught

    def _window(self, position: int, sample: Sample) -> Sample:
        bounds = self.image_range(position // self.global_batch)
        if bounds is None:
            return sample
        images = images_drawn(self.seed, position, bounds)
        window = draw_window(sample, images, self.questions, (self.seed, position))
        if self.packs:
            check_planned(window, sample, images)
        return window
