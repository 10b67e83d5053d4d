"""What to change in a run so that it takes less of each GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from laid_ds.plan.memory import memory, peak_bytes, tokens_that_fit
from laid_ds.plan.pair import Machine, Pair

CHECKPOINTING, TEACHER, STUDENT = "student.gradient_checkpointing", "teacher.deepspeed", "student.deepspeed"
TEACHER_OFFLOAD, STUDENT_OFFLOAD = "zero3_teacher_offload.json", "zero3_student_offload.json"  # of ds_configs/
ON_CPU = {"device": "cpu"}
MORE_GPUS = (8, 16, 32, 64, 128)

Settings = dict[str, Any]
"""Recipe keys, dotted, and their values; of an engine's file the name."""


def with_settings(pair: Pair, settings: Settings) -> Pair:
    """The pair with other values of the three keys above."""
    run, zero, teacher_zero = pair.run, pair.student_zero, pair.teacher_zero
    if CHECKPOINTING in settings:
        run = run.model_copy(update={"student": run.student.model_copy(update={"gradient_checkpointing": settings[CHECKPOINTING]})})
    if STUDENT in settings:
        zero = zero | {"offload_optimizer": ON_CPU}
    if TEACHER in settings:
        teacher_zero = teacher_zero | {"offload_param": ON_CPU}
    return replace(pair, run=run, student_zero=zero, teacher_zero=teacher_zero)


def suggestion(pair: Pair, machine: Machine, tokens: int) -> str:
    """The first change that makes T tokens fit: checkpointing, the teacher on the CPU, checkpoints there too, more GPUs, the optimizer on
    the CPU too; else fewer tokens."""
    waiting = {CHECKPOINTING: "offload", TEACHER: TEACHER_OFFLOAD}
    changes: list[tuple[str, Settings, int]] = [
        ("set student.gradient_checkpointing = true", {CHECKPOINTING: True}, machine.gpus),
        (f"keep the teacher on the CPU (teacher.deepspeed = ds_configs/{TEACHER_OFFLOAD})", {TEACHER: TEACHER_OFFLOAD}, machine.gpus),
        (
            "checkpoint the student's activations and keep the teacher on the CPU",
            {CHECKPOINTING: True, TEACHER: TEACHER_OFFLOAD},
            machine.gpus,
        ),
        (
            'keep the teacher and the checkpointed activations (student.gradient_checkpointing = "offload") on the CPU',
            waiting,
            machine.gpus,
        ),
        *((f"use {gpus} GPUs", {}, gpus) for gpus in MORE_GPUS if gpus > machine.gpus),
        (
            "keep the teacher, the checkpointed activations and the optimizer"
            f" (student.deepspeed = ds_configs/{STUDENT_OFFLOAD}) on the CPU",
            waiting | {STUDENT: STUDENT_OFFLOAD},
            machine.gpus,
        ),
    ]
    for sentence, settings, gpus in changes:
        changed, other = with_settings(pair, settings), replace(machine, gpus=gpus)
        if peak_bytes(memory(changed, other, tokens)) <= machine.gpu_bytes:
            return f"{sentence}; then {tokens_that_fit(changed, other):,} tokens fit"
    every = with_settings(pair, waiting)
    fitting = {gpus: tokens_that_fit(every, replace(machine, gpus=gpus)) for gpus in (machine.gpus, 128)}
    return (
        f"no single change is enough; with the teacher and checkpointed activations on the CPU {fitting[machine.gpus]:,} tokens fit on "
        f"{machine.gpus} GPUs and {fitting[128]:,} on 128: use shorter samples"
    )
