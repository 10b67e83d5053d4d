"""The matching loss as a leaf of the graph: how an implementation's walk becomes a function of three tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from laid_ds.kernels import leaf

# (mixing, whether gradients are wanted) -> loss, d student_query, d student_key, d mixing
Walk = Callable[[Tensor, bool], tuple[Tensor, Tensor | None, Tensor | None, Tensor]]


def leaf_loss(walk: Walk, student_query: Tensor, student_key: Tensor, mixing: Tensor) -> Tensor:
    """The loss of one walk; it can be differentiated once."""
    return leaf.leaf_loss(partial(walk, mixing.detach()), student_query, student_key, mixing)[0]
