"""Law: one run folder, one training. Whatever process of it is killed, the others end, and the same command goes on at once."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from laid_ds.run.loop import train
from laid_ds.run.metrics import Reporter
from laid_ds.runtime import engine, lock
from laid_ds.runtime.launchers import MODULE
from laid_ds.runtime.stop import StopRequest
from laid_ds.train import main
from tests.support.processes import free_port, run_ranks, start_ranks, wait_until
from tests.support.recipes import write_recipe

KILLS = int(os.environ.get("LAID_KILLS", "2"))
EXACT = ("step", "loss", "sft", "kl", "align", "match", "gradient_norm", "lr", "keys")
PYTHON = [sys.executable, "-m"]
BY_US = [*PYTHON, "laid_ds.cli", "train", "RECIPE", "--ranks", "2"]
BY_HAND = (
    [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", "PORT", "--module", "laid_ds.train", "RECIPE"],
    [*PYTHON, "torch.distributed.run", "--nproc-per-node=2", "--master-port=PORT", "--module", "laid_ds.train", "RECIPE"],
)
VICTIMS = ("command", "launcher", "rank", "worker")


def records(output):
    """Whole lines of metrics.jsonl."""
    path = output / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


class Attempt:
    """One start of a run, its processes, and what it says."""

    def __init__(self, run, recipe, command):
        self.run, self.recipe, self.by_us, self.before = run, recipe, command is BY_US, records(run.output)
        words = [word.replace("RECIPE", str(recipe)).replace("PORT", str(free_port())) for word in command]
        self.said = recipe.with_suffix(".log")
        with self.said.open("a") as file:
            self.process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)

    def tree(self):
        """The processes of the attempt, by what they are."""
        try:
            command = psutil.Process(self.process.pid)
            below = {p.pid: p for p in command.children(recursive=True)}
            words = {pid: p.cmdline() for pid, p in below.items()}
            alike = {pid for pid in below if is_rank(words[pid])}
            launchers = [p for pid, p in below.items() if "laid_ds.train" in words[pid] and pid not in alike and words[pid][0] != "env"]
            ranks = [below[pid] for pid in alike if below[pid].ppid() not in alike]
            workers = [below[pid] for pid in alike if below[pid].ppid() in alike]
        except psutil.NoSuchProcess:  # as it was being looked at
            return None
        launchers = launchers or [command]  # torchrun is its own
        return {"command": [command], "launcher": launchers, "rank": ranks, "worker": workers, "below": list(below.values())}

    def wait_for(self, condition, what):
        wait_until(lambda: condition() or self.process.poll() is not None, what)
        assert condition(), self.said.read_text()

    def lines(self):
        """How many lines this attempt has written."""
        return len([record for record in records(self.run.output) if record not in self.before])

    def killed(self, victim, lines, chance):
        """kill -9 of one of these once the attempt has written so many lines; the processes that the command had started."""
        trees = []

        def is_there():
            tree = self.tree() if self.lines() >= lines else None
            trees[:] = [tree] if tree and tree[victim] else []
            return bool(trees)

        self.wait_for(is_there, f"{victim} after {lines} lines")
        if lines:
            assert len(ranks_of(self.recipe)) == 2
        chance.choice(trees[0][victim]).send_signal(signal.SIGKILL)
        return trees[0]["below"]


def ranks_of(recipe):
    """Every process of the machine that trains this recipe, their workers left out."""
    found = {}
    for process in psutil.process_iter(["cmdline", "ppid", "status"]):
        words = process.info["cmdline"] or []
        if is_rank(words) and str(recipe) in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found[process.pid] = process.info["ppid"]
    return [pid for pid, parent in found.items() if parent not in found]


def is_rank(words):
    return ("-m", MODULE) in (tuple(words[1:3]), tuple(words[2:4]))  # launchers name it farther behind


def is_gone(process):
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def run_to(run, step):
    """Uninterrupted up to `step`, then asked to stop."""
    report = Reporter.step

    def report_and_ask(self, done, values):
        report(self, done, values)
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    Reporter.step = report_and_ask
    engine.start_processes()
    train(run, StopRequest().listen())


@pytest.fixture
def start():
    """Attempts that do not outlive the test."""
    started = []

    def attempt(run, recipe, command):
        started.append(Attempt(run, recipe, command))
        return started[-1]

    yield attempt
    for attempt in started:
        attempt.process.kill()


def test_whatever_is_killed_the_same_command_goes_on_at_once(world, tmp_path, start):
    def make(name):
        return world.run(tmp_path / name, steps=1_000_000, checkpoint={"every_steps": 3}, data={"workers": 1}, match={"rows": 5})

    chance, run = random.Random(KILLS), make("killed")
    recipe = write_recipe(run, tmp_path / "recipe.toml")
    attempt = start(run, recipe, BY_US)
    for number in range(KILLS):
        victim = VICTIMS[number % 4] if number < 4 else chance.choice(VICTIMS)
        lines = chance.choice((0, 1, 2, 4) if attempt.by_us and victim != "worker" else (1, 2, 4))
        processes, command = attempt.killed(victim, lines, chance), attempt.process
        killed_at = time.monotonic()
        attempt = start(run, recipe, BY_US if number % 3 < 2 else chance.choice(BY_HAND))
        wait_until(lambda processes=processes: all(map(is_gone, processes)), f"the end of all when a {victim} was killed")
        seconds = time.monotonic() - killed_at
        wait_until(lambda command=command: command.poll() is not None, f"the end of a command whose {victim} was killed")
        assert victim != "worker" or "lost one of its data workers; the same command goes on" in attempt.said.read_text()
        attempt.before = records(run.output)
        print(f"kill {number}: {victim} of {command.args[:3]} after {lines} lines: all gone after {seconds:.1f} s")
    attempt.wait_for(lambda: attempt.lines() >= 4, "the last attempt")
    assert len(ranks_of(recipe)) == 2
    (run.output / "stop").touch()
    assert attempt.process.wait() == 0, attempt.said.read_text()
    found = records(run.output)
    assert [record["step"] for record in found] == list(range(1, len(found) + 1))
    run_ranks(2, run_to, make("straight"), len(found))
    assert [[record[name] for name in EXACT] for record in found] == [
        [record[name] for name in EXACT] for record in records(make("straight").output)
    ]


def status_of_main(recipe):
    lock.HERE_SECONDS, sys.stderr = 0.0, io.StringIO()
    return main([str(recipe)]), sys.stderr.getvalue()


def test_of_two_trainings_that_start_together_one_trains(world, tmp_path):
    run = world.run(tmp_path / "run", steps=1_000_000, checkpoint={"every_steps": 100_000})
    recipe = write_recipe(run, tmp_path / "recipe.toml")
    trainings = [start_ranks(2, status_of_main, recipe) for _ in range(2)]

    def ended():
        return [training for training in trainings if not any(process.is_alive() for process in training[0])]

    wait_until(ended, "the end of one")
    wait_until(lambda: len(records(run.output)) >= 2 or len(ended()) == 2, "two steps of the other")
    (refused,) = ended()
    (trained,) = [training for training in trainings if training is not refused]
    (run.output / "stop").touch()
    for (_, queue), expected in ((refused, 2), (trained, 0)):
        said = {}
        for _ in range(2):
            rank, ok, result = queue.get()
            assert ok, result
            status, said[rank] = torch.load(io.BytesIO(result), weights_only=False)
            assert status == expected, said
        if expected == 2:
            holder = json.loads((run.output / lock.FILE).read_text())
            who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
            assert said[0].startswith(f"laid: {run.output} is in use by the training of {who}; stop it")
            assert (said[0].count("\n"), said[1]) == (1, "")
    steps = [record["step"] for record in records(run.output)]
    assert steps == list(range(1, len(steps) + 1))
