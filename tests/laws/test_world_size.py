"""Law 7 and the sharding itself: ranks and accumulation change nothing, and each rank holds its share of the teacher."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from laid_ds.run.build import build_teacher
from laid_ds.runtime import engine
from tests.support.processes import run_ranks
from tests.support.training import plain_steps, rank_steps
from tests.support.world import ROOT

STEPS = 3
ENGINES = ROOT / "ds_configs"


def assert_equal(result, plain):
    """Every term, the gradient norm and the weights after the last step."""
    for found, expected in zip(result["records"], plain["records"], strict=True):
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    for name, weight in plain["weights"].items():
        torch.testing.assert_close(result["weights"][name], weight, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    return plain_steps(world.run(tmp_path_factory.mktemp("plain")), STEPS, global_batch=4)


@pytest.mark.parametrize(
    "ranks, accumulation, checkpointing", [(1, 2, False), (2, 1, False), (2, 1, True), (2, 1, "offload"), (4, 1, False)]
)
def test_zero3_equals_plain_torch(world, tmp_path, plain, ranks, accumulation, checkpointing):
    run = world.run(
        tmp_path / "run",
        data={"micro_batch": 4 // (ranks * accumulation)},
        optimizer={"accumulation": accumulation},
        student={"gradient_checkpointing": checkpointing},
        losses={"rows_per_chunk": 3},
    )
    for result in run_ranks(ranks, rank_steps, run, STEPS):
        assert_equal(result, plain)


@pytest.mark.parametrize(
    "student, teacher",
    [
        ("zero1_student", "zero3_teacher"),
        ("zero2_student", "zero3_teacher_offload"),
        ("zero3_student_offload", "zero3_teacher"),
        ("zero3_student", "zero3_teacher_offload"),
    ],
)
def test_every_engine_file_equals_plain_torch(world, tmp_path, plain, student, teacher):
    """Nothing is compiled for them where there is no GPU."""
    files = {"student": {"deepspeed": ENGINES / f"{student}.json"}, "teacher": {"deepspeed": ENGINES / f"{teacher}.json"}}
    for result in run_ranks(2, rank_steps, world.run(tmp_path / "run", **files), STEPS):
        assert_equal(result, plain)


def async_io_is_built() -> bool:
    """Whether DeepSpeed's file engine was compiled on this machine: that takes libaio's headers and minutes of g++."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory("async_io", verbose=False), "async_io.so").is_file()


@pytest.mark.skipif(not async_io_is_built(), reason="DeepSpeed's async_io is not built here (ds_configs/README.md says how)")
def test_a_teacher_on_nvme_equals_plain_torch(world, tmp_path, plain):
    """Only shards of 1 MiB and more go to the disk, so this teacher's head has many rows more than the tokenizer has ids; they are cut."""
    teacher = shutil.copytree(world.teacher, tmp_path / "teacher")
    model = world.load("teacher")
    model.resize_token_embeddings(1 << 14)
    model.save_pretrained(teacher)
    mechanics = json.loads((ENGINES / "zero3_teacher_nvme.json").read_text())
    mechanics["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    mechanics["zero_optimization"]["offload_param"] |= {"nvme_path": str(tmp_path), "buffer_size": 1_000_000}
    (tmp_path / "engine.json").write_text(json.dumps(mechanics))
    run = world.run(tmp_path / "run", teacher={"deepspeed": tmp_path / "engine.json", "path": teacher})
    for result in run_ranks(2, rank_steps, run, STEPS):
        assert_equal(result, plain)
    assert len(list(tmp_path.rglob("*.swp"))) == 4  # embedding and head, on two ranks


def test_bf16_with_fp32_masters_follows_fp32(world, tmp_path, plain):
    """Rounding only: every term of the first steps within 3 %, and the small parameters move although bf16 could not show it."""
    run = world.run(tmp_path / "run", student={"dtype": "bfloat16"}, teacher={"dtype": "bfloat16"})
    for result in run_ranks(2, rank_steps, run, STEPS):
        for found, expected in zip(result["records"], plain["records"], strict=True):
            for name in ("loss", "sft", "kl", "align", "match"):
                assert found[name] == pytest.approx(expected[name], rel=0.03), name
        assert 0 < result["weights"]["align.gain.1"].abs().max() < 0.01


def rank_shows(run, batch):
    """The logits that a sharded teacher shows of every token, put together from what it holds of them."""
    engine.start_processes()
    shown = build_teacher(run, ((1, 1),), 300)(batch).logits
    assert shown.weight.shape == (300, 64)
    return shown.rows @ shown.weight.mT


def test_a_sharded_teacher_shows_factors_of_its_logits(world, tmp_path):
    """With more rows than its hidden states are wide it hands out those and a copy of its head, which is whole inside its forward only."""
    batch = world.batch()
    batch = replace(batch, labels=batch.inputs["input_ids"])
    run = world.run(tmp_path / "run", teacher={"deepspeed": _no_persistence(tmp_path)})
    expected = world.load("teacher")(**batch.inputs).logits.flatten(0, 1)[:, :300]
    for logits in run_ranks(2, rank_shows, run, batch):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_holds_its_share_of_both_models(world, tmp_path, ranks):
    run = world.run(tmp_path / "run", teacher={"deepspeed": _no_persistence(tmp_path)}, student={"deepspeed": _no_persistence(tmp_path)})
    held = [result["bytes"] for result in run_ranks(ranks, rank_steps, run, 1)]
    whole = 4 * sum(p.numel() for p in world.load("teacher").parameters())
    for share in held:
        assert share["teacher"] == pytest.approx(whole / ranks, rel=0.01)


def _no_persistence(folder):
    path = folder / "engine.json"
    path.write_text('{"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000000, "stage3_param_persistence_threshold": 0}}')
    return path
