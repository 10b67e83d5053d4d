"""`laid eval` under every launcher gives the same answers, and Ctrl-C keeps what was said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from laid_ds.evaluation.answers import answers_file, read_answers
from laid_ds.evaluation.evaluate import How, evaluate_models
from tests.support import benchmarks
from tests.support.processes import free_port, interrupted, output_of

EVAL = ["laid_ds.cli", "eval"]
PYTHON = [sys.executable, "-m"]


@pytest.fixture(scope="module")
def task(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    names = benchmarks.write_pictures(world.shards, folder / "pictures", 12)
    return benchmarks.import_shards(folder, "vhs", "visual_haystack_4", benchmarks.visual_haystacks(names, 9, 4), folder / "pictures")


@pytest.fixture(scope="module")
def alone(world, task, tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("alone") / "e.json"
    evaluate_models([task], {"m": world.student}, out, how=How(max_new_tokens=4))
    return read_answers(answers_file(out))[1]


def words(task: Path, model: Path, out: Path) -> list[str]:
    return [str(task), f"m={model}", "--out", str(out), "--max-new-tokens", "4", "--workers", "0"]


LAUNCHERS = {
    "ranks": ([*PYTHON, *EVAL], ["--ranks", "2", "--zero3"]),
    "torchrun": ([*PYTHON, "torch.distributed.run", "--nproc-per-node=2", "--master-port=PORT", "--module", *EVAL], []),
    "plain-deepspeed": (
        [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus=2", "--master_port=PORT", "--module", *EVAL],
        ["--zero3"],
    ),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_gives_the_same_answers(world, task, alone, tmp_path, launcher):
    before, after = LAUNCHERS[launcher]
    command = [word.replace("PORT", str(free_port())) for word in before] + words(task, world.student, tmp_path / "e.json") + after
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("next: laid report") == 1
    assert "m, rank 0 of 2: 5 of 5 samples of visual_haystack_4" in found.stderr
    assert read_answers(tmp_path / "e.answers.jsonl")[1] == alone


def test_ranks_that_srun_started_are_ranks(world, task, alone, tmp_path):
    """Two tasks of a SLURM step, by the variables that SLURM sets."""
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    step |= {"SLURM_NODEID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [*PYTHON, *EVAL, *words(task, world.student, tmp_path / "e.json")]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in range(2)
    ]
    said = [output_of(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert read_answers(tmp_path / "e.answers.jsonl")[1] == alone


def test_ctrl_c_keeps_what_was_said_and_the_same_command_goes_on(world, task, alone, tmp_path):
    """A model that may say very much is stopped; what it had said stands."""
    out = tmp_path / "e.json"
    command = [*PYTHON, *EVAL, *words(task, world.student, out), "--ranks", "2", "--tokens-per-batch", "1"]
    command[command.index("--max-new-tokens") + 1] = "3000"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    said = interrupted(process, lambda: sum(len(path.read_bytes().splitlines()) for path in tmp_path.glob("e.answers.jsonl*")) > 1)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    header, kept = read_answers(tmp_path / "e.answers.jsonl")
    assert 0 < len(kept) < len(alone)
    assert json.loads(out.read_text())["models"] == {}
    assert header["setting"]["max_new_tokens"] == 3000


def test_what_is_wrong_is_said_once_before_ranks_start(world, task, tmp_path):
    command = [*PYTHON, *EVAL, *words(task, tmp_path / "nowhere", tmp_path / "e.json"), "--ranks", "2"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.count("no model at") == 1
    assert "Traceback" not in found.stderr
