"""The mask function `laid`: SDPA's masks, or the bounds of the samples where these say all (backends.is_bounds)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.masking_utils import sdpa_mask

from laid_ds.models.family import DECODERS

_packed: ContextVar[bool] = ContextVar("packed", default=False)


@contextmanager
def packed_rows() -> Iterator[None]:
    """Inside the block, models under `laid` take position ids that start again as borders between samples, and make no mask."""
    token = _packed.set(True)
    try:
        yield
    finally:
        _packed.reset(token)


_whole: ContextVar[bool] = ContextVar("whole", default=False)


@contextmanager
def unpadded_rows(plain: bool) -> Iterator[None]:
    """Inside the block no row is padded before its end; plain: whether what attends there can do without dense masks then."""
    token = _whole.set(plain)
    try:
        yield
    finally:
        _whole.reset(token)


@dataclass(frozen=True)
class Cut:
    """The whole rows of which a decoder computes this rank's tokens."""

    bounds: Tensor
    packed: bool
    """Whether they hold several samples each."""


_cut: ContextVar[Cut | None] = ContextVar("cut", default=None)


@contextmanager
def cut_masks(inputs: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block a decoder computes a part of the rows of these inputs, and its masks are those of the whole rows."""
    (batch, tokens), positions = inputs["input_ids"].shape, inputs.get("position_ids")
    starts = torch.zeros(batch, tokens, dtype=torch.bool)
    if positions is not None:
        counted = (positions if positions.ndim == 2 else positions[0]).cpu()
        starts[:, 1:] = counted.diff(dim=1) != 1
    starts[:, 0] = True
    bounds = torch.cat([starts.flatten().nonzero().flatten(), torch.tensor([batch * tokens])]).int()
    token = _cut.set(Cut(bounds, positions is not None))
    try:
        yield
    finally:
        _cut.reset(token)


def laid_mask(
    *, batch_size: int, q_length: int, mask_function: Callable[..., Tensor], device: torch.device, **kwargs: Any
) -> Tensor | None:
    """transformers' mask interface: SDPA's mask or, inside `packed_rows` and for sliding windows on CUDA or inside `whole_rows`, the bounds
    of the samples.

    A token that does not see the one before it begins a sample. Of rows that ranks share, the decoder sees too little to tell: there the
    mask is known beforehand (cut_masks).
    """
    if (cut := _cut.get()) is not None:
        return cut.bounds if cut.packed or kwargs.get("local_size") is not None else None
    if _whole.get():
        kwargs["attention_mask"] = None
    if not (_packed.get() or ((device.type == "cuda" or _whole.get()) and _is_plain_window(q_length, **kwargs))):
        return sdpa_mask(batch_size=batch_size, q_length=q_length, mask_function=mask_function, device=device, **kwargs)
    row, token = torch.arange(batch_size, device=device)[:, None], torch.arange(1, q_length, device=device)[None]
    follows = mask_function(row, torch.zeros_like(row), token, token - 1).expand(batch_size, -1)
    starts = torch.cat([torch.ones_like(row, dtype=torch.bool), ~follows], 1).flatten().nonzero().flatten()
    return torch.cat([starts.cpu(), torch.tensor([batch_size * q_length])]).int()


def _is_plain_window(
    q_length: int,
    config: PretrainedConfig,
    kv_length: int,
    local_size: int | None = None,
    attention_mask: Tensor | None = None,
    **rest: Any,
) -> bool:
    """A sliding window over whole rows, no padding, cache or dropout, of a decoder in which every row sees one run of keys."""
    known = DECODERS.get(config.model_type)
    plain = attention_mask is None and kv_length == q_length and not getattr(config, "attention_dropout", 0.0)
    return local_size is not None and plain and known is not None and known.packable
