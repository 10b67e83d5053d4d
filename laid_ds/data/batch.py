"""Samples become tensors: window, render, pad. The last thing a data worker does.

Rows are padded on the right and attention is causal, so padding changes nothing and no mask exists. Letters: B rows, T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from laid_ds.data.haystack import draw_window
from laid_ds.data.record import DataError, Sample

IGNORED = -100


class Rendered(Protocol):
    """One sample as tensors (models.processor.Rendered is one)."""

    input_ids: Tensor  # [T]
    token_types: Tensor  # [T] 0 text, 1 image
    supervised: Tensor  # [T] bool: the tokens of the answers
    pixel_values: Tensor  # [patches, values]
    image_grid_thw: Tensor  # [images, 3]
    trailing: int  # tokens after the sample itself: a stand-in image where it has none


@dataclass(frozen=True)
class Batch:
    """One micro-batch. `inputs` are the keyword arguments of the model's own forward."""

    inputs: dict[str, Tensor]
    labels: Tensor
    """[B, T]: the token that position t must predict, IGNORED where there is none (already shifted by one)."""
    segments: Tensor
    """[B, T]: 0, and -1 for padding."""
    keys: tuple[str, ...]

    @property
    def supervised(self) -> Tensor:
        """[B, T] bool."""
        return self.labels != IGNORED

    def counts(self) -> dict[str, int]:
        """What the sums of this micro-batch are divided by, once per optimizer step."""
        return {"rows": int(self.supervised.sum()), "tokens": int((self.segments >= 0).sum()), "samples": len(self.keys)}

    def images(self) -> int:
        return len(self.inputs["image_grid_thw"])

    def to(self, device: torch.device) -> Batch:
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name in ("labels", "segments")}
        return replace(self, inputs={name: tensor.to(device) for name, tensor in self.inputs.items()}, **moved)


def collate(rendered: list[Rendered], keys: list[str], pad_token: int) -> Batch:
    """Stack rendered samples into right-padded rows."""

    def padded(rows: list[Tensor], value: int) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value)

    labels = [torch.where(r.supervised, r.input_ids, IGNORED) for r in rendered]
    segments = [torch.zeros_like(r.input_ids) for r in rendered]
    for row, r in zip(segments, rendered, strict=True):
        row[len(row) - r.trailing :] = -1
    return Batch(
        inputs={
            "input_ids": padded([r.input_ids for r in rendered], pad_token),
            "mm_token_type_ids": padded([r.token_types for r in rendered], 0),
            "pixel_values": torch.cat([r.pixel_values for r in rendered]),
            "image_grid_thw": torch.cat([r.image_grid_thw for r in rendered]),
        },
        labels=padded([torch.cat([row[1:], row.new_full((1,), IGNORED)]) for row in labels], IGNORED),
        segments=padded(segments, -1),
        keys=tuple(keys),
    )


@dataclass(frozen=True)
class Prepare:
    """From (position, sample) pairs to a Batch; runs in a data worker. All randomness follows from (seed, position)."""

    render: Callable[[Sample], Rendered]
    pad_token: int
    seed: int = 0
    global_batch: int = 1
    """Samples per optimizer step over all ranks: position // global_batch is the step."""
    image_range: Callable[[int], tuple[int, int] | None] = lambda step: None
    questions: int | None = None

    def __call__(self, items: list[tuple[int, Sample]]) -> Batch:
        samples = [self._window(position, sample) for position, sample in items]
        return collate([self._rendered(sample) for sample in samples], [sample.key for sample in samples], self.pad_token)

    def _window(self, position: int, sample: Sample) -> Sample:
        bounds = self.image_range(position // self.global_batch)
        if bounds is None:
            return sample
        images = random.Random(f"images {self.seed} {position}").randint(*bounds)
        return draw_window(sample, images, self.questions, (self.seed, position))

    def _rendered(self, sample: Sample) -> Rendered:
        try:
            return self.render(sample)
        except DataError as error:
            raise error.at(sample.origin) from None
        except ValueError as error:
            raise DataError(str(error), key=sample.key).at(sample.origin) from error
