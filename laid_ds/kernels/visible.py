"""Which keys a query row sees, and which rows take part.

Letters: B batch, T query rows, S keys. Row t is the token with key index `last = t + query_offset`. With causal attention, sliding
windows, packed segments and padding, the visible keys of a row are always one interval [first, last], so two numbers per row replace
every mask. All plans live on the CPU; they hold T numbers, never T x S.
"""

from __future__ import annotations

import torch
from torch import Tensor


def first_visible(batch: int, tokens: int, query_offset: int, segments: Tensor | None, window: int | None) -> Tensor:
    """The first key each row sees, [B, T] int64 on the CPU: the start of its segment or of its window of `window` keys."""
    last = torch.arange(tokens) + query_offset
    first = torch.zeros(batch, tokens, dtype=torch.long)
    if segments is not None:
        segments = segments.cpu()
        starts = torch.ones_like(segments, dtype=torch.bool)
        starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
        first = torch.where(starts, torch.arange(segments.shape[1]), 0).cummax(1).values[:, last]
    if window is not None:
        first = torch.maximum(first, last - window + 1)
    return first


def row_weights(
    batch: int,
    tokens: int,
    query_offset: int,
    segments: Tensor | None,
    row_mask: Tensor | None,
    rows: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, int]:
    """(weight [B, T] float64 on the CPU, number of counted rows).

    A counted row is one that `row_mask` keeps and that is not padding; its weight is 1, every other row's 0. With `rows` = n, each batch
    element's counted rows are cut into n strata of consecutive rows whose sizes differ by at most one, one row is drawn from each, and
    its weight is the stratum's size: the weighted sum over drawn rows is an unbiased estimate of the sum over all of them.
    """
    counted = torch.ones(batch, tokens, dtype=torch.bool)
    if segments is not None:
        counted &= segments.cpu()[:, query_offset : query_offset + tokens] >= 0
    if row_mask is not None:
        counted &= row_mask.cpu()
    count = int(counted.sum())
    if rows is None:
        return counted.double(), count
    weight = torch.zeros(batch, tokens, dtype=torch.double)
    for b in range(batch):
        index = counted[b].nonzero().flatten()
        strata = min(rows, len(index))
        edges = torch.arange(strata + 1) * len(index) // max(strata, 1)
        sizes = edges.diff()
        draw = torch.rand(strata, generator=generator, dtype=torch.double, device=generator.device if generator else None).cpu()
        weight[b, index[edges[:-1] + (draw * sizes).long()]] = sizes.double()
    return weight, count


def row_chunks(weight: Tensor, chunk_size: int) -> tuple[Tensor, ...]:
    """The rows of weight [T] that take part, in order, at most `chunk_size` at a time."""
    index = weight.nonzero().flatten()
    return index.split(chunk_size) if len(index) else ()


Hidden = list[tuple[slice, Tensor]]
"""Columns of a chunk's scores that some row does not see, and which entries of them [C, n] those are."""


def hidden(first: Tensor, last: Tensor, keys: slice, device: torch.device) -> Hidden:
    """Where the keys lie outside the [first, last] of a row ([C], CPU). For long causal rows that is among the last C columns."""
    seen_by_all = max(int(first.max()), keys.start), int(last.min()) + 1
    whole = seen_by_all[0] >= seen_by_all[1]
    spans = [(keys.start, keys.stop)] if whole else [(keys.start, seen_by_all[0]), (seen_by_all[1], keys.stop)]
    found = []
    for left, right in spans:
        if left < right:
            key = torch.arange(left, right)
            mask = (key < first[:, None]) | (key > last[:, None])
            found.append((slice(left - keys.start, right - keys.start), mask.to(device)))
    return found


def hide_(scores: Tensor, where: Hidden, value: float) -> Tensor:
    """Write `value` in place where a row of scores [..., C, n] meets a hidden key."""
    for columns, mask in where:
        scores[..., columns].masked_fill_(mask, value)
    return scores
