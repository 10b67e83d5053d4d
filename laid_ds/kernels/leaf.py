"""A loss whose upstream gradient is one scalar: the pass that computes it computes its gradients too, and the backward only scales them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# whether gradients are wanted -> the loss, values reported beside it, and last a gradient (or None) for each input
Walk = Callable[[bool], tuple[Tensor | None, ...]]


def leaf_loss(walk: Walk, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The walk's loss as a function of `inputs`, differentiable once, and its other values, without a gradient."""
    backward = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return _Leaf.apply(walk, backward, *inputs)


def at_once(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), a scalar, with its gradients computed beside it: they are all of it that is kept for the backward pass."""

    def walk(backward: bool) -> tuple[Tensor | None, ...]:
        own = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
        if not backward:
            return function(*own), *[None] * len(own)
        with torch.enable_grad():
            value = function(*own)
        gradients = iter(torch.autograd.grad(value, [x for x in own if x.requires_grad]))
        return value.detach(), *(next(gradients) if x.requires_grad else None for x in own)

    return leaf_loss(walk, *inputs)[0]


class _Leaf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, walk, backward, *inputs):
        found = walk(backward)
        values, ctx.gradients = found[: -len(inputs)], found[-len(inputs) :]
        ctx.mark_non_differentiable(*values[1:])
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        if ctx.gradients is None:
            raise RuntimeError("second backward through a loss whose gradients were handed out in the first; compute it again")
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(None if gradient is None else gradient.mul_(upstream) for gradient in gradients)
