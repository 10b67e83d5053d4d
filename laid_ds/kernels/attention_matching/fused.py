"""Attention matching on CUDA, in Triton, in two forms chosen by the mixture; README.md counts the FLOPs and bytes of each.

*Sparse*, for at most 4 teacher heads per student head, or one where a head dim is 129 to 256: a row pass (loss, c, d query) and a column
pass (d key) that never leave the tile, 128 columns at a time. *Dense*, otherwise: scores of a chunk of rows by batched matrix products,
and a kernel for everything elementwise and row-wise. No atomics: sums over blocks are written side by side and added in a fixed order.
Letters: R rows of the plan (see kernels/tiles.py), S keys, U teacher heads of a student head, M rows and N keys of a tile, C rows of a
chunk, n keys it sees.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from laid_ds.kernels import tiles
from laid_ds.kernels.attention_matching.leaf import leaf_loss
from laid_ds.kernels.attention_matching.problem import Problem, Side
from laid_ds.kernels.tiles import LN2, LOG2E, fast_log2, key_range, load_bounds, load_tile, load_tile_transposed, store_tile

MOST_SPARSE_HEADS = tl.constexpr(4)
WIDEST_TILE = 128  # columns of a head dim in a tile of the sparse form; twice as many spill registers
DENSE_BYTES = 2 * 2**30  # score buffers of the dense form
KINDS = ("uniform", "frontier", "power")
UNIFORM, FRONTIER = tl.constexpr(0), tl.constexpr(1)
TINY = tl.constexpr(1.1754943508222875e-38)  # float32's smallest normal number: 0 ln 0 = 0


def attention_matching(
    problem: Problem, student_query: Tensor, student_key: Tensor, mixing: Tensor, chunk_size: int | None = None
) -> Tensor:
    """As reference.attention_matching, for bfloat16, float16 and float32. `chunk_size` is the dense form's."""
    if problem.dtype is torch.float64:
        raise ValueError("implementation is 'fused' with float64 inputs: expected bfloat16, float16 or float32")
    most = sparse_heads(max(student_query.shape[3], problem.teacher.query.shape[3]))
    sparse = problem.teacher_heads is not None and problem.teacher_heads.shape[1] <= most
    walk = partial(_sparse, problem) if sparse else partial(_dense, problem, chunk_size)
    return leaf_loss(walk, student_query, student_key, mixing)


def sparse_heads(dim: int) -> int:
    """Teacher heads of each student head that the sparse form takes at most; on an H200 the dense form was the faster beyond."""
    return MOST_SPARSE_HEADS.value if dim <= WIDEST_TILE else int(dim <= 2 * WIDEST_TILE)


@triton.jit
def omega_at(distance, gamma, frontier, inv_width, inv_delta_0, alpha, KIND: tl.constexpr):
    """omega at float distances >= 0."""
    if KIND == FRONTIER:
        return 1.0 + gamma / (1.0 + tl.exp2((frontier - distance) * (inv_width * LOG2E)))
    else:
        return tl.exp2(alpha * fast_log2(1.0 + distance * inv_delta_0))


@triton.jit
def norm_kernel(
    weight,  # [B, R] float32
    first,  # [B, R] int32
    last,  # [B, R] int32
    positions,  # [B, S] int32
    norm,  # [B, R] float32: weight * number of keys seen / sum of omega over them
    gamma,
    frontier,
    inv_width,
    inv_delta_0,
    alpha,
    R,
    S,
    KIND: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * M + tl.arange(0, M)
    row_first, row_last = load_bounds(first, last, b, rows, R)
    seen = row_first <= row_last
    here = tl.load(positions + b * S + row_last, mask=seen, other=0)
    total = tl.zeros([M], tl.float32)
    start, stop = key_range(row_first, row_last, S, N)
    for n in range(start, stop, N):
        keys = n + tl.arange(0, N)
        there = tl.load(positions + b * S + keys, mask=keys < S, other=0)
        distance = tl.maximum(here[:, None] - there[None, :], 0).to(tl.float32)
        omega = omega_at(distance, gamma, frontier, inv_width, inv_delta_0, alpha, KIND)
        visible = (keys[None, :] >= row_first[:, None]) & (keys[None, :] <= row_last[:, None])
        total += tl.sum(tl.where(visible, omega, 0.0), 1)
    count = (row_last - row_first + 1).to(tl.float32)
    row_weight = tl.load(weight + b * R + rows, mask=rows < R, other=0.0)
    tl.store(norm + b * R + rows, tl.where(seen, row_weight * count / tl.where(seen, total, 1.0), 0.0), mask=rows < R)


@triton.jit
def log_shares(x, y, m, n, x_stop, y_stop, scale, lse, D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """log2 [M, N] of attention between the rows from m of x and from n of y, both contiguous [*, D], BLOCK_D columns at a time.

    lse: [M, 1] or [1, N] of the side that attends. What a loop around this need not load again, the compiler holds.
    """
    z = tl.zeros([M, N], tl.float32)
    for column in tl.static_range(0, D, BLOCK_D):
        tile = load_tile(x, m, x_stop, D, BLOCK_D, M, column)
        z = tl.dot(tile, load_tile_transposed(y, n, y_stop, D, BLOCK_D, N, column), z, input_precision="tf32x3")
    return z * (scale * LOG2E) - lse


@triton.jit
def teacher_rows(
    query, key, lse, j, b, row, n, scale, R, S, HT, KT, DT: tl.constexpr, BLOCK_DT: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """log2 a [M, N] of teacher head j for the rows from `row` and the keys from `n`, seen or not."""
    at = (b * HT + j) * R
    m = row + tl.arange(0, M)
    row_lse = tl.load(lse + at + m, mask=m < R, other=0.0)
    key_at = (b * KT + j // (HT // KT)) * S
    return log_shares(query + at * DT, key + key_at * DT, row, n, R, S, scale, row_lse[:, None], DT, BLOCK_DT, M, N)


@triton.jit
def teacher_columns(
    query, key, lse, j, b, row, n, scale, R, S, HT, KT, DT: tl.constexpr, BLOCK_DT: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """The same tile transposed, [N, M]."""
    at = (b * HT + j) * R
    m = row + tl.arange(0, M)
    row_lse = tl.load(lse + at + m, mask=m < R, other=0.0)
    key_at = (b * KT + j // (HT // KT)) * S
    return log_shares(key + key_at * DT, query + at * DT, n, row, S, R, scale, row_lse[None, :], DT, BLOCK_DT, N, M)


@triton.jit(do_not_specialize=["U"])
def row_kernel(
    student_query,  # [B, H^s, R, D^s]
    student_key,  # [B, K^s, S, D^s]
    teacher_query,  # [B, H^t, R, D^t]
    teacher_key,  # [B, K^t, S, D^t]
    heads,  # [H^s, U] int32
    pi,  # [H^s, U] float32; BY_ROW: [B, H^s, U, R]
    student_lse,  # [B, H^s, R] float32, base 2
    teacher_lse,  # [B, H^t, R]
    student_first,  # [B, R] int32
    teacher_first,  # [B, R] int32
    last,  # [B, R] int32
    norm,  # [B, R] float32
    positions,  # [B, S] int32
    d_query,  # [B, H^s, R, D^s]
    excess,  # [B, H^s, R] float32: c = sum of omega (q - p)
    loss,  # [B, H^s, blocks] float32
    d_pi,  # [B, H^s, blocks, U] float32; BY_ROW: the gradient to the mixing logits
    student_scale,
    teacher_scale,  # both without log2(e)
    gamma,
    frontier,
    inv_width,
    inv_delta_0,
    alpha,
    R,
    S,
    HS,
    KS,
    HT,
    KT,
    U,
    DS: tl.constexpr,
    DT: tl.constexpr,
    ONE: tl.constexpr,  # U is 1, and the loop over it gone
    KIND: tl.constexpr,
    NARROW: tl.constexpr,  # the teacher sees less than the student
    BY_ROW: tl.constexpr,  # the student sees less than the teacher, and each row mixes by its own pi
    POSITIONS: tl.constexpr,  # distances are those of positions, else of tokens
    BACKWARD: tl.constexpr,
    BLOCK_DS: tl.constexpr,
    BLOCK_DT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """One sweep over the keys for each BLOCK_DS columns of d query, the first for loss, c and d pi, too.

    c is known only after a sweep: d query = scale (sum of omega (q - p) k - c sum of q k), where the second sum is the mean key.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    i, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = block * M + tl.arange(0, M)
    ok = rows < R
    first, row_last = load_bounds(student_first, last, b, rows, R)
    first_t = tl.load(teacher_first + b * R + rows, mask=ok, other=2147483647) if NARROW else first
    row_norm = tl.load(norm + b * R + rows, mask=ok, other=0.0)
    at = (b * HS + i) * R
    lse = tl.load(student_lse + at + rows, mask=ok, other=0.0)
    query_base, key_base = student_query + at * DS, student_key + (b * KS + i // (HS // KS)) * S * DS
    here = tl.load(positions + b * S + row_last, mask=first <= row_last, other=0) if POSITIONS else row_last
    c, row_loss = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    choice = tl.arange(0, MOST_SPARSE_HEADS)
    shares = pi + (b * HS + i) * U * R if BY_ROW else pi + i * U
    d_mix = tl.zeros([M if BY_ROW else 1, MOST_SPARSE_HEADS], tl.float32)
    parts: tl.constexpr = (DS + BLOCK_DS - 1) // BLOCK_DS
    start, stop = key_range(first, row_last, S, N)
    for part in tl.static_range(parts if BACKWARD else 1):
        acc, mean_key = tl.zeros([M, BLOCK_DS], tl.float32), tl.zeros([M, BLOCK_DS], tl.float32)
        for n in range(start, stop, N):
            keys = n + tl.arange(0, N)
            log_q = log_shares(query_base, key_base, block * M, n, R, S, student_scale, lse[:, None], DS, BLOCK_DS, M, N)
            visible = (keys[None, :] >= first[:, None]) & (keys[None, :] <= row_last[:, None])
            q = tl.where(visible, tl.exp2(log_q), 0.0)
            seen = visible & (keys[None, :] >= first_t[:, None]) if NARROW else visible
            if ONE:
                j = tl.load(heads + i)
                log_p = teacher_rows(
                    teacher_query, teacher_key, teacher_lse, j, b, block * M, n, teacher_scale, R, S, HT, KT, DT, BLOCK_DT, M, N
                )
                p = tl.where(seen, tl.exp2(log_p), 0.0)
            else:
                p = tl.zeros([M, N], tl.float32)
                for u in range(U):
                    j = tl.load(heads + i * U + u)
                    log_a = teacher_rows(
                        teacher_query, teacher_key, teacher_lse, j, b, block * M, n, teacher_scale, R, S, HT, KT, DT, BLOCK_DT, M, N
                    )
                    share = tl.load(shares + u * R + rows, mask=ok, other=0.0)[:, None] if BY_ROW else tl.load(shares + u)
                    p += share * tl.where(seen, tl.exp2(log_a), 0.0)
                log_p = fast_log2(tl.maximum(p, TINY))
            weight = row_norm[:, None]
            if KIND != UNIFORM:
                there = tl.load(positions + b * S + keys, mask=keys < S, other=0) if POSITIONS else keys
                distance = tl.maximum(here[:, None] - there[None, :], 0).to(tl.float32)
                weight *= omega_at(distance, gamma, frontier, inv_width, inv_delta_0, alpha, KIND)
            d = weight * (q - p)
            if part == 0:
                g = weight * (log_p - log_q)  # omega ln(p / q) / ln 2
                row_loss += tl.sum(p * g, 1)
                c += tl.sum(d, 1)
                if not ONE:  # one head's share is 1 whatever its logit; for more, their tiles are made again rather than kept
                    for u in range(U):
                        j = tl.load(heads + i * U + u)
                        log_a = teacher_rows(
                            teacher_query, teacher_key, teacher_lse, j, b, block * M, n, teacher_scale, R, S, HT, KT, DT, BLOCK_DT, M, N
                        )
                        terms = g * tl.where(seen, tl.exp2(log_a), 0.0)
                        d_share = tl.sum(terms, 1)[:, None] if BY_ROW else tl.sum(terms)
                        d_mix += tl.where((choice == u)[None, :], d_share, 0.0)
            if BACKWARD:
                key = tl.trans(load_tile_transposed(key_base, n, S, DS, BLOCK_DS, N, part * BLOCK_DS))
                acc = tl.dot(d.to(key.dtype), key, acc, input_precision="tf32x3")
                if KIND != UNIFORM:
                    mean_key = tl.dot(q.to(key.dtype), key, mean_key, input_precision="tf32x3")
        if BACKWARD:
            store_tile(d_query + at * DS, block * M, R, (acc - c[:, None] * mean_key) * student_scale, DS, BLOCK_DS, M, part * BLOCK_DS)
    partial_at = (b * HS + i) * tl.num_programs(0) + block
    tl.store(loss + partial_at, tl.sum(row_loss * LN2 + c))
    if BY_ROW:
        own = tl.load(shares + choice[None, :] * R + rows[:, None], mask=ok[:, None] & (choice < U)[None, :], other=0.0)
        d_mix = own * (d_mix - row_loss[:, None])
    tl.store(d_pi + partial_at * U + choice, tl.sum(d_mix, 0) * LN2, mask=choice < U)
    tl.store(excess + at + rows, c, mask=ok)


@triton.jit(do_not_specialize=["U"])
def column_kernel(
    student_query,
    student_key,
    teacher_query,
    teacher_key,
    heads,
    pi,
    student_lse,
    teacher_lse,
    student_first,
    teacher_first,
    last,
    norm,
    positions,
    excess,  # all as in row_kernel
    row_range,  # [B, key blocks, 2] int32: plan rows that see a key of the block
    d_key,  # [B, K^s, S, D^s]
    student_scale,
    teacher_scale,
    gamma,
    frontier,
    inv_width,
    inv_delta_0,
    alpha,
    R,
    S,
    HS,
    KS,
    HT,
    KT,
    U,
    DS: tl.constexpr,
    DT: tl.constexpr,
    ONE: tl.constexpr,  # U is 1, and the loop over it gone
    KIND: tl.constexpr,
    NARROW: tl.constexpr,
    BY_ROW: tl.constexpr,
    POSITIONS: tl.constexpr,
    BLOCK_DS: tl.constexpr,
    BLOCK_DT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """BLOCK_DS columns of d key of one block of keys: all rows that see it, of all query heads that read it. Tiles are [N, M]."""
    block, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    parts: tl.constexpr = (DS + BLOCK_DS - 1) // BLOCK_DS
    group, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    keys = block * N + tl.arange(0, N)
    key_base = student_key + (b * KS + group) * S * DS
    there = tl.load(positions + b * S + keys, mask=keys < S, other=0) if POSITIONS else keys
    range_at = (b * tl.num_programs(0) + block) * 2
    start, stop = tl.load(row_range + range_at), tl.load(row_range + range_at + 1)
    acc = tl.zeros([N, BLOCK_DS], tl.float32)
    for i in range(group * (HS // KS), (group + 1) * (HS // KS)):
        at = (b * HS + i) * R
        query_base = student_query + at * DS
        for m in range(start, stop, M):
            rows = m + tl.arange(0, M)
            ok = rows < R
            first, row_last = load_bounds(student_first, last, b, rows, R)
            lse = tl.load(student_lse + at + rows, mask=ok, other=0.0)
            log_q = log_shares(key_base, query_base, block * N, m, S, R, student_scale, lse[None, :], DS, BLOCK_DS, N, M)
            visible = (keys[:, None] >= first[None, :]) & (keys[:, None] <= row_last[None, :])
            q = tl.where(visible, tl.exp2(log_q), 0.0)
            seen = visible
            if NARROW:
                seen &= keys[:, None] >= tl.load(teacher_first + b * R + rows, mask=ok, other=2147483647)[None, :]
            if ONE:
                j = tl.load(heads + i)
                log_p = teacher_columns(
                    teacher_query, teacher_key, teacher_lse, j, b, m, block * N, teacher_scale, R, S, HT, KT, DT, BLOCK_DT, M, N
                )
                p = tl.where(seen, tl.exp2(log_p), 0.0)
            else:
                p = tl.zeros([N, M], tl.float32)
                for u in range(U):
                    j = tl.load(heads + i * U + u)
                    log_a = teacher_columns(
                        teacher_query, teacher_key, teacher_lse, j, b, m, block * N, teacher_scale, R, S, HT, KT, DT, BLOCK_DT, M, N
                    )
                    if BY_ROW:
                        share = tl.load(pi + ((b * HS + i) * U + u) * R + rows, mask=ok, other=0.0)[None, :]
                    else:
                        share = tl.load(pi + i * U + u)
                    p += share * tl.where(seen, tl.exp2(log_a), 0.0)
            weight = tl.load(norm + b * R + rows, mask=ok, other=0.0)[None, :]
            if KIND != UNIFORM:
                here = tl.load(positions + b * S + row_last, mask=first <= row_last, other=0) if POSITIONS else row_last
                distance = tl.maximum(here[None, :] - there[:, None], 0).to(tl.float32)
                weight *= omega_at(distance, gamma, frontier, inv_width, inv_delta_0, alpha, KIND)
            d = weight * (q - p)
            if KIND != UNIFORM:
                d -= q * tl.load(excess + at + rows, mask=ok, other=0.0)[None, :]
            query = tl.trans(load_tile_transposed(query_base, m, R, DS, BLOCK_DS, M, part * BLOCK_DS))
            acc = tl.dot(d.to(query.dtype), query, acc, input_precision="tf32x3")
    store_tile(d_key + (b * KS + group) * S * DS, block * N, S, acc * student_scale, DS, BLOCK_DS, N, part * BLOCK_DS)


@triton.jit(do_not_specialize=["b"])
def mix_kernel(
    teacher_scores,  # [H^t, C, n] float32, q . k
    student_scores,  # [H^s, C, n] float32
    d_scores,  # [H^s, C, n]: gradients of the scaled student scores
    pi,  # [H^s, H^t] float32; BY_ROW: the mixing logits
    log_mass,  # [B, H^t, R] float32, base 2, read BY_ROW: how much of a teacher head's attention lies on keys that the student sees
    student_lse,  # as in row_kernel, like all without a comment
    teacher_lse,
    student_first,
    teacher_first,
    last,
    norm,
    positions,
    loss,  # [C] float32
    d_pi,  # [C, H^s, H^t] float32: the gradient to `pi` as given
    b,
    row_start,
    key_start,
    n,
    student_scale,
    teacher_scale,
    gamma,
    frontier,
    inv_width,
    inv_delta_0,
    alpha,
    R,
    S,
    HS,
    HT,
    KIND: tl.constexpr,
    BY_ROW: tl.constexpr,
    PRECISION: tl.constexpr,  # of the products with the mixture
    BLOCK_HS: tl.constexpr,
    BLOCK_HT: tl.constexpr,
    N: tl.constexpr,
):
    """One plan row: first c = sum of omega (q - p) where omega varies, then loss, d pi and d scores."""
    row, num_rows = tl.program_id(0), tl.num_programs(0)
    at = b.to(tl.int64) * R + row_start + row
    first, first_t, row_last = tl.load(student_first + at), tl.load(teacher_first + at), tl.load(last + at)
    row_norm = tl.load(norm + at)
    here = tl.load(positions + b.to(tl.int64) * S + row_last, mask=first <= row_last, other=0)
    i, j = tl.arange(0, BLOCK_HS), tl.arange(0, BLOCK_HT)
    i_ok, j_ok = i < HS, j < HT
    mixture = tl.load(pi + i[:, None] * HT + j[None, :], mask=i_ok[:, None] & j_ok[None, :], other=0.0)
    lse = tl.load(student_lse + (b.to(tl.int64) * HS + i) * R + row_start + row, mask=i_ok, other=0.0)
    teacher_at = (b.to(tl.int64) * HT + j) * R + row_start + row
    lse_t = tl.load(teacher_lse + teacher_at, mask=j_ok, other=0.0)
    if BY_ROW:
        shifted = mixture * LOG2E + tl.load(log_mass + teacher_at, mask=j_ok, other=-float("inf"))[None, :]
        mixture = tl.exp2(shifted - tl.max(shifted, 1)[:, None])
        mixture = tl.where(i_ok[:, None], mixture / tl.sum(mixture, 1)[:, None], 0.0)
    from_i = (i.to(tl.int64) * num_rows + row) * n
    from_j = (j.to(tl.int64) * num_rows + row) * n
    c, row_loss = tl.zeros([BLOCK_HS], tl.float32), tl.zeros([BLOCK_HS], tl.float32)
    d_mix = tl.zeros([BLOCK_HS, BLOCK_HT], tl.float32)
    for sweep in tl.static_range(1 if KIND == UNIFORM else 0, 2):
        for start in range(0, n, N):
            column = start + tl.arange(0, N)
            ok, keys = column < n, key_start + column
            visible = ok & (keys >= first) & (keys <= row_last)
            t = tl.load(teacher_scores + from_j[:, None] + column[None, :], mask=j_ok[:, None] & ok[None, :], other=0.0)
            a = tl.exp2(t * (teacher_scale * LOG2E) - lse_t[:, None])
            a = tl.where(j_ok[:, None] & (visible & (keys >= first_t))[None, :], a, 0.0)
            z = tl.load(student_scores + from_i[:, None] + column[None, :], mask=i_ok[:, None] & ok[None, :], other=0.0)
            log_q = z * (student_scale * LOG2E) - lse[:, None]
            shown = i_ok[:, None] & visible[None, :]
            q = tl.where(shown, tl.exp2(log_q), 0.0)
            p = tl.dot(mixture, a, input_precision=PRECISION)
            weight = row_norm
            if KIND != UNIFORM:
                there = tl.load(positions + b.to(tl.int64) * S + keys, mask=ok, other=0)
                distance = tl.maximum(here - there, 0).to(tl.float32)
                weight = (row_norm * omega_at(distance, gamma, frontier, inv_width, inv_delta_0, alpha, KIND))[None, :]
            e = weight * (q - p)
            if sweep == 0:
                c += tl.sum(e, 1)
            else:
                g = tl.where(shown, weight * (fast_log2(tl.maximum(p, TINY)) - log_q) * LN2, 0.0)
                row_loss += tl.sum(p * g + e, 1)
                d_mix = tl.dot(g, tl.trans(a), d_mix, input_precision=PRECISION)
                d = (e - q * c[:, None]).to(d_scores.dtype.element_ty)
                tl.store(d_scores + from_i[:, None] + column[None, :], d, mask=i_ok[:, None] & ok[None, :])
    tl.store(loss + row, tl.sum(row_loss))
    if BY_ROW:
        d_mix = mixture * (d_mix - tl.sum(mixture * d_mix, 1)[:, None])
    where = (row.to(tl.int64) * HS + i[:, None]) * HT + j[None, :]
    tl.store(d_pi + where, d_mix, mask=i_ok[:, None] & j_ok[None, :])


# Tiles as (rows M, keys N, warps, stages) for each chip and whether a head dim is wider than a tile; first where one teacher head is mixed
# under plain masks and token distances, then for everything else (the first may be missing). Hopper's were the fastest of those timed on
# an H200, where a few spilled registers cost less than smaller tiles; the others' spill least, found by compiling.
ROW_TILES = {
    (80, False): ((32, 64, 4, 2), (32, 32, 4, 2)),
    (80, True): ((32, 32, 4, 2), (32, 16, 4, 1)),
    (90, False): ((128, 32, 8, 3), (64, 32, 4, 2)),
    (90, True): ((128, 16, 8, 1), (64, 32, 4, 2)),
    (100, False): ((64, 32, 4, 2), (64, 32, 4, 2)),
    (100, True): ((64, 16, 4, 1), (64, 16, 4, 1)),
}
COLUMN_TILES = {
    (80, False): ((16, 64, 4, 2), (16, 128, 8, 1)),
    (80, True): (None, (16, 128, 8, 1)),
    (90, False): ((64, 128, 8, 2), (64, 64, 4, 2)),
    (90, True): ((64, 128, 8, 1), (32, 128, 8, 2)),
    (100, False): (None, (32, 128, 8, 2)),
    (100, True): (None, (16, 128, 8, 1)),
}
# the same where the rows mix by their own pi, as far as it asks for others
BY_ROW_TILES = {("row", 80, False): (32, 32, 4, 1), ("column", 100, False): (16, 128, 8, 2)}

# what float32 asks for, every product being three, on any chip: it fits, and spills
EXACT_TILES = {"row": (32, 32, 4, 1), "column": (16, 32, 4, 1)}


def tile_options(
    kernel: str, chip: int, student_dim: int, teacher_dim: int, plain: bool, by_row: bool, exact: bool = False
) -> dict[str, int]:
    """Tile and launch sizes of the "row" or "column" kernel. plain: one head, both see the same keys, token distances; exact: float32."""
    wide = max(student_dim, teacher_dim) > WIDEST_TILE
    best, general = (ROW_TILES if kernel == "row" else COLUMN_TILES)[chip, wide]
    if by_row:
        general = BY_ROW_TILES.get((kernel, chip, wide), general)
    rows, keys, warps, stages = EXACT_TILES[kernel] if exact else best if plain and best else general
    blocks = {"BLOCK_DS": min(tiles.block_d(student_dim), WIDEST_TILE), "BLOCK_DT": min(tiles.block_d(teacher_dim), WIDEST_TILE)}
    return blocks | {"ONE": bool(plain and best), "M": rows, "N": keys, "num_warps": warps, "num_stages": stages}


def _chip(device: torch.device) -> int:
    """The table entry for a device; the interpreter takes Hopper's."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
    return {8: 80, 9: 90}.get(major, 100)


def _omega_numbers(problem: Problem) -> tuple[float, ...]:
    omega = problem.omega
    return float(omega.gamma), float(omega.frontier), 1 / omega.width, 1 / omega.delta_0, float(omega.alpha)


def _norm(problem: Problem, plan: tiles.Plan, positions: Tensor) -> Tensor:
    """[B, R]: what omega is multiplied with in each row."""
    if problem.omega.kind == "uniform":
        return plan.weight
    norm = torch.empty_like(plan.weight)
    (batch, rows), keys = norm.shape, positions.shape[1]
    options = {"KIND": KINDS.index(problem.omega.kind), "M": 64, "N": 64}
    norm_kernel[(triton.cdiv(rows, 64), batch)](
        plan.weight, plan.first, plan.last, positions, norm, *_omega_numbers(problem), rows, keys, **options
    )
    return norm


def _log_sum_exp(side: Side, query: Tensor, key: Tensor, plan: tiles.Plan, first: Tensor, heads: Tensor | None) -> Tensor:
    """[B, H, R] base 2: the caller's, else computed for `heads`."""
    if side.lse is not None:
        return plan.gather(side.lse).float() * LOG2E.value
    return tiles.log_sum_exp(query, key, side.scale, plan, first, heads)


def _prepare(problem: Problem, used: Tensor | None) -> tuple[tiles.Plan, dict[str, Tensor]]:
    """The plan and the contiguous tensors that both forms read, named as the kernels' arguments."""
    student, teacher = problem.student, problem.teacher
    plan_of = partial(tiles.plan, problem.weight, query_offset=problem.query_offset, device=student.query.device)
    plan = plan_of(student.first)
    taught = plan if torch.equal(student.first, teacher.first) else plan_of(teacher.first)
    x = {"student_query": plan.gather(student.query), "student_key": student.key.contiguous()}
    x |= {"teacher_query": plan.gather(teacher.query), "teacher_key": teacher.key.contiguous()}
    x["student_lse"] = _log_sum_exp(student, x["student_query"], x["student_key"], plan, plan.first, None)
    x["teacher_lse"] = _log_sum_exp(teacher, x["teacher_query"], x["teacher_key"], plan, taught.first, used)
    x |= {"student_first": plan.first, "teacher_first": taught.first, "last": plan.last}
    x["positions"] = tiles.positions_or_tokens(problem.positions, x["student_key"])
    x["norm"] = _norm(problem, plan, x["positions"])
    tiles.check_layout(student.query.device, **x)
    return plan, x


def _log_mass(problem: Problem, plan: tiles.Plan, x: dict[str, Tensor], used: Tensor | None) -> Tensor:
    """[B, H^t, R] base 2: the share of each teacher head's attention that lies on the keys that both see, 1 in rows that see none."""
    alone = problem.teacher_alone
    first = tiles.plan(problem.weight, alone.first, problem.query_offset, plan.first.device).first
    whole = _log_sum_exp(alone, x["teacher_query"], x["teacher_key"], plan, first, used)
    return torch.where((plan.first <= plan.last)[:, None], x["teacher_lse"] - whole, 0.0)


def _sparse(problem: Problem, mixing: Tensor, backward: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """(loss, d query, d key, d mixing) by the row and the column pass."""
    choice = problem.teacher_heads
    given = all(side.lse is not None for side in (problem.teacher, problem.teacher_alone) if side)
    used = None if given else choice.unique()  # which waits for the card
    plan, x = _prepare(problem, used)
    by_row, pi = problem.teacher_alone is not None, mixing.gather(1, choice)
    if by_row:
        log_mass = _log_mass(problem, plan, x, used)[:, choice]  # [B, H^s, U, R]
        pi = (pi[..., None] + log_mass * LN2.value).softmax(2)
    x |= {"heads": choice.int().contiguous(), "pi": pi.contiguous()}
    tiles.check_layout(mixing.device, heads=x["heads"], pi=x["pi"])
    (batch, heads, rows, size), (_, key_heads, keys, _) = x["student_query"].shape, x["student_key"].shape
    (_, teacher_heads, _, teacher_size), teacher_key_heads = x["teacher_query"].shape, x["teacher_key"].shape[1]
    new = partial(torch.empty, dtype=torch.float32, device=mixing.device)
    x |= dict(zip(("gamma", "frontier", "inv_width", "inv_delta_0", "alpha"), _omega_numbers(problem), strict=True))
    x |= {"student_scale": problem.student.scale, "teacher_scale": problem.teacher.scale, "R": rows, "S": keys}
    x |= {"HS": heads, "KS": key_heads, "HT": teacher_heads, "KT": teacher_key_heads}
    x |= {"DS": size, "DT": teacher_size, "U": choice.shape[1], "KIND": KINDS.index(problem.omega.kind)}
    narrow, positions = x["teacher_first"] is not plan.first, problem.positions is not None
    x |= {"NARROW": narrow, "BY_ROW": by_row, "POSITIONS": positions, "excess": new(batch, heads, rows)}
    plain = choice.shape[1] == 1 and not narrow and not positions
    how = {"chip": _chip(mixing.device), "student_dim": size, "teacher_dim": teacher_size, "plain": plain, "by_row": by_row}
    how["exact"] = mixing.is_cuda and x["student_query"].dtype is torch.float32

    options = tile_options("row", **how)
    blocks = triton.cdiv(rows, options["M"])
    held = torch.float32 if problem.student.query.dtype is torch.float16 else problem.student.query.dtype
    d_query = new(batch, heads, rows, size, dtype=held) if backward else x["student_query"]
    loss, d_pi = new(batch, heads, blocks), new(batch, heads, blocks, choice.shape[1])
    row_kernel[(blocks, heads, batch)](**x, d_query=d_query, loss=loss, d_pi=d_pi, BACKWARD=backward, **options)
    d_mixing = torch.zeros_like(mixing).scatter(1, choice, d_pi.sum((0, 2)).to(mixing.dtype))
    if not backward:
        return loss.sum(), None, None, d_mixing

    options = tile_options("column", **how)
    d_key = new(batch, key_heads, keys, size, dtype=held)
    ranges = plan.row_range(keys, options["N"])
    grid = triton.cdiv(keys, options["N"]), key_heads * triton.cdiv(size, options["BLOCK_DS"]), batch
    column_kernel[grid](**x, row_range=ranges, d_key=d_key, **options)
    return loss.sum(), plan.scatter(d_query, problem.student.query.shape[2]), d_key, d_mixing


def _dense(problem: Problem, chunk_size: int | None, mixing: Tensor, backward: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """(loss, d query, d key, d mixing) by chunks of rows."""
    plan, x = _prepare(problem, None)
    by_row = problem.teacher_alone is not None
    x |= {"BY_ROW": by_row, "log_mass": _log_mass(problem, plan, x, None) if by_row else x["teacher_lse"]}
    names = ("student_query", "student_key", "teacher_query", "teacher_key")
    student_query, student_key, teacher_query, teacher_key = (x.pop(name) for name in names)
    (batch, heads, rows, _), (teacher_heads, keys) = student_query.shape, (teacher_query.shape[1], student_key.shape[2])
    x |= dict(zip(("gamma", "frontier", "inv_width", "inv_delta_0", "alpha"), _omega_numbers(problem), strict=True))
    x |= {"student_scale": problem.student.scale, "teacher_scale": problem.teacher.scale, "R": rows, "S": keys}
    x |= {"HS": heads, "HT": teacher_heads, "KIND": KINDS.index(problem.omega.kind), "pi": mixing.contiguous()} | mix_options(
        heads, teacher_heads
    )
    x["PRECISION"] = "tf32x3" if student_query.dtype is torch.float32 else "tf32"  # as exact as the inputs
    row_bytes = keys * (4 * teacher_heads + (4 + student_query.itemsize) * heads)
    chunk_size = min(chunk_size or max(DENSE_BYTES // row_bytes, 16), rows)
    new = partial(torch.empty, dtype=torch.float32, device=mixing.device)
    scratch = [new(teacher_heads * chunk_size * keys), new(heads * chunk_size * keys), student_query.new_empty(heads * chunk_size * keys)]
    held = torch.float32 if student_query.dtype is torch.float16 else student_query.dtype
    d_query, d_key = torch.zeros_like(student_query, dtype=held), torch.empty_like(student_key, dtype=held)
    loss, d_pi = mixing.new_zeros(batch, rows), torch.zeros_like(mixing)
    for b in range(batch):
        d_key_b = torch.zeros_like(student_key[b], dtype=torch.float32)
        bounds = plan.bounds[b]
        for start in range(0, rows, chunk_size):
            chunk = slice(start, min(start + chunk_size, rows))
            num_rows = chunk.stop - start
            first, last = bounds[:, chunk][:, bounds[0, chunk] <= bounds[1, chunk]]
            if not len(first):
                continue  # none of them counts
            span = _aligned(int(first.min()), int(last.max()) + 1, keys)
            n = span.stop - span.start
            t, z, d = (s[: h * num_rows * n].view(h, num_rows, n) for s, h in zip(scratch, (teacher_heads, heads, heads), strict=True))
            query = student_query[b, :, chunk]
            _products(teacher_query[b, :, chunk], teacher_key[b, :, span], t)
            _products(query, student_key[b, :, span], z)
            d_pi_rows = new(num_rows, heads, teacher_heads)
            where = {"b": b, "row_start": start, "key_start": span.start, "n": n}
            mix_kernel[(num_rows,)](t, z, d, loss=loss[b, chunk], d_pi=d_pi_rows, **where, **x)
            d_pi += d_pi_rows.sum(0)
            if backward:
                per_key = d.view(len(student_key[b]), -1, n)  # [K, C H/K, n]
                d_query[b, :, chunk] = (_bmm(per_key, student_key[b, :, span]).view(query.shape) * problem.student.scale).to(held)
                d_key_b[:, span] += _bmm(per_key.mT, query.reshape(len(per_key), -1, query.shape[2])) * problem.student.scale
        d_key[b] = d_key_b
    if not backward:
        return loss.sum(), None, None, d_pi
    return loss.sum(), plan.scatter(d_query, problem.student.query.shape[2]), d_key, d_pi


def _aligned(start: int, stop: int, keys: int) -> slice:
    """The span widened to multiples of 16, so that rows of the score buffers can be read in whole vectors."""
    return slice(start // 16 * 16, min(-(-stop // 16) * 16, keys))


def _products(query: Tensor, key: Tensor, out: Tensor) -> None:
    """out [H, C, n] = query [H, C, D] . key [K, n, D], in float32."""
    _bmm(query.reshape(len(key), -1, query.shape[2]), key.mT, out=out.view(len(key), -1, key.shape[1]))


def _bmm(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """Batched product in float32 of low-precision operands; only CUDA has the product that need not convert them first."""
    if x.is_cuda and x.dtype is not torch.float32:
        return torch.bmm(x, y, out_dtype=torch.float32, out=out)
    return torch.bmm(x.float(), y.float(), out=out)


def mix_options(heads: int, teacher_heads: int) -> dict[str, int]:
    """Tile and launch sizes of mix_kernel."""
    return {"BLOCK_HS": tiles.block_d(heads), "BLOCK_HT": tiles.block_d(teacher_heads), "N": 64, "num_warps": 4, "num_stages": 3}
