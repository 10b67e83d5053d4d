"""Run the jobs of a study, some at a time, each as the project's own commands. Whatever is killed, the same call goes on: what a job does
next follows from its folder, and a job that has its line is over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

from laid_ds.parent import end_with
from laid_ds.study import results
from laid_ds.study.file import Study
from laid_ds.study.jobs import BEFORE, SWEEP, TEST, Job, Line, Wanted, jobs, let_go, next_command, waits_for_sweep
from laid_ds.terminal import say

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Work:
    """A study in a world: what is asked for, and where it goes."""

    study: Study
    path: Path
    world: Path
    out: Path
    lines_file: Path
    wanted: Wanted

    @property
    def name(self) -> str:
        return self.path.stem

    def lines(self) -> list[Line]:
        return results.of_world(results.read_lines(self.lines_file), self.name, self.world.name)

    def jobs(self) -> list[Job]:
        return jobs(self.study, self.path, self.world, self.out, self.lines(), self.wanted)

    def open_jobs(self) -> list[Job]:
        """Those without a line."""
        lines = self.lines()
        return [job for job in self.jobs() if waits_for_sweep(self.study, job) or not results.is_done(job, lines)]


@dataclass
class Running:
    """A command of a job under way."""

    job: Job
    what: str
    process: subprocess.Popen
    log: TextIO = field(repr=False)


def expected_seconds(work: Work, job: Job) -> float | None:
    """CPU seconds, by the jobs that are done: of the same arm, else of those that are trained (or not) as this one; None without any."""
    lines = [line for line in work.lines() if line["role"] == job.key[0]] or work.lines()
    trained = job.spec.model is None
    alike = [line for line in lines if line["arm"] == job.arm] or [line for line in lines if ("steps" in line) == trained]
    return fmean(sum(line["cpu_seconds"].values()) for line in alike) if alike else None


def run(work: Work, at_once: int, threads: int, advance: Callable[[int], None]) -> list[str]:
    """Run all that has no line yet, `at_once` jobs at a time; sentences about those that failed. advance: is told of each that is over.

    First the student before (thresholds follow from it), then the sweep, then the arms with what the sweep chose.
    """
    failed: list[str] = []
    with results.claimed(work.out), _stopping() as running:
        for role in (BEFORE, SWEEP, TEST):
            pending = [job for job in work.open_jobs() if job.role == role]
            left = [job.name for job in pending if waits_for_sweep(work.study, job)]
            failed += [f"{name}: not run, since its sweep is not finished" for name in left]
            pending = [job for job in pending if not waits_for_sweep(work.study, job)]
            while pending or running:
                while pending and len(running) < at_once:
                    _go_on(work, pending.pop(0), threads, running, advance)
                for one in [one for one in running if _ended(one)]:
                    running.remove(one)
                    one.log.close()
                    if one.process.returncode == 0:
                        _go_on(work, one.job, threads, running, advance)
                    else:
                        failed.append(_failure(one))
                        say(failed[-1])
                time.sleep(POLL_SECONDS)
            if failed and role == BEFORE:  # from which all thresholds follow
                break
    return failed


def _go_on(work: Work, job: Job, threads: int, running: list[Running], advance: Callable[[int], None]) -> None:
    """Start the next command of a job, or write its line if there is none left."""
    words = next_command(job)
    if words is not None:
        running.append(_started(job, words, threads))
        return
    line = results.line_of(job, work.study, work.name, work.world.name, work.lines())
    results.add_line(work.lines_file, line)
    if not work.study.keep:
        let_go(job)
    advance(1)
    say(f"{job.name}: {_told(line, work.study.unit)}")


def _told(line: Line, unit: str) -> str:
    curve = "  ".join(f"{size}: {share:.2f}" for size, share in line["accuracy"].items())
    window = line.get("window")
    seen = f"  window {'>= ' if window['censored'] else ''}{window['size']:.1f} {unit}" if window else ""
    return f"{curve}{seen}, {sum(line['cpu_seconds'].values()):.0f} CPU s"


def _started(job: Job, words: Sequence[str], threads: int) -> Running:
    """A command in a session of its own, so that Ctrl-C reaches it through us; it ends when we do."""
    job.folder.mkdir(parents=True, exist_ok=True)
    log = (job.folder / "log.txt").open("a")
    log.write(f"$ laid {' '.join(words)}\n")
    log.flush()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "laid_ds.cli", *words]
    dies_with_us = partial(end_with, os.getpid())
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True, preexec_fn=dies_with_us)
    return Running(job, words[0], process, log)


def _failure(one: Running) -> str:
    said = Path(one.log.name).read_text().strip().splitlines()[-1]
    return f"{one.job.name}: `laid {one.what}` left with {one.process.returncode} ({said}); all it said is in {one.log.name}"


def _ended(one: Running) -> bool:
    """Whether a command is over; then its CPU time is noted, with that of all that it waited for."""
    pid, status, usage = os.wait4(one.process.pid, os.WNOHANG)
    if pid == 0:
        return False
    one.process.returncode = os.waitstatus_to_exitcode(status)
    results.note_cpu(one.job, one.what, round(usage.ru_utime + usage.ru_stime, 1))
    return True


@contextmanager
def _stopping():
    """A list of what runs: however the block ends, Ctrl-C and SIGTERM among it, those are asked to save and leave, and waited for."""
    running: list[Running] = []

    def leave(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield running
    finally:
        for one in running:
            with suppress(ProcessLookupError):
                one.process.send_signal(signal.SIGINT)
        for one in running:
            one.process.wait()
        signal.signal(signal.SIGTERM, before)
