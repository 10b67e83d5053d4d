"""Law 8: killed at any moment and resumed, on any number of ranks, is uninterrupted; a stop signal saves; nothing is overwritten."""

from __future__ import annotations

import io
import itertools
import json
import math
import multiprocessing.connection
import os
import random
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from laid_ds import config
from laid_ds.export import export_run
from laid_ds.models.load import load_model
from laid_ds.run.build import build
from laid_ds.run.loop import train
from laid_ds.run.metrics import Reporter
from laid_ds.runtime import checkpoint, engine
from laid_ds.runtime.stop import StopRequest
from tests.support.processes import interrupted, output_of, run_ranks, start_ranks
from tests.support.recipes import write_recipe

EXACT = ("loss", "sft", "kl", "align", "match", "gradient_norm", "lr", "keys")
KILLS = int(os.environ.get("LAID_KILLS", "6"))
CALLS = 150_000  # Python calls of about two steps and saves


def whole_run(run):
    engine.start_processes()
    train(run, StopRequest().listen())


def run_killed_after(run, step):
    """Every rank dies by SIGKILL right after reporting `step`, before anything of it is saved."""
    report = Reporter.step

    def report_and_die(self, done, values):
        report(self, done, values)
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Reporter.step = report_and_die
    whole_run(run)


def lines(run):
    records = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    return [{name: record[name] for name in ("step", *EXACT)} for record in records]


def test_killed_and_resumed_is_uninterrupted(world, tmp_path):
    def make(name):
        return world.run(tmp_path / name, match={"rows": 5})  # sampled rows use the random state that must be restored

    straight, killed = make("straight"), make("killed")
    run_ranks(2, whole_run, straight)
    processes, _ = start_ranks(2, run_killed_after, killed, 3)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL] * 2
    assert checkpoint.latest(killed.output).name == "step_000002"
    assert len(lines(killed)) == 3
    run_ranks(2, whole_run, killed)
    assert lines(killed) == lines(straight)
    assert [line["step"] for line in lines(killed)] == [1, 2, 3, 4]


def killed(run, ranks, step):
    """A run whose ranks all die after reporting `step`; the checkpoint before it is left."""
    processes, _ = start_ranks(ranks, run_killed_after, run, step)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL] * ranks


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """Eight steps on two ranks, six samples each, without a pause; checkpoints of steps 6 and 8 are kept."""
    run = world.run(tmp_path_factory.mktemp("straight") / "run", steps=8, data={"micro_batch": 3})
    run_ranks(2, whole_run, run)
    return run


def test_a_run_moves_between_numbers_of_ranks(world, tmp_path, straight):
    def on(micro_batch, accumulation):
        return world.run(tmp_path / "run", steps=8, data={"micro_batch": micro_batch}, optimizer={"accumulation": accumulation})

    killed(on(3, 1), ranks=2, step=3)
    with pytest.raises(AssertionError, match=r"began with 6 samples per step .* these are 3 \(3 x 1 x 1 / 1\)"):
        run_ranks(1, whole_run, on(3, 1))
    killed(on(3, 2), ranks=1, step=5)
    killed(on(3, 1), ranks=2, step=7)
    run_ranks(3, whole_run, on(2, 1))
    moved, expected = lines(on(2, 1)), lines(straight)
    assert [line["step"] for line in moved] == list(range(1, 9))
    for line, other in zip(moved, expected, strict=True):
        alike = line["step"] <= 6  # micro-batches of the same shape: two gradients are added, in whichever order
        assert line["keys"] == other["keys"]  # of all ranks, in the stream's order
        assert len(line["keys"]) == 6
        for name in ("lr", "loss", "sft", "kl", "align", "match"):
            assert line[name] == (other[name] if alike else pytest.approx(other[name], rel=1e-6)), (line["step"], name)
        assert line["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-12 if alike else 1e-6)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")) == ["step_000006", "step_000008"]


def test_prolonged_is_uninterrupted_where_no_schedule_knows_the_end(world, tmp_path):
    def make(name, steps):
        return world.run(tmp_path / name, steps=steps, optimizer={"decay": "constant"}, match={"omega": "uniform"})

    run_ranks(2, whole_run, make("straight", 6))
    run_ranks(2, whole_run, make("run", 3))
    with pytest.raises(AssertionError, match=r"holds a finished run of 3 steps; give more steps=\.\.\. to go on from there"):
        run_ranks(1, whole_run, make("run", 3))
    run_ranks(2, whole_run, make("run", 6))
    assert lines(make("run", 6)) == lines(make("straight", 6))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["run"]["steps"] == 6
    assert record["prolonged"] == [{"after_step": 3, "from": 3, "to": 6}]
    assert json.loads((tmp_path / "run" / "done.json").read_text()) == {"steps": 6}


def sentences_of(run):
    """A whole run, and what it says."""
    said, say = [], Reporter.say
    Reporter.say = lambda self, text: (said.append(text), say(self, text))
    whole_run(run)
    return said


def test_a_prolonged_run_has_the_schedules_of_a_longer_one(world, tmp_path):
    run_ranks(1, whole_run, world.run(tmp_path / "run", steps=2))
    longer = world.run(tmp_path / "run", steps=5)
    (said,) = run_ranks(1, sentences_of, longer)
    rates = [line["lr"] / longer.optimizer.lr for line in lines(longer)]
    assert rates == pytest.approx([1, 0.5] + [0.5 * (1 + math.cos(math.pi * step / 5)) for step in (2, 3, 4)])
    assert said[1] == (
        "prolonged from 2 to 5 steps: after step 2 all schedules are those of a run of 5 steps, and the learning rate goes on at 65% of "
        "optimizer.lr (cosine)"
    )


def test_an_older_checkpoint_is_exported_by_its_step(straight, tmp_path):
    export_run(straight.output, tmp_path / "six", step=6)
    export_run(straight.output, tmp_path / "eight")
    with pytest.raises(ValueError, match=r"holds no checkpoint of step 7; there are \[6, 8\]"):
        export_run(straight.output, tmp_path / "seven", step=7)
    saved = straight.output / "checkpoints" / "step_000006"
    weights = {name: engine.checkpoint_weights(saved)[f"model.{name}"] for name in ("lm_head.weight", "model.language_model.norm.weight")}
    six, eight = (load_model(tmp_path / name).state_dict() for name in ("six", "eight"))
    for name, weight in weights.items():
        assert torch.equal(six[name], weight)
        assert not torch.equal(eight[name], weight)
    state = json.loads((saved / "manifest.json").read_text())["state"]
    assert state["run"] == config.as_tree(straight)
    assert state["versions"]["torch"] == version("torch")


def test_a_checkpoint_that_a_running_run_removes_while_it_is_exported_is_one_sentence(straight, tmp_path, monkeypatch):
    copied = shutil.copytree(straight.output, tmp_path / "run")

    def removed(saved):
        shutil.rmtree(saved)
        raise FileNotFoundError(2, "No such file or directory", str(saved))

    monkeypatch.setattr(engine, "checkpoint_weights", removed)
    with pytest.raises(ValueError, match=r"has removed checkpoint .*/step_000008 while it was read; export again"):
        export_run(copied, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def save_again(run, saved):
    engine.start_processes()
    training = build(run)
    state = checkpoint.restore(training.student, saved)
    checkpoint.save(training.student, run.output, state, run.checkpoint)


def test_another_number_of_ranks_holds_the_same_state_bit_for_bit(world, tmp_path, straight):
    run = world.run(tmp_path / "run", steps=8, data={"micro_batch": 2})
    run_ranks(3, save_again, run, straight.output / "checkpoints" / "step_000006")
    here, there = (checkpoint.universal(output / "checkpoints" / "step_000006") / "zero" for output in (run.output, straight.output))
    states = sorted(path.relative_to(here) for path in here.rglob("*.pt") if path.name != "optimizer_state.pt")
    assert len(states) > 100
    for name in states:
        mine, theirs = (torch.load(folder / name, weights_only=False) for folder in (here, there))
        assert torch.equal(*(value["param"] if isinstance(value, dict) else value for value in (mine, theirs))), name
    groups = [
        torch.load(folder / "optimizer_state.pt", weights_only=False)["optimizer_state_dict"]["param_groups"] for folder in (here, there)
    ]
    assert groups[0] == groups[1]
    assert [group["name"] for group in groups[0]] == ["model", "mixing", "gain"]


def run_until_death(run, rank, kind, number):
    """This rank dies by SIGKILL at the number-th function call of its training loop, or at its number-th act on a checkpoint's files."""
    if int(os.environ["RANK"]) == rank:
        {"call": die_at_call, "write": die_at_write}[kind](number)
    whole_run(run)


def die_at_call(number):
    calls, start = itertools.count(1), Reporter.start

    def count(frame, event, argument):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def start_counting(self, step):
        start(self, step)
        sys.setprofile(count)

    Reporter.start = start_counting


def die_at_write(number):
    """Files are left half written; deletions, flushes and renames are not begun."""
    acts = itertools.count(1)

    def dying(function):
        def act(*arguments, **options):
            if next(acts) == number:
                if function is save:
                    whole = io.BytesIO()
                    save(arguments[0], whole)
                    Path(arguments[1]).write_bytes(whole.getvalue()[: whole.tell() // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return act

    save = torch.save
    torch.save, os.fsync, os.replace, shutil.rmtree = map(dying, (torch.save, os.fsync, os.replace, shutil.rmtree))


def test_killed_at_random_moments_and_resumed_is_uninterrupted(world, tmp_path):
    def make(name):
        return world.run(tmp_path / name, steps=2 * KILLS + 2, match={"rows": 5}, checkpoint={"every_steps": 1})

    chance, run = random.Random(0), make("killed")
    run_ranks(2, whole_run, make("straight"))
    for kill in range(KILLS):
        death = chance.randrange(2), *(("write", chance.randint(1, 12)) if kill % 2 else ("call", chance.randint(1, CALLS)))
        processes, _ = start_ranks(2, run_until_death, run, *death)
        multiprocessing.connection.wait([process.sentinel for process in processes])
        for process in processes:
            process.kill()  # as a launcher does when one rank is gone
            process.join()
        assert processes[death[0]].exitcode == -signal.SIGKILL, death
        saved = checkpoint.latest(run.output)  # verified: it would be refused here
        reported = len(lines(run)) if (run.output / "metrics.jsonl").is_file() else 0
        assert reported - (int(saved.name.removeprefix("step_")) if saved else 0) <= 1, death
    run_ranks(2, whole_run, run)
    assert lines(run) == lines(make("straight"))


@pytest.fixture
def recipe(world, tmp_path):
    """A longer run as a file, for the real launcher."""
    run = world.run(tmp_path / "run", steps=1_000_000, checkpoint={"every_steps": 100_000})
    return write_recipe(run, tmp_path / "recipe.toml")


def start(recipe, *overrides):
    command = [sys.executable, "-m", "laid_ds.cli", "train", str(recipe), *overrides, "--ranks", "2"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def test_ctrl_c_leaves_a_resumable_run_and_no_process(recipe, tmp_path):
    process = start(recipe)
    output = interrupted(process, (tmp_path / "run" / "metrics.jsonl").is_file)
    assert process.returncode == 130, output
    assert "the same command goes on from there" in output
    assert "Traceback" not in output
    stopped = int(checkpoint.latest(tmp_path / "run").name.removeprefix("step_"))
    records = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records == list(range(1, stopped + 1))

    changed = start(recipe, "optimizer.lr=0.5")
    output = output_of(changed)
    assert changed.returncode != 0
    assert "holds another run (it differs in optimizer.lr)" in output
    assert "Traceback" not in output
    assert checkpoint.latest(tmp_path / "run").name == f"step_{stopped:06d}"
