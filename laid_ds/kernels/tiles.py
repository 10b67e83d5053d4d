"""Triton pieces that the fused kernels share: row plans on the device, tiles of scores, and the log-sum-exp pass.

Everything runs in base 2: a score is q . k times scale * log2(e), and 2 ** (score - lse) is a probability. Tensors are contiguous, row
and key counts are arguments, head sizes are compile-time. Letters: R rows in the plan, S keys, H heads, D head dim, M rows and N keys of
a tile. Offsets are int64; tiles outside every row's [first, last] are never visited.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Plan:
    """The rows that take part, compacted to R per batch element; rows of weight 0 fill up and see no key."""

    rows: Tensor  # [B, R] int64: query row of each plan row
    last: Tensor  # [B, R] int32: its own key, the last it sees
    first: Tensor  # [B, R] int32
    weight: Tensor  # [B, R] float32
    bounds: Tensor  # [B, 2, R] int32: first and last, on the CPU
    whole: bool  # every query row takes part, in its place

    def gather(self, x: Tensor) -> Tensor:
        """x [B, H, T, ...] at the plan's rows, contiguous: [B, H, R, ...]; x itself where nothing need be moved."""
        if self.whole:
            return x.contiguous()
        index = self.rows[:, None, :].expand(-1, x.shape[1], -1)
        if x.ndim == 4:
            index = index[..., None].expand(-1, -1, -1, x.shape[3])
        return x.gather(2, index).contiguous()

    def scatter(self, x: Tensor, tokens: int) -> Tensor:
        """The reverse of `gather` for x [B, H, R, D], zero at the other of `tokens` rows."""
        if self.whole:
            return x
        index = self.rows[:, None, :, None].expand_as(x)
        return x.new_zeros(*x.shape[:2], tokens, x.shape[3]).scatter_add_(2, index, x)

    def row_range(self, keys: int, block: int) -> Tensor:
        """[B, blocks, 2] int32: the plan rows first .. stop - 1 that see a key of each block of keys; both bounds of a row grow along R."""
        starts = torch.arange(0, keys, block, dtype=torch.int32, device=self.first.device).expand(len(self.first), -1).contiguous()
        low = torch.searchsorted(self.last, starts)
        high = torch.searchsorted(self.first, starts + block)
        return torch.stack([low, high], -1).int()


def plan(weight: Tensor, first: Tensor, query_offset: int, device: torch.device) -> Plan:
    """Compact the rows of weight [B, T] > 0 (both on the CPU) and move them to the device."""
    tokens = weight.shape[1]
    count = (weight > 0).sum(1)
    longest = max(int(count.max()), 1)
    rows = (weight > 0).int().argsort(dim=1, descending=True, stable=True)[:, :longest]
    filler = torch.arange(longest) >= count[:, None]
    last = rows + query_offset
    first = first.gather(1, rows)
    beyond = tokens + query_offset  # past every key that a row sees: sorted after all, seeing none
    last, first = last.masked_fill(filler, beyond), first.masked_fill(filler, beyond + 1)
    weight = weight.gather(1, rows).masked_fill(filler, 0)
    first, last = first.int(), last.int()
    there = (x.to(device) for x in (rows, last, first, weight.float()))
    return Plan(*there, bounds=torch.stack([first, last], 1), whole=int(count.min()) == tokens)


def check_layout(device: torch.device, **tensors: Tensor) -> None:
    """The kernels know a tensor by its first element: each must lie on the device, without gaps."""
    for name, x in tensors.items():
        assert x.device == device, f"{name} is on {x.device}, not on {device}"
        assert x.is_contiguous(), f"{name} {tuple(x.shape)} has strides {x.stride()}"


def positions_or_tokens(positions: Tensor | None, key: Tensor) -> Tensor:
    """[B, S] int32, contiguous: what distances are differences of; token indices if no positions are given."""
    if positions is not None:
        return positions.int().contiguous()
    return torch.arange(key.shape[2], dtype=torch.int32, device=key.device).repeat(len(key), 1)


@triton.jit
def fast_log2(x):
    """One instruction where tl.log2 is twenty; absolute error below 3e-7. Triton's interpreter lacks it."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return libdevice.fast_log2f(x)


@triton.jit
def load_tile(base, start, stop, D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, column=0):
    """[M, BLOCK_D] rows from `start`, columns from `column`, of a contiguous [*, D] at base; zero past D and from row `stop` on.

    Only the scalar part of the offset is int64: a tile of int64 offsets would fill the registers.
    """
    m, d = tl.arange(0, M), column + tl.arange(0, BLOCK_D)
    ok = (start + m < stop)[:, None]
    if D % BLOCK_D:
        ok = ok & (d < D)[None, :]
    return tl.load(base + tl.cast(start, tl.int64) * D + (m[:, None] * D + d[None, :]), mask=ok, other=0.0)


@triton.jit
def load_tile_transposed(base, start, stop, D: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr, column=0):
    """[BLOCK_D, N] of the same."""
    n, d = tl.arange(0, N), column + tl.arange(0, BLOCK_D)
    ok = (start + n < stop)[None, :]
    if D % BLOCK_D:
        ok = ok & (d < D)[:, None]
    return tl.load(base + tl.cast(start, tl.int64) * D + (n[None, :] * D + d[:, None]), mask=ok, other=0.0)


@triton.jit
def store_tile(base, start, stop, x, D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, column=0):
    """The reverse of load_tile, in the dtype of base."""
    m, d = tl.arange(0, M), column + tl.arange(0, BLOCK_D)
    ok = (start + m < stop)[:, None] & (d < D)[None, :]
    tl.store(base + tl.cast(start, tl.int64) * D + (m[:, None] * D + d[None, :]), x.to(base.dtype.element_ty), mask=ok)


@triton.jit
def load_bounds(first, last, b, rows, R):
    """(first, last) key [M] of plan rows; none past R."""
    ok = rows < R
    at = b * R + rows
    return tl.load(first + at, mask=ok, other=2147483647), tl.load(last + at, mask=ok, other=-1)


@triton.jit
def key_range(first, last, S, N: tl.constexpr):
    """(start, stop) of the keys that some row of a tile sees; start is a multiple of N. Rows that see none have first > last."""
    stop = tl.minimum(tl.max(tl.where(first <= last, last, -1)) + 1, S)
    return tl.minimum(tl.min(first), stop) // N * N, stop


@triton.jit
def lse_kernel(
    query,  # [B, H, R, D]
    key,  # [B, K, S, D]
    heads,  # [U] int32: the heads to do
    first,  # [B, R] int32
    last,  # [B, R] int32
    lse,  # [B, H, R] float32, base 2; 0 for rows that see no key
    scale,  # times log2(e)
    R,
    S,
    H,
    K,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    h = tl.load(heads + tl.program_id(1)).to(tl.int64)
    rows = tl.program_id(0) * M + tl.arange(0, M)
    row_first, row_last = load_bounds(first, last, b, rows, R)
    q = load_tile(query + (b * H + h) * R * D, tl.program_id(0) * M, R, D, BLOCK_D, M)
    k_base = key + (b * K + h // (H // K)) * S * D
    highest = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    start, stop = key_range(row_first, row_last, S, N)
    for n in range(start, stop, N):
        keys = n + tl.arange(0, N)
        z = tl.dot(q, load_tile_transposed(k_base, n, S, D, BLOCK_D, N), input_precision="tf32x3") * scale
        z = tl.where((keys[None, :] >= row_first[:, None]) & (keys[None, :] <= row_last[:, None]), z, -float("inf"))
        peak = tl.maximum(highest, tl.max(z, 1))
        base = tl.where(peak > -float("inf"), peak, 0.0)
        total = total * tl.exp2(highest - base) + tl.sum(tl.exp2(z - base[:, None]), 1)
        highest = peak
    result = tl.where(total > 0, highest + tl.log2(tl.where(total > 0, total, 1.0)), 0.0)
    tl.store(lse + (b * H + h) * R + rows, result, mask=rows < R)


def log_sum_exp(query: Tensor, key: Tensor, scale: float, rows: Plan, first: Tensor, heads: Tensor | None = None) -> Tensor:
    """Base-2 log-sum-exp [B, H, R] of the scaled scores of query [B, H, R, D] over key [B, K, S, D]; unwritten for heads not asked for."""
    batch, num_heads, num_rows, size = query.shape
    heads = torch.arange(num_heads, device=query.device) if heads is None else heads
    lse = torch.empty(batch, num_heads, num_rows, dtype=torch.float32, device=query.device)
    options = lse_options(size)
    grid = (triton.cdiv(num_rows, options["M"]), len(heads), batch)
    shape = num_rows, key.shape[2], num_heads, key.shape[1]
    lse_kernel[grid](query, key, heads.int(), first, rows.last, lse, scale * LOG2E.value, *shape, size, **options)
    return lse


def block_d(size: int) -> int:
    """The power of two that holds a head dim, at least what a matrix instruction takes."""
    return max(triton.next_power_of_2(size), 16)


def lse_options(size: int) -> dict[str, int]:
    """Tile and launch sizes of lse_kernel for a head dim."""
    wide = block_d(size) > 128
    return {"BLOCK_D": block_d(size), "M": 128, "N": 32 if wide else 64, "num_warps": 8 if wide else 4, "num_stages": 2}
