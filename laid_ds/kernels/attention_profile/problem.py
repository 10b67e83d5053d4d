"""What every implementation of the attention profile is given, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """One layer's attention and what to measure on it."""

    query: Tensor  # [B, H, T, D]
    key: Tensor  # [B, K, S, D]
    scale: float
    first: Tensor  # [B, T] int64 on the CPU: row t sees the keys first .. t + query_offset
    weight: Tensor  # [B, T] float64 on the CPU: 0 for rows that do not take part
    query_offset: int
    positions: Tensor | None  # [B, S] int64
    lse: Tensor | None  # [B, H, T]
    bins: Tensor  # [E] int64: lower edges
    far: int
    planes: Tensor | None  # [P, 2] int64
    marked: Tensor | None  # [B, S] bool

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return torch.float64 if self.query.dtype is torch.float64 else torch.float32


@dataclass(frozen=True)
class Profile:
    """Sums over the rows that take part, each times its weight (1, or its stratum's size when sampled): divide by `row_count` or by pairs.

    A pair is a counted row and a key that it sees; `bin_mass / bin_pairs` is the mean mass per key at a distance.
    """

    row_count: int
    lse: Tensor  # [B, H, T] log-sum-exp of the scaled scores; NaN for rows that do not take part
    entropy: Tensor  # [B, H, T] in nats; NaN likewise
    entropy_sum: Tensor  # [H] float64, as all below
    bins: Tensor  # [E] int64: bin e holds the distances bins[e] <= delta < bins[e + 1], the last one all above
    bin_mass: Tensor  # [H, E]
    bin_pairs: Tensor  # [E]
    far_mass: Tensor  # [H] mass at distances >= far
    far_pairs: Tensor  # []
    plane_response: Tensor | None  # [H, P] sum over far pairs of |the plane's part of the scaled score|
    marked_mass: Tensor | None  # [H] mass on marked keys
