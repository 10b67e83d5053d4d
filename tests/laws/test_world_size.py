"""Law 7 and the sharding itself: ranks and accumulation change nothing, and each rank holds its share of the teacher."""

from __future__ import annotations

import pytest
import torch

from tests.support.processes import run_ranks
from tests.support.training import plain_steps, rank_steps

STEPS = 3


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    return plain_steps(world.run(tmp_path_factory.mktemp("plain")), STEPS, global_batch=4)


@pytest.mark.parametrize("ranks, accumulation, checkpointing", [(1, 2, False), (2, 1, False), (2, 1, True), (4, 1, False)])
def test_zero3_equals_plain_torch(world, tmp_path, plain, ranks, accumulation, checkpointing):
    run = world.run(
        tmp_path / "run",
        data={"micro_batch": 4 // (ranks * accumulation)},
        optimizer={"accumulation": accumulation},
        student={"gradient_checkpointing": checkpointing},
        losses={"rows_per_chunk": 3},
    )
    results = run_ranks(ranks, rank_steps, run, STEPS)
    for result in results:
        for found, expected in zip(result["records"], plain["records"], strict=True):
            for name, value in expected.items():
                assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
        for name, weight in plain["weights"].items():
            torch.testing.assert_close(result["weights"][name], weight, rtol=0, atol=1e-5)


def test_bf16_with_fp32_masters_follows_fp32(world, tmp_path, plain):
    """Rounding only: every term of the first steps within 3 %, and the small parameters move although bf16 could not show it."""
    run = world.run(tmp_path / "run", student={"dtype": "bfloat16"}, teacher={"dtype": "bfloat16"})
    for result in run_ranks(2, rank_steps, run, STEPS):
        for found, expected in zip(result["records"], plain["records"], strict=True):
            for name in ("loss", "sft", "kl", "align", "match"):
                assert found[name] == pytest.approx(expected[name], rel=0.03), name
        assert 0 < result["weights"]["align.gain.1"].abs().max() < 0.01


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
