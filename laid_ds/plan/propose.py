"""Settings for a run that is only to be written: what a recipe for a pair of models, a machine and a data set may start from."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from operator import or_
from pathlib import Path

from laid_ds.config import Run
from laid_ds.plan.advice import CHECKPOINTING, STUDENT, STUDENT_OFFLOAD, TEACHER, TEACHER_OFFLOAD, Settings, with_settings
from laid_ds.plan.pair import Machine, Pair, read_pair, reads_lessons
from laid_ds.plan.report import Plan, plan


@dataclass(frozen=True)
class Proposal:
    """Settings, and the plan of the run with them."""

    settings: Settings
    """Recipe keys, dotted, as `laid_ds.config.load` takes them for overrides: student.gradient_checkpointing, and where an engine is to
    keep something on the CPU, teacher.deepspeed and student.deepspeed (paths beside the run's own files)."""
    plan: Plan
    """`fits` says whether even these are enough; `tokens`, `tokens_that_fit`, `total_bytes`, `step_seconds`, `hours`, `notes` and
    `suggestion` are those of the run with these settings."""


def propose(
    run: Run, machine: Machine, tokens: int | None = None, student_config: Path | None = None, teacher_config: Path | None = None
) -> Proposal:
    """The fastest settings under which the micro-batches of a run fit on the GPUs of a machine; if none does, those that take least.

    run: a draft; of its models the folders' config.json is read (or the JSON files given instead), of its shards the index. All that it
    says stays, but for what `Proposal.settings` names. tokens: of the longest micro-batch of a GPU; None takes it from the shards, or
    assumes some and says so in `plan.notes`.

    From the fastest on: everything kept; checkpointing (a third more to compute); the teacher's weights on the CPU; checkpointed
    activations there too; the optimizer too.

    >>> draft = config.load("draft.toml")
    >>> found = propose(draft, Machine(gpus=4, gpu_bytes=80 * 2**30, peak_flops=312e12, mfu=0.35))
    >>> found.settings, found.plan.fits, found.plan.tokens_that_fit, found.plan.hours

    Raises ValueError for what `read_pair` and `plan` refuse.
    """
    return fastest(read_pair(run, student_config, teacher_config), machine, tokens)


def fastest(pair: Pair, machine: Machine, tokens: int | None = None) -> Proposal:
    """The same for a pair that was read before."""
    for settings in ladder(pair):
        found = Proposal(settings, plan(with_settings(pair, settings), machine, tokens))
        if found.plan.fits:
            break
    return found


def ladder(pair: Pair) -> list[Settings]:
    """Settings from fast to frugal, each with those of the one before."""
    run = pair.run
    teacher = {} if pair.teacher is None or reads_lessons(run) else {TEACHER: str(run.teacher.deepspeed.with_name(TEACHER_OFFLOAD))}
    optimizer = {STUDENT: str(run.student.deepspeed.with_name(STUDENT_OFFLOAD))}
    changes = [{CHECKPOINTING: False}, {CHECKPOINTING: True}, teacher, {CHECKPOINTING: "offload"}, optimizer]
    return [settings for settings, change in zip(accumulate(changes, or_), changes, strict=True) if change]
