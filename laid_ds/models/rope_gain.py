"""RoPE response gain (ours): each rotary plane of the student's queries answers with a learned factor that folds exactly into weights.

A plane's uniform scaling commutes with its rotation, so a factor g on the two coordinates of plane f of the rotated query is the same as
scaling the weights that make these coordinates: rows of the query projection, one per head (theta [H, P]); or, where queries are normalised
before they rotate, the norm's weight, which all heads share (theta [1, P]). Letters: H query heads, P rotary planes, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from laid_ds.models.attention import attention_layers, attention_shape, rotary_planes
from laid_ds.models.family import family

BOUND = 4.0  # 1/4 < g < 4
NORMS = ("q_norm", "q_layernorm")  # names of a norm on the queries before they rotate
PROJECTIONS = ("q_proj", "qkv_proj")  # a fused projection has the queries' rows first


def gain(theta: Tensor) -> Tensor:
    """g = exp(b tanh(theta / b)) with b = ln 4: 1 at theta = 0 with slope 1, and always inside (1/4, 4). theta [H, P] -> g [H, P]."""
    bound = math.log(BOUND)
    return torch.exp(bound * torch.tanh(theta.float() / bound))


def apply_gain(query: Tensor, theta: Tensor, layout: str = "half") -> Tensor:
    """query [B, H, T, D] after RoPE -> the same times its planes' gains; theta [H, P], or [1, P] for all heads alike.

    layout: plane f is coordinates f and f + P ("half") or 2f and 2f + 1 ("interleaved").
    """
    factor = _per_coordinate(gain(theta), query.shape[-1], layout)
    return query * factor[None, :, None, :].to(query.dtype)


def responder(thetas: nn.ParameterDict, layer: int, layout: str = "half") -> Callable[[Tensor], Tensor]:
    """The gain of a layer as a function of its queries; the parameter is looked up at each call, as ZeRO-3 needs."""
    return lambda query: apply_gain(query, thetas[str(layer)], layout)


def gain_shapes(model: PreTrainedModel) -> dict[int, tuple[int, int]]:
    """Decoder layer -> shape of its theta: [H, P] where a gain folds per head, [1, P] where a layer's heads share it.

    Nothing is measured and no weight is read, so the model may be partitioned. Raises ValueError for an unknown family and where nothing
    folds.
    """
    expected = family(model.config)
    if expected.gain == "none":
        raise ValueError(f"a RoPE gain folds nowhere in {expected.model_type} ({expected.decoder}): set gain.enabled=false")
    rows = attention_shape(model.config)[0] if expected.gain == "head" else 1
    return {layer: (rows, rotary_planes(model, layer)) for layer in attention_layers(model)}


@torch.no_grad()
def fold(attention: nn.Module, theta: Tensor, layout: str = "half") -> None:
    """Fold the gain into the attention's own weights, in fp32 and cast once. The module then needs no gain.

    Raises ValueError where these weights cannot hold it: a norm that does not come before the rotation, or a gain per head where all
    heads share one norm.
    """
    norm = _query_norm(attention)
    if norm is not None:
        _fold_into_norm(attention, norm, gain(theta), layout)
    else:
        _fold_into_projection(attention, gain(theta), layout)


def norm_style(attention: nn.Module) -> str:
    """How the norm that a gain folds into uses its weight: "w" or "1+w"; "" where there is none."""
    children = dict(attention.named_children())
    norm = next((children[name] for name in NORMS if name in children), None)
    return "" if norm is None else "1+w" if _offset(norm) else "w"


def _query_norm(attention: nn.Module) -> nn.Module | None:
    """The norm on the queries before they rotate, or None. Raises ValueError for any other norm that touches the queries."""
    norms = {name: child for name, child in attention.named_children() if "norm" in name and not name.startswith(("k", "v"))}
    other = sorted(norms.keys() - set(NORMS))
    if other:
        raise ValueError(f"{type(attention).__name__}.{other[0]} has no weight for the queries alone: a gain does not fold there")
    return next(iter(norms.values()), None)


def _fold_into_norm(attention: nn.Module, norm: nn.Module, g: Tensor, layout: str) -> None:
    """Scale the norm's weight: [D], shared by the heads, or [H D], one stretch per head."""
    weight: nn.Parameter = norm.weight
    head_dim = attention.head_dim
    if g.shape[0] != weight.numel() // head_dim:
        raise ValueError(
            f"{type(attention).__name__} normalises its queries with {weight.numel()} weights for a head dim of {head_dim}: a gain with"
            f" {g.shape[0]} rows does not fold there"
        )
    factor = _per_coordinate(g, head_dim, layout).reshape(-1)
    offset = _offset(norm)
    weight.copy_(((weight.float() + offset) * factor - offset).to(weight.dtype))


@torch.no_grad()
def _offset(norm: nn.Module) -> float:
    """1 for a norm that multiplies by 1 + weight, 0 for one that multiplies by weight; measured, not read."""
    weight: nn.Parameter = norm.weight
    kept = weight.detach().clone()
    weight.zero_()
    silent = not norm(torch.ones(1, weight.numel(), dtype=weight.dtype, device=weight.device)).any()
    weight.copy_(kept)
    return 0.0 if silent else 1.0


def _fold_into_projection(attention: nn.Module, g: Tensor, layout: str) -> None:
    """Scale the queries' rows of the projection and of its bias."""
    found = [getattr(attention, name) for name in PROJECTIONS if hasattr(attention, name)]
    if not found:
        raise ValueError(f"{type(attention).__name__} has none of {PROJECTIONS}: a gain does not fold there")
    factor = _per_coordinate(g, attention.head_dim, layout).reshape(-1, 1)
    for tensor in (found[0].weight, found[0].bias):
        if tensor is not None:
            rows = tensor[: factor.shape[0]]
            rows.copy_((rows.float() * (factor if tensor.ndim == 2 else factor[:, 0])).to(tensor.dtype))


def _per_coordinate(g: Tensor, head_dim: int, layout: str) -> Tensor:
    """[H, P] -> [H, D]: both coordinates of a plane get its factor; coordinates that do not rotate get 1."""
    heads, planes = g.shape
    rotating = torch.cat([g, g], -1) if layout == "half" else g.repeat_interleave(2, -1)
    return torch.cat([rotating, g.new_ones(heads, head_dim - 2 * planes)], -1)
