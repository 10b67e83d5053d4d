"""The attention profile on CUDA, in Triton: a pass for the log-sum-exp, one for everything by distance, one for the rotary planes.

No attention map leaves a tile, no atomics: each block of rows writes its sums, which are added in a fixed order. Letters: R rows of the
plan (see kernels/tiles.py), S keys, H heads, E edges, P planes, M rows and N keys of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from laid_ds.kernels import tiles
from laid_ds.kernels.attention_profile.problem import Problem, Profile
from laid_ds.kernels.tiles import LN2, LOG2E, key_range, load_bounds, load_tile, load_tile_transposed


@triton.jit
def profile_kernel(
    query,  # [B, H, R, D]
    key,  # [B, K, S, D]
    lse,  # [B, H, R] float32, base 2
    first,  # [B, R] int32
    last,  # [B, R] int32
    weight,  # [B, R] float32
    positions,  # [B, S] int32
    edges,  # [E] int32
    marked,  # [B, S] int8
    entropy,  # [B, H, R] float32
    mass,  # [B, H, blocks, E + 1] float32: mass at distances >= each edge, and on marked keys
    pairs,  # [B, blocks, E] float32: pairs at distances >= each edge
    scale,  # without log2(e)
    R,
    S,
    H,
    K,
    E,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    block, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = block * M + tl.arange(0, M)
    row_first, row_last = load_bounds(first, last, b, rows, R)
    at = (b * H + h) * R
    row_lse = tl.load(lse + at + rows, mask=rows < R, other=0.0)
    row_weight = tl.load(weight + b * R + rows, mask=rows < R, other=0.0)
    here = tl.load(positions + b * S + row_last, mask=row_first <= row_last, other=0)
    q = load_tile(query + at * D, block * M, R, D, BLOCK_D, M)
    key_base = key + (b * K + h // (H // K)) * S * D
    column = tl.arange(0, BLOCK_E)
    row_entropy = tl.zeros([M], tl.float32)
    row_mass, row_pairs = tl.zeros([M, BLOCK_E], tl.float32), tl.zeros([M, BLOCK_E], tl.float32)
    start, stop = key_range(row_first, row_last, S, N)
    for n in range(start, stop, N):
        keys = n + tl.arange(0, N)
        k = load_tile_transposed(key_base, n, S, D, BLOCK_D, N)
        log_p = tl.dot(q, k, input_precision="tf32x3") * (scale * LOG2E) - row_lse[:, None]
        visible = (keys[None, :] >= row_first[:, None]) & (keys[None, :] <= row_last[:, None])
        p = tl.where(visible, tl.exp2(log_p), 0.0)
        row_entropy -= tl.sum(p * log_p, 1) * LN2
        there = tl.load(positions + b * S + keys, mask=keys < S, other=0)
        distance = tl.maximum(here[:, None] - there[None, :], 0)
        for e in range(E):
            beyond = distance >= tl.load(edges + e)
            row_mass += tl.where(column[None, :] == e, tl.sum(tl.where(beyond, p, 0.0), 1)[:, None], 0.0)
            if h == 0:
                row_pairs += tl.where(column[None, :] == e, tl.sum((beyond & visible).to(tl.float32), 1)[:, None], 0.0)
        on_marked = tl.sum(p * tl.load(marked + b * S + keys, mask=keys < S, other=0).to(tl.float32)[None, :], 1)
        row_mass += tl.where(column[None, :] == E, on_marked[:, None], 0.0)
    tl.store(entropy + at + rows, row_entropy, mask=rows < R)
    blocks = tl.num_programs(0)
    mass_at = mass + ((b * H + h) * blocks + block) * (E + 1)
    tl.store(mass_at + column, tl.sum(row_mass * row_weight[:, None], 0), mask=column <= E)
    if h == 0:
        tl.store(pairs + (b * blocks + block) * E + column, tl.sum(row_pairs * row_weight[:, None], 0), mask=column < E)


@triton.jit
def plane_kernel(
    query,
    key,
    first,
    last,
    weight,
    positions,  # as in profile_kernel
    planes,  # [P, 2] int32
    response,  # [B, H, blocks, P] float32
    far,
    scale,
    R,
    S,
    H,
    K,
    P,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    block, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = block * M + tl.arange(0, M)
    row_first, row_last = load_bounds(first, last, b, rows, R)
    row_weight = tl.load(weight + b * R + rows, mask=rows < R, other=0.0) * scale
    here = tl.load(positions + b * S + row_last, mask=row_first <= row_last, other=0)
    query_base = query + ((b * H + h) * R + rows) * D
    key_base = key + (b * K + h // (H // K)) * S * D
    start, stop = key_range(row_first, row_last, S, N)
    for f in range(P):
        x, y = tl.load(planes + 2 * f), tl.load(planes + 2 * f + 1)
        query_x = tl.load(query_base + x, mask=rows < R, other=0.0).to(tl.float32)
        query_y = tl.load(query_base + y, mask=rows < R, other=0.0).to(tl.float32)
        total = tl.zeros([M], tl.float32)
        for n in range(start, stop, N):
            keys = n + tl.arange(0, N)
            at = keys.to(tl.int64) * D
            key_x = tl.load(key_base + at + x, mask=keys < S, other=0.0).to(tl.float32)
            key_y = tl.load(key_base + at + y, mask=keys < S, other=0.0).to(tl.float32)
            there = tl.load(positions + b * S + keys, mask=keys < S, other=0)
            counts = (keys[None, :] >= row_first[:, None]) & (keys[None, :] <= row_last[:, None])
            counts &= tl.maximum(here[:, None] - there[None, :], 0) >= far
            part = tl.abs(query_x[:, None] * key_x[None, :] + query_y[:, None] * key_y[None, :])
            total += tl.sum(tl.where(counts, part, 0.0), 1)
        at_block = ((b * H + h) * tl.num_programs(0) + block) * P
        tl.store(response + at_block + f, tl.sum(total * row_weight))


def profile_options(size: int, edges: int) -> dict[str, int]:
    """Tile and launch sizes of profile_kernel for a head dim and a number of edges."""
    blocks = {"BLOCK_D": tiles.block_d(size), "BLOCK_E": tiles.block_d(edges + 1)}
    return blocks | {"M": 64, "N": 32 if blocks["BLOCK_D"] <= 128 else 16, "num_warps": 4, "num_stages": 1}


PLANE_OPTIONS = {"M": 64, "N": 64, "num_warps": 8}


def attention_profile(problem: Problem, row_count: int, chunk_size: int | None = None) -> Profile:
    """As reference.attention_profile, for bfloat16, float16 and float32; `chunk_size` has no meaning here."""
    if problem.dtype is torch.float64:
        raise ValueError("implementation is 'fused' with float64 inputs: expected bfloat16, float16 or float32")
    plan = tiles.plan(problem.weight, problem.first, problem.query_offset, problem.query.device)
    query, key = plan.gather(problem.query), problem.key.contiguous()
    (batch, heads, rows, size), (_, key_heads, keys, _) = query.shape, key.shape
    if problem.lse is None:
        lse = tiles.log_sum_exp(query, key, problem.scale, plan, plan.first)
    else:
        lse = plan.gather(problem.lse).float() * LOG2E.value
    positions = tiles.positions_or_tokens(problem.positions, key)
    edges = torch.cat([problem.bins, problem.bins.new_tensor([problem.far])]).int()
    marked = torch.zeros(batch, keys, dtype=torch.bool, device=key.device) if problem.marked is None else problem.marked
    marked = marked.to(torch.int8).contiguous()
    tiles.check_layout(key.device, query=query, key=key, lse=lse, positions=positions, edges=edges, marked=marked)
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=key.device)  # noqa: E731
    options = profile_options(size, len(edges))
    blocks = triton.cdiv(rows, options["M"])
    entropy, mass, pairs = new(batch, heads, rows), new(batch, heads, blocks, len(edges) + 1), new(batch, blocks, len(edges))
    bounds, shape = (plan.first, plan.last, plan.weight, positions), (rows, keys, heads, key_heads)
    profile_kernel[(blocks, heads, batch)](
        query, key, lse, *bounds, edges, marked, entropy, mass, pairs, problem.scale, *shape, len(edges), size, **options
    )
    response = None
    if problem.planes is not None:
        response = new(batch, heads, blocks, len(problem.planes))
        numbers = (problem.far, problem.scale, *shape, len(problem.planes), size)
        plane_kernel[(blocks, heads, batch)](query, key, *bounds, problem.planes.int().contiguous(), response, *numbers, **PLANE_OPTIONS)
        response = response.double().sum((0, 2))
    mass, pairs = mass.double().sum((0, 2)), pairs.double().sum((0, 1))
    return Profile(
        row_count=row_count,
        lse=_rows_or_nan(plan, lse * LN2.value, problem.query.shape[2]),
        entropy=_rows_or_nan(plan, entropy, problem.query.shape[2]),
        entropy_sum=(entropy.double() * plan.weight[:, None]).sum((0, 2)),
        bins=problem.bins,
        bin_mass=_between(mass[:, : len(problem.bins)]),
        bin_pairs=_between(pairs[: len(problem.bins)]),
        far_mass=mass[:, -2],
        far_pairs=pairs[-1],
        plane_response=response,
        marked_mass=None if problem.marked is None else mass[:, -1],
    )


def _between(beyond: Tensor) -> Tensor:
    """What lies in each bin [..., E], from what lies at or beyond its lower edge."""
    return torch.cat([beyond[..., :-1] - beyond[..., 1:], beyond[..., -1:]], -1)


def _rows_or_nan(plan: tiles.Plan, x: Tensor, tokens: int) -> Tensor:
    """x [B, H, R] at its rows of [B, H, T], NaN elsewhere."""
    x = x.masked_fill((plan.weight == 0)[:, None], torch.nan)
    out = torch.full((*x.shape[:2], tokens), torch.nan, dtype=x.dtype, device=x.device)
    return out.scatter(2, plan.rows[:, None].expand_as(x), x)
