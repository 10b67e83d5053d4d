"""How fast matching and attention are here, as a share of what the device's own matrix products reach."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from laid_ds.doctor.attention import short
from laid_ds.doctor.line import OK, SLOW, Line, Room, looked
from laid_ds.kernels import switch
from laid_ds.kernels.attention_matching import Omega, attention_matching
from laid_ds.models import backends

SLOW_SHARE = 0.015  # of the speed of a large matrix product; an H200 alone reaches 0.033 with matching at 4,096 tokens
SIZES = {  # lengths, (H^s, K^s), (H^t, K^t), head dim, side of the matrix product, dtype
    "cuda": ((4096, 8192, 16384), (28, 4), (40, 8), 128, 8192, torch.bfloat16),
    "cpu": ((512, 1024, 2048), (4, 2), (8, 4), 64, 1024, torch.float32),
}
REPEATS = 4
OMEGA = Omega("frontier", gamma=3.0, frontier=1024.0, width=256.0)


def speed(device: torch.device) -> Room:
    """Products first, then a line for each kernel and length, forward and backward together."""
    lengths, student, teacher, dim, side, dtype = SIZES[device.type]
    x = torch.randn(side, side, device=device, dtype=dtype)
    peak = 2 * side**3 / seconds(lambda: x @ x, device)
    yield Line("matrix products", OK, f"{peak / 1e12:.3g} TFLOP/s ({side} x {side}, {short(dtype)})", "", {"flops_per_second": peak})
    for tokens in lengths:
        yield looked(f"attention, {tokens} tokens", partial(_attention, device, dtype, tokens, student, dim, peak))
    for tokens in lengths:
        yield looked(f"matching, {tokens} tokens", partial(_matching, device, dtype, tokens, student, teacher, dim, peak))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """The fastest of REPEATS runs after one to warm up."""
    times = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _attention(device: torch.device, dtype: torch.dtype, tokens: int, heads: tuple[int, int], dim: int, peak: float) -> Line:
    query, key, value = (_drawn(h, tokens, dim, device, dtype).requires_grad_() for h in (heads[0], heads[1], heads[1]))

    def work() -> None:
        out, _ = backends.attend(query, key, value, None, dim**-0.5)
        torch.autograd.grad(out.sum(), [query, key, value])

    products = 7 * heads[0]  # 2 forward, 5 backward
    return _line("attention", switch.used, seconds(work, device), products, tokens, dim, peak, device)


def _matching(
    device: torch.device, dtype: torch.dtype, tokens: int, heads: tuple[int, int], taught: tuple[int, int], dim: int, peak: float
) -> Line:
    query, key = (_drawn(h, tokens, dim, device, dtype).requires_grad_() for h in heads)
    teacher = [_drawn(h, tokens, dim, device, dtype) for h in taught]
    mixing = torch.zeros(heads[0], taught[0], device=device, requires_grad=True)
    scale = {"student_scale": dim**-0.5, "teacher_scale": dim**-0.5}

    def work() -> None:
        loss, count = attention_matching(query, key, *teacher, mixing, omega=OMEGA, **scale)
        torch.autograd.grad(loss / count, [query, key, mixing])

    products = taught[0] + 3 * heads[0] + 2 * heads[0] * taught[0] / dim  # the last: mixing and its gradient
    return _line("attention_matching", switch.used, seconds(work, device), products, tokens, dim, peak, device)


def _line(
    what: str, used: Callable[[], dict[str, str]], taken: float, products: float, tokens: int, dim: int, peak: float, device: torch.device
) -> Line:
    share = products * 2 * dim * tokens * (tokens + 1) / 2 / taken / peak
    check = f"{what.removeprefix('attention_')}, {tokens} tokens"
    numbers = {"tokens": tokens, "seconds": taken, "share_of_products": share, "kernel": used()[what]}
    if device.type == "cuda":
        numbers["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    found = f"{taken * 1e3:.3g} ms, {share:.0%} of the speed of matrix products ({used()[what]})"
    if share < SLOW_SHARE:
        return Line(
            check, SLOW, found, "is the device shared, throttled (nvidia-smi -q -d PERFORMANCE), or the CPU oversubscribed?", numbers
        )
    return Line(check, OK, found, "", numbers)


def _drawn(heads: int, tokens: int, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(1, heads, tokens, dim, device=device, dtype=dtype)
