"""Attention matching as it is defined, with every map written out: O(T S) memory, for tests and small sizes only.

Letters: B batch, T query rows, S keys, H query heads, K key heads, D head dim; ^s student, ^t teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from laid_ds.kernels.attention_matching.problem import Problem, Side


def attention_matching(
    problem: Problem, student_query: Tensor, student_key: Tensor, mixing: Tensor, chunk_size: int | None = None
) -> Tensor:
    """Sum over counted rows m and heads i of D_i(m), see README.md. Gradients by autograd; `chunk_size` has no meaning here.

    mixing [H^s, H^t] has rows that sum to 1; with problem.teacher_alone it has logits, to which each row adds the logarithm of each teacher
    head's mass on the keys that the student sees.
    """
    dtype, device = problem.dtype, student_query.device
    last = torch.arange(student_query.shape[2], device=device) + problem.query_offset  # [T]
    student, teacher = problem.student, problem.teacher
    visible = _visible(student, last)  # [B, 1, T, S]
    log_q = _scores(student_query, student_key, student.scale, dtype).masked_fill(~visible, -torch.inf).log_softmax(-1)
    log_q = log_q.masked_fill(~visible, 0.0)  # [B, H^s, T, S]
    q = log_q.exp() * visible
    with torch.no_grad():
        scores = _scores(teacher.query, teacher.key, teacher.scale, dtype)
        inside = scores.masked_fill(~_visible(teacher, last), -torch.inf)
        a = inside.softmax(-1)  # [B, H^t, T, S]
    if problem.teacher_alone is None:
        p = torch.einsum("ij,bjts->bits", mixing, a)  # [B, H^s, T, S]
    else:
        whole = scores.masked_fill(~_visible(problem.teacher_alone, last), -torch.inf)
        log_mass = inside.logsumexp(-1) - whole.logsumexp(-1)  # [B, H^t, T]
        shares = (mixing[:, :, None] + log_mass[:, None]).softmax(2)  # [B, H^s, H^t, T]: pi mu / sum of pi mu
        p = torch.einsum("bijt,bjts->bits", shares, a)
    log_p = p.clamp_min(torch.finfo(dtype).tiny).log()  # 0 ln 0 = 0
    divergence = (_weights(problem, visible, last, dtype) * (p * (log_p - log_q) - p + q)).sum(-1)  # [B, H^s, T]
    return (divergence * problem.weight.to(device, dtype)[:, None]).sum()


def _visible(side: Side, last: Tensor) -> Tensor:
    key = torch.arange(side.key.shape[2], device=last.device)
    return ((key >= side.first.to(last.device)[..., None]) & (key <= last[:, None]))[:, None]


def _scores(query: Tensor, key: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    key = key.to(dtype).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return query.to(dtype) @ key.mT * scale


def _weights(problem: Problem, visible: Tensor, last: Tensor, dtype: torch.dtype) -> Tensor:
    """omega [B, 1, T, S], mean 1 over the keys that each row of the student sees, 0 elsewhere."""
    key = torch.arange(visible.shape[-1], device=last.device)
    if problem.positions is None:
        distance = (last[:, None] - key).expand(visible.shape[0], -1, -1)
    else:
        distance = problem.positions[:, last, None] - problem.positions[:, None, :]
    omega = problem.omega(distance.clamp_min(0).to(dtype))[:, None] * visible
    return omega * (visible.sum(-1, keepdim=True) / omega.sum(-1, keepdim=True))
