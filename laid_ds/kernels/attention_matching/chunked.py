"""Attention matching in one pass over chunks of query rows, in plain torch on any device; nothing T x S is ever held.

The loss is a leaf whose upstream gradient is one scalar, so the pass that computes it computes its gradients too and keeps only those:
d query [B, H, T, D], d key [B, K, S, D] and d mixing [H^s, H^t]. Nothing is computed again in the backward.
Letters: C rows of a chunk, n keys that the chunk sees, U teacher heads that some student head listens to; others as in reference.py.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from laid_ds.kernels.attention import Attention, log_, rows_that_fit
from laid_ds.kernels.attention_matching.leaf import leaf_loss
from laid_ds.kernels.attention_matching.problem import Problem, Side
from laid_ds.kernels.visible import Hidden, hide_, row_chunks


def attention_matching(
    problem: Problem, student_query: Tensor, student_key: Tensor, mixing: Tensor, chunk_size: int | None = None
) -> Tensor:
    """As reference.attention_matching, `chunk_size` rows at a time (default: as many as a byte budget holds)."""
    walk = partial(_walk, problem, chunk_size or default_chunk_size(problem))
    return leaf_loss(walk, student_query, student_key, mixing)


def default_chunk_size(problem: Problem) -> int:
    """As many rows as a byte budget holds."""
    heads = 4 * problem.student.query.shape[1] + problem.teacher.query.shape[1]
    return rows_that_fit(heads * problem.student.key.shape[2] * problem.dtype.itemsize, problem.student.query)


def _walk(problem: Problem, chunk_size: int, mixing: Tensor, backward: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """(loss, d query, d key, d mixing); the first two gradients only with `backward`."""
    comparison = Comparison(problem, chunk_size, mixing)
    d_query, d_key = _gradients_of(problem.student, problem.dtype) if backward else (None, None)
    for b in range(len(problem.weight)):
        student = comparison.begin(b)
        d_key_b = keys_last(student.key)
        for rows in row_chunks(problem.weight[b], chunk_size):
            found = comparison(rows)
            if backward:
                d_z = found.d_scores.addcmul_(found.probabilities, found.shift, value=-1)
                d_query[b, :, rows] = student.backward(d_z, found.query, found.keys, d_key_b).to(d_query.dtype)
        if backward:
            d_key[b] = d_key_b.mT
    return comparison.loss(), d_query, d_key, comparison.d_mixing()


class Compared(NamedTuple):
    """What one chunk of rows gave; the tensors are overwritten by the next chunk."""

    keys: slice
    """The keys that it sees."""
    query: Tensor
    """[H, C, D]: the student's, scaled."""
    probabilities: Tensor
    """[H, C, n]: the student's, q."""
    d_scores: Tensor
    """[H, C, n]: omega (q - p); with q times `shift` taken off it is the gradient to the student's scores."""
    shift: Tensor
    """[H, C, 1]: the sum of d_scores over the keys."""
    scratch: Tensor
    """[H, C, n], free for the caller."""


class Comparison:
    """Student against teacher, a chunk of rows of one batch element at a time; it adds up the loss and its gradient to the mixture."""

    def __init__(self, problem: Problem, chunk_size: int, mixing: Tensor) -> None:
        heads = mixing.shape[1]
        self.problem, self.mixing, self.chunk_size = problem, mixing, chunk_size
        self.used = torch.arange(heads) if problem.teacher_heads is None else problem.teacher_heads.unique().cpu()
        self.by_row = problem.teacher_alone is not None
        self.pi = mixing[:, self.used].to(problem.dtype)  # [H^s, U]; by row the logits
        self.d_pi, self.excess = torch.zeros_like(self.pi), self.pi.new_zeros(())
        self.omegas = _Omegas(problem, chunk_size)
        self.heads = (len(self.used), *[len(mixing)] * 4)
        self.scratch = [self.pi.new_empty(h * chunk_size * problem.student.key.shape[2]) for h in self.heads]

    def begin(self, b: int) -> Attention:
        """Go on with batch element b, whose student attention is returned."""
        self.b, problem = b, self.problem
        self.student, self.teacher = problem.student.attention(b, problem), problem.teacher.attention(b, problem, self.used)
        self.alone = problem.teacher_alone.attention(b, problem, self.used) if self.by_row else None
        self.see_the_same = torch.equal(self.student.first, self.teacher.first)
        return self.student

    def __call__(self, rows: Tensor) -> Compared:
        """Compare a chunk of rows."""
        student, teacher = self.student, self.teacher
        keys = student.keys_of(rows)
        a, z, q, p, g = self._maps(rows, keys)
        where = student.hidden(rows, keys)
        where_taught = where if self.see_the_same else teacher.hidden(rows, keys)
        if self.by_row:
            shares = self._row_shares(rows, keys, where_taught, a)
            torch.bmm(shares, a.transpose(0, 1), out=p.transpose(0, 1))
        else:
            teacher.forward(rows, keys, where_taught, a, a)
            torch.mm(self.pi, a.flatten(1), out=p.flatten(1))
        query = student.forward(rows, keys, where, z, q)
        omega = self.omegas(self.b, rows, keys, where)
        tiny = torch.finfo(p.dtype).tiny
        student.subtract_log_(log_(torch.clamp_min(p, tiny, out=g)), rows, z, q).mul_(omega)  # omega ln(p / q)
        hide_(g, where, 0.0)
        if self.by_row:
            self._add_row_shares(shares, torch.bmm(g.transpose(0, 1), a.permute(1, 2, 0)))
        else:
            self.d_pi.addmm_(g.flatten(1), a.flatten(1).mT)
        d_z = torch.sub(q, p, out=p).mul_(omega)
        shift = d_z.sum(-1, keepdim=True)
        self.excess += shift.sum()
        return Compared(keys, query, q, d_z, shift, g)

    def student_alone(self, rows: Tensor) -> Compared:
        """The same without the teacher: nothing is compared."""
        keys = self.student.keys_of(rows)
        _, z, q, p, g = self._maps(rows, keys)
        query = self.student.forward(rows, keys, self.student.hidden(rows, keys), z, q)
        return Compared(keys, query, q, p.zero_(), p.new_zeros(len(p), len(rows), 1), g)

    def _row_shares(self, rows: Tensor, keys: slice, where: Hidden, a: Tensor) -> Tensor:
        """rho [C, H^s, U] of README.md, the rows' own pi; fills a [U, C, n] with the teacher's attention over the keys that both see."""
        whole = self._whole(rows)
        log_mass = self.teacher.softmax_(rows, keys, where, a) - whole  # [U, C, 1]
        return (self.pi + log_mass.permute(1, 2, 0)).softmax(-1)

    def _whole(self, rows: Tensor) -> Tensor:
        """[U, C, 1]: log-sum-exp of the teacher's scores over all keys that it sees; where it is not given, through the room for `a`."""
        if self.alone.lse is not None:
            return self.alone.given_lse(rows)
        keys = self.alone.keys_of(rows)
        return self.alone.softmax_(rows, keys, self.alone.hidden(rows, keys), self._maps(rows, keys)[0])

    def _add_row_shares(self, shares: Tensor, d_shares: Tensor) -> None:
        """Add up the first part of the loss and the gradient to the logits, from rho [C, H^s, U] and the gradient to it."""
        terms = shares * d_shares
        of_row = terms.sum(-1, keepdim=True)  # sum omega p ln(p / q)
        self.d_pi += terms.addcmul_(shares, of_row, value=-1).sum(0)
        self.excess += of_row.sum()

    def _maps(self, rows: Tensor, keys: slice) -> list[Tensor]:
        """Room for a chunk's scores and what becomes of them, [heads, C, n] each."""
        rows, keys = len(rows), keys.stop - keys.start
        return [x[: h * rows * keys].view(h, rows, keys) for x, h in zip(self.scratch, self.heads, strict=True)]

    def loss(self) -> Tensor:
        """Of all chunks so far."""
        if self.by_row:
            return self.excess
        return (self.pi * self.d_pi).sum() + self.excess  # sum omega p ln(p / q) = sum over j of pi_ij dD/dpi_ij

    def d_mixing(self) -> Tensor:
        """[H^s, H^t]"""
        d_mixing = torch.zeros_like(self.mixing)
        d_mixing[:, self.used] = self.d_pi.to(self.mixing.dtype)
        return d_mixing


def keys_last(key: Tensor) -> Tensor:
    """Zeros [K, D, S] for a gradient to key [K, S, D], see Attention.backward."""
    return torch.zeros_like(key.mT, memory_format=torch.contiguous_format)


def _gradients_of(side: Side, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Where the gradients wait for the backward, in the inputs' dtype; in `dtype` for fp16, whose range unscaled sums may leave."""
    held = dtype if side.query.dtype is torch.float16 else side.query.dtype
    return torch.zeros_like(side.query, dtype=held), torch.empty_like(side.key, dtype=held)


class _Omegas:
    """The rows' weight times omega, mean 1 over the keys each row sees, chunk by chunk.

    Token distances of consecutive rows are the same along diagonals, so a table of omega over the longest chunk serves all of them.
    """

    def __init__(self, problem: Problem, chunk_size: int) -> None:
        self.problem, self.device, self.keys = problem, problem.student.query.device, problem.student.key.shape[2]
        self.uniform = problem.omega.kind == "uniform"
        if not self.uniform and problem.positions is None:
            row, column = torch.arange(chunk_size, device=self.device), torch.arange(self.keys + chunk_size, device=self.device)
            self.table = self._of(row[:, None] + self.keys - column)  # [chunk_size, S + chunk_size]
            self.scratch = self.table.new_empty(chunk_size * self.keys)
            ahead = problem.omega(torch.arange(self.keys, device=self.device, dtype=torch.float64)).cumsum(0)
            self.sums = torch.cat([ahead.new_zeros(1), ahead]).to(problem.dtype)  # [n]: of the n nearest keys

    def _of(self, distance: Tensor) -> Tensor:
        return self.problem.omega(distance.clamp_min_(0).to(self.problem.dtype))  # float32 counts tokens exactly to 2^24

    def __call__(self, b: int, rows: Tensor, keys: slice, where: Hidden) -> Tensor:
        """[C, n], or [C, 1] where it is the same for all keys; anything at hidden keys."""
        problem = self.problem
        weight = problem.weight[b, rows, None].to(self.device, problem.dtype)
        if self.uniform:
            return weight
        last = rows + problem.query_offset
        seen = (last + 1 - problem.student.first[b, rows]).to(self.device)
        if problem.positions is None and int(last[-1] - last[0]) == len(rows) - 1:
            shift = self.keys - int(last[0])
            omega = self.scratch[: len(rows) * (keys.stop - keys.start)].view(len(rows), -1)
            table = self.table[: len(rows), keys.start + shift : keys.stop + shift]
            return torch.mul(table, weight * seen[:, None] / self.sums[seen, None], out=omega)
        last, key = last.to(self.device), torch.arange(keys.start, keys.stop, device=self.device)
        if problem.positions is not None:
            last, key = problem.positions[b, last], problem.positions[b, keys]
        omega = hide_(self._of(last[:, None] - key), where, 0.0)
        return omega.mul_(weight * seen[:, None] / omega.sum(-1, keepdim=True))
