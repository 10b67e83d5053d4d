"""What recorded lessons would save of a run, and what they take: the choice between a live teacher and `laid teach` (docs/teachers.md)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from laid_ds.plan.flops import batch_flops
from laid_ds.plan.memory import memory, peak_bytes
from laid_ds.plan.pair import BYTES, FP32, Machine, Pair, compared, reads_lessons


@dataclass(frozen=True)
class LessonPlan:
    """Of one run; the figures stand beside those of a teacher in memory."""

    bytes_per_token: int
    """Queries, keys and log-sum-exps of the compared layers. Where only answer rows of the queries are held: the keys."""
    bytes_per_answer_token: int
    """Its hidden states; and its queries where only those of answer rows are held."""
    bytes_per_step: float
    """Of all GPUs, answer tokens not counted: how many there are is not in the index."""
    bytes_per_epoch: float | None
    """The same; None where the shards are not known."""
    saved_bytes: int
    """Of the peak of each GPU; negative where a student with LoRA teaches itself and no KL asks for a copy of its head."""
    saved_share: float
    """Of a step's computing."""
    recording_hours: float
    """On the same GPUs: the teacher's forward passes over the whole run."""
    used: bool
    """Whether the run reads lessons already."""

    def as_text(self) -> str:
        epoch = f", {self.bytes_per_epoch / 1e9:,.1f} GB an epoch" if self.bytes_per_epoch is not None else ""
        rows = f"{self.bytes_per_step / 1e9:,.3f} GB a step{epoch}, and " if self.bytes_per_token else ""
        sizes = f"{rows}{self.bytes_per_answer_token / 1e3:,.1f} kB for each answer token"
        saved = f"{self.saved_bytes / 2**30:.2f} GiB of each GPU and {self.saved_share:.0%} of a step's computing"
        if self.saved_bytes < 0:
            saved = f"{self.saved_share:.0%} of a step's computing, for {-self.saved_bytes / 2**30:.2f} GiB more of each GPU"
        costs = f"recording takes about {self.recording_hours:.2g} h"
        if self.used:
            return f"lessons: {sizes}; they save {saved}; {costs}"
        return (
            f"lessons: {sizes} would save {saved}; {costs}, as long as the teacher takes in one run: cheaper from the second run over the"
            " same windows on (`laid teach`)"
        )


def plan_lessons(
    pair: Pair,
    machine: Machine,
    longest: tuple[int, int],
    micro_batches: float,
    mean_rows: tuple[float, ...],
    taught_rows: tuple[float, ...],
    epoch_share: float | None,
) -> LessonPlan | None:
    """longest: tokens of the longest micro-batch, padding included, and of what the teacher reads; micro_batches: of the run on all GPUs;
    mean_rows, taught_rows: tokens of a typical one's rows, and of the teacher's; epoch_share: epochs / run. None without a teacher."""
    if pair.teacher is None:
        return None
    run, folder = pair.run, Path("lessons")
    live, read = (replace(pair, run=_with(pair, lessons)) for lessons in (None, folder))
    peaks = [peak_bytes(memory(each, machine, *longest)) for each in (live, read)]
    flops = [batch_flops(each, mean_rows, taught_rows) for each in (live, read)]
    per_token, per_answer = _sizes(pair)
    step = run.optimizer.accumulation * run.groups(machine.gpus)
    of_run = per_token * sum(mean_rows) * micro_batches
    seconds = (flops[0] - flops[1]) * micro_batches / machine.gpus / (machine.peak_flops * machine.mfu)
    return LessonPlan(
        bytes_per_token=per_token,
        bytes_per_answer_token=per_answer,
        bytes_per_step=per_token * sum(mean_rows) * step,
        bytes_per_epoch=of_run / epoch_share if epoch_share else None,
        saved_bytes=peaks[0] - peaks[1],
        saved_share=(flops[0] - flops[1]) / flops[0],
        recording_hours=seconds / 3600,
        used=reads_lessons(run),
    )


def _with(pair: Pair, lessons: Path | None):
    return pair.run.model_copy(update={"teacher": pair.run.teacher.model_copy(update={"lessons": lessons})})


def _sizes(pair: Pair) -> tuple[int, int]:
    """Bytes of a lesson for each token, and for each answer token besides."""
    run, (heads, keys, dim) = pair.run, pair.teacher.heads
    width = BYTES[run.teacher.dtype]
    queries, every_key = 0, 0
    for n, _ in enumerate(compared(pair)):
        chosen = range(heads) if run.align.heads == "all" else {head for _, head in run.align.heads[n]}
        queries += len(chosen) * (width * dim + (FP32 if run.losses.match > 0 else 0))
        every_key += len({head // (heads // keys) for head in chosen}) * width * dim
    hidden = width * pair.teacher.hidden
    if run.losses.align == 0 and run.match.rows_from == "answers":
        return every_key, hidden + queries
    return queries + every_key, hidden
