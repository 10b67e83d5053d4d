"""One batch shared by several ranks beside the same batch on one: memory, work, its balance, and what is sent.

python -m benchmarks.sequence --json            T = 16,384 on 1, 2 and 4 ranks, about 15 minutes on two cores

Each rank is a process with one thread; the ranks of a group share one row of images and text (7 of 8 tokens are images', the last
sixteenth is an answer) in ZeRO-3 engines, fp32, without activation checkpointing, with every term of the loss and every layer compared.
Both models are random Qwen2.5-VL of 4 layers. After a step on a short row, which leaves parameters, gradients and the optimizer's
states where they stay, steps on the long one are measured: activation_ratio_N is the most that any of N ranks adds to its resident
memory, divided by what one rank alone adds; cpu_ratio_N the CPU seconds of all ranks together, divided by those of one; imbalance_N the
CPU seconds of the slowest rank divided by their mean; sent_bytes_N what one rank sends in one decoder layer, counted, which has to be
what `laid plan` says (laid_ds.plan.flops.sent_bytes); sent_features_N the same of the features of images, in a step.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import measure

VOCABULARY, LAYERS, HEADS, KEY_HEADS = 8192, 4, 4, 2
HIDDEN = {"student": 128, "teacher": 256}
IMAGE, PATCH_VALUES, MERGED = 8000, 3 * 2 * 14 * 14, 4
GRIDS = ((32, 32), (16, 48), (24, 24))
"""Patches of images, in turn: 256, 192 and 144 tokens."""
WARM_TOKENS = 512
ENGINE = Path(__file__).resolve().parents[1] / "ds_configs" / "zero3_cpu.json"
PACKAGES = ("transformers", "deepspeed")
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),  # what is freed leaves the process, so that its size is what it holds
}


def model(who: str):
    """A random Qwen2.5-VL."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    hidden = HIDDEN[who]
    planes = hidden // HEADS // 2
    sections = [planes // 4, planes * 3 // 8, planes * 3 // 8]
    text = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    text |= {"num_key_value_heads": KEY_HEADS, "vocab_size": VOCABULARY, "tie_word_embeddings": False}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}}
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": hidden}
    torch.manual_seed(len(who))
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision | {"fullatt_block_indexes": [1]}, image_token_id=IMAGE)
    config.text_config.use_cache = False
    return Qwen2_5_VLForConditionalGeneration(config)


def row(tokens: int):
    """A batch of one row of T tokens."""
    from laid_ds.data.batch import Batch

    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(IMAGE, (1, tokens), generator=generator)
    grids, at = [], 8
    while True:
        height, width = GRIDS[len(grids) % len(GRIDS)]
        length = height * width // MERGED
        if at + length > tokens * 7 // 8:
            break
        ids[:, at : at + length] = IMAGE
        grids.append((1, height, width))
        at += length + 8
    labels = torch.full_like(ids, -100)
    labels[:, -tokens // 16 : -1] = ids[:, -tokens // 16 + 1 :]
    inputs = {"input_ids": ids, "image_grid_thw": torch.tensor(grids), "mm_token_type_ids": (ids == IMAGE).long()}
    inputs["pixel_values"] = torch.randn(sum(h * w for _, h, w in grids), PATCH_VALUES, generator=generator)
    return Batch(inputs, labels, torch.zeros_like(ids), ("sample",), num_images=len(grids))


class Counter:
    """Bytes that a rank sends when it gathers, and when the gradients of what was gathered go back: its part goes to each of the others.
    Keys and values [B, heads, t, D] apart from the features of images."""

    def __init__(self, gather: Callable[[Tensor], Tensor]) -> None:
        self.gather, self.of_layers, self.of_images = gather, 0, 0

    def __call__(self, x: Tensor) -> Tensor:
        found = self.gather(x)
        self._count(found)
        if found.requires_grad:
            found.register_hook(self._count)
        return found

    def _count(self, gathered: Tensor) -> None:
        """gathered [n, ...]"""
        sent = (len(gathered) - 1) * gathered[0].nbytes
        if gathered.ndim == 5:
            self.of_layers += sent
        else:
            self.of_images += sent


def rank(ranks: int, tokens: int, steps: int) -> dict:
    """What this rank measures of steps on a row that all ranks share."""
    from laid_ds.config import Run
    from laid_ds.method import schedule
    from laid_ds.method.align import Align, layer_pairs
    from laid_ds.method.distill import Student, Teacher, train_step
    from laid_ds.models.attention import Tap, attention_shape, listen
    from laid_ds.models.rope_gain import responder
    from laid_ds.runtime import distributed, engine

    engine.start_processes()
    torch.set_num_threads(1)
    group = distributed.sequence_group(ranks)
    place = {"path": "random", "dtype": "float32", "deepspeed": ENGINE}
    run = Run.model_validate(
        {"name": "bench", "output": "none", "steps": steps, "student": place, "teacher": place, "data": {"shards": ["none"]}}
        | {"align": {"pairs": "proportional"}, "losses": {"align": 1.0, "match": 1.0}, "sequence_parallel": ranks}
        | {"match": {"omega": "frontier"}, "gain": {"enabled": True}}
    )
    pupil, master = model("student"), model("teacher")
    pairs = layer_pairs("proportional", LAYERS, LAYERS)
    shapes = attention_shape(pupil.config), attention_shape(master.config)
    gains = {layer: (HEADS, shapes[0][2] // 2) for layer in range(LAYERS)}
    align = Align(run.align, pairs, *shapes, gains, torch.float32)
    taps = Tap([s for s, _ in pairs], lse=True), Tap([t for _, t in pairs], lse=True)
    counters = {who: Counter(group.gather) for who in HIDDEN}
    listen(pupil, taps[0], {n: responder(align.gain, n) for n in range(LAYERS)}, group=replace(group, gather=counters["student"]))
    listen(master, taps[1], group=replace(group, gather=counters["teacher"]))
    mechanics = [engine.read_deepspeed(ENGINE, run.student.dtype, run, trains) for trains in (True, False)]
    student = engine.training_engine(Student(pupil, align, taps[0], run.losses, VOCABULARY), run, mechanics[0])
    teacher = engine.teacher_engine(Teacher(master, taps[1], VOCABULARY, shows_logits=True), mechanics[1])
    counted_by, omega = {"kl": "rows", "sft": "rows"} | align.counted_by(), schedule.omega(0, run.match)

    def step(batch) -> dict[str, float]:
        return train_step(student, teacher, [batch], run.losses, omega, counted_by)

    step(row(WARM_TOKENS))
    batch, seconds = row(tokens), []
    for counter in counters.values():
        counter.of_layers = counter.of_images = 0
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the present size
    held = measure.status_mb("VmRSS")
    for _ in range(steps):
        start = time.process_time()
        values = step(batch)
        seconds.append(time.process_time() - start)
    return {
        "cpu_seconds": statistics.median(seconds),
        "added_bytes": round((measure.status_mb("VmHWM") - held) * 2**20),
        "sent_bytes": {who: counter.of_layers / steps / LAYERS for who, counter in counters.items()},
        "sent_features": {who: counter.of_images / steps for who, counter in counters.items()},
        "loss": values["loss"],
    }


def in_own_processes(ranks: int, tokens: int, steps: int) -> list[dict]:
    """What each of so many ranks measures; the report is the last line that it prints."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["-m", "benchmarks.sequence", "--rank-of", str(ranks), "--tokens", str(tokens), "--steps", str(steps)]
    place = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    processes = [
        subprocess.Popen(
            [sys.executable, *words],
            env=os.environ | ENVIRONMENT | place | {"MASTER_PORT": str(port), "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(ranks)
    ]
    said = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"a rank of {ranks} failed:\n{errors}")
    return [json.loads(out.strip().splitlines()[-1]) for out, _ in said]


def compare(numbers: list[int], tokens: int, steps: int, repeats: int) -> dict[str, float]:
    """Figures of so many ranks; arms take turns, `repeats` times."""
    runs: dict[int, list[list[dict]]] = {ranks: [] for ranks in numbers}
    for _ in range(repeats):
        for ranks in numbers:
            runs[ranks].append(in_own_processes(ranks, tokens, steps))
    losses = [report["loss"] for found in runs.values() for ranks in found for report in ranks]
    assert max(losses) - min(losses) < 1e-4 * abs(losses[0]), losses  # all compute the same
    figures: dict[str, float] = {}
    for ranks, found in runs.items():
        figures[f"cpu_seconds_{ranks}"] = statistics.median(sum(report["cpu_seconds"] for report in group) for group in found)
        figures[f"added_bytes_{ranks}"] = statistics.median(max(report["added_bytes"] for report in group) for group in found)
        if ranks == 1:
            continue
        figures[f"cpu_ratio_{ranks}"] = figures[f"cpu_seconds_{ranks}"] / figures["cpu_seconds_1"]
        figures[f"activation_ratio_{ranks}"] = figures[f"added_bytes_{ranks}"] / figures["added_bytes_1"]
        slowest = [max(times) / statistics.mean(times) for times in ([report["cpu_seconds"] for report in group] for group in found)]
        figures[f"imbalance_{ranks}"] = statistics.median(slowest)
        figures |= _sent(ranks, tokens, [report for group in found for report in group])
    return figures


def _sent(ranks: int, tokens: int, reports: list[dict]) -> dict[str, float]:
    """What a rank sends in each layer. It must be what the documents say: 2 K D elements of each of its T / n tokens go to n - 1 others,
    forward; and their gradients come back to it from as many."""
    figures = {}
    for who, times in (("student", 2), ("teacher", 1)):
        expected = times * 2 * KEY_HEADS * (HIDDEN[who] // HEADS) * (tokens // ranks) * (ranks - 1) * torch.float32.itemsize
        assert all(report["sent_bytes"][who] == expected for report in reports), (who, expected, reports)
        figures[f"sent_bytes_{who}_{ranks}"] = expected
        figures[f"sent_features_{who}_{ranks}"] = reports[0]["sent_features"][who]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="1 first: what the others are compared with")
    parser.add_argument("--steps", type=int, default=2, help="in each process, after one on a short row")
    parser.add_argument("--repeats", type=int, default=1, help="starts of each number of ranks")
    parser.add_argument("--rank-of", type=int, help="be one of so many ranks and print its report")
    parser.add_argument("--no-row", action="store_true", help="leave results.csv as it is")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    arguments = parser.parse_args()
    if arguments.rank_of:
        print(json.dumps(rank(arguments.rank_of, arguments.tokens, arguments.steps)))
        return
    figures = compare(arguments.ranks, arguments.tokens, arguments.steps, arguments.repeats)
    if not arguments.no_row:
        measure.append("sequence.compare", "cpu", f"tokens={arguments.tokens}", figures, PACKAGES)
    measure.show(figures | {"tokens": arguments.tokens, "versions": measure.versions(PACKAGES)}, arguments.json)


if __name__ == "__main__":
    main()
