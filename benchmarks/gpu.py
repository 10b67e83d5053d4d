"""What a GPU does: matching, attention and a whole step, beside what one would write first, beside peers, and beside its own products.

python -m benchmarks.gpu --json                            everything, and rows in results.csv with the card and versions
python -m benchmarks.gpu --json --only matching attention  what needs torch, triton and numpy alone
python -m benchmarks.gpu --json --rehearse                 the same code on a CPU at small lengths, to try the script: no row is written

Matching is one layer in bfloat16 with the heads of Qwen2.5-VL-7B (28 / 4) and 32B (40 / 8), D 128, frontier omega, at 4,096 to 65,536
tokens, forward alone and with its backward pass: the setting in which StreamKL (arXiv 2606.20005) reports its speeds. "eager" writes the
maps out and lets autograd differentiate; it has no row where its maps do not fit the card, and chunked and eager have none for longer
windows once half a second was not enough. "limit" is the time that the matrix products which matching cannot do without (README.md of the
kernel, Products) would take at the speed of a large product of the same dtype.
Times are medians of CUDA events; memory is what the allocator holds at most beyond the inputs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from json import loads

import torch
from torch import Tensor

from benchmarks import measure
from laid_ds.kernels.attention_matching import Omega, attention_matching
from laid_ds.models import backends

TOKENS = (4096, 8192, 16384, 32768, 65536)
REHEARSED = (128, 256)
SLOW_MS = 500  # what takes longer is not asked for longer windows, ours excepted
HEADS, TAUGHT, DIM = (28, 4), (40, 8), 128  # query and key heads of student and teacher
OMEGA = Omega("frontier", gamma=3.0, frontier=1024.0, width=256.0)
PARTS = ("matching", "attention", "step")
PACKAGES = ("triton", "transformers", "deepspeed", "trl", "flash-attn", "flash-attn-4")
Figures = dict[str, float]


def timed(work: Callable[[], object], device: torch.device, repeats: int) -> Figures:
    """Milliseconds and added peak memory; on a CPU, where this is a rehearsal, the former alone."""
    if device.type == "cuda":
        return measure.gpu(work, repeats)
    start = time.perf_counter()
    work()
    return {"ms_p50": 1e3 * (time.perf_counter() - start)}


def peak_flops(device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """FLOP/s of a large square product."""
    side = 8192 if device.type == "cuda" else 512
    x = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / (timed(lambda: x @ x, device, repeats)["ms_p50"] / 1e3)


def inputs(tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    def draw(heads: int) -> Tensor:
        return torch.randn(1, heads, tokens, DIM, device=device, dtype=dtype)

    x = {"student_query": draw(HEADS[0]), "student_key": draw(HEADS[1]), "teacher_query": draw(TAUGHT[0]), "teacher_key": draw(TAUGHT[1])}
    x["mixing_logits"] = torch.zeros(HEADS[0], TAUGHT[0], device=device)
    return x | {name: x[name].requires_grad_() for name in LEARNED}


LEARNED = ("student_query", "student_key", "mixing_logits")


def ours(x: dict[str, Tensor], backward: bool, implementation: str, choice: Tensor | None) -> None:
    scales = {"student_scale": DIM**-0.5, "teacher_scale": DIM**-0.5}
    with torch.set_grad_enabled(backward):
        loss, count = attention_matching(**x, **scales, omega=OMEGA, teacher_heads=choice, implementation=implementation)
    if backward:
        torch.autograd.grad(loss / count, [x[name] for name in LEARNED])


def eager(x: dict[str, Tensor], backward: bool) -> None:
    """Every map written out, uniform mixture of all teacher heads, gradients by autograd."""
    tokens = x["student_query"].shape[2]
    token = torch.arange(tokens, device=x["student_query"].device)
    hidden = token[:, None] < token

    def scores(side: str) -> Tensor:
        query, key = x[f"{side}_query"], x[f"{side}_key"]
        return (query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * DIM**-0.5).float().masked_fill(hidden, -torch.inf)

    with torch.no_grad():
        a = scores("teacher").softmax(-1)
    with torch.set_grad_enabled(backward):
        log_q = scores("student").log_softmax(-1).masked_fill(hidden, 0.0)
        p = torch.einsum("ij,bjmn->bimn", x["mixing_logits"].softmax(-1), a)
        omega = OMEGA((token[:, None] - token).clamp_min(0).float()).masked_fill(hidden, 0.0)
        omega = omega * (token[:, None] + 1) / omega.sum(-1, keepdim=True)
        terms = p * (p.clamp_min(1e-38).log() - log_q) - p + log_q.exp().masked_fill(hidden, 0.0)
        loss = (omega * terms).sum() / (HEADS[0] * tokens)
    if backward:
        torch.autograd.grad(loss, [x[name] for name in LEARNED])


def limit_ms(tokens: int, peak: float, backward: bool, one_hot: bool) -> float:
    """Scores of both models, the mixture, and with the backward pass d query, d key and d mixing."""
    products = HEADS[0] * (3 if backward else 1) + (HEADS[0] if one_hot else TAUGHT[0])
    mixing = 0 if one_hot else HEADS[0] * TAUGHT[0] / DIM * (2 if backward else 1)
    return 1e3 * (products + mixing) * 2 * DIM * tokens * (tokens + 1) / 2 / peak


def matching(device: torch.device, dtype: torch.dtype, lengths: tuple[int, ...], repeats: int) -> Iterator[tuple[str, Figures]]:
    """(case, figures) of each length."""
    peak, fast = peak_flops(device, dtype, repeats), "fused" if device.type == "cuda" else "chunked"
    one_hot, slow = (torch.arange(HEADS[0], device=device) * TAUGHT[0] // HEADS[0])[:, None], set()
    for tokens in lengths:
        x = inputs(tokens, device, dtype)
        for backward in (False, True):
            arms = {
                f"{fast}_one_hot": partial(ours, x, backward, fast, one_hot),
                f"{fast}_all_heads": partial(ours, x, backward, fast, None),
            }
            arms |= {"chunked_all_heads": partial(ours, x, backward, "chunked", None), "eager": partial(eager, x, backward)}
            figures = {
                "limit_one_hot_ms": limit_ms(tokens, peak, backward, True),
                "limit_all_heads_ms": limit_ms(tokens, peak, backward, False),
            }
            for name, work in arms.items():
                found = {} if name in slow else fitting(work, device, repeats)
                figures |= {f"{name}_{what}": value for what, value in found.items()}
                if found.get("ms_p50", 0) > SLOW_MS and not name.startswith(fast):
                    slow.add(name)
            yield f"tokens={tokens} {'forward+backward' if backward else 'forward'}", figures | {"peak_tflops": peak / 1e12}


def fitting(work: Callable[[], object], device: torch.device, repeats: int) -> Figures:
    """Figures of what fits the card; of what does not, none."""
    try:
        return timed(work, device, repeats)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {}


def attention(device: torch.device, dtype: torch.dtype, lengths: tuple[int, ...], repeats: int) -> Iterator[tuple[str, Figures]]:
    """Every branch that is installed, forward and backward, one row of one sample and one of eight."""
    if device.type == "cuda":
        found = backends.varlen_kernels(torch.cuda.get_device_capability(device)[0])
        branches = {name: partial(backends.varlen, kernel) for name, kernel in found.items() if not isinstance(kernel, str)}
    else:
        branches = {"CPU": partial(backends._segments, backends._flash_cpu)}
    peak = peak_flops(device, dtype, repeats)
    for tokens in lengths:
        shapes = [(1, heads, tokens, DIM) for heads in (HEADS[0], HEADS[1], HEADS[1])]
        query, key, value = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes)
        for samples in (1, 8):
            bounds = torch.arange(samples + 1, dtype=torch.int32) * (tokens // samples)
            figures = {"limit_ms": 1e3 * 7 * HEADS[0] * DIM * samples * (tokens // samples) ** 2 / peak}
            for name, attend in branches.items():

                def work(attend=attend, query=query, key=key, value=value, bounds=bounds) -> None:
                    out, _ = attend(query, key, value, bounds=bounds, scale=DIM**-0.5, window=None)
                    torch.autograd.grad(out.sum(), [query, key, value])

                label = name.lower().replace(" ", "_")
                figures |= {f"{label}_{what}": figure for what, figure in fitting(work, device, repeats).items()}
            yield f"tokens={tokens} samples={samples} forward+backward", figures


def step(device: torch.device, lengths: tuple[int, ...], repeats: int) -> Iterator[tuple[str, Figures]]:
    """A whole step of LAid beside TRL's and the plain Trainer's, on this device (benchmarks/train_step.py)."""
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR" or device.type == "cpu"}
    for tokens in lengths:
        command = [sys.executable, "-m", "benchmarks.train_step", "--device", device.type, "--tokens", str(tokens), "--no-row", "--json"]
        command += ["--repeats", str(min(repeats, 3))]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"benchmarks.train_step failed:\n{done.stderr}")
        found = loads(done.stdout.strip().splitlines()[-1])
        yield f"tokens={tokens}", {name: value for name, value in found.items() if isinstance(value, float) and name != "tokens"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tokens", type=int, nargs="+", help=f"lengths; default {', '.join(map(str, TOKENS))}, for a step the first two")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, small, without a row")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    arguments = parser.parse_args()
    if not (arguments.rehearse or torch.cuda.is_available()):
        parser.error("no CUDA GPU can be used here; --rehearse tries the script on the CPU")
    device = torch.device("cpu" if arguments.rehearse else "cuda")
    dtype, lengths = (torch.float32, REHEARSED) if arguments.rehearse else (torch.bfloat16, TOKENS)
    lengths, repeats = tuple(arguments.tokens or lengths), 1 if arguments.rehearse else arguments.repeats
    installed = [name for name in PACKAGES if measure.is_installed(name)]
    if "step" in arguments.only and any(find_spec(name) is None for name in ("trl", "deepspeed", "datasets")):
        parser.error("a whole step needs the package and its peers: pip install -e '.[bench]', or --only matching attention")
    report: dict[str, dict[str, Figures]] = {}
    for part in arguments.only:
        found = (
            step(device, lengths[:2], repeats)
            if part == "step"
            else {"matching": matching, "attention": attention}[part](device, dtype, lengths, repeats)
        )
        for case, figures in found:
            report.setdefault(part, {})[case] = figures
            if not arguments.rehearse:
                measure.append(f"gpu.{part}", "cuda", case, figures, installed)
    measure.show({**report, "versions": measure.versions(installed)}, arguments.json)


if __name__ == "__main__":
    main()
