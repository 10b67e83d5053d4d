"""The plan of a run, as an object for programs and as a table for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from laid_ds.data.dataset import Dataset
from laid_ds.data.record import DataError
from laid_ds.plan.advice import suggestion, windows
from laid_ds.plan.flops import batch_flops, sent_bytes
from laid_ds.plan.lengths import Lengths, read_lengths
from laid_ds.plan.lessons import LessonPlan, plan_lessons
from laid_ds.plan.memory import memory, peak_bytes
from laid_ds.plan.pair import Machine, Pair

ASSUMED_TOKENS = 8192
MEANINGS = {
    "parameters": ("the student's weights; each GPU holds its share", "more GPUs"),
    "gradients": ("their gradients, where they are trained", "more GPUs, student.freeze_vision, student.lora"),
    "optimizer": ("fp32 weights and two moments of what is trained", "more GPUs, zero3_student_offload.json, student.lora"),
    "gradient_bucket": ("gradients on their way to other GPUs", "reduce_bucket_size"),
    "teacher_parameters": ("the teacher's weights; each GPU holds its share", "more GPUs, zero3_teacher_offload.json"),
    "live_layer": ("weights gathered to be computed with", "stage3_max_live_parameters"),
    "pictures": ("pixels of all micro-batches of a step, in fp32", "fewer tokens, less accumulation"),
    "activations": ("what the forward pass keeps for the backward pass", "student.gradient_checkpointing, fewer tokens"),
    "masks": ("which tokens see each other, tokens x tokens", "fewer tokens, a family without image blocks"),
    "tapped_qk": ("queries and keys of the compared layers, both models", "fewer align.pairs, fewer tokens"),
    "layer_backward": ("one layer, computed again and differentiated", "fewer tokens"),
    "alignment": ("comparing the two models' attention", "fewer align.pairs, fewer tokens"),
    "logits_chunk": ("losses.rows_per_chunk rows over the vocabulary", "losses.rows_per_chunk, fewer tokens"),
    "reserved": ("CUDA, NCCL, fragmentation: 8 % of the GPU, assumed", ""),
}
"""Term -> what it is, and what makes it smaller."""


@dataclass(frozen=True)
class Plan:
    tokens: int
    """T, of the longest micro-batch of a GPU (or of those that share one): what memory is planned for."""
    mean_tokens: float
    """Of a micro-batch: what the run's tokens are reckoned from."""
    tokens_from: str
    """"given", "shards" or "assumed"."""
    teacher_tokens: int | None
    """What the teacher reads of the longest micro-batch; None without a teacher."""
    teacher_mean_tokens: float | None
    terms: dict[str, int]
    """Bytes on each GPU."""
    total_bytes: int
    """The peak: see `peak_bytes`."""
    gpu_bytes: int
    gpus: int
    fits: bool
    tokens_that_fit: int
    """In one micro-batch of a GPU, or of those that share one."""
    sequence_parallel: int
    """GPUs that share a micro-batch."""
    windows: dict[int, int]
    """`tokens_that_fit` by sequence_parallel."""
    sent_bytes: dict[str, int]
    """What each of the GPUs that share a micro-batch of `tokens` sends the others in one decoder layer, by model."""
    step_flops: float
    """Of one optimizer step on each GPU, in the mean."""
    step_seconds: float
    """Of one optimizer step; ranks wait for the one with most to do."""
    peak_flops: float
    mfu: float
    steps: int
    hours: float
    """Of the whole run: its steps, without starting, evaluating and saving."""
    samples: float | None
    """That the whole run sees on all GPUs; None where packs hold nobody knows how many."""
    epochs: float | None
    """None where the shards are not known."""
    total_tokens: float
    """Of the whole run on all GPUs, padding included."""
    suggestion: str | None
    lessons: LessonPlan | None
    """What recorded lessons would save, or save; None where there is no second model."""
    notes: tuple[str, ...]
    """What a reader should know of the figures, one sentence each."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def as_text(self) -> str:
        """A table in GiB, and what follows from it."""
        lines = [f"{'of each GPU':20}{'GiB':>8}   {'what it is':56}less of it by"]
        for name, size in self.terms.items():
            what, less = MEANINGS[name]
            if size or name != "masks":
                lines.append(f"{name.replace('_', ' '):20}{size / 2**30:8.2f}   {what:56}{less}".rstrip())
        lines.append(
            f"{'peak':20}{self.total_bytes / 2**30:8.2f}   of {self.gpu_bytes / 2**30:.2f} on each of {self.gpus} GPUs"
            " (layer backward, or alignment and logits chunk: never both)"
        )
        fits = "fit" if self.fits else "do not fit"
        shared = self.sequence_parallel
        place = "per GPU" if shared == 1 else f"on the {shared} GPUs that share a micro-batch"
        lines.append(f"\n{self.tokens:,} tokens {place} {fits}; at most {self.tokens_that_fit:,} do (of one micro-batch, padding included)")
        if self.teacher_tokens is not None and self.teacher_tokens != self.tokens:
            share = f"{self.teacher_mean_tokens:,.0f} in the mean, {self.teacher_mean_tokens / self.mean_tokens:.0%} of the student's"
            lines.append(f"of these the teacher reads {self.teacher_tokens:,} ({share}), its needles and distractors alone")
        if len(self.windows) > 1:
            lines.append("longest by sequence_parallel: " + ", ".join(f"{n}: {tokens:,}" for n, tokens in self.windows.items()))
        if shared > 1:
            sent = " and ".join(f"{size / 1e6:,.1f} MB in each layer of the {who}" for who, size in self.sent_bytes.items())
            lines.append(f"each GPU sends the others that share its micro-batch {sent}")
        speed = f"{self.step_flops:.3g} FLOPs per GPU at {self.mfu:.0%} of {self.peak_flops / 1e12:g} TFLOP/s, both assumed"
        lines.append(f"a step takes about {self.step_seconds:.1f} s ({speed})")
        seen = f", {self.samples:,.0f} samples" if self.samples is not None else ""
        epochs = f" ({self.epochs:.3g} epochs)" if self.epochs is not None else ""
        size = f"{self.total_tokens / 1e6:,.1f} M tokens"
        lines.append(f"the run of {self.steps:,} steps takes about {self.hours:.1f} h: {size}{seen}{epochs}")
        lines += [self.lessons.as_text()] if self.lessons else []
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, *([f"suggestion: {self.suggestion}"] if self.suggestion else [])])


def plan(pair: Pair, machine: Machine, tokens: int | None = None) -> Plan:
    """The plan of micro-batches of so many tokens on each GPU (or on those that share one); without, of those that the stream makes of the
    run's shards.

    Where there are no shards to read, ASSUMED_TOKENS are planned with, and `notes` says so. Raises DataError (a ValueError) for a sample
    that no pack can hold, and ValueError unless sequence_parallel divides the GPUs.
    """
    run, notes, found = pair.run, [], None
    groups = run.groups(machine.gpus)
    if tokens is None:
        found, notes = _lengths(pair, groups)
    micro_batches = found.micro_batches if found else _alike(pair, tokens or ASSUMED_TOKENS, groups)
    longest = found.longest if found else tokens or ASSUMED_TOKENS
    mean_tokens = found.mean if found else float(longest)
    taught, taught_longest = (found.taught, found.taught_longest) if found else (micro_batches, longest)
    taught_mean, fewer = sum(map(sum, taught)) / len(taught), taught_longest if found else None
    terms = memory(pair, machine, longest, fewer)
    total = peak_bytes(terms)
    fits = total <= machine.gpu_bytes
    mean_flops, most_flops = _flops(pair, list(zip(micro_batches, taught, strict=True)), groups)
    seconds = most_flops / (machine.peak_flops * machine.mfu)
    in_all = run.steps * run.optimizer.accumulation * groups  # micro-batches
    longest_by = windows(pair, machine, fewer)
    packs = run.data.tokens_per_pack is not None
    samples = in_all * found.samples if found else None if packs else float(in_all * run.data.micro_batch)
    epochs = samples / found.data_samples if found else None
    rows = max(1, round(found.samples)) if found else run.data.micro_batch
    typical, typical_taught = (mean_tokens / rows,) * rows, (taught_mean / rows,) * rows  # rows of a micro-batch, or samples of a pack
    if run.taught and run.teacher.sees == "needles" and not found:
        notes.append(
            'the teacher is reckoned as if it read all; with teacher.sees = "needles" it reads less, and how much is told by the shards'
            " (without --tokens)"
        )
    return Plan(
        tokens=longest,
        mean_tokens=mean_tokens,
        tokens_from="shards" if found else "given" if tokens else "assumed",
        teacher_tokens=taught_longest if pair.teacher else None,
        teacher_mean_tokens=taught_mean if pair.teacher else None,
        terms=terms,
        total_bytes=total,
        gpu_bytes=machine.gpu_bytes,
        gpus=machine.gpus,
        fits=fits,
        tokens_that_fit=longest_by[run.sequence_parallel],
        sequence_parallel=run.sequence_parallel,
        windows=longest_by,
        sent_bytes=sent_bytes(pair, longest),
        step_flops=mean_flops,
        step_seconds=seconds,
        peak_flops=machine.peak_flops,
        mfu=machine.mfu,
        steps=run.steps,
        hours=run.steps * seconds / 3600,
        samples=samples,
        epochs=epochs,
        total_tokens=in_all * mean_tokens,
        suggestion=None if fits else suggestion(pair, machine, longest, fewer),
        lessons=plan_lessons(pair, machine, (longest, taught_longest), in_all, typical, typical_taught, epochs),
        notes=tuple(notes),
    )


def _lengths(pair: Pair, groups: int) -> tuple[Lengths | None, list[str]]:
    """What the shards say, and a note on it."""
    shards = ", ".join(pair.run.data.shards)
    try:
        dataset = Dataset.open(list(pair.run.data.shards))
    except (DataError, OSError) as error:
        return None, [f"no shards to read ({error}): {ASSUMED_TOKENS:,} tokens are assumed; give --tokens, or plan where the shards are"]
    found = read_lengths(pair.run, dataset, groups)
    note = (
        f"tokens are {found.counted_by}: {found.mean:,.0f} in the mean and {found.longest:,} in the longest of"
        f" {len(found.micro_batches):,} micro-batches of {shards}"
    )
    return found, [note if found.every else f"{note} (the run has more: these are its first)"]


def _alike(pair: Pair, tokens: int, groups: int) -> tuple[tuple[float, ...], ...]:
    rows = pair.run.data.micro_batch
    return ((tokens / rows,) * rows,) * groups


def _flops(pair: Pair, micro_batches: list[tuple[tuple[float, ...], tuple[float, ...]]], groups: int) -> tuple[float, float]:
    """Of one optimizer step: on a GPU in the mean, and on the GPU with most to do, since the others wait for it in each micro-batch.
    micro_batches: rows of the student, and of the teacher."""
    known = {both: batch_flops(pair, *both) / pair.run.sequence_parallel for both in dict.fromkeys(micro_batches)}
    each = [known[both] for both in micro_batches]
    most = [max(each[first : first + groups]) for first in range(0, len(each), groups)]
    return pair.run.optimizer.accumulation * fmean(each), pair.run.optimizer.accumulation * fmean(most)
