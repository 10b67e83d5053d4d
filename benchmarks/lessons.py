"""A training step with recorded lessons beside the same step with the teacher in memory.

python -m benchmarks.lessons --tokens 1024 --json
LAID_BENCH_ANSWERS=1 python -m benchmarks.lessons --json     every token is an answer's: most of a step is the head's, which both have

The models are those of benchmarks/train_step.py on the CPU, twice as wide: 256, and 512 the teacher. Of 16 tokens of the sample one is an
answer's, and every layer is compared; `kl` is the same without alignment and matching. Each run is a process of its own with one thread,
and arms take turns. Seconds are the CPU's, of a step and of reading its lesson from the disk's cache, which in a run the data workers do
ahead; memory is the peak of the process beyond what it held before the models were made.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks import measure, train_step

LOSSES = {"all": {}, "kl": {"align": 0.0, "match": 0.0}}
HIDDEN = {"student": 256, "teacher": 512}
ANSWERS = int(os.environ.get("LAID_BENCH_ANSWERS", "16"))  # one of so many tokens
ARMS = ("record", "live", "lessons")


def parts(losses: str, steps: int):
    """(run, layer pairs, tap of the student, tap of the teacher)."""
    from laid_ds.config import Run
    from laid_ds.method.align import layer_pairs
    from laid_ds.models.attention import Tap

    place = {"path": "random", "dtype": "float32", "deepspeed": train_step.ENGINE}
    run = Run.model_validate(
        {"name": "bench", "output": "none", "steps": steps, "student": place, "teacher": place, "data": {"shards": ["none"]}}
        | {"align": {"pairs": "proportional"}, "losses": LOSSES[losses]}
    )
    pairs = layer_pairs("proportional", train_step.LAYERS, train_step.LAYERS) if run.losses.listens else ()
    lse = run.losses.match > 0
    return run, pairs, Tap([s for s, _ in pairs], lse), Tap([t for _, t in pairs], lse)


def batch_of(tokens: int):
    from laid_ds.data.batch import Batch

    ids, labels = train_step.sample(tokens)
    labels = torch.cat([labels[:, 1:], torch.full((1, 1), -100)], 1)
    labels[:, torch.arange(tokens) % ANSWERS > 0] = -100
    return Batch({"input_ids": ids}, labels, torch.zeros_like(ids), ("sample",), num_images=0)


def teacher_of(kind, tap):
    from laid_ds.models.attention import listen

    model = train_step.model("teacher", HIDDEN["teacher"])
    listen(model, tap)
    return kind(model, tap, train_step.VOCABULARY, shows_logits=True)


def record(losses: str, tokens: int, folder: Path) -> dict:
    """The lesson of the one sample, and the head."""
    from dataclasses import asdict

    from safetensors.torch import save_file

    from laid_ds.data.lessons import HEAD, Layer, Layout, cut, file_name, write_file, write_index
    from laid_ds.method.distill import Recorder

    _, pairs, _, tap = parts(losses, 1)
    heads, keys, width = train_step.HEADS, train_step.KEY_HEADS, HIDDEN["teacher"]
    layers = [Layer(t, tuple(range(heads)), heads // keys, True, width // heads, False, True) for _, t in pairs]
    layout, batch = Layout("float32", width, tuple(layers)), batch_of(tokens)
    shown = teacher_of(Recorder, tap)(batch, with_head=True)
    write_file(folder / file_name(0), [(0, *lesson) for lesson in cut(layout, batch, shown.logits.rows, shown.heads)])
    scales = [{"layer": layer, "scale": found.scale, "window": found.window} for layer, found in shown.heads.items()]
    write_index(folder, 1, {"facts": {}, "layout": asdict(layout), "layers": scales})
    save_file({"weight": shown.logits.weight.contiguous()}, folder / HEAD)
    return {"bytes_per_token": (folder / file_name(0)).stat().st_size / tokens}


def train(losses: str, tokens: int, steps: int, folder: Path | None) -> dict:
    """Steps with the teacher in memory or, with a folder, with its lessons."""
    from safetensors.torch import load_file

    from laid_ds.data.lessons import HEAD, Lessons, read_manifest
    from laid_ds.method import schedule
    from laid_ds.method.align import Align
    from laid_ds.method.distill import RecordedTeacher, Student, Teacher
    from laid_ds.method.distill import train_step as step_of
    from laid_ds.method.losses import Shown
    from laid_ds.models.attention import listen
    from laid_ds.models.rope_gain import responder

    meter = train_step.Meter()
    run, pairs, own, theirs = parts(losses, steps)
    pupil, heads, keys = train_step.model("student", HIDDEN["student"]), train_step.HEADS, train_step.KEY_HEADS
    shapes = [(heads, keys, HIDDEN[who] // heads) for who in ("student", "teacher")]
    gains = {layer: (heads, shapes[0][2] // 2) for layer in range(train_step.LAYERS)}
    align = Align(run.align, pairs, *shapes, gains)
    listen(pupil, own, {layer: responder(align.gain, layer) for layer in range(train_step.LAYERS)})
    student = train_step.PlainEngine(Student(pupil, align, own, run.losses, train_step.VOCABULARY))
    if folder is None:
        lessons, teacher = None, teacher_of(Teacher, theirs)
    else:
        lessons, head = Lessons(folder, read_manifest(folder)), load_file(folder / HEAD)["weight"]
        teacher = RecordedTeacher(Shown(head[:0], head), torch.device("cpu"), train_step.VOCABULARY, shows_logits=True)
    batch, counted_by = batch_of(tokens), {"kl": "rows", "sft": "rows"} | align.counted_by()
    for step in range(steps):
        meter.begin()
        told = batch if lessons is None else replace(batch, lesson=lessons([0], batch))
        values = step_of(student, teacher, [told], run.losses, schedule.omega(step / steps, run.match), counted_by)
        meter.end()
        meter.losses.append({name: value for name, value in values.items() if name in ("loss", "sft", "kl", "align", "match")})
    return meter.report()


def in_own_process(arm: str, losses: str, tokens: int, steps: int, folder: Path) -> dict:
    """One arm in a fresh process; its report is the last line it prints."""
    command = [sys.executable, "-m", "benchmarks.lessons", "--arm", arm, "--losses", losses, "--folder", str(folder)]
    command += ["--tokens", str(tokens), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | train_step.ENVIRONMENT | train_step.OF_CPU)
    if done.returncode:
        raise RuntimeError(f"{arm} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(tokens: int, steps: int, repeats: int) -> dict:
    """Medians over `repeats` processes of each arm; the losses of both must be the same numbers."""
    figures = {}
    for losses, suffix in (("all", ""), ("kl", "_kl")):
        with TemporaryDirectory() as name:
            folder, found = Path(name), {"live": [], "lessons": []}
            figures[f"bytes_per_token{suffix}"] = in_own_process("record", losses, tokens, steps, folder)["bytes_per_token"]
            for _ in range(repeats):
                for arm, runs in found.items():
                    runs.append(in_own_process(arm, losses, tokens, steps, folder))
            assert found["live"][0]["losses"] == found["lessons"][0]["losses"], "lessons are the live teacher's, bit for bit"
        for what, ratio in ((train_step.TIME, "cpu_ratio_lessons"), ("added_bytes", "memory_ratio_lessons")):
            medians = {arm: statistics.median(run[what] for run in runs) for arm, runs in found.items()}
            figures |= {f"{what}_{arm}{suffix}": value for arm, value in medians.items()}
            figures[f"{ratio}{suffix}"] = medians["lessons"] / medians["live"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=4, help="in each process; the first warms up")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each arm")
    parser.add_argument("--no-row", action="store_true", help="leave results.csv as it is")
    parser.add_argument("--arm", choices=ARMS, help="run one arm in this process and print its report")
    parser.add_argument("--losses", choices=LOSSES, default="all")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    arguments = parser.parse_args()
    if arguments.arm == "record":
        print(json.dumps(record(arguments.losses, arguments.tokens, arguments.folder)))
    elif arguments.arm:
        folder = arguments.folder if arguments.arm == "lessons" else None
        print(json.dumps(train(arguments.losses, arguments.tokens, arguments.steps, folder)))
    else:
        figures = compare(arguments.tokens, arguments.steps, arguments.repeats)
        if not arguments.no_row:
            measure.append("lessons.compare", "cpu", f"tokens={arguments.tokens} answers=1/{ANSWERS}", figures, ("transformers",))
        measure.show(figures | {"tokens": arguments.tokens, "versions": measure.versions(("transformers",))}, arguments.json)


if __name__ == "__main__":
    main()
