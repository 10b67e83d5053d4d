"""The kernels of matching and of the profile against their definition: values and every gradient, in the dtypes that runs have."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from laid_ds.doctor.attention import short
from laid_ds.doctor.line import ABSENT, OK, WRONG, Line, Room, looked
from laid_ds.kernels.attention_matching import Omega, attention_matching
from laid_ds.kernels.attention_profile import attention_profile
from laid_ds.kernels.switch import TOLERANCES, differences

TOKENS = 90
HEADS = (4, 2, 6, 3)  # H^s, K^s, H^t, K^t
OMEGA = Omega("frontier", gamma=3.0, frontier=20.0, width=8.0)
CASES: dict[str, dict[str, Any]] = {
    "one head": {"teacher_heads": [[0], [5], [1], [3]]},
    "few heads": {"teacher_heads": [[0, 3, 4], [5, 1, 2], [1, 0, 2], [3, 0, 5]]},
    "all heads": {},
    "narrow student": {"student_window": 23},
}


def kernels(device: torch.device) -> Room:
    """Lines for chunked and fused; the latter are absent without a GPU, unless Triton interprets them (TRITON_INTERPRET=1)."""
    dim = 128 if device.type == "cuda" else 16
    of_device = (torch.bfloat16, torch.float16) if device.type == "cuda" else (torch.float32, torch.bfloat16)
    for dtype in of_device:
        yield from _lines("chunked", device, dtype, dim)
    for dtype in (torch.bfloat16, torch.float16):
        why_not = _why_not(device, dtype)
        if why_not:
            yield Line(f"fused kernels, {short(dtype)}", ABSENT, why_not)
        else:
            yield from _lines("fused", device, dtype, dim)


def _why_not(device: torch.device, dtype: torch.dtype) -> str:
    if find_spec("triton") is None:
        return "Triton is not installed: pip install 'laid-ds[triton]'; chunked serves"
    if device.type == "cuda":
        return ""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "no GPU; TRITON_INTERPRET=1 laid doctor tries them in Triton's interpreter"
    return "Triton's interpreter has no such products" if dtype is torch.bfloat16 else ""


def _lines(implementation: str, device: torch.device, dtype: torch.dtype, dim: int) -> Room:
    for case, options in CASES.items():
        check = f"matching, {implementation}, {case}, {short(dtype)}"
        yield looked(check, partial(_compared, check, partial(_matched, device, dtype, dim, options), implementation, dtype))
    check = f"profile, {implementation}, {short(dtype)}"
    yield looked(check, partial(_compared, check, partial(_profiled, device, dtype, dim), implementation, torch.float32))


def _compared(check: str, work: Callable[[str], dict[str, Tensor]], implementation: str, dtype: torch.dtype) -> Line:
    shares, tolerance = differences(work(implementation), work("reference")), TOLERANCES[dtype]
    worst = max(shares, key=shares.__getitem__)
    found = f"differs from the definition by at most {shares[worst]:.1e} ({worst}), {tolerance:g} is allowed"
    numbers = {"largest_difference": shares[worst]}
    if shares[worst] > tolerance:
        advice = "runs go on with chunked here; try another release of triton, and tell us the card and versions"
        return Line(check, WRONG, found, advice if implementation == "fused" else "try another release of torch", numbers)
    return Line(check, OK, found, "", numbers)


def _matched(device: torch.device, dtype: torch.dtype, dim: int, options: dict[str, Any], implementation: str) -> dict[str, Tensor]:
    """Loss and every gradient of packed rows with padding and positions that crawl."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, TOKENS, dim) for heads in HEADS]
    queries_and_keys = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    student = [x.requires_grad_() for x in queries_and_keys[:2]]
    mixing = torch.randn(HEADS[0], HEADS[2], generator=generator).to(device).requires_grad_()
    segments = torch.tensor([[0] * 40 + [1] * 41 + [-1] * 9, [0] * TOKENS], device=device)
    positions = (torch.arange(TOKENS, device=device) * 2 // 3).expand(2, -1)
    options = {name: torch.tensor(value, device=device) if name == "teacher_heads" else value for name, value in options.items()}
    scale = {"student_scale": dim**-0.5, "teacher_scale": dim**-0.5}
    masks = {"segments": segments, "positions": positions, "omega": OMEGA}
    loss, _ = attention_matching(*student, *queries_and_keys[2:], mixing, **scale, **masks, **options, implementation=implementation)
    gradients = torch.autograd.grad(loss, [*student, mixing])
    return {"the loss": loss} | dict(zip(("d student_query", "d student_key", "d mixing_logits"), gradients, strict=True))


def _profiled(device: torch.device, dtype: torch.dtype, dim: int, implementation: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, TOKENS, dim, generator=generator).to(device, dtype) for heads in HEADS[:2])
    planes = torch.tensor([[0, dim // 2], [1, dim // 2 + 1]], device=device)
    found = attention_profile(query, key, scale=dim**-0.5, planes=planes, window=31, implementation=implementation)
    return {name: getattr(found, name) for name in ("lse", "entropy", "bin_mass", "bin_pairs", "far_mass", "plane_response")}
