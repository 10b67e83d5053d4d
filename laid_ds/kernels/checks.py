"""The checks at the door of the kernels: a ValueError names the argument, its value and what was expected."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_tensor(name: str, x: Tensor, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """Refuse a tensor of another shape (None: any size), dtype or device."""
    if x.ndim != len(shape) or any(want not in (None, have) for have, want in zip(x.shape, shape, strict=True)):
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {tuple('any' if n is None else n for n in shape)}")
    if x.dtype not in dtypes:
        raise ValueError(f"{name} is {x.dtype}: expected {' or '.join(map(str, dtypes))}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}: expected {device}, where student_query or query is")


def check_attention(prefix: str, query: Tensor, key: Tensor, batch: int, tokens: int, keys: int, device: torch.device) -> None:
    """Refuse query, key that are not [B, H, T, D] and [B, K, S, D] with K dividing H."""
    check_tensor(f"{prefix}query", query, (batch, None, tokens, None), FLOATS, device)
    check_tensor(f"{prefix}key", key, (batch, None, keys, query.shape[3]), FLOATS, device)
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"{prefix}key has {key.shape[1]} heads: expected a divisor of {prefix}query's {query.shape[1]}")


def check_positive(name: str, value: float | None) -> None:
    """Refuse a number that is not finite and positive; None passes."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}: expected a positive number")


def check_rows(
    query: Tensor, keys: int, query_offset: int, segments: Tensor | None, row_mask: Tensor | None, positions: Tensor | None
) -> None:
    """Refuse an offset, segments, row mask or positions that do not fit query [B, H, T, D] and `keys` keys."""
    batch, _, tokens, _ = query.shape
    if not 0 <= query_offset <= keys - tokens:
        raise ValueError(
            f"query_offset is {query_offset}: expected 0 to {keys - tokens}, since each of {tokens} rows has its own among {keys} keys"
        )
    if segments is not None:
        check_segments(segments, batch, keys, query.device)
    if row_mask is not None:
        check_tensor("row_mask", row_mask, (batch, tokens), (torch.bool,), query.device)
    if positions is not None:
        check_tensor("positions", positions, (batch, keys), (torch.int64,), query.device)


def check_segments(segments: Tensor, batch: int, keys: int, device: torch.device) -> None:
    """Segments [B, S] are runs of ids >= 0 that grow along the keys, with -1 (padding) before, between or after them, never inside one."""
    check_tensor("segments", segments, (batch, keys), (torch.int64,), device)
    segments = segments.cpu()
    if (segments < -1).any():
        raise ValueError(f"segments holds {int(segments.min())}: expected ids >= 0, or -1 for padding")
    none = segments.new_full((batch, 1), -1)
    before = torch.cat([none, segments[:, :-1]], 1)
    highest = torch.cat([none, segments.cummax(1).values[:, :-1]], 1)
    broken = ((segments >= 0) & (segments != before) & (segments <= highest)).nonzero()
    if len(broken):
        b, n = broken[0].tolist()
        raise ValueError(
            f"segments[{b}, {n}] is {int(segments[b, n])} after {int(before[b, n])}: expected ids sorted along the keys, "
            "each segment in one run without padding inside"
        )
