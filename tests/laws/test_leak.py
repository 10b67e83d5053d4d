"""A long run holds no more at its end than after its first steps: both engines, every term of the loss."""

from __future__ import annotations

import gc
from itertools import islice
from pathlib import Path

import torch

from laid_ds.method import schedule
from laid_ds.method.distill import train_step
from laid_ds.run.build import build
from laid_ds.run.loop import seed_everything
from laid_ds.runtime import engine
from tests.support.processes import run_ranks

STEPS, EVERY = 300, 60
TOLERATED_MB = 8  # the allocator's own movement (3 seen); a leak of 35 kB in each step would be more


def rank_holds(run) -> list[tuple[int, float]]:
    """(live tensors, resident megabytes) after every EVERY steps."""
    engine.start_processes()
    seed_everything(run.seed)
    training = build(run)
    batches, found = list(islice(training.stream, 4)), []  # of different lengths
    for step in range(STEPS):
        omega = schedule.omega(schedule.progress(step, STEPS), run.match)
        train_step(training.student, training.teacher, [batches[step % 4]], run.losses, omega, training.counted_by)
        if (step + 1) % EVERY == 0:
            gc.collect()
            found.append((_live_tensors(), _resident_mb()))
    return found


def _live_tensors() -> int:
    return sum(isinstance(x, torch.Tensor) for x in gc.get_objects())


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def test_300_steps_hold_no_more_than_60(world, tmp_path):
    run = world.run(tmp_path / "run", data={"micro_batch": 1}, align={"pairs": "proportional"})
    (found,) = run_ranks(1, rank_holds, run)
    tensors, resident = zip(*found, strict=True)
    assert set(tensors) == {tensors[0]}
    assert max(resident) - resident[0] < TOLERATED_MB
