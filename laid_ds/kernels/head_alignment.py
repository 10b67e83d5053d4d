"""Head-level alignment of queries and keys (LAid, AAAI-26, Eq. 3 and 7) for one pair of layers, in O(T) memory.

Letters: B batch, T tokens, H query heads, K key heads, D head dim; ^s student, ^t teacher.

    Q part: || Q^s_i - sum_j w_ij Q^t_j ||^2 per student head i, summed over tokens and dims; the K part likewise.

Tied mixing uses one w [H^s, H^t] for both parts, with every key head standing for each query head that reads it (so the K part too has
H^s heads); separate mixing has w_q [H^s, H^t] and w_k [K^s, K^t] (the K part has K^s heads). Where both models rotate alike, the loss is
the same before and after RoPE; a projection between different head sizes ends that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from laid_ds.kernels import checks
from laid_ds.kernels.leaf import at_once
from laid_ds.kernels.switch import exactly_on
from laid_ds.sequence import ALONE, SequenceGroup

REDUCTIONS = ("relative", "mean", "sum")


def head_alignment(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    mixing: Tensor | tuple[Tensor, Tensor],
    *,
    reduction: str = "relative",
    segments: Tensor | None = None,
    projection: tuple[Tensor, Tensor] | None = None,
    group: SequenceGroup = ALONE,
) -> tuple[Tensor, int]:
    """(loss sum, count); the caller sums both over a step and divides once. float32 (float64 if an input is).

    student_query [B, H^s, T, D^s], student_key [B, K^s, T, D^s], teacher_query [B, H^t, T, D^t], teacher_key [B, K^t, T, D^t].
    mixing: weights, of a row softmax or free: w [H^s, H^t] (tied) or (w_q [H^s, H^t], w_k [K^s, K^t]) (separate).
    segments [B, T] int64: packed samples, ids growing along the tokens, -1 padding that is ignored; default: each batch row is one.
    projection: (for queries, for keys), each [D^t, D^s]; needed where the head sizes differ.
    group: the ranks that share the rows. Tensors are then of this rank's T tokens alone, but segments and count of whole rows; the sum over
        the ranks is what one rank alone would compute, and "relative" divides by norms over all of them. Collective.

    What the sum holds and what is counted (H of the K part = H^s tied, K^s separate):
    "relative": for each segment and head, ||error||^2 / ||mixed teacher||^2 (not differentiated), norms over the segment's tokens; the mean
        over the K part's heads plus that over the Q part's, times H^s. Count: segments x H^s.
    "mean": for each token, the mean squared error over heads and dims, Q part plus K part. Count: tokens.
    "sum": Eq. 7 as printed, the whole squared error. Count: segments, so that one unpacked sample gives the literal number.

    Gradients reach the student, the mixing and the projection, never the teacher; they are computed at once, and a second backward is an
    error. Raises ValueError on shapes that do not fit.
    """
    tokens = student_query.shape[2] * group.size if student_query.ndim == 4 else None
    weights = _check(student_query, student_key, teacher_query, teacher_key, mixing, reduction, segments, projection, tokens)
    member = _membership(segments, len(student_query), tokens, student_query.device)  # [B, T, G]
    segments_total, num_tokens = int(member.any(1).sum()), int(member.sum())
    member = group.own(member, 1)
    loss = 0.0
    parts = (student_query, teacher_query), (student_key, teacher_key)
    with exactly_on(student_query.device):
        for (student, teacher), weight, project in zip(parts, weights, projection or (None, None), strict=True):
            part = partial(_part, teacher=teacher, member=member, reduction=reduction, query_heads=student_query.shape[1], add=group.add)
            loss = loss + at_once(part, student, weight, *(() if project is None else (project,)))
    return loss, {"relative": segments_total * student_query.shape[1], "mean": num_tokens, "sum": segments_total}[reduction]


def _part(
    student: Tensor,
    weight: Tensor,
    project: Tensor | None = None,
    *,
    teacher: Tensor,
    member: Tensor,
    reduction: str,
    query_heads: int,
    add: Callable[[Tensor], Tensor],
) -> Tensor:
    """The Q or the K part of the sum."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    mixed = torch.einsum("ij,bjtd->bitd", weight.to(dtype), teacher.detach().to(dtype))  # [B, H, T, D^t]
    if project is not None:
        mixed = mixed @ project.to(dtype)
    student = student.to(dtype).repeat_interleave(mixed.shape[1] // student.shape[1], dim=1)
    heads, size = mixed.shape[1], mixed.shape[3]
    error = _per_segment((student - mixed).square().sum(-1), member)  # [B, H, G]
    if reduction == "relative":
        norm = add(_per_segment(mixed.detach().square().sum(-1), member))
        error = error / norm.clamp_min(torch.finfo(dtype).tiny) * (query_heads / heads)
    return error.sum() / (heads * size if reduction == "mean" else 1)


def _membership(segments: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor:
    """[B, T, G] bool: token t belongs to the g-th segment of its batch row; G is the largest number of segments in a row."""
    if segments is None:
        return torch.ones(batch, tokens, 1, dtype=torch.bool, device=device)
    starts = segments >= 0
    starts[:, 1:] &= segments[:, 1:] != segments[:, :-1]
    index = starts.cumsum(1) - 1
    groups = torch.arange(max(int(index.max()) + 1, 1), device=device)
    return (index[..., None] == groups) & (segments >= 0)[..., None]


def _per_segment(x: Tensor, member: Tensor) -> Tensor:
    """Sums of x [B, H, T] over each segment: [B, H, G]. A product, since adding by index is not deterministic on CUDA."""
    return x @ member.to(x.dtype)


def _check(
    student_query, student_key, teacher_query, teacher_key, mixing, reduction, segments, projection, whole_tokens
) -> tuple[Tensor, Tensor]:
    """Refuse what does not fit; returns the weights of the Q part [H^s, H^t] and of the K part [H^s or K^s, K^t]."""
    if student_query.ndim != 4:
        raise ValueError(f"student_query has shape {tuple(student_query.shape)}: expected [B, H, T, D]")
    (batch, heads, tokens, size), device = student_query.shape, student_query.device
    checks.check_attention("student_", student_query, student_key, batch, tokens, tokens, device)
    checks.check_attention("teacher_", teacher_query, teacher_key, batch, tokens, tokens, device)
    teacher_heads, teacher_size = teacher_query.shape[1], teacher_query.shape[3]
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}: expected one of {REDUCTIONS}")
    if segments is not None:
        checks.check_segments(segments, batch, whole_tokens, device)
    if projection is None and size != teacher_size:
        raise ValueError(f"projection is None: expected two of shape {(teacher_size, size)}, since the head sizes differ")
    for name, project in zip(("query", "key"), projection or (), strict=False):
        checks.check_tensor(f"projection for the {name}", project, (teacher_size, size), checks.FLOATS, device)
    if torch.is_tensor(mixing):
        checks.check_tensor("mixing", mixing, (heads, teacher_heads), checks.FLOATS, device)
        per_key_head = mixing.unflatten(1, (teacher_key.shape[1], -1)).sum(-1)  # [H^s, K^t]: query heads of one key head share its keys
        return mixing, per_key_head
    checks.check_tensor("mixing[0]", mixing[0], (heads, teacher_heads), checks.FLOATS, device)
    checks.check_tensor("mixing[1]", mixing[1], (student_key.shape[1], teacher_key.shape[1]), checks.FLOATS, device)
    return mixing
