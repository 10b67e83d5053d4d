"""What changes over a run, as pure functions of the step. Nothing here is stored, so nothing here can be resumed wrongly."""

from __future__ import annotations

import math

from laid_ds.config import Data, Match, Optimizer
from laid_ds.kernels.attention_matching import Omega


def learning_rate_factor(step: int, steps: int, optimizer: Optimizer) -> float:
    """Factor on every group's learning rate at `step` (0-based): linear warm-up, then cosine to 0 or constant."""
    warmup = min(1.0, (step + 1) / optimizer.warmup_steps) if optimizer.warmup_steps else 1.0
    decay = 0.5 * (1 + math.cos(math.pi * step / steps)) if optimizer.decay == "cosine" else 1.0
    return warmup * decay


def progress(step: int, steps: int) -> float:
    """Training progress tau in [0, 1] at `step` (0-based)."""
    return step / max(1, steps - 1)


def omega(tau: float, match: Match) -> Omega:
    """The distance weight at progress tau (method: progressive matching; ours, the paper gives no formula).

    `frontier`: the far edge of the emphasised region moves from frontier_tokens[0] to frontier_tokens[1].
    `power`: the exponent ramps from 0 to alpha. `uniform`: the control.
    """
    near, far = match.frontier_tokens
    return Omega(
        kind=match.omega,
        gamma=match.gamma,
        frontier=near + tau * (far - near),
        width=match.width_tokens,
        delta_0=match.delta_tokens,
        alpha=tau * match.alpha,
    )


def image_range(step: int, steps: int, data: Data) -> tuple[int, int] | None:
    """The [least, most] images of the windows of `step`; the upper end grows geometrically when data.grow_from is set."""
    if data.images is None or data.grow_from is None:
        return data.images
    least, most = data.images
    share = min(1.0, step / (data.grow_until * steps))
    return least, round(data.grow_from * (most / data.grow_from) ** share)
