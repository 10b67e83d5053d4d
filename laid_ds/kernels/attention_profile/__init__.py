"""Attention statistics of one layer, streamed: log-sum-exp, entropy, mass by distance, and how far rotary planes answer.

The definition is in README.md and, as code, in reference.py; chunked.py and fused.py compute the same without holding an attention map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laid_ds.kernels import checks
from laid_ds.kernels.attention_profile.problem import Problem, Profile
from laid_ds.kernels.attention_profile.trial import trial_of
from laid_ds.kernels.switch import choose, exactly_on
from laid_ds.kernels.visible import first_visible, row_weights

__all__ = ["Profile", "attention_profile", "distance_bins"]


def distance_bins(longest: int, per_octave: int = 1) -> list[int]:
    """Lower edges of log-spaced distance bins up to `longest`: 0, 1, 2, 4, 8, ... or `per_octave` times finer where integers allow."""
    if longest < 0 or per_octave < 1:
        raise ValueError(f"longest is {longest}, per_octave is {per_octave}: expected at least 0 and 1")
    octaves = max(longest, 1).bit_length()
    edges = {round(2 ** (i / per_octave)) for i in range(octaves * per_octave)}
    return [0, *sorted(edge for edge in edges if edge <= longest)]


@torch.no_grad()
def attention_profile(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    bins: Sequence[int] | None = None,
    far: int | None = None,
    planes: Tensor | None = None,
    marked: Tensor | None = None,
    segments: Tensor | None = None,
    row_mask: Tensor | None = None,
    positions: Tensor | None = None,
    window: int | None = None,
    query_offset: int = 0,
    rows: int | None = None,
    generator: torch.Generator | None = None,
    lse: Tensor | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> Profile:
    """Profile of the causal attention of query [B, H, T, D] over key [B, K, S, D] (after RoPE), summed over the batch; no gradients.

    bins: lower edges of the distance bins, growing from 0 (default: `distance_bins` of the largest possible token distance).
    far: the distance from which mass is far and plane responses are taken (default: half the largest possible token distance).
    planes [P, 2] int64: the two coordinates of each rotary plane, for `plane_response`. marked [B, S] bool: keys for `marked_mass`.
    scale, segments, row_mask, positions, window, query_offset, rows, generator, lse, chunk_size, implementation: as in attention_matching.

    Raises ValueError naming the argument, its value and what was expected.
    """
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(f"query has shape {tuple(query.shape)}, key {tuple(key.shape)}: expected [B, H, T, D] and [B, K, S, D]")
    (batch, _, tokens, size), keys, device = query.shape, key.shape[2], query.device
    checks.check_attention("", query, key, batch, tokens, keys, device)
    checks.check_rows(query, keys, query_offset, segments, row_mask, positions)
    for name, value in {"scale": scale, "window": window, "rows": rows, "chunk_size": chunk_size}.items():
        checks.check_positive(name, value)
    bins = torch.tensor(distance_bins(keys - 1) if bins is None else list(bins), device=device)
    if bins.is_floating_point() or bins[:1].tolist() != [0] or not (bins.diff() > 0).all():
        raise ValueError(f"bins is {bins.tolist()}: expected integers growing from 0")
    if planes is not None:
        checks.check_tensor("planes", planes, (None, 2), (torch.int64,), device)
        if not (planes.min() >= 0 and planes.max() < size):
            raise ValueError(f"planes holds {int(planes.min())} to {int(planes.max())}: expected coordinates from 0 to {size - 1}")
    if marked is not None:
        checks.check_tensor("marked", marked, (batch, keys), (torch.bool,), device)
    if lse is not None:
        checks.check_tensor("lse", lse, query.shape[:3], (torch.float32, torch.float64), device)
    weight, count = row_weights(batch, tokens, query_offset, segments, row_mask, rows, generator)
    problem = Problem(
        query=query,
        key=key,
        scale=scale,
        first=first_visible(batch, tokens, query_offset, segments, window),
        weight=weight,
        query_offset=query_offset,
        positions=positions,
        lse=lse,
        bins=bins,
        far=(keys - 1) // 2 if far is None else far,
        planes=planes,
        marked=marked,
    )
    with exactly_on(device):
        return choose(__name__, "attention_profile", implementation, device, trial_of(problem))(problem, count, chunk_size)
