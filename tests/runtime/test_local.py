"""On one machine every launcher gives the same run, and Ctrl-C saves under each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from laid_ds.train import main
from tests.support.processes import free_port, interrupted, run_ranks
from tests.support.recipes import write_recipe
from tests.support.slurm import lines

BIN = Path(sys.executable).parent
LOCAL = [sys.executable, "-m", "launch.cli", "local"]


def whole_run(recipe: Path) -> None:
    assert main([str(recipe)]) == 0


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory) -> list:
    run = world.run(tmp_path_factory.mktemp("straight") / "run", seed=5)
    run_ranks(2, whole_run, write_recipe(run, run.output.with_suffix(".toml")))
    return lines(run.output)


@pytest.mark.parametrize(
    "command",
    [
        [*LOCAL, "RECIPE", "seed=5", "--ranks", "2"],
        [*LOCAL, "RECIPE", "seed=5", "--ranks", "2", "--launcher", "torchrun"],
        [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", "PORT", "--module", "laid_ds.train", "RECIPE", "seed=5"],
    ],
    ids=["deepspeed", "torchrun", "plain-deepspeed"],
)
def test_every_launcher_gives_the_same_run(world, tmp_path, straight, command):
    run = world.run(tmp_path / "run")
    places = {"RECIPE": str(write_recipe(run, tmp_path / "recipe.toml")), "PORT": str(free_port())}
    found = subprocess.run([places.get(word, word) for word in command], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert lines(run.output) == straight


def test_ctrl_c_saves_under_torchrun_too(world, tmp_path):
    run = world.run(tmp_path / "run", steps=1_000_000, checkpoint={"every_steps": 100_000})
    recipe = write_recipe(run, tmp_path / "recipe.toml")
    command = [*LOCAL, str(recipe), "--ranks", "2", "--launcher", "torchrun"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    output = interrupted(process, (run.output / "metrics.jsonl").is_file)
    assert process.returncode == 130, output
    assert json.loads((run.output / "requeue.json").read_text())["reason"] == "SIGINT"


def test_an_unknown_launcher_is_one_sentence(world, tmp_path):
    recipe = write_recipe(world.run(tmp_path / "run"), tmp_path / "recipe.toml")
    found = subprocess.run([*LOCAL, str(recipe), "--launcher", "mpirun"], capture_output=True, text=True)
    assert (found.returncode, found.stderr.splitlines()[-1]) == (2, "laid-launch: launcher 'mpirun': choose one of deepspeed, torchrun")
