"""What a new recipe says: a TOML file for people, each value with its reason."""

from __future__ import annotations

import json
from typing import Any

from laid_ds.config import Model, Run
from laid_ds.plan.pair import Machine, Pair
from laid_ds.plan.report import Plan

TEXT = """\
# Written by `laid new` as a start. docs/choosing.md says where the advice comes from and what is not known, docs/recipe.md
# what each key means.
# Student: {student_facts}. Teacher: {teacher_facts}.
# Planned for {planned}.
name = {name}
output = {output}
# {steps_why}
steps = {steps}

[student]
path = {student}
dtype = {dtype}
deepspeed = {student_engine}
# The tower sees as well after as before; what is to be learned is where to look. Train it, too, for pictures unlike those
# it has learned from.
freeze_vision = {freeze}
# Chosen by the plan: false is fastest and takes most memory, "offload" takes least and waits for the CPU.
gradient_checkpointing = {checkpointing}

[teacher]
path = {teacher}
dtype = {dtype}
# Chosen by the plan: sharded over all ranks, or kept on the CPU where the GPUs have no room for it.
deepspeed = {teacher_engine}

[data]
shards = {shards}
{images}
{image_pixels}
{batch}
workers = {workers}

[optimizer]
# The paper's rate for 7B. A small model that is trained on little wants more: try a factor of 3 up and down, and the same
# for whatever it is compared with.
lr = 1e-5
mixing_lr = 1e-5
gain_lr = 1e-4
accumulation = {accumulation}
warmup_steps = {warmup}

# Answers and the teacher's logits: safe wherever we looked, and most of what there is to have. Attention (align, match) and
# the gain are experiments that must beat this run's held-out window; switch one on at a time, at layers that retrieve.
[losses]
sft = 1.0
kl = 1.0
align = 0.0
match = 0.0

# Of use once align or match is above 0. A guess, at 0.6 of the depth of both: the paper compares the last layers, and in
# the one real decoder that we looked into those did not retrieve. This measures where yours do:
#   laid probe {probe} --out probe.json
# Then these lines take the place of the one below:
#   probe = "probe.json"
#   pairs = "probed"
#   heads = "probed"
[align]
pairs = [[{student_layer}, {teacher_layer}]]

[match]
omega = "uniform"
rows_from = "answers"

[gain]
enabled = false

[checkpoint]
every_steps = {fifth}

{evaluation}
"""
EVALUATION = """\
# The figure that matters: does the window grow while accuracy at the fewest images stays? Sizes may go well beyond what
# training shows.
[evaluation]
shards = {shards}
every_steps = {fifth}
sizes = {sizes}
haystacks = {haystacks}"""
NO_EVALUATION = """\
# Without held-out haystacks nobody sees whether the window grows. Build some from pictures that are in no training sample, and uncomment:
# [evaluation]
# shards = "data/test"
# every_steps = {fifth}
# sizes = [1, 2, 5, 10, 20, 50]
# haystacks = 32"""
DEPTH = 0.6  # of a decoder: where the one real decoder that was looked into retrieves
WARM_UP = 0.05  # of the steps; the paper's


def recipe_text(run: Run, pair: Pair, plan: Plan, machine: Machine | None, samples: int) -> str:
    """The recipe of a run as TOML. samples: in its shards. machine: None for a run on a CPU, of which no time is foretold."""
    student, teacher, data, fifth = run.student, run.teacher, run.data, fifth_of(run)
    test = run.evaluation
    asked = test.model_dump() | {"shards": _toml(test.shards), "sizes": list(test.sizes), "fifth": fifth} if test else {}
    return TEXT.format(
        student_facts=_facts(pair.student),
        teacher_facts=_facts(pair.teacher),
        planned=_planned(plan, machine),
        name=_toml(run.name),
        output=_toml(run.output),
        steps_why=_steps_why(samples),
        steps=run.steps,
        student=_toml(student.path),
        teacher=_toml(teacher.path),
        dtype=_toml(student.dtype),
        student_engine=_engine(student),
        teacher_engine=_engine(teacher),
        freeze=_toml(student.freeze_vision),
        checkpointing=_toml(student.gradient_checkpointing),
        shards=_toml(list(data.shards)),
        images=_images(run),
        image_pixels=_image_pixels(run),
        batch=_batch(run),
        workers=data.workers,
        accumulation=run.optimizer.accumulation,
        warmup=round(WARM_UP * run.steps),
        probe=f"{teacher.path} {test.shards if test else 'data/test'} --student {student.path}",
        student_layer=_layer(pair.student.layers),
        teacher_layer=_layer(pair.teacher.layers),
        fifth=fifth,
        evaluation=EVALUATION.format(**asked) if test else NO_EVALUATION.format(fifth=fifth),
    )


def fifth_of(run: Run) -> int:
    """How often it saves and is asked: five times."""
    return max(1, run.steps // 5)


def _toml(value: Any) -> str:
    """A text, a path, a number, a truth or a list of such, as TOML writes it: JSON's way is among TOML's."""
    return json.dumps(value, default=str, ensure_ascii=False)


def _engine(model: Model) -> str:
    """As it is named anywhere: in a folder without ds_configs/ the one that laid_ds comes with is meant."""
    return _toml(f"ds_configs/{model.deepspeed.name}")


def _facts(sizes: Any) -> str:
    return f"{sizes.name}, {sizes.total():,} parameters, {sizes.layers} layers"


def _layer(layers: int) -> int:
    return min(layers - 1, round(DEPTH * layers))


def _planned(plan: Plan, machine: Machine | None) -> str:
    tokens = f"{plan.tokens:,} tokens in the longest micro-batch"
    if machine is None:
        return f"one CPU process: {tokens}"
    speed = f"{plan.mfu:.0%} of {plan.peak_flops / 1e12:g} TFLOP/s, both assumed"
    return (
        f"{machine.gpus} GPUs of {machine.gpu_bytes / 2**30:.0f} GiB: {tokens}, at most {plan.tokens_that_fit:,} fit;\n"
        f"# about {plan.hours:.1f} h at {speed}"
    )


def _steps_why(samples: int) -> str:
    return f"Ten times over {samples:,} samples, about 8 a step, as the paper; at least 100 steps and at most the paper's 6250."


def _images(run: Run) -> str:
    if run.data.images is None:
        return "# images: left out, since no sample looked at is a haystack (docs/data_format.md, Windows); they stay whole."
    return (
        "# Windows, drawn anew for each step. The upper end is what the haystacks hold or what memory allows, whichever is less.\n"
        "# The teacher's own window bounds the student's: `laid eval` it first.\n"
        f"images = {list(run.data.images)}"
    )


def _image_pixels(run: Run) -> str:
    if run.data.image_pixels is None:
        return "# image_pixels: left out, since this family shows every picture in sizes of its own."
    return (
        "# Area of each picture in pixels, as both models see it; the exported folder says the same. Room for 640 x 480, not for\n"
        "# photographs: less to see more pictures in a window, more where what is asked about is small.\n"
        f"image_pixels = {list(run.data.image_pixels)}"
    )


def _batch(run: Run) -> str:
    if run.data.tokens_per_pack is not None:
        return (
            "# Samples laid end to end, without padding, as many as make up a step of about 8 samples over all ranks.\n"
            f"tokens_per_pack = {run.data.tokens_per_pack}"
        )
    return (
        "# Samples of each rank at a time, padded to the longest. Times ranks and optimizer.accumulation a step: about 8, as the\n"
        "# paper's.\n"
        f"micro_batch = {run.data.micro_batch}"
    )
