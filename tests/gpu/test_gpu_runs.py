"""Whole runs on one GPU: DeepSpeed's ZeRO with NCCL, bfloat16, resumed, packed, offloaded; against the same run on the CPU in float32."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_device import ON_GPU

pytest.importorskip("deepspeed", reason="a run needs all of the package, not only its kernels")

from tests.support.recipes import write_recipe
from tests.support.world import ROOT

pytestmark = ON_GPU
ENGINES = ROOT / "ds_configs"
TERMS = ("loss", "sft", "kl", "align", "match")
ON_THE_GPU = {name: value for name, value in os.environ.items() if name not in ("DS_ACCELERATOR", "TRITON_INTERPRET")}


def trained(run, *words: str, environment=ON_THE_GPU) -> tuple[list[dict], str]:
    """(records of every step, what was said) of a run by the command, in a launcher's rank."""
    recipe = write_recipe(run, run.output.with_suffix(".toml"))
    command = [sys.executable, "-m", "laid_ds.cli", "train", str(recipe), "--ranks", "1", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    return records, done.stdout + done.stderr


def gpu_run(world, output: Path, student="zero3_student", teacher="zero3_teacher", **changes):
    models = {
        "student": {"deepspeed": ENGINES / f"{student}.json", "dtype": "bfloat16"} | changes.pop("student_options", {}),
        "teacher": {"deepspeed": ENGINES / f"{teacher}.json", "dtype": "bfloat16"},
    }
    return world.run(output, **models, **changes)


@pytest.fixture(scope="module")
def on_cpu(world, tmp_path_factory) -> list[dict]:
    """The same run in float32 on the CPU."""
    return trained(world.run(tmp_path_factory.mktemp("cpu") / "run"), environment=os.environ | {"DS_ACCELERATOR": "cpu"})[0]


def assert_close(found: list[dict], wanted: list[dict], share: float) -> None:
    assert [record["step"] for record in found] == [record["step"] for record in wanted]
    for got, want in zip(found, wanted, strict=True):
        for term in TERMS:
            assert got[term] == pytest.approx(want[term], rel=share, abs=1e-3), (got["step"], term)


ENGINE_FILES = [
    ("zero3_student", "zero3_teacher"),
    ("zero3_student_offload", "zero3_teacher"),
    ("zero3_student", "zero3_teacher_offload"),
    ("zero2_student", "zero3_teacher"),
    ("zero1_student", "zero3_teacher_offload"),
]


@pytest.mark.parametrize("student, teacher", ENGINE_FILES)
def test_every_engine_file_follows_float32_on_the_cpu(world, tmp_path, on_cpu, student, teacher):
    found, said = trained(gpu_run(world, tmp_path / "run", student, teacher))
    assert_close(found, on_cpu, 0.05)
    (kernels,) = (line for line in said.splitlines() if line.startswith("kernels: "))
    assert "attention by " in kernels
    assert "matching by fused" in kernels, said


def test_a_resumed_run_in_bfloat16_goes_on_as_it_was(world, tmp_path):
    """The second half again, from the checkpoint in the middle."""
    run = gpu_run(world, tmp_path / "run")
    straight, _ = trained(run)
    go_back(run.output, 2)
    resumed, said = trained(run)
    assert "step 2 of 4" in said
    assert_close(resumed, straight, 1e-2)


def go_back(output: Path, step: int) -> None:
    """As if the run had been killed after the checkpoint of a step."""
    (output / "done.json").unlink()
    for path in (output / "checkpoints").glob("step_*"):
        if path.name != f"step_{step:06d}":
            shutil.rmtree(path)
    (output / "checkpoints" / "latest").write_text(f"step_{step:06d}")


@pytest.mark.parametrize("checkpointing", [True, "offload"])
def test_checkpointing_changes_nothing(world, tmp_path, on_cpu, checkpointing):
    found, _ = trained(gpu_run(world, tmp_path / "run", student_options={"gradient_checkpointing": checkpointing}))
    assert_close(found, on_cpu, 0.05)


def test_packed_rows(world, tmp_path):
    data = {"tokens_per_pack": 256, "micro_batch": 1}
    cpu, _ = trained(world.run(tmp_path / "cpu", data=data), environment=os.environ | {"DS_ACCELERATOR": "cpu"})
    found, _ = trained(gpu_run(world, tmp_path / "gpu", data=data))
    assert_close(found, cpu, 0.05)


def test_doctor_finds_nothing_wrong(tmp_path):
    command = [sys.executable, "-m", "laid_ds.cli", "doctor", "--json", "--ranks", "1", "--run", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=ON_THE_GPU)
    report = json.loads(done.stdout)
    assert done.returncode == 0, [line for line in report["lines"] if line["verdict"] == "wrong"]
    checks = {line["check"] for line in report["lines"] if line["verdict"] in ("ok", "slow")}
    assert {"GPU 0", "attention, torch varlen, bfloat16", "matching, fused, all heads, bfloat16"} <= checks
    assert "a LAid step under ZeRO-3, bfloat16" in checks
