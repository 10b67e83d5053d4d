"""Folders of runs and evaluations as `laid train` and `laid eval` write them, from numbers that are drawn."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

from laid_ds.config import Run, as_tree
from laid_ds.data.dataset import Dataset
from laid_ds.data.record import Sample, Turn
from laid_ds.data.writer import ShardWriter

SIZES = (1, 2, 4, 8, 16)
CHOICES = ("red", "blue", "green", "grey")


def picture(number: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (64, 48), tuple(int(n) for n in np.random.default_rng(number).integers(40, 255, 3))).save(data, "JPEG")
    return data.getvalue()


def write_shards(folder: Path, haystacks: int) -> None:
    with ShardWriter(folder) as writer:
        for i in range(haystacks):
            turns = (
                Turn("user", (*range(SIZES[-1]), f"What colour is shape {i}?"), needles=(i % SIZES[-1],), choices=CHOICES),
                Turn("assistant", (CHOICES[i % 4],)),
            )
            images = tuple(picture(100 * i + n) for n in range(SIZES[-1]))
            writer.write(Sample(f"key-{i:04d}", turns, images, source="test", licence="CC0-1.0", haystack=True))


def write_evaluation(
    folder: Path, ends: dict[str, float], shards: Path | None = None, haystacks: int = 24, attention: tuple[int, int] | None = None
) -> None:
    """ends: model -> images at which its accuracy has halved; 0: always wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    random, models, answers = np.random.default_rng(0), {}, []
    fingerprint = Dataset.open(shards).fingerprint if shards else "f" * 64
    for name, end in ends.items():
        hits = {
            str(size): [[int(random.random() < (1 / (1 + (size / end) ** 2) if end else 0))] for _ in range(haystacks)] for size in SIZES
        }
        models[name] = {"folder": f"models/{name}", "answers": hits, "scores": {}}
        if attention:
            models[name]["attention"] = {str(size): looked(random, *attention, strong=end > 2) for size in (4, 16)}
        for size in SIZES:
            for i, (hit,) in enumerate(hits[str(size)]):
                right = CHOICES[i % 4]
                answers.append(
                    {"model": name, "task": "test", "benchmark": "haystack", "key": f"key-{i:04d}", "cluster": f"key-{i:04d}"}
                    | {"window_size": size, "needle_at": None, "question_index": 0, "questions": 1, "size": size}
                    | {"depth": (i % size) / size, "question": f"What colour is shape {i}?", "shown": list(range(size))}
                    | {
                        "expected": [right],
                        "choices": list(CHOICES),
                        "said": right if hit else "<b>no idea & more</b>",
                        "meta": {},
                        "right": hit,
                    }
                )
    setting = {"task": "test", "shards": str(shards or "gone"), "fingerprint": fingerprint, "sizes": list(SIZES), "haystacks": haystacks}
    setting |= {
        "questions": 1,
        "choices": 4,
        "dtype": "float32",
        "benchmark": "haystack",
        "mode": "teacher-forced",
        "attention": bool(attention),
    }
    about = {"setting": setting, "versions": {"laid-ds": "0.1.0"}}
    (folder / "evaluation.json").write_text(json.dumps(about | {"models": models, "left_out": {}}))
    lines = [{"laid_eval": 1} | about | {"models": {}}, *answers]
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def looked(random, layers: int, heads: int, strong: bool) -> dict:
    bins = [0, 1, 2, 4, 8, 16, 32]
    found = {}
    for layer in range(layers):
        mass = random.dirichlet(np.ones(len(bins)), heads)
        needle = random.random(heads) * (0.9 if strong and layer == layers - 1 else 0.05)
        found[str(layer)] = {"bins": bins, "mass": mass.tolist(), "entropy": (3 * random.random(heads)).tolist()}
        found[str(layer)] |= {"far_mass": random.random(heads).tolist(), "marked_mass": needle.tolist(), "flat_mass": 0.06}
        found[str(layer)] |= {"needle_rows": [0, 0, 0, 0, 6, 10, 8], "needle_mass": np.outer(needle, [0, 0, 0, 0, 1.1, 1, 0.9]).tolist()}
    return found


def what_was_learned(random, layers: int, heads: int, teacher_heads: int, planes: int) -> dict:
    mixing = {str(layer): random.dirichlet(np.full(teacher_heads, 0.2), heads).round(4).tolist() for layer in range(layers)}
    gain = {str(layer): np.exp(random.normal(0, 0.2, (heads, planes))).round(4).tolist() for layer in range(layers)}
    return {"pairs": [[layer, 2 * layer + 1] for layer in range(layers)], "mixing": mixing, "key_mixing": {}, "gain": gain}


def model(name: str) -> dict:
    return {"path": f"models/{name}", "deepspeed": "ds_configs/zero3_cpu.json"}


def recipe(folder: Path, steps: int, **changes) -> dict:
    tree = {"name": folder.name, "output": str(folder), "steps": steps, "student": model("student"), "data": {"shards": ["gone"]}}
    tree |= {"teacher": model("teacher")}
    return as_tree(Run.model_validate(tree | changes))


def write_run(
    folder: Path,
    steps: int,
    planned: int | None = None,
    half_a_line: bool = False,
    attention: bool = False,
    keys: int = 2,
    learned: dict | None = None,
    **changes,
) -> None:
    """learned: "layers", "heads", "teacher_heads" and "planes" of learned.json; None: there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(steps)
    first = {"after_step": 0, "since": "2026-01-01 00:00:00 +0000", "ranks": 2, "host": "node1", "device": "CPU, 2 cores"}
    record = {"run": recipe(folder, planned or steps, **changes), "versions": {"laid-ds": "0.1.0", "torch": "2.13.0"}, "world_size": 2}
    record |= {"attempts": [first, first | {"after_step": steps // 2, "ranks": 4}]}
    (folder / "run.json").write_text(json.dumps(record))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            terms = {
                name: scale * math.exp(-step / steps) * (1 + 0.1 * random.random()) for name, scale in (("sft", 3), ("kl", 1), ("align", 2))
            }
            line = {"step": step} | terms | {"loss": sum(terms.values()), "tokens": 4096.0, "images": 16.0, "samples": 2.0, "fill": 0.9}
            line |= {"lr": 1e-5, "gradient_norm": 1 + random.random(), "keys": [f"key-{n:08d}" for n in range(keys)], "seconds": 0.5}
            line |= {"peak_bytes": 2**33, "mixture_entropy": 0.5}
            if attention and step % max(1, steps // 4) == 0:
                line["attention"] = {who: looked(random, 2, 4, False) for who in ("student", "teacher")}
            file.write(json.dumps(line) + "\n")
        if half_a_line:
            file.write(json.dumps(line)[:60])
    if learned:
        (folder / "learned.json").write_text(json.dumps({"step": steps} | what_was_learned(random, **learned)))
    held_out = [
        {
            "step": step,
            "accuracy": {"1": 0.9, "4": 0.5 + 0.4 * step / steps},
            "threshold": 0.64,
            "window": 2.0 + step / steps,
            "censored": step == steps,
        }
        for step in (0, steps // 2, steps)
    ]
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in held_out))
    if not half_a_line:
        (folder / "done.json").write_text(json.dumps({"steps": steps}))
