"""A loss whose upstream gradient is one scalar: the pass that computes it computes its gradients too, and the backward only scales them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# (mixing, whether gradients are wanted) -> loss, d student_query, d student_key, d mixing
Walk = Callable[[Tensor, bool], tuple[Tensor, Tensor | None, Tensor | None, Tensor]]


def leaf_loss(walk: Walk, student_query: Tensor, student_key: Tensor, mixing: Tensor) -> Tensor:
    """The loss of one walk, as a function of three tensors; it can be differentiated once."""
    backward = torch.is_grad_enabled() and any(x.requires_grad for x in (student_query, student_key, mixing))
    return _Leaf.apply(student_query, student_key, mixing, walk, backward)


class _Leaf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_query, student_key, mixing, walk, backward):
        loss, *ctx.gradients = walk(mixing.detach(), backward)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        if ctx.gradients is None:
            raise RuntimeError("attention_matching: second backward, but the gradients were handed out in the first; call it again")
        gradients, ctx.gradients = ctx.gradients, None
        return *(gradient.mul_(upstream) for gradient in gradients), None, None
