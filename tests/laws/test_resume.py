"""Law 8: killed and resumed is uninterrupted, in losses, samples and random numbers; a stop signal saves; nothing is overwritten."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import tomli_w

from laid_ds import checkpoint, engine
from laid_ds.metrics import Reporter
from laid_ds.train import train
from tests.support.processes import run_ranks, start_ranks

EXACT = ("loss", "sft", "kl", "align", "match", "gradient_norm", "lr", "keys")


def whole_run(run):
    engine.start_processes()
    train(run)


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


def test_another_world_size_is_refused_with_a_sentence(world, tmp_path):
    run = world.run(tmp_path / "run")
    processes, _ = start_ranks(2, run_killed_after, run, 3)
    for process in processes:
        process.join()
    with pytest.raises(AssertionError, match="was saved by 2 ranks, this run has 1"):
        run_ranks(1, whole_run, run)


def test_a_damaged_checkpoint_is_refused_and_a_half_written_one_is_ignored(world, tmp_path):
    run = world.run(tmp_path / "run")
    processes, _ = start_ranks(2, run_killed_after, run, 3)
    for process in processes:
        process.join()
    (run.output / "checkpoints" / "step_000003").mkdir()
    (run.output / "checkpoints" / "step_000003" / "garbage").write_bytes(b"x")
    saved = checkpoint.latest(run.output)
    assert saved.name == "step_000002"
    victim = max(saved.glob("*optim_states.pt"))
    with victim.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match=f"{victim.name} has 100 bytes"):
        checkpoint.latest(run.output)


@pytest.fixture
def recipe(world, tmp_path):
    """A longer run as a file, for the real launcher."""
    run = world.run(tmp_path / "run", steps=2000, checkpoint={"every_steps": 1000})
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(json.loads(run.model_dump_json(exclude_none=True))))
    return path


def start(recipe, *overrides):
    command = [sys.executable, "-m", "laid_ds.cli", "train", str(recipe), *overrides, "--ranks", "2"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_ctrl_c_leaves_a_resumable_run_and_no_process(recipe, tmp_path):
    process = start(recipe)
    while not (tmp_path / "run" / "metrics.jsonl").is_file() and process.poll() is None:
        time.sleep(0.2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "the same command goes on from there" in output
    assert "Traceback" not in output
    assert not psutil.wait_procs(children, timeout=5)[1]
    stopped = int(checkpoint.latest(tmp_path / "run").name.removeprefix("step_"))
    records = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records == list(range(1, stopped + 1))

    changed = start(recipe, "optimizer.lr=0.5")
    output, _ = changed.communicate(timeout=60)
    assert changed.returncode != 0
    assert "holds another run (it differs in optimizer.lr)" in output
    assert "Traceback" not in output
    assert checkpoint.latest(tmp_path / "run").name == f"step_{stopped:06d}"
