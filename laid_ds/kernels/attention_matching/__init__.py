"""Progressive distance-weighted attention matching: how far each student head's attention is from its mixture of teacher heads.

The definition is in README.md and, as code, in reference.py; chunked.py and fused.py compute the same without holding an attention map,
inside_attention.py together with the backward pass of the student's attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from laid_ds.kernels import checks
from laid_ds.kernels.attention_matching.inside_attention import attention_and_matching
from laid_ds.kernels.attention_matching.omega import UNIFORM, Omega
from laid_ds.kernels.attention_matching.problem import Problem, Side, mixture, teacher_sides
from laid_ds.kernels.attention_matching.trial import trial_of
from laid_ds.kernels.switch import choose, exactly_on
from laid_ds.kernels.visible import first_visible, row_weights

__all__ = ["Omega", "attention_and_matching", "attention_matching"]


def attention_matching(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    mixing_logits: Tensor,
    *,
    student_scale: float,
    teacher_scale: float,
    omega: Omega = UNIFORM,
    segments: Tensor | None = None,
    row_mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    positions: Tensor | None = None,
    student_window: int | None = None,
    teacher_window: int | None = None,
    query_offset: int = 0,
    rows: int | None = None,
    generator: torch.Generator | None = None,
    teacher_heads: Tensor | None = None,
    student_lse: Tensor | None = None,
    teacher_lse: Tensor | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, int]:
    """(sum of D_i(m) over counted rows m and student heads i, counted rows x student heads); the caller sums both and divides once.

    The sum is a float32 scalar (float64 if an input is), with gradients to student_query, student_key and mixing_logits only; any scalar
    upstream gradient is fine, a second backward through the same call is an error (except in the reference).

    student_query [B, H^s, T, D^s], student_key [B, K^s, S, D^s], teacher_query [B, H^t, T, D^t], teacher_key [B, K^t, S, D^t]: after RoPE,
        bfloat16, float16, float32 or float64; K divides H; query row t is the token of key t + query_offset.
    mixing_logits [H^s, H^t]: student head i matches the teacher heads mixed by softmax(mixing_logits[i]), as far as it sees what they see.
    student_scale, teacher_scale: what each model multiplies its scores with.
    omega: the weight of a distance, normalised to mean 1 over the keys that a row sees, row by row.
    segments [B, S] int64: the packed sample of each key; ids grow along the keys; -1 is padding, never seen and never counted.
    row_mask [B, T] bool: the rows that count (default all). row_weight [B, T] float64 on the CPU: what each counts for, in place of
        `row_mask`, `rows` and `generator`, where those were drawn for more rows than these (visible.row_weights).
    positions [B, S] int64: distances are differences of these, negative ones taken as 0 (default: token indices).
    student_window, teacher_window: a row sees its own key and the window - 1 before it (None: all). Where the student sees less than the
        teacher, the mixture is conditioned on what it sees: mixed first, then renormalised once, so that a head counts by its mass there.
        Where it sees more, the mixture is 0 on the rest.
    rows, generator: estimate from at most `rows` rows per batch element, stratified over its counted rows, unbiased; the count stays that
        of all counted rows.
    teacher_heads [H^s, k] int64: student head i mixes only these k distinct teacher heads.
    student_lse [B, H^s, T], teacher_lse [B, H^t, T] float32: natural log-sum-exp of the scaled scores over the keys each row sees in its
        own model, to save work; the gradient treats them as the functions of query and key that they are.
    chunk_size: rows at once in "chunked" and in the dense form of "fused".
    implementation: "reference" (dense), "chunked" (any device), "fused" (Triton, CUDA), "auto" (fused
        where it can run and gives what chunked gives on a small problem, see switch.py; else chunked).

    Raises ValueError naming the argument, its value and what was expected. Source: method section 2 of docs, not the LAid paper.
    """
    batch, heads, tokens, _ = student_query.shape if student_query.ndim == 4 else (None, None, None, None)
    keys = student_key.shape[2] if student_key.ndim == 4 else None
    device = student_query.device
    checks.check_attention("student_", student_query, student_key, batch, tokens, keys, device)
    checks.check_attention("teacher_", teacher_query, teacher_key, batch, tokens, keys, device)
    checks.check_tensor("mixing_logits", mixing_logits, (heads, teacher_query.shape[1]), checks.FLOATS, device)
    checks.check_rows(student_query, keys, query_offset, segments, row_mask, positions)
    named = {"student_scale": student_scale, "teacher_scale": teacher_scale, "rows": rows, "chunk_size": chunk_size}
    for name, value in (named | {"student_window": student_window, "teacher_window": teacher_window}).items():
        checks.check_positive(name, value)
    for name, lse, query in (("student_lse", student_lse, student_query), ("teacher_lse", teacher_lse, teacher_query)):
        if lse is not None:
            checks.check_tensor(name, lse, query.shape[:3], (torch.float32, torch.float64), device)

    student_first = first_visible(batch, tokens, query_offset, segments, student_window)
    teacher_first = first_visible(batch, tokens, query_offset, segments, teacher_window)
    if row_weight is None:
        weight, count = row_weights(batch, tokens, query_offset, segments, row_mask, rows, generator)
    else:
        checks.check_tensor("row_weight", row_weight, (batch, tokens), (torch.float64,), torch.device("cpu"))
        weight, count = row_weight, int((row_weight > 0).sum())
    own = Side(teacher_query.detach(), teacher_key.detach(), teacher_scale, teacher_first, teacher_lse)
    teacher, teacher_alone = teacher_sides(own, student_first, weight, teacher_heads)
    problem = Problem(
        Side(student_query.detach(), student_key.detach(), student_scale, student_first, student_lse),
        teacher,
        teacher_alone,
        weight,
        positions,
        query_offset,
        omega,
        teacher_heads,
    )
    mixing = mixture(mixing_logits.to(problem.dtype), teacher_heads, by_row=teacher_alone is not None)
    with exactly_on(device):
        run = choose(__name__, "attention_matching", implementation, device, trial_of(problem))
        return run(problem, student_query, student_key, mixing, chunk_size), count * heads
