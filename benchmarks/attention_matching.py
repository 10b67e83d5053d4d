"""Attention matching on a CPU against dense autograd and against its own matrix products; gpu.py does that on a GPU.

python -m benchmarks.attention_matching --tokens 4096 --json     time and memory at one length, on the CPU
python -m benchmarks.attention_matching --student-window 512 --json     the same for a student that sees less than its teacher
python -m benchmarks.attention_matching --slope --json           added peak memory at 2k, 4k, 8k and 16k tokens
python -m benchmarks.attention_matching --step --json            what one layer adds to a training step of two small models
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import Tensor

from benchmarks import measure
from laid_ds.kernels.attention_matching import Omega, attention_matching

HEADS, HEAD_DIM = {"student": (4, 2), "teacher": (8, 4)}, 64  # (query heads, key heads)
OMEGAS = {
    "uniform": Omega(),
    "frontier": Omega("frontier", gamma=3.0, frontier=1024.0, width=256.0),
    "power": Omega("power", delta_0=256.0, alpha=1.0),
}


def inputs(tokens: int, omega: str = "uniform", student_window: int | None = None) -> dict:
    """Arguments of attention_matching with B = 1 and T = S = tokens; the teacher sees all."""
    torch.manual_seed(0)
    x = {}
    for side, (heads, key_heads) in HEADS.items():
        x[f"{side}_query"] = torch.randn(1, heads, tokens, HEAD_DIM, requires_grad=side == "student")
        x[f"{side}_key"] = torch.randn(1, key_heads, tokens, HEAD_DIM, requires_grad=side == "student")
        x[f"{side}_scale"] = HEAD_DIM**-0.5
    mixing = torch.randn(HEADS["student"][0], HEADS["teacher"][0], requires_grad=True)
    return x | {"mixing_logits": mixing, "omega": OMEGAS[omega], "student_window": student_window}


def ours(x: dict) -> tuple[Tensor, ...]:
    """Loss and gradients by the chunked kernel."""
    loss, count = attention_matching(**x, implementation="chunked")
    return loss, *torch.autograd.grad(loss / count, [x["student_query"], x["student_key"], x["mixing_logits"]])


def dense(x: dict) -> tuple[Tensor, ...]:
    """The same the way one writes it first: maps by softmax, gradients by autograd."""
    tokens = x["student_query"].shape[2]
    window = x["student_window"] or tokens
    ahead = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    hidden = ahead | torch.ones_like(ahead).tril(-window)

    def scores(side: str, hidden: Tensor) -> Tensor:
        query, key = x[f"{side}_query"], x[f"{side}_key"]
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        return (query @ key.mT * x[f"{side}_scale"]).masked_fill(hidden, -torch.inf)

    with torch.no_grad():
        a = scores("teacher", ahead).softmax(-1)
    log_q = scores("student", hidden).log_softmax(-1).masked_fill(hidden, 0.0)
    p = torch.einsum("ij,bjmn->bimn", x["mixing_logits"].softmax(-1), a)
    if window < tokens:
        p = p.masked_fill(hidden, 0.0)
        p = p / p.sum(-1, keepdim=True)
    log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log()
    term = p * (log_p - log_q)
    if x["omega"].kind != "uniform":
        token = torch.arange(tokens)
        omega = x["omega"]((token[:, None] - token).clamp_min(0).float()).masked_fill(hidden, 0.0)
        omega = omega * (token[:, None] + 1).clamp_max(window) / omega.sum(-1, keepdim=True)
        term = omega * (term - p + log_q.exp().masked_fill(hidden, 0.0))
    loss = term.sum()
    return loss, *torch.autograd.grad(loss / (HEADS["student"][0] * tokens), [x["student_query"], x["student_key"], x["mixing_logits"]])


def products(x: dict, chunk_size: int) -> None:
    """The matrix products of the chunked kernel without windows, and nothing else: both scores, mixture, d mixing, d query, d key."""
    tokens, (heads, key_heads), (teacher_heads, teacher_key_heads) = x["student_query"].shape[2], *HEADS.values()
    student_query, student_key, teacher_query, teacher_key, mixing = (
        x[name].detach()[0] if "mixing" not in name else x[name].detach()
        for name in ("student_query", "student_key", "teacher_query", "teacher_key", "mixing_logits")
    )
    buffers = [torch.zeros(h * chunk_size * tokens) for h in (teacher_heads, heads, heads)]
    d_key, d_mixing = torch.zeros_like(student_key), torch.zeros_like(mixing)
    for start in range(0, tokens, chunk_size):
        stop = min(start + chunk_size, tokens)
        a, z, p = (
            x[: h * (stop - start) * stop].view(h, stop - start, stop) for x, h in zip(buffers, (teacher_heads, heads, heads), strict=True)
        )
        for k in range(teacher_key_heads):
            group = slice(k * teacher_heads // teacher_key_heads, (k + 1) * teacher_heads // teacher_key_heads)
            torch.mm(teacher_query[group, start:stop].flatten(0, 1), teacher_key[k, :stop].T, out=a[group].flatten(0, 1))
        torch.mm(mixing, a.flatten(1), out=p.flatten(1))
        d_mixing.addmm_(p.flatten(1), a.flatten(1).T)
        for k in range(key_heads):
            group = slice(k * heads // key_heads, (k + 1) * heads // key_heads)
            query, score = student_query[group, start:stop].flatten(0, 1), z[group].flatten(0, 1)
            torch.mm(query, student_key[k, :stop].T, out=score)
            torch.mm(score, student_key[k, :stop])
            d_key[k, :stop].addmm_(score.T, query)


def compare(tokens: int, omega: str, student_window: int | None, repeats: int) -> dict:
    """CPU seconds and added peak memory of ours, dense autograd and the bare products, measured in this one run."""
    x = inputs(tokens, omega, student_window)
    for got, want in zip(ours(x), dense(x), strict=True):
        got, want = got.detach(), want.detach()
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    seconds = {
        "ours": measure.cpu_seconds(lambda: ours(x), repeats),
        "matmul": measure.cpu_seconds(lambda: products(x, 64), repeats),
        "dense": measure.cpu_seconds(lambda: dense(x), max(repeats // 3, 1)),
    }
    memory = {name: measure.added_peak_mb(inputs, work, tokens, omega, student_window) for name, work in (("ours", ours), ("dense", dense))}
    return {
        "cpu_seconds": seconds["ours"],
        "cpu_seconds_dense": seconds["dense"],
        "cpu_seconds_matmul": seconds["matmul"],
        "added_peak_mb": memory["ours"],
        "added_peak_mb_dense": memory["dense"],
        "cpu_ratio_vs_dense": seconds["dense"] / seconds["ours"],
        "memory_ratio_vs_dense": memory["dense"] / memory["ours"],
        "cpu_ratio_vs_matmul": seconds["ours"] / seconds["matmul"],
    }


def slope(sizes: tuple[int, ...] = (2048, 4096, 8192, 16384)) -> dict:
    """Added peak memory at each size, and how far it strays from the straight line fitted through all of them."""
    peaks = [measure.added_peak_mb(inputs, ours, tokens) for tokens in sizes]
    mean_size, mean_peak = sum(sizes) / len(sizes), sum(peaks) / len(peaks)
    covariance = sum((n - mean_size) * (peak - mean_peak) for n, peak in zip(sizes, peaks, strict=True))
    per_token = covariance / sum((n - mean_size) ** 2 for n in sizes)
    line = [mean_peak + per_token * (n - mean_size) for n in sizes]
    return {
        **{f"added_peak_mb_{n}": peak for n, peak in zip(sizes, peaks, strict=True)},
        "kb_per_token": per_token * 1024,
        "largest_deviation": max(abs(peak / fit - 1) for peak, fit in zip(peaks, line, strict=True)),
    }


def models(tokens: int) -> tuple:
    """A random student and teacher (Qwen2, 4 layers, 4 heads, 2 key heads, hidden 128 and 256) that keep the last layer's q and k."""
    from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    taps = []

    def tapped(module, query, key, *args, **kwargs):
        if module.layer_idx == 3:
            taps.append((query, key, kwargs["scaling"]))
        return sdpa_attention_forward(module, query, key, *args, **kwargs)

    AttentionInterface.register("tapped", tapped)
    torch.manual_seed(0)
    pair = []
    for hidden in (128, 256):
        sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": 4, "num_attention_heads": 4}
        config = Qwen2Config(vocab_size=8192, num_key_value_heads=2, use_cache=False, **sizes)
        config._attn_implementation = "tapped"
        pair.append(Qwen2ForCausalLM(config))
    return *pair, torch.randint(0, 8192, (1, tokens)), torch.zeros(4, 4, requires_grad=True), taps


def step(prepared: tuple, match: bool) -> None:
    """Teacher forward, student forward and backward of the next-token loss; with `match` the last layer's attention is matched too."""
    student, teacher, ids, mixing, taps = prepared
    taps.clear()
    with torch.no_grad():
        teacher(input_ids=ids)
    loss = student(input_ids=ids, labels=ids).loss
    if match:
        (teacher_query, teacher_key, teacher_scale), (query, key, scale) = taps
        scales = {"student_scale": scale, "teacher_scale": teacher_scale}
        total, count = attention_matching(query, key, teacher_query, teacher_key, mixing, omega=OMEGAS["frontier"], **scales)
        loss = loss + total / count
    taps.clear()
    loss.backward()
    student.zero_grad()


def step_alone(prepared: tuple) -> None:
    step(prepared, match=False)


def step_matched(prepared: tuple) -> None:
    step(prepared, match=True)


def in_a_step(tokens: int, repeats: int) -> dict:
    """What matching one layer adds to a training step of two small models."""
    prepared = models(tokens)
    seconds = [measure.cpu_seconds(lambda work=work: work(prepared), repeats) for work in (step_alone, step_matched)]
    memory = [statistics.median(measure.added_peak_mb(models, work, tokens) for _ in range(3)) for work in (step_alone, step_matched)]
    return {
        "cpu_seconds_step": seconds[0],
        "cpu_seconds_step_matched": seconds[1],
        "peak_mb_step": memory[0],
        "peak_mb_step_matched": memory[1],
        "cpu_share_added": seconds[1] / seconds[0] - 1,
        "memory_share_added": memory[1] / memory[0] - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--omega", choices=OMEGAS, default="uniform")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--student-window", type=int, metavar="TOKENS")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--slope", action="store_true")
    what.add_argument("--step", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.slope:
        name, figures = "slope", slope()
    elif arguments.step:
        name, figures = "step", in_a_step(arguments.tokens, arguments.repeats)
    else:
        name, figures = "compare", compare(arguments.tokens, arguments.omega, arguments.student_window, arguments.repeats)
    cases = {"slope": "tokens=2048..16384 omega=uniform", "step": f"tokens={arguments.tokens} omega=frontier"}
    case = cases.get(name, f"tokens={arguments.tokens} omega={arguments.omega}")
    if name == "compare" and arguments.student_window:
        case += f" student_window={arguments.student_window}"
    measure.append(f"attention_matching.{name}", "cpu", case, figures)
    measure.show(figures | {"tokens": arguments.tokens, "versions": measure.versions()}, arguments.json)


if __name__ == "__main__":
    main()
