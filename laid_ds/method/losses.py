"""Losses at the head (Paper, Eq. 8): cross-entropy on the answers and a divergence from the teacher, as sums.

Every term of a run is a sum and a count. Counts are added over the micro-batches of an optimizer step and over ranks before the first
forward pass, and each sum is divided once: accumulation and world size change nothing. What a sum is multiplied with (weight / count) is
therefore known when it is computed, and the loss at the head is a leaf: one pass over chunks of rows computes it and its gradients.

Letters: R supervised rows, r rows of a chunk, C hidden size, V vocabulary (cut to the tokenizer's real length).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from laid_ds.config import Losses
from laid_ds.kernels.leaf import leaf_loss

TERMS = ("align", "match", "kl", "sft")
DEFAULTS = Losses()


class Shown(NamedTuple):
    """The teacher's logits at the supervised rows: as they are, or as what they are a product of."""

    rows: Tensor
    """[R, >= V] logits, or with a weight [R, C] hidden states."""
    weight: Tensor | None = None
    """[>= V, C]"""
    bias: Tensor | None = None
    """[>= V]"""


def show(head: nn.Linear, hidden: Tensor, vocabulary: int) -> Shown:
    """The logits of hidden [R, C] in whichever form holds less memory: more rows than C are kept as they are, with a copy of the head."""
    return Shown(*inside(head, partial(_show, vocabulary), hidden))


def _show(vocabulary: int, head: nn.Linear, hidden: Tensor) -> tuple[Tensor, ...]:
    parameters = [p.detach()[:vocabulary] for p in (head.weight, head.bias) if p is not None]
    if len(hidden) > hidden.shape[1]:
        return hidden, *(p.clone() for p in parameters)
    return (nn.functional.linear(hidden, *parameters),)


def head_losses(
    hidden: Tensor,
    head: nn.Linear,
    labels: Tensor,
    vocabulary: int,
    factors: dict[str, float],
    teacher: Shown | None = None,
    options: Losses = DEFAULTS,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, sums): sums over rows of cross-entropy ("sft") and of temperature^2 x divergence ("kl"), and factors["sft"] x one +
    factors["kl"] x the other.

    hidden [R, C], labels [R]; without a teacher there is no "kl". Columns from V on are dropped, so both distributions are renormalised
    over the shared vocabulary. Only the loss has a gradient, to hidden and the head's parameters, and
    it can be differentiated once. All are scalars in float32 (float64 for such a head). [R, V] never exists, and the head is called once,
    so that ZeRO-3 gathers its weight once; its gradients are held in its own dtype.
    """
    walk = partial(_walk, hidden.detach(), labels, vocabulary, factors, teacher, options)
    loss, *sums = inside(head, partial(_leaf, walk), hidden)
    return loss, dict(zip(("sft", "kl"), sums, strict=False))


def inside(module: nn.Module, work: Callable[..., tuple], *inputs: Tensor) -> tuple:
    """work(module, *inputs) in place of the module's own forward. The module's hooks run around it: under ZeRO-3 its parameters are whole
    there and only there."""
    assert "forward" not in vars(module), f"{type(module).__name__} has a forward of its own"
    module.forward = partial(work, module)
    try:
        return module(*inputs)
    finally:
        del module.forward


def _leaf(walk: Callable, head: nn.Linear, hidden: Tensor) -> tuple[Tensor, ...]:
    parameters = [head.weight] if head.bias is None else [head.weight, head.bias]
    return leaf_loss(partial(walk, *parameters), hidden, *parameters)


def _walk(
    hidden: Tensor, labels: Tensor, vocabulary: int, factors: dict, teacher: Shown | None, options: Losses, *parameters_and_backward
) -> tuple[Tensor | None, ...]:
    """loss, "sft", "kl" if there is a teacher, d hidden, d weight, d bias if there is one."""
    *parameters, backward = parameters_and_backward
    weight, bias = (*(p.detach()[:vocabulary] for p in parameters), None)[:2]
    held = [torch.zeros_like(hidden), *(torch.zeros_like(p) for p in parameters)] if backward else []
    dtype = torch.promote_types(weight.dtype, torch.float32)
    size = options.rows_per_chunk
    scratch = hidden.new_empty(4, min(size, len(hidden)), vocabulary, dtype=dtype)
    sums = hidden.new_zeros(1 if teacher is None else 2, dtype=dtype)
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        z, t, q, d = scratch[:, : len(hidden[rows])]
        _logits(hidden[rows], weight, bias, out=z)
        if teacher is not None:
            _shown_logits(teacher, rows, out=t)
        sums += _chunk(z, None if teacher is None else t, q, d, labels[rows], factors, options)
        if backward:
            d = d.to(weight.dtype)
            torch.mm(d, weight, out=held[0][rows])
            held[1][:vocabulary].addmm_(d.mT, hidden[rows])
            if bias is not None:
                held[2][:vocabulary] += d.sum(0)
    loss = sum(factors.get(term, 0.0) * total for term, total in zip(("sft", "kl"), sums, strict=False))
    return loss, *sums, *(held or [None] * (1 + len(parameters)))


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write the logits [r, V] to `out`; the product is computed in the weight's dtype."""
    if out.dtype == weight.dtype:
        torch.mm(rows, weight.mT, out=out)
    else:
        out.copy_(rows @ weight.mT)
    if bias is not None:
        out += bias


def _shown_logits(teacher: Shown, rows: slice, out: Tensor) -> None:
    """Write the teacher's logits [r, V] to `out`."""
    vocabulary, bias = out.shape[1], teacher.bias
    if teacher.weight is None:
        out.copy_(teacher.rows[rows, :vocabulary])
    else:
        _logits(teacher.rows[rows], teacher.weight[:vocabulary], None if bias is None else bias[:vocabulary], out)


def _chunk(z: Tensor, t: Tensor | None, q: Tensor, d: Tensor, labels: Tensor, factors: dict, options: Losses) -> Tensor:
    """The sums of a chunk [1 or 2] from logits z and t of student and teacher; d becomes the loss's gradient to z. All four are scratch."""
    sft, kl, tau = factors.get("sft", 0.0), factors.get("kl", 0.0), options.temperature
    lse = softmax_(z, q)
    own = labels[:, None]
    sums = [(lse - z.gather(1, own)).sum()]
    torch.mul(q, sft, out=d).scatter_add_(1, own, d.new_full(own.shape, -sft))
    if t is not None:
        if tau != 1:
            lse = softmax_(z.div_(tau), q)
            t.div_(tau)
        ratio = torch.sub(t, z, out=z)
        ratio -= (softmax_(t, t) - lse).to(ratio.dtype)
        total, gradient = DIVERGENCES[options.divergence](t, q, ratio, options.beta)
        d.add_(gradient, alpha=kl * tau)
        sums.append(tau**2 * total)
    return torch.stack(sums)


def softmax_(x: Tensor, out: Tensor) -> Tensor:
    """Write the softmax of x [r, V] to out, which may be x, and return the log-sum-exp [r, 1] in float64.

    Its rounding would be a whole row's, and a divergence of nearly equal distributions is smaller than that of float32.
    """
    highest = x.amax(-1, keepdim=True).double()
    torch.softmax(x, -1, out=out)
    return highest - out.amax(-1, keepdim=True).double().log() + out.sum(-1, keepdim=True, dtype=torch.float64).log()


def forward_kl(p: Tensor, q: Tensor, ratio: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """sum p ln(p / q) over all rows and its gradient to the logits of q, for p, q [r, V] and ratio = ln(p / q). Overwrites q and ratio.

    Source: Paper, Eq. 8. The other divergences have the same arguments."""
    return ratio.mul_(p).sum(), q.sub_(p)


def reverse_kl(p: Tensor, q: Tensor, ratio: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """sum q ln(q / p)."""
    rows = -(q * ratio).sum(-1, keepdim=True)
    return rows.sum(), q.mul_(ratio.add_(rows).neg_())


def jensen_shannon(p: Tensor, q: Tensor, ratio: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, 0 < beta < 1.

    Source: generalised JSD of Agarwal et al., On-Policy Distillation of Language Models, 2024."""
    log_m = torch.logaddexp(ratio + math.log(beta), ratio.new_tensor(math.log(1 - beta)))  # ln(m / q)
    student = (q * log_m).sum(-1, keepdim=True)
    total = beta * ratio.sub_(log_m).mul_(p).sum() - (1 - beta) * student.sum()
    return total, q.mul_(log_m.sub_(student).mul_(beta - 1))


DIVERGENCES = {"kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jensen_shannon}
