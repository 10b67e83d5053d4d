"""A recipe for a pair of models and a data set, as a file to go on from (recipe_text.py), with numbers from the plan."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laid_ds import config
from laid_ds.config import Run
from laid_ds.data.dataset import Dataset
from laid_ds.data.haystack import LOOKED_AT, describe_windows, why_whole
from laid_ds.data.stream import budgeted_lengths
from laid_ds.disk import writing
from laid_ds.evaluation.haystack import survey
from laid_ds.models.family import check_packable
from laid_ds.models.image_pixels import modest_limits
from laid_ds.models.load import load_config
from laid_ds.models.processor import load_processor
from laid_ds.models.sizes import model_sizes
from laid_ds.plan.lengths import build_packing
from laid_ds.plan.pair import Machine, read_pair
from laid_ds.plan.propose import Proposal, propose
from laid_ds.plan.report import Plan
from laid_ds.run.build import build_renderer
from laid_ds.run.check import check, data_notes
from laid_ds.run.folder import check_output
from laid_ds.run.recipe_text import fifth_of, recipe_text

SAMPLES_PER_STEP = 8  # the paper's
EPOCHS, LEAST_STEPS, MOST_STEPS = 10, 100, 6250
HAYSTACKS = 32
SIZES = (1, 2, 5, 10, 20, 50, 100, 150, 200, 500, 1000)  # images of held-out haystacks
THIS_CPU = Machine(gpus=1, gpu_bytes=1 << 50, peak_flops=1e11, mfu=1.0)  # memory is not planned there


@dataclass(frozen=True)
class Written:
    """A recipe that was written."""

    run: Run
    plan: Plan
    notes: list[str]
    """What the dry run would say of the data."""


def write_recipe(
    path: Path, student: Path, teacher: Path, shards: list[str], test: str | None, output: Path, machine: Machine | None
) -> Written:
    """Write a recipe whose dry run passes. test: held-out haystacks; machine: None for a run on this CPU.

    Raises ValueError, with nothing written, when `path` exists, for a pair or data that the dry run refuses, and when no settings that the
    plan knows make room for a sample.
    """
    if path.suffix != ".toml" or path.exists():
        reason = "exists; choose another name or remove it" if path.exists() else "is no name of a recipe; end it in .toml"
        raise ValueError(f"{path} {reason}")
    dataset, on_cpu = Dataset.open(shards), machine is None
    draft = _draft(path.stem, student, teacher, shards, test, output, on_cpu)
    run, proposal = _fitted(draft, dataset, machine or THIS_CPU)
    partial = path.with_name(path.name + ".partial")
    with writing(path.parent, path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(recipe_text(run, read_pair(run), proposal.plan, machine, len(dataset)))
    try:
        written = config.load(partial)
        check_output(written)
        check(written)
        notes = data_notes(written)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    return Written(written, proposal.plan, notes)


def machine_of(gpus: int | None, gib: float) -> Machine | None:
    """GPUs of so much memory each; without a number those of this machine, None if it has none. Speed is an A100's, at a common share."""
    count = torch.cuda.device_count() if gpus is None else gpus
    return Machine(count, int(gib * 2**30), peak_flops=312e12, mfu=0.35) if count else None


def next_steps(path: Path, run: Run) -> list[str]:
    """What to do with a recipe that was written."""
    commands = [("plan", path), ("train", path)]
    if run.evaluation:
        commands.insert(1, ("probe", run.teacher.path, run.evaluation.shards, "--student", run.student.path, "--out", "probe.json"))
    return ["read it, and change what you know better", *(shlex.join(map(str, ("laid", *words))) for words in commands)]


def _draft(name: str, student: Path, teacher: Path, shards: list[str], test: str | None, output: Path, on_cpu: bool) -> Run:
    """The run with all that does not depend on memory."""
    own, _, dataset = load_config(student), load_config(teacher), Dataset.open(shards)
    dtype = "float32" if on_cpu else "bfloat16"
    of_student, of_teacher = ("zero3_cpu", "zero3_cpu") if on_cpu else ("zero3_student", "zero3_teacher")
    frozen = model_sizes(own, dtype).vision is not None
    limits = modest_limits(load_processor(student))
    tree: dict[str, Any] = {
        "name": name,
        "output": output,
        "steps": min(MOST_STEPS, max(LEAST_STEPS, math.ceil(EPOCHS * len(dataset) / SAMPLES_PER_STEP))),
        "student": {"path": student, "dtype": dtype, "deepspeed": f"ds_configs/{of_student}.json", "freeze_vision": frozen},
        "teacher": {"path": teacher, "dtype": dtype, "deepspeed": f"ds_configs/{of_teacher}.json"},
        "data": {"shards": shards, "images": _windows(dataset), "image_pixels": limits, "workers": 1 if on_cpu else 4},
        "losses": {"align": 0.0, "match": 0.0},
        "gain": {"enabled": False},
    }
    run = Run.model_validate(tree)
    return run if test is None else Run.model_validate(tree | {"evaluation": _held_out(test) | {"every_steps": fifth_of(run)}})


def _held_out(test: str) -> dict[str, Any]:
    """Sizes that the held-out haystacks can be asked at. Raises ValueError when there are none."""
    dataset = Dataset.open(test)
    haystacks, most = min(HAYSTACKS, len(dataset)), int(dataset.num_images.max())
    sizes = survey(dataset, haystacks, [size for size in SIZES if size <= most] or [1]).sizes
    return {"shards": test, "sizes": sizes, "haystacks": haystacks}


def _windows(dataset: Dataset) -> tuple[int, int] | None:
    """From 2 images to as many as the longest of some haystacks has; None where none of the samples is one."""
    records = [dataset.record(i) for source in range(len(dataset.source_shard_sizes)) for i in dataset.spread(source, LOOKED_AT)]
    held = [len(record.images) for record in records if why_whole(record) is None]
    return (min(2, max(held)), max(held)) if held else None


def _fitted(run: Run, dataset: Dataset, machine: Machine) -> tuple[Run, Proposal]:
    """The longest windows that fit, as many at a time as make up a step. Raises ValueError where not even the shortest fit."""
    found = propose(run, machine)
    while not found.plan.fits and run.data.images is not None and run.data.images[0] < run.data.images[1]:
        least, most = run.data.images
        run = _with_data(run, images=(least, max(least, min(most - 1, most * found.plan.tokens_that_fit // found.plan.tokens))))
        found = propose(run, machine)
    if not found.plan.fits:
        raise ValueError(f"{found.plan.tokens:,} tokens of one sample do not fit on {machine.gpus} GPUs: {found.plan.suggestion}")
    of_rank = max(1, SAMPLES_PER_STEP // machine.gpus)
    at_once = max(1, min(of_rank, found.plan.tokens_that_fit // found.plan.tokens))
    packed = _with_data(run, tokens_per_pack=64 * math.ceil(1.1 * at_once * found.plan.tokens / 64))
    run = packed if at_once > 1 and _packs(packed, dataset) else _with_data(run, micro_batch=at_once)
    run = run.model_copy(update={"optimizer": run.optimizer.model_copy(update={"accumulation": max(1, of_rank // at_once)})})
    found = propose(run, machine)
    return _with_settings(run, found), found


def _with_data(run: Run, **changes: Any) -> Run:
    return run.model_copy(update={"data": run.data.model_copy(update=changes)})


def _with_settings(run: Run, proposal: Proposal) -> Run:
    tree = config.as_tree(run)
    for name, value in proposal.settings.items():
        section, key = name.split(".")
        tree[section][key] = value
    return Run.model_validate(tree)


def _packs(run: Run, dataset: Dataset) -> bool:
    """Whether both models keep the samples of a row apart and number positions alike, and every pack can be planned."""
    try:
        families = [check_packable(load_config(model.path)) for model in (run.student, run.teacher)]
        if run.data.images is not None:
            describe_windows(dataset, run.data.images, packed=True)
        budgeted_lengths(dataset, build_packing(run, dataset, build_renderer(run, load_processor(run.student.path))))
    except ValueError:
        return False
    return len({(family.positions, family.positions == "1d" or family.model_type) for family in families}) == 1
