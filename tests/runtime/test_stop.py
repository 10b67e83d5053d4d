"""Whoever asks, and whichever rank hears it: the step is finished, the run saved, and a file says how the attempt ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import psutil
import pytest

from laid_ds.run.loop import train
from laid_ds.run.metrics import Reporter
from laid_ds.runtime import checkpoint, distributed, engine
from laid_ds.runtime.stop import StopRequest, clear
from laid_ds.train import main
from tests.support.processes import run_ranks
from tests.support.recipes import write_recipe


def asked_at_step(run, step, ask):
    """A run in which `ask(run)` happens on rank 1 while step `step` (0: the loading of the models) is in progress."""
    report, begin = Reporter.step, Reporter.start

    def act():
        if os.environ["RANK"] == "1":
            ask(run)
        distributed.barrier()  # rank 0 looks for the file only after it is there

    def report_and_ask(self, done, values):
        report(self, done, values)
        if done == step:
            act()

    def start_and_ask(self, first):
        begin(self, first)
        if step == 0:
            act()

    Reporter.step, Reporter.start = report_and_ask, start_and_ask
    engine.start_processes()
    stop = StopRequest().listen()
    train(run, stop)


def kill(number):
    return lambda run: os.kill(os.getpid(), number)


def write_stop_file(run):
    (run.output / "stop").touch()


def ask_by_term(run):
    kill(signal.SIGTERM)(run)


def ask_with_workers(run):
    workers = [str(worker.pid) for worker in psutil.Process().children()]
    assert workers
    subprocess.run(["kill", "-TERM", *workers], check=True)  # not by their parent: DeepSpeed's launcher and SLURM do it
    kill(signal.SIGTERM)(run)


def ask_by_usr1(run):
    kill(signal.SIGUSR1)(run)


def ask_by_usr2(run):
    kill(signal.SIGUSR2)(run)


def ask_by_ctrl_c(run):
    kill(signal.SIGINT)(run)


@pytest.mark.parametrize(
    "ask, reason",
    [
        (ask_by_term, "SIGTERM"),
        (ask_by_usr1, "SIGUSR1"),
        (ask_by_usr2, "SIGUSR2"),
        (ask_by_ctrl_c, "SIGINT"),
        (write_stop_file, "the file 'stop'"),
    ],
)
def test_one_rank_is_asked_and_all_save_the_same_step(world, tmp_path, ask, reason):
    run = world.run(tmp_path / "run", checkpoint={"every_steps": 100})
    run_ranks(2, asked_at_step, run, 2, ask)
    assert json.loads((run.output / "requeue.json").read_text()) == {"step": 2, "reason": reason}
    assert checkpoint.latest(run.output).name == "step_000002"
    assert not (run.output / "done.json").exists()


def test_data_workers_that_are_asked_as_well_live_until_it_is_saved(world, tmp_path):
    run = world.run(tmp_path / "run", steps=8, checkpoint={"every_steps": 100}, data={"workers": 1})
    run_ranks(2, asked_at_step, run, 2, ask_with_workers)
    assert json.loads((run.output / "requeue.json").read_text()) == {"step": 2, "reason": "SIGTERM"}
    assert checkpoint.latest(run.output).name == "step_000002"


def test_the_clock_asks_too(world, tmp_path):
    run = world.run(tmp_path / "run", stop={"after_minutes": 1e-9})
    run_ranks(2, asked_at_step, run, 99, ask_by_term)
    assert json.loads((run.output / "requeue.json").read_text()) == {"step": 0, "reason": "stop.after_minutes"}
    assert checkpoint.latest(run.output) is None


def test_a_warning_while_models_load_is_remembered_and_the_next_attempt_finishes(world, tmp_path):
    run = world.run(tmp_path / "run")
    run_ranks(2, asked_at_step, run, 0, ask_by_usr1)
    assert json.loads((run.output / "requeue.json").read_text()) == {"step": 0, "reason": "SIGUSR1"}
    (run.output / "stop").touch()  # an old request must not stop the new attempt
    run_ranks(2, asked_at_step, run, 99, ask_by_term)
    assert json.loads((run.output / "done.json").read_text()) == {"steps": 4}
    assert not (run.output / "requeue.json").exists()
    assert not (run.output / "stop").exists()


def status_with_late_signals(recipe):
    status = main([str(recipe)])
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    return status


def test_a_late_signal_does_not_change_how_a_run_ended(world, tmp_path):
    recipe = write_recipe(world.run(tmp_path / "run", steps=1), tmp_path / "recipe.toml")
    assert run_ranks(1, status_with_late_signals, recipe) == [0]
    assert (tmp_path / "run" / "done.json").exists()


def test_a_stop_file_made_while_the_ranks_start_is_not_lost(tmp_path):
    stop, old = tmp_path / "stop", time.time() - 60
    stop.touch()
    os.utime(stop, (old, old))
    started = StopRequest().started
    clear(tmp_path, started)
    assert not stop.exists()
    stop.touch()
    clear(tmp_path, started - 1)  # the clock of a file system is a few milliseconds late
    assert stop.exists()
