"""Resume, loop, stop cleanly: what every rank does with a recipe's parts (run/build.py)."""

from __future__ import annotations

import json
import math
import random
import zlib
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from laid_ds.config import Run, as_tree
from laid_ds.data.batch import Batch
from laid_ds.data.record import DataError
from laid_ds.disk import writing
from laid_ds.evaluation import progress
from laid_ds.evaluation.spectra import profile_heads
from laid_ds.kernels import switch
from laid_ds.method import schedule
from laid_ds.method.align import Align
from laid_ds.method.distill import NonFiniteLoss, RecordedTeacher, train_step
from laid_ds.models.shared_tower import WAITING
from laid_ds.plan.flops import model_flops
from laid_ds.plan.pair import read_pair
from laid_ds.run.build import Training, build
from laid_ds.run.check import data_notes
from laid_ds.run.first_look import BATCHES, Seen, first_look
from laid_ds.run.folder import open_output, versions
from laid_ds.run.learned import write_learned
from laid_ds.run.metrics import Reporter
from laid_ds.run.sight import doubles, look_at_images
from laid_ds.runtime import checkpoint, distributed, engine
from laid_ds.runtime.stop import DONE, REQUEUE, StopRequest
from laid_ds.terminal import next_step, working


def train(run: Run, stop: StopRequest) -> None:
    """Run to the end, or until asked to stop, from the latest checkpoint if there is one. Every rank calls it."""
    active = distributed.rank() == 0
    steps_before = open_output(run, stop.started)
    seed_everything(run.seed + distributed.rank())
    notes = data_notes(run)
    with working("loading the models", active=active):
        training = build(run)
    flops = partial(model_flops, read_pair(run)) if active and run.logging.peak_tflops else None
    reporter = Reporter(run.output, run.steps, run.logging, active, as_tree(run), flops)
    with working("looking for a checkpoint and loading it", active=active):
        saved = checkpoint.latest(run.output)
        first = _resume(run, training, saved) if saved else 0
    together = f", {run.sequence_parallel} to a batch" if run.sequence_parallel > 1 else ""
    reporter.say(f"{run.name}: step {first} of {run.steps}, {distributed.world_size()} ranks{together}, output {run.output}")
    if steps_before:
        reporter.say(prolonged(run, steps_before, first))
    for note in notes:
        reporter.say(note)
    if first == 0:
        with working("the first look", active=active):
            seen = look(run, training)
        reporter.say(str(seen))
        with working("do the models see their images?", active=active):
            sentences = sight(run, training)
        for sentence in sentences:
            reporter.say(sentence)
    stop.listen_to_ctrl_c()
    try:
        finished, reason = loop(run, training, reporter, first, stop)
    finally:
        reporter.stop()
    if reason:
        _mark(run.output / REQUEUE, {"step": finished, "reason": reason})
        reporter.say(f"stopped after step {finished} ({reason}); the same command goes on from there")
    else:
        _mark(run.output / DONE, {"steps": run.steps})
        reporter.say("done")
        if active:
            next_step("laid", "export", run.output, f"models/{run.output.name}")


def prolonged(run: Run, steps_before: int, first: int) -> str:
    """What the schedules do where a run is given more steps."""
    rate = schedule.learning_rate_factor(first, run.steps, run.optimizer)
    return (
        f"prolonged from {steps_before} to {run.steps} steps: after step {first} all schedules are those of a run of {run.steps} steps, "
        f"and the learning rate goes on at {rate:.0%} of optimizer.lr ({run.optimizer.decay})"
    )


def loop(run: Run, training: Training, reporter: Reporter, first: int, stop: StopRequest) -> tuple[int, str]:
    """Steps `first` to run.steps; saves at intervals, at the end, and when asked to stop.

    Returns the number of finished steps and why it stopped before the end, "" if it did not.
    """
    batches = iter(training.stream)
    reporter.start(first)
    reason = stop.agreed(run.output, run.stop.after_minutes)
    if reason:
        return first, reason
    if first == 0 and run.evaluation:
        _evaluate(run, training, reporter, 0)
    for step in range(first, run.steps):
        reporter.step(step + 1, _one_step(run, training, batches, step))
        if step == first:
            reporter.say(kernels_used())
        if run.evaluation and ((step + 1) % run.evaluation.every_steps == 0 or step + 1 == run.steps):
            _evaluate(run, training, reporter, step + 1)
        reason = stop.agreed(run.output, run.stop.after_minutes) if step + 1 < run.steps else ""
        if reason or (step + 1) % run.checkpoint.every_steps == 0 or step + 1 == run.steps:
            state = {"step": step + 1, "stream": training.stream.state_dict(), "run": as_tree(run), "versions": versions()}
            with reporter.working("saving"):
                checkpoint.save(training.student, run.output, state, run.checkpoint)
                if training.student.module.align is not None:
                    write_learned(training.student.module.align, run.output, step + 1)
        if reason:
            return step + 1, reason
    return run.steps, ""


def kernels_used() -> str:
    """Which kernels have served in this process."""
    used = {"attention": "SDPA"} | switch.used()
    said = [f"{what.removeprefix('attention_')} by {which}" for what, which in used.items()]
    return f"kernels: {', '.join(said)}"


def _one_step(run: Run, training: Training, batches: Iterator[Batch], step: int) -> dict[str, Any]:
    """What the schedules say of this step, the step itself, and its record."""
    engine.set_learning_rate(training.student, schedule.learning_rate_factor(step, run.steps, run.optimizer))
    omega = schedule.omega(schedule.progress(step, run.steps), run.match)
    micro_batches = [_to_device(training, batch) for batch in next_batches(batches, run.optimizer.accumulation)]
    try:
        values = train_step(training.student, training.teacher, micro_batches, run.losses, omega, training.counted_by)
        record = values | _details(training, micro_batches)
    except NonFiniteLoss as error:
        _keep_evidence(run, step, micro_batches, error)
        raise
    every = run.logging.attention_every_steps
    due = every is not None and (step + 1) % every == 0 and distributed.rank() < run.sequence_parallel
    return record | (_attention(training, micro_batches[-1]) if due else {})


def _to_device(training: Training, batch: Batch) -> Batch:
    """Where the student is; the pixels of batches that ranks share come later, each rank's own."""
    return batch.to(training.student.device, WAITING if training.student.module.group.size > 1 else ())


def next_batches(batches: Iterator[Batch], number: int) -> list[Batch]:
    """The micro-batches of one step. A sample that cannot be read stops all ranks together, so that none waits for another for ever."""
    found, failure = [], None
    try:
        found = list(islice(batches, number))
    except DataError as error:
        failure = error
    (failures,) = distributed.add([float(failure is not None)])
    if failure is not None:
        raise failure
    if failures:
        raise StoppedByOthers
    return found


class StoppedByOthers(RuntimeError):
    """Another rank met an error and tells of it."""


def _resume(run: Run, training: Training, saved: Path) -> int:
    """Go on from a checkpoint. On another number of ranks the random generators start from (seed, checkpoint, rank): the stream's draws
    do not use them, but match.rows does, which then samples other rows than an uninterrupted run."""
    seed_everything(zlib.crc32(f"{run.seed} {saved.name} {distributed.rank()}".encode()))
    state = checkpoint.restore(training.student, saved)
    training.stream.load_state_dict(state["stream"])
    return state["step"]


def _evaluate(run: Run, training: Training, reporter: Reporter, step: int) -> None:
    """Ask the student about held-out haystacks; every rank takes its share."""
    with reporter.working("held-out haystacks"):
        accuracy = progress.measure(training.student, training.renderer, run.evaluation)
    if distributed.rank() == 0:
        allowed = progress.held_out(run.evaluation)
        found = progress.record(run.output / progress.FILE, step, accuracy, 1 / allowed.choices, allowed.left_out)
        reporter.say(progress.sentence(found))


def look(run: Run, training: Training) -> Seen:
    """The first look at the batches that come first."""
    batches = [_to_device(training, training.stream.peek(k)) for k in range(BATCHES)]
    return first_look(run, training.student, training.teacher, batches, training.vocabulary)


def sight(run: Run, training: Training) -> list[str]:
    """What the first batches say of whether the models see their images."""
    pairs = ((_to_device(training, own), _to_device(training, others)) for own, others in doubles(training.stream))
    live = training.teacher if run.taught and run.teacher.lessons is None else None  # a recorded one was looked at when it was recorded
    return look_at_images(run, training.student, live, pairs, training.vocabulary)


def _details(training: Training, batches: list[Batch]) -> dict[str, Any]:
    """What is worth recording of a step beside the loss. Raises NonFiniteLoss when the engine skipped the step for its gradient."""
    norm = float(training.student.get_global_grad_norm())
    if not math.isfinite(norm):
        raise NonFiniteLoss("the gradient is not finite although the loss is; the optimizer has not moved")
    return {
        "lr": training.student.optimizer.param_groups[0]["lr"],
        "gradient_norm": norm,
        **_mixture(training.student.module.align),
        "keys": _keys(batches, training.student.module.group.size),
    }


def _mixture(align: Align | None) -> dict[str, float]:
    """Collective where ZeRO-3 has sharded the mixture."""
    if align is None or not align.mixing:
        return {}
    with engine.whole(list(align.mixing.parameters())):
        return {"mixture_entropy": align.mixture_entropy()}


def _keys(batches: list[Batch], shared_by: int) -> list[str]:
    """Keys of a step's samples on all ranks, in the stream's order: the same on any number of ranks. Collective."""
    of_ranks = distributed.gathered([list(batch.keys) for batch in batches])[::shared_by]
    return [key for micro_step in zip(*of_ranks, strict=True) for keys in micro_step for key in keys]


def _keep_evidence(run: Run, step: int, batches: list[Batch], error: NonFiniteLoss) -> None:
    """This rank's samples and tensors of a step that went wrong, in the run folder."""
    path = run.output / f"nonfinite_rank{distributed.rank()}.json"
    with writing(run.output, path.with_suffix(".pt").name):
        torch.save(batches, path.with_suffix(".pt"))
    checkpoint.write_durably(path, json.dumps({"step": step + 1, "error": str(error), "keys": [list(batch.keys) for batch in batches]}))


def _attention(training: Training, batch: Batch) -> dict[str, Any]:
    """Statistics of the compared layers of both models on rank 0's last micro-batch. Collective over the ranks that share it."""
    engines = {"student": training.student, "teacher": None if isinstance(training.teacher, RecordedTeacher) else training.teacher}
    return {
        "attention": {
            name: profile_heads(engine.module.tap.captured, batch.segments, group=training.student.module.group)
            for name, engine in engines.items()
            if engine is not None
        }
    }


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _mark(path: Path, content: dict[str, Any]) -> None:
    """Write how this attempt ended, as the last thing that it does."""
    distributed.barrier()
    if distributed.rank() == 0:
        checkpoint.write_durably(path, json.dumps(content))
