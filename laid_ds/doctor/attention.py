"""Each branch of attention that exists here against attention as it is defined, in float32: outputs, log-sum-exps, every gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from laid_ds.doctor.line import ABSENT, OK, WRONG, Line, Room, looked
from laid_ds.kernels.switch import TOLERANCES, differences
from laid_ds.models import backends

HEADS, KEY_HEADS, DIM, TOKENS = 8, 2, 64, 300
BOUNDS = (0, 170, 171, 300)  # three samples in a row, one of them a single token
WINDOW = 40
MASKS = {
    "causal": ((0, TOKENS), None, 0),
    "windowed": ((0, TOKENS), WINDOW, 0),
    "packed": (BOUNDS, None, 0),
    "packed, windowed": (BOUNDS, WINDOW, 0),
    "shared": (BOUNDS, None, 120),
    "shared, windowed": (BOUNDS, WINDOW, 171),
    "shared, whole": ((0, TOKENS), None, 299),
}
"""Bounds of samples, window, and how many keys stand before the first query: rows that ranks share begin inside a sample."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, float, int | None], backends.Result]
"""(query, key, value, bounds, scale, window) as backends.attend means them."""


def attention(device: torch.device) -> Room:
    """A line for each branch and dtype that a run may meet on this device."""
    if device.type == "cuda":
        found = backends.varlen_kernels(torch.cuda.get_device_capability(device)[0])
        for name, kernel in found.items():
            for dtype in backends.HALVES if not isinstance(kernel, str) else (None,):
                check = f"attention, {name}" + (f", {short(dtype)}" if dtype else "")
                if dtype is None:
                    yield Line(check, ABSENT, kernel)
                else:
                    yield looked(check, partial(compared, check, partial(backends.varlen, kernel), device, dtype))
    else:
        for name in ("FlashAttention 4", "FlashAttention 2", "torch varlen"):
            yield Line(f"attention, {name}", ABSENT, "for GPUs only")
        for dtype in (torch.float32, torch.bfloat16):
            check = f"attention, CPU, {short(dtype)}"
            yield looked(check, partial(compared, check, partial(backends._segments, backends._flash_cpu), device, dtype))
    check = f"attention, SDPA by samples, {short(torch.float32)}"
    yield looked(check, partial(compared, check, partial(backends._segments, backends._sdpa), device, torch.float32))


def compared(check: str, attend: Attend, device: torch.device, dtype: torch.dtype) -> Line:
    """The largest difference over causal, windowed, packed and shared rows, and where it is."""
    shares, tolerance = {}, TOLERANCES[dtype]
    for mask, (bounds, window, before) in MASKS.items():
        inputs = drawn(device, dtype, before)
        exact = [x.detach().float().requires_grad_() for x in inputs]
        found = results(partial(attend, bounds=torch.tensor(bounds, dtype=torch.int32), scale=DIM**-0.5, window=window), inputs)
        wanted = results(partial(defined, bounds=bounds, scale=DIM**-0.5, window=window), exact)
        if "log-sum-exp" not in found:
            wanted.pop("log-sum-exp")
        shares |= {f"{name}, {mask}": share for name, share in differences(found, wanted).items()}
    worst = max(shares, key=shares.__getitem__)
    found = f"differs from float32 by at most {shares[worst]:.1e} ({worst}), {tolerance:g} is allowed"
    if shares[worst] > tolerance:
        advice = "remove that package: another branch serves; else another release of torch or of the driver"
        return Line(check, WRONG, found, advice, {"largest_difference": shares[worst]})
    return Line(check, OK, found, "", {"largest_difference": shares[worst]})


def drawn(device: torch.device, dtype: torch.dtype, before: int = 0) -> list[Tensor]:
    """query [1, H, T - before, D], key and value [1, K, T, D], laid out as transformers has them: heads beside each other in a token."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, tokens, heads, DIM) for tokens, heads in ((TOKENS - before, HEADS), (TOKENS, KEY_HEADS), (TOKENS, KEY_HEADS))]
    drawn = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return [x.transpose(1, 2).detach().requires_grad_() for x in drawn]


def results(attend: Callable[..., backends.Result], inputs: list[Tensor]) -> dict[str, Tensor]:
    """Output, log-sum-exp where there is one, and gradients of a sum that weighs every entry in its own way."""
    out, lse = attend(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
    gradients = torch.autograd.grad((out.float() * weights).sum(), inputs)
    named = dict(zip(("d query", "d key", "d value"), gradients, strict=True)) | {"output": out}
    return named if lse is None else named | {"log-sum-exp": lse}


def defined(query: Tensor, key: Tensor, value: Tensor, bounds: tuple[int, ...], scale: float, window: int | None) -> backends.Result:
    """Every pair written out; the queries are those of the last keys."""
    token, before = torch.arange(key.shape[2], device=query.device), key.shape[2] - query.shape[2]
    sample = torch.cat([torch.full((stop - start,), n) for n, (start, stop) in enumerate(pairwise(bounds))]).to(query.device)
    distance = token[:, None] - token
    seen = (sample[:, None] == sample) & (distance >= 0) & (distance < (window or len(token)))
    groups = query.shape[1] // key.shape[1]
    scores = (query @ key.repeat_interleave(groups, 1).mT * scale).masked_fill(~seen[before:], -torch.inf)
    return scores.softmax(-1) @ value.repeat_interleave(groups, 1), scores.logsumexp(-1)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
