"""Recorded lessons and the runs that may read them: what a lesson must hold for a run, and whose lessons they are."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors

from laid_ds.config import Run
from laid_ds.data.lessons import HEAD, Layer, Layout, Lessons, check_facts, read_manifest, replace_file
from laid_ds.data.stream import Stream
from laid_ds.disk import DiskError
from laid_ds.files import read_json
from laid_ds.method.align import compared_heads
from laid_ds.method.losses import Shown
from laid_ds.models.attention import attention_shape
from laid_ds.models.identity import Marks, difference, model_marks, processor_identity, read_whole
from laid_ds.models.load import load_config
from laid_ds.runtime import distributed
from laid_ds.terminal import say

SEEN = "teacher_seen.json"  # marks of the teacher's files when a run last read them whole


def layout_of(run: Run, pairs: Sequence[tuple[int, int]], lse: bool) -> Layout:
    """What a lesson must hold for the terms of a run's loss; lse: whether the teacher's attention gives its log-sum-exps."""
    configs = [load_config(model.path, model.trust_remote_code) for model in (run.student, run.teacher)]
    chosen: dict[int, set[int]] = {}
    shapes = {teacher: attention_shape(configs[1], teacher) for _, teacher in pairs}
    every = compared_heads(run.align.heads, pairs, *(attention_shape(config)[0] for config in configs))
    for (_, teacher), couples in zip(pairs, every, strict=True):
        chosen.setdefault(teacher, set()).update(range(shapes[teacher][0]) if couples is None else (head for _, head in couples))
    answers = run.losses.align == 0 and run.match.rows_from == "answers"
    layers = []
    for teacher, heads in sorted(chosen.items()):
        number, keys, dim = shapes[teacher]
        layers.append(
            Layer(teacher, tuple(sorted(heads)), number // keys, len(heads) == number, dim, answers, lse and run.losses.match > 0)
        )
    return Layout(run.teacher.dtype, configs[1].get_text_config().hidden_size, tuple(layers))


def facts_of(run: Run, stream: Stream, per_step: int) -> dict[str, Any]:
    """What must be the same for a lesson to be that of a run's sample, beside the teacher's files; per_step: samples of an optimizer step
    over all ranks."""
    data, teacher, order = run.data, run.teacher, stream.order_facts()
    growing = {"from": data.grow_from, "until": data.grow_until, "steps": run.steps, "samples per step": per_step}
    return {
        "data (fingerprint)": stream.dataset.fingerprint,
        "seed": run.seed,
        "order of samples": {name: order[name] for name in ("shuffle", "weights", "packing", "lengths_crc32")},
        "treatment of bad samples (data.on_bad)": data.on_bad,
        "window (data.images)": data.images and list(data.images),
        "growth of windows": None if data.grow_from is None else growing,
        "number of questions": data.questions,
        "processor": processor_identity(run.student.path),
        "way to show pictures": [data.image_pixels and list(data.image_pixels), data.decoder, data.resizer, data.number_images],
        "dtype": teacher.dtype,
        "view of the teacher (teacher.sees, distractors)": [teacher.sees, teacher.distractors],
    }


def check_teacher(folder: Path, recorded: Any, path: Path) -> None:
    """Raises ValueError, naming the file, unless a model's files are those of the teacher that a folder of lessons is of.

    Those whose size and time are as when they were read are taken as read. Others, as of a copy, are read whole; that they were is kept
    in the folder where it can be written, so that the next run need not.
    """
    if not isinstance(recorded, dict):
        raise ValueError(
            f"the lessons in {folder} are of an earlier version, which had not read all of its teacher, so that nobody can tell whether it"
            f" is the one at {path}: record them anew in another folder"
        )
    seen = read_json(folder / SEEN) if (folder / SEEN).is_file() else {}
    marks = model_marks(path, [recorded, seen])
    why = difference(recorded, marks)
    if why is None:
        whole = read_whole(path, marks)
        why = difference(recorded, whole)
        if why is None and whole != marks and os.access(folder, os.W_OK):
            _remember(folder, whole)
    if why is not None:
        raise ValueError(f"the lessons in {folder} are of another teacher than {path}: {why}; record its own with `laid teach`")


def _remember(folder: Path, marks: Marks) -> None:
    try:
        replace_file(folder / SEEN, [json.dumps(marks, indent=1).encode()])
    except DiskError as error:
        say(f"{error}; until then the teacher is read again before each run")


def open_lessons(run: Run, pairs: Sequence[tuple[int, int]], stream: Stream, per_step: int) -> tuple[Lessons, int | None]:
    """The lessons of a run, and after how many epochs they repeat. Raises ValueError, one sentence, for those of another run, with less
    in them than its loss asks, or of fewer steps without `teacher.lessons_repeat`."""
    folder, manifest = run.teacher.lessons, read_manifest(run.teacher.lessons)
    check_facts(folder, manifest["facts"], facts_of(run, stream, per_step))
    distributed.on_rank_0(lambda: check_teacher(folder, manifest["facts"].get("teacher"), run.teacher.path))
    lessons = Lessons(folder, manifest)
    _check_held(folder, lessons.layout, layout_of(run, pairs, lse=False))
    slots, needed = manifest["slots"], run.steps * per_step
    if slots >= needed:
        return lessons, None
    epochs, left = 0, slots
    while left >= (number := len(stream.epoch_slots(epochs))):
        epochs, left = epochs + 1, left - number
    if not run.teacher.lessons_repeat:
        raise ValueError(
            f"{folder} holds the lessons of {slots // per_step} steps, and the run has {run.steps}: record more with `laid teach --steps"
            f" {run.steps}`, or let them repeat (teacher.lessons_repeat = true)"
        )
    if not epochs:
        raise ValueError(f"{folder} holds {slots} of the {number} places of an epoch, and only whole epochs repeat: record more steps")
    return lessons, epochs


def _check_held(folder: Path, held: Layout, wanted: Layout) -> None:
    found = {layer.layer: layer for layer in held.layers}
    for layer in wanted.layers:
        if lacks := _lacking(found.get(layer.layer), layer):
            raise ValueError(f"the lessons in {folder} lack {lacks} of the teacher's layer {layer.layer}, which the loss asks: record anew")


def _lacking(held: Layer | None, wanted: Layer) -> str:
    if held is None:
        return "queries and keys"
    if missing := sorted(set(wanted.heads) - set(held.heads)):
        return f"the heads {missing}"
    return "the queries of all rows" if held.answers and not wanted.answers else ""


def with_lessons(run: Run, pairs: Sequence[tuple[int, int]], stream: Stream, per_step: int) -> Stream:
    """The stream with the lessons of its samples in each batch."""
    lessons, repeats = open_lessons(run, pairs, stream, per_step)
    return stream.with_prepare(replace(stream.prepare, lessons=lessons), repeats)


def load_head(run: Run) -> Shown:
    """The teacher's head, uncut. Raises ValueError for a damaged file."""
    path = run.teacher.lessons / HEAD
    data = path.read_bytes() if path.is_file() else b""
    if zlib.crc32(data) != read_manifest(run.teacher.lessons)["head_crc32"]:
        raise ValueError(f"{path} is damaged or missing: remove it, and `laid teach` with the same words writes it again")
    tensors = load_tensors(data)
    return Shown(tensors["weight"][:0], tensors["weight"], tensors.get("bias"))
