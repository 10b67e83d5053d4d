"""A run on several ranks: samples without images among samples with, and numbers that are not finite."""

from __future__ import annotations

import pytest
import torch

from data_tools.synth import haystacks
from laid_ds import distributed, engine
from laid_ds.data.index import ShardWriter
from laid_ds.data.record import Sample, Turn
from laid_ds.loop import train
from laid_ds.stop import StopRequest
from laid_ds.train import main
from tests.support.processes import run_ranks
from tests.support.training import rank_steps


@pytest.fixture(scope="module")
def mixed_shards(tmp_path_factory):
    """Every other sample is text alone, so that at each step some rank has no image of its own."""
    folder = tmp_path_factory.mktemp("mixed") / "shards"
    with ShardWriter(folder) as writer:
        for number, sample in enumerate(haystacks("train", 6, 3, 2, ("colour",), seed=1, num_scenes=576)):
            writer.write(sample)
            text = (Turn("user", (f"What colour is shape {number}?",)), Turn("assistant", ("blue",)))
            writer.write(Sample(f"text-{number}", text))
    return folder


def test_ranks_without_images_neither_hang_nor_change_the_numbers(world, tmp_path, mixed_shards):
    """ZeRO-3 gathers the vision tower on every rank or on none; a stand-in image keeps all ranks in step."""
    data = {"shards": [str(mixed_shards)], "images": None, "questions": None, "shuffle": "none"}
    one = world.run(tmp_path / "one", data=data | {"micro_batch": 2}, optimizer={"accumulation": 1})
    two = world.run(tmp_path / "two", data=data | {"micro_batch": 1}, optimizer={"accumulation": 1})
    (alone,) = run_ranks(1, rank_steps, one, 3)
    for result in run_ranks(2, rank_steps, two, 3):
        for found, expected in zip(result["records"], alone["records"], strict=True):
            for name, value in expected.items():
                if name != "images":  # stand-ins are counted where they are
                    assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_a_frozen_vision_tower_trains_beside_checkpointing(world, tmp_path):
    """Only the decoder moves; the first losses are those of the run that trains all."""
    changes = {"gradient_checkpointing": True}
    free = world.run(tmp_path / "free", student=changes)
    frozen = world.run(tmp_path / "frozen", student=changes | {"freeze_vision": True})
    (a, _), (b, _) = (run_ranks(2, rank_steps, run, 2) for run in (free, frozen))
    assert b["records"][0]["loss"] == pytest.approx(a["records"][0]["loss"], rel=1e-6)
    assert b["records"][0]["gradient_norm"] < a["records"][0]["gradient_norm"]
    assert b["records"][1]["loss"] != a["records"][1]["loss"]


def poisoned_run(run):
    """What the rank says of a student whose head holds a NaN, and whether anything was saved."""
    engine.start_processes()
    try:
        train(run, StopRequest().listen())
    except Exception as error:
        return type(error).__name__, str(error), distributed.rank()
    return "finished", "", distributed.rank()


def test_a_loss_that_is_not_finite_stops_every_rank_before_the_optimizer_moves(world, tmp_path):
    student = world.load("student")
    with torch.no_grad():
        student.lm_head.weight[3, 0] = float("nan")
    student.save_pretrained(tmp_path / "student")
    for name in world.student.iterdir():
        if not (tmp_path / "student" / name.name).exists():
            (tmp_path / "student" / name.name).write_bytes(name.read_bytes())
    run = world.run(tmp_path / "run", student={"path": tmp_path / "student"})
    for kind, message, _ in run_ranks(2, poisoned_run, run):
        assert kind == "NonFiniteLoss"
        assert "['kl', 'sft'] of samples ['train-0-" in message
        assert "the optimizer has not moved" in message
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_help_without_a_recipe(capsys):
    assert main(["--local_rank=0"]) == 2
    assert "no recipe given; usage: deepspeed" in capsys.readouterr().err
