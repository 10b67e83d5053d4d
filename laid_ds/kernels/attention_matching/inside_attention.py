"""Attention whose backward pass matches it to the teacher, in plain torch: for a CPU, where it shares what costs most.

Both the gradient of attention and that of matching are a gradient to the same scores, so one walk over chunks of query rows computes
scores and probabilities once and makes one product each for d query and d key. The price: the loss is known only after the backward pass.

Letters as in chunked.py; for one row with d out = G, out = O and probabilities q, the scores' gradient of attention is q (G value - G O).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from laid_ds.kernels.attention_matching.chunked import Comparison, default_chunk_size, keys_last
from laid_ds.kernels.attention_matching.omega import Omega
from laid_ds.kernels.attention_matching.problem import Problem, Side, mixture, teacher_sides
from laid_ds.kernels.switch import note
from laid_ds.kernels.visible import first_visible, row_chunks, row_weights

Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(query, key, value) -> (out [B, H, T, D], log-sum-exp [B, H, T])"""


def attention_and_matching(
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    mixing_logits: Tensor,
    *,
    scale: float,
    teacher_scale: float,
    first: Tensor,
    segments: Tensor,
    report: Callable[[Tensor], None],
    omega: Omega,
    teacher_window: int | None = None,
    teacher_lse: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, log-sum-exp, matching), the first two as `attend` gives them for query [B, H, T, D], key and value [B, K, S, D], S >= T; query
    row t is the token of key t + S - T.

    `matching` is the sum of attention_matching over all counted rows and heads; its value is 0 and its backward calls `report` with the
    true one, a scalar. float32 or float64 on a CPU; gradients, once, to query, key, value and mixing_logits.

    first [B, T] int64 on the CPU: row t of the student sees the keys first .. t + S - T, as `attend` does; where segments [B, S] are not
        -1 these must be the keys of its segment (and window).
    All else as in attention_matching.
    """
    note("attention_matching", "chunked inside attention's backward pass")
    batch, _, tokens, _ = query.shape
    query_offset = key.shape[2] - tokens
    weight, _ = row_weights(batch, tokens, query_offset, segments, None)
    teacher_first = first_visible(batch, tokens, query_offset, segments, teacher_window)
    own = Side(teacher_query.detach(), teacher_key.detach(), teacher_scale, teacher_first, teacher_lse)
    teacher, teacher_alone = teacher_sides(own, first, weight, None)

    def problem_of(query: Tensor, key: Tensor, lse: Tensor, upstream: float) -> Problem:
        return Problem(Side(query, key, scale, first, lse), teacher, teacher_alone, weight * upstream, None, query_offset, omega, None)

    mixing = mixture(mixing_logits.to(query.dtype), None, by_row=teacher_alone is not None)
    return _AttentionAndMatching.apply(attend, problem_of, report, chunk_size, query, key, value, mixing)


class _AttentionAndMatching(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attend, problem_of, report, chunk_size, query, key, value, mixing):
        out, lse = attend(query, key, value)
        ctx.save_for_backward(query, key, value, mixing, out, lse)  # the only references to them: checkpointing makes them anew
        ctx.problem_of, ctx.report, ctx.chunk_size = problem_of, report, chunk_size
        ctx.mark_non_differentiable(lse)
        return out, lse, query.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, _, upstream):
        query, key, value, mixing, out, lse = ctx.saved_tensors
        problem = ctx.problem_of(query, key, lse, upstream.item())
        comparison = Comparison(problem, ctx.chunk_size or default_chunk_size(problem), mixing)
        gradients = _walk(problem, comparison, value, out, d_out)
        if upstream:
            ctx.report(comparison.loss() / upstream)
        return None, None, None, None, *gradients, comparison.d_mixing()


def _walk(problem: Problem, comparison: Comparison, value: Tensor, out: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d query, d key, d value."""
    query, key = problem.student.query, problem.student.key
    d_query, d_key, d_value = torch.zeros_like(query), torch.empty_like(key), torch.empty_like(value)
    of_out = (d_out * out).sum(-1, keepdim=True)  # [B, H, T, 1]
    for b in range(len(query)):
        student = comparison.begin(b)
        d_key_b, d_value_b = keys_last(key[b]), keys_last(value[b])
        others = (problem.weight[b] == 0) & d_out[b].any(-1).any(0).cpu()  # rows that are not compared, but of use to the model
        turns = [(rows, comparison) for rows in row_chunks(problem.weight[b], comparison.chunk_size)]
        turns += [(rows, comparison.student_alone) for rows in row_chunks(others, comparison.chunk_size)]
        for rows, compare in turns:
            found, d_out_rows = compare(rows), d_out[b][:, rows]
            attention = student.products(d_out_rows, value[b], found.keys, out=found.scratch)
            attention.sub_(of_out[b][:, rows] + found.shift)
            d_scores = found.d_scores.addcmul_(found.probabilities, attention)
            d_query[b, :, rows] = student.backward(d_scores, found.query, found.keys, d_key_b)
            student.add_to_keys_(d_value_b, d_out_rows, found.probabilities, found.keys)
        d_key[b], d_value[b] = d_key_b.mT, d_value_b.mT
    return d_query, d_key, d_value
