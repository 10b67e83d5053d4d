"""RoPE response gain (ours): each rotary plane of each student head answers with a learned factor, which folds exactly into q_proj.

A plane's uniform scaling commutes with its rotation, so a factor g on the two coordinates of plane f of the rotated query is the same as
scaling the two rows of the query projection that make them. Letters: H query heads, P rotary planes, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

BOUND = 4.0  # 1/4 < g < 4


def gain(theta: Tensor) -> Tensor:
    """g = exp(b tanh(theta / b)) with b = ln 4: 1 at theta = 0 with slope 1, and always inside (1/4, 4). theta [H, P] -> g [H, P]."""
    bound = math.log(BOUND)
    return torch.exp(bound * torch.tanh(theta.float() / bound))


def apply_gain(query: Tensor, theta: Tensor) -> Tensor:
    """query [B, H, T, D] after RoPE in the half-split layout (plane f = coordinates f and f + P) -> the same times its planes' gains."""
    factor = _per_coordinate(gain(theta), query.shape[-1])
    return query * factor[None, :, None, :].to(query.dtype)


def responder(thetas: nn.ParameterDict, layer: int) -> Callable[[Tensor], Tensor]:
    """The gain of a layer as a function of its queries; the parameter is looked up at each call, as ZeRO-3 needs."""
    return lambda query: apply_gain(query, thetas[str(layer)])


@torch.no_grad()
def fold(attention: nn.Module, theta: Tensor) -> None:
    """Fold the gain into `attention.q_proj` (weight and bias), in fp32 and cast once. The module then needs no gain.

    Raises ValueError where nothing folds per head.
    """
    if getattr(attention, "q_norm", None) is not None:
        raise ValueError(f"{type(attention).__name__} normalises its queries after q_proj: a per-head gain does not fold there")
    projection: nn.Linear = attention.q_proj
    heads = theta.shape[0]
    factor = _per_coordinate(gain(theta), projection.weight.shape[0] // heads).reshape(-1)
    projection.weight.copy_((projection.weight.float() * factor[:, None]).to(projection.weight.dtype))
    if projection.bias is not None:
        projection.bias.copy_((projection.bias.float() * factor).to(projection.bias.dtype))


def _per_coordinate(g: Tensor, head_dim: int) -> Tensor:
    """[H, P] -> [H, D]: both coordinates of a plane get its factor; coordinates that do not rotate get 1."""
    heads, planes = g.shape
    return torch.cat([g, g, g.new_ones(heads, head_dim - 2 * planes)], -1)
