"""On one machine every launcher gives the same run, and Ctrl-C saves under each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from laid_ds.runtime import local
from laid_ds.runtime.environment import DEVICES, without_ranks
from laid_ds.train import main
from tests.support.processes import free_port, interrupted, run_ranks, wait_until
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
    said = "laid-launch: invalid value for '--launcher': 'mpirun' is not one of 'deepspeed', 'torchrun' (`laid-launch local --help`)"
    assert (found.returncode, found.stderr.splitlines()[-1]) == (2, said)


TELLING = """
import json, os, pathlib, sys
pathlib.Path(sys.argv[1], "rank-" + os.environ["RANK"]).write_text(json.dumps(dict(os.environ)))
"""
START = """
import sys
import torch
from laid_ds.runtime import local
torch.cuda.device_count = lambda: 2
command = local._launcher
local._launcher = lambda *options: [word.replace("laid_ds.train", "telling") for word in command(*options)]
sys.exit(local.launch([sys.argv[1]], None, 0, sys.argv[2]))
"""
CHOICES = {
    "nothing": {},
    "numbers": {"CUDA_VISIBLE_DEVICES": "3,2"},
    "names": {"CUDA_VISIBLE_DEVICES": "MIG-GPU-1a/7/0,GPU-4b", "ROCR_VISIBLE_DEVICES": "1,0", "ASCEND_RT_VISIBLE_DEVICES": "5,4"},
}
LEFT_OVER = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "5",
    "LOCAL_SIZE": "4",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "elsewhere",
    "MASTER_PORT": "1",
    "CROSS_SIZE": "2",
    "PET_NNODES": "2",
    "PET_RDZV_ENDPOINT": "elsewhere:1",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
}


@pytest.mark.parametrize("chosen", CHOICES)
@pytest.mark.parametrize("launcher", local.LAUNCHERS)
def test_ranks_see_the_devices_that_were_chosen_and_nothing_of_another_launcher(tmp_path, launcher, chosen):
    (tmp_path / "telling.py").write_text(TELLING)
    environ = {name: value for name, value in os.environ.items() if name not in DEVICES} | LEFT_OVER | CHOICES[chosen]
    environ["PYTHONPATH"] = f"{tmp_path}:{Path.cwd()}"
    found = subprocess.run([sys.executable, "-c", START, str(tmp_path), launcher], env=environ, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    ranks = [json.loads((tmp_path / f"rank-{rank}").read_text()) for rank in range(2)]
    for rank, told in enumerate(ranks):
        assert {name: told[name] for name in DEVICES if name in told} == CHOICES[chosen]
        assert (told["RANK"], told["WORLD_SIZE"], told["LOCAL_RANK"], told["MASTER_ADDR"]) == (str(rank), "2", str(rank), "127.0.0.1")
        assert told.get("LOCAL_SIZE", "2") == told.get("LOCAL_WORLD_SIZE", "2") == "2"
        assert not {"OMPI_COMM_WORLD_LOCAL_RANK", "PET_NNODES"} & told.keys()
        assert told.get("TORCHELASTIC_USE_AGENT_STORE") == (None if launcher == "deepspeed" else "True")  # torchrun's own


ASKED = """
import os, pathlib, signal, sys
def asked(*_):
    pathlib.Path(sys.argv[1], "asked").touch()
    sys.exit(0)
signal.signal(signal.SIGINT, asked)
pathlib.Path(sys.argv[1], "ready").touch()
while True:
    signal.pause()
"""
START_STUB = """
import sys
from laid_ds.runtime import local
sys.exit(local.launch([sys.argv[1]], 1, module="asked"))
"""


@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal_asks_the_ranks_to_save_unless_nohup_keeps_it_away(tmp_path, nohup):
    (tmp_path / "asked.py").write_text(ASKED)
    environ = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}
    command = [sys.executable, "-c", START_STUB, str(tmp_path)]
    heard = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup themselves
    words = ["nohup", *command] if nohup else command
    process = subprocess.Popen(words, env=environ, start_new_session=True, preexec_fn=heard)
    wait_until((tmp_path / "ready").is_file, "the rank")
    process.send_signal(signal.SIGHUP)
    if nohup:
        process.send_signal(signal.SIGTERM)  # which reaches it after the other
    assert process.wait() == 128 + (signal.SIGTERM if nohup else signal.SIGHUP)
    assert (tmp_path / "asked").is_file()


FAILING = """
import os, sys
from pathlib import Path
from tests.support.processes import wait_until
spoken = Path(sys.argv[1], "spoken")
if os.environ["RANK"] == "0":
    print('{"finished": true}', flush=True)
    spoken.touch()
else:
    wait_until(spoken.is_file, "rank 0 to speak")
    sys.exit(3)
"""
START_FAILING = """
import sys
from laid_ds.runtime import local
sys.exit(local.launch(sys.argv[1:], ranks=2, module="failing"))
"""


def test_what_the_launcher_says_of_a_rank_that_failed_is_no_part_of_stdout(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    environ = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}
    found = subprocess.run([sys.executable, "-c", START_FAILING, str(tmp_path)], capture_output=True, text=True, env=environ)
    assert found.returncode == 3
    assert found.stdout == '{"finished": true}\n'
    assert "exits with return code = 3" in found.stderr


def test_the_part_of_deepspeed_that_looks_for_other_machines_is_left_out():
    assert "deepspeed.launcher.runner" not in local._launcher("deepspeed", 2, 29500)  # it reads /job/hostfile and .deepspeed_env


def test_what_is_no_launchers_word_is_kept():
    kept = {
        "PATH": "/bin",
        "NCCL_DEBUG": "INFO",
        "SLURM_JOB_ID": "5",
        "RANKING": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "1",
    }
    assert without_ranks(kept | LEFT_OVER) == kept


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(local.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-4b")
    monkeypatch.delenv("DS_ACCELERATOR")
    with pytest.raises(ValueError, match=r"2 ranks need 2 GPUs, but 1 can be used here \(CUDA_VISIBLE_DEVICES=GPU-4b\); give --ranks 1"):
        local.launch(["recipe.toml"], ranks=2)
