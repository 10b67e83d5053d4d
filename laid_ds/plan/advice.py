"""What to change in a run so that it takes less of each GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from laid_ds.plan.memory import memory, peak_bytes, tokens_that_fit
from laid_ds.plan.pair import Machine, Pair

CHECKPOINTING, TEACHER, STUDENT = "student.gradient_checkpointing", "teacher.deepspeed", "student.deepspeed"
SHARED = "sequence_parallel"
TEACHER_OFFLOAD, STUDENT_OFFLOAD = "zero3_teacher_offload.json", "zero3_student_offload.json"  # of ds_configs/
ON_CPU = {"device": "cpu"}
MORE_GPUS = (8, 16, 32, 64, 128)
SHARES = (1, 2, 4, 8)  # GPUs that may share a micro-batch: those of one node

Settings = dict[str, Any]
"""Recipe keys, dotted, and their values; of an engine's file the name."""


def with_settings(pair: Pair, settings: Settings) -> Pair:
    """The pair with other values of the four keys above."""
    run, zero, teacher_zero = pair.run, pair.student_zero, pair.teacher_zero
    if SHARED in settings:
        run = run.model_copy(update={SHARED: settings[SHARED]})
    if CHECKPOINTING in settings:
        run = run.model_copy(update={"student": run.student.model_copy(update={"gradient_checkpointing": settings[CHECKPOINTING]})})
    if STUDENT in settings:
        zero = zero | {"offload_optimizer": ON_CPU}
    if TEACHER in settings:
        teacher_zero = teacher_zero | {"offload_param": ON_CPU}
    return replace(pair, run=run, student_zero=zero, teacher_zero=teacher_zero)


def windows(pair: Pair, machine: Machine, taught: int | None = None) -> dict[int, int]:
    """The tokens of a micro-batch that fit, by the number of GPUs that share it: that of the recipe, and those that it might have."""
    ours = pair.run.sequence_parallel
    numbers = {ours, *(shared for shared in SHARES if pair.sliceable and machine.gpus % shared == 0)}
    return {shared: tokens_that_fit(with_settings(pair, {SHARED: shared}), machine, taught) for shared in sorted(numbers)}


def suggestion(pair: Pair, machine: Machine, tokens: int, taught: int | None = None) -> str:
    """The first change that makes T tokens fit: checkpointing, the teacher on the CPU, checkpoints there too, more GPUs for each
    micro-batch, more GPUs, the optimizer on the CPU too; else fewer tokens. taught: as for `memory`."""
    ours, accumulation = pair.run.sequence_parallel, pair.run.optimizer.accumulation
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
        *(
            (
                f"let {shared} GPUs share each micro-batch (sequence_parallel = {shared}; optimizer.accumulation ="
                f" {accumulation * shared // ours} keeps the samples of a step)",
                {SHARED: shared},
                machine.gpus,
            )
            for shared in windows(pair, machine)
            if shared > ours and shared % ours == 0
        ),
        *((f"use {gpus} GPUs", {}, gpus) for gpus in MORE_GPUS if gpus > machine.gpus and gpus % ours == 0),
        (
            "keep the teacher, the checkpointed activations and the optimizer"
            f" (student.deepspeed = ds_configs/{STUDENT_OFFLOAD}) on the CPU",
            waiting | {STUDENT: STUDENT_OFFLOAD},
            machine.gpus,
        ),
    ]
    for sentence, settings, gpus in changes:
        changed, other = with_settings(pair, settings), replace(machine, gpus=gpus)
        if peak_bytes(memory(changed, other, tokens, taught)) <= machine.gpu_bytes:
            return f"{sentence}; then {tokens_that_fit(changed, other, taught):,} tokens fit"
    every, most = with_settings(pair, waiting), MORE_GPUS[-1] // ours * ours
    fitting = {gpus: tokens_that_fit(every, replace(machine, gpus=gpus), taught) for gpus in (machine.gpus, most)}
    return (
        f"no single change is enough; with the teacher and checkpointed activations on the CPU {fitting[machine.gpus]:,} tokens fit on "
        f"{machine.gpus} GPUs and {fitting[most]:,} on {most}: use shorter samples"
    )
