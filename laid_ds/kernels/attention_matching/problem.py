"""What every implementation of attention matching is given: checked tensors and the plan of rows, nothing left to interpret."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from laid_ds.kernels import checks
from laid_ds.kernels.attention import Attention
from laid_ds.kernels.attention_matching.omega import Omega


@dataclass(frozen=True)
class Problem:
    """Student against teacher. `weight` says which rows count and how much (see `visible.row_weights`)."""

    student: Side
    teacher: Side  # over the keys that both see
    teacher_alone: Side | None  # over all keys that it sees, where the mixture needs that (see `teacher_sides`)
    weight: Tensor  # [B, T] float64 on the CPU
    positions: Tensor | None  # [B, S] int64
    query_offset: int
    omega: Omega
    teacher_heads: Tensor | None  # [H^s, k] int64: the mixture is zero elsewhere

    @property
    def dtype(self) -> torch.dtype:
        """What sums are accumulated in."""
        double = torch.float64 in (self.student.query.dtype, self.teacher.query.dtype)
        return torch.float64 if double else torch.float32


@dataclass(frozen=True)
class Side:
    """One model's attention in one layer, without its graph."""

    query: Tensor  # [B, H, T, D]
    key: Tensor  # [B, K, S, D], K divides H; head h reads key head h // (H / K)
    scale: float
    first: Tensor  # [B, T] int64 on the CPU: row t sees the keys first .. t + query_offset
    lse: Tensor | None  # [B, H, T]: ln sum exp of the row's scores, if the caller has it

    def attention(self, b: int, problem: Problem, heads: Tensor | None = None) -> Attention:
        lse = None if self.lse is None else self.lse[b]
        return Attention(self.query[b], self.key[b], self.scale, self.first[b], problem.query_offset, problem.dtype, lse, heads)


def teacher_sides(own: Side, student_first: Tensor, weight: Tensor, teacher_heads: Tensor | None) -> tuple[Side, Side | None]:
    """(the teacher over the keys that both see, `own` over all that it sees or None) for a problem.

    The second is None where the mixture is the same for all rows: where each row that counts (weight [B, T] > 0) shows the student all that
    the teacher sees, or where there is one head to mix.
    """
    is_cut = bool((student_first > own.first)[weight > 0].any())
    both = replace(own, first=torch.maximum(student_first, own.first), lse=None if is_cut else own.lse)
    mixed = own.query.shape[1] if teacher_heads is None else teacher_heads.shape[-1]
    return both, own if is_cut and mixed > 1 else None


def mixture(logits: Tensor, teacher_heads: Tensor | None, by_row: bool) -> Tensor:
    """`mixing` [H^s, H^t]: the row softmax of logits [H^s, H^t], or `by_row`, where each row makes its own (see README.md), the logits.

    With teacher_heads [H^s, k] the other heads are left out: their entries are 0, or -inf.
    """
    if teacher_heads is None:
        return logits if by_row else logits.softmax(-1)
    heads, choices = logits.shape
    checks.check_tensor("teacher_heads", teacher_heads, (heads, None), (torch.int64,), logits.device)
    ordered = teacher_heads.sort(-1).values
    if not ((ordered.diff(dim=-1) > 0).all() & (ordered >= 0).all() & (ordered < choices).all()):  # one wait for the card
        raise ValueError(f"teacher_heads is {teacher_heads.tolist()}: expected distinct heads from 0 to {choices - 1} in each row")
    chosen = logits.gather(-1, teacher_heads)
    none, chosen = (torch.full_like(logits, -torch.inf), chosen) if by_row else (torch.zeros_like(logits), chosen.softmax(-1))
    return none.scatter(-1, teacher_heads, chosen)
