"""A run on several ranks: samples without images among samples with, and numbers that are not finite."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from itertools import islice

import psutil
import pytest
import torch
import torch.nn.functional as F

from data_tools.synth import haystacks
from laid_ds.data.dataset import Dataset
from laid_ds.data.images import Pixels
from laid_ds.data.record import Sample, Turn
from laid_ds.data.writer import ShardWriter
from laid_ds.models.processor import Renderer, load_processor
from laid_ds.run.build import build, build_stream
from laid_ds.run.loop import look, train
from laid_ds.run.metrics import Reporter
from laid_ds.runtime import distributed, engine
from laid_ds.runtime.stop import SIGNALS, StopRequest
from laid_ds.train import main
from tests.support.processes import free_port, run_ranks, start_ranks
from tests.support.recipes import write_recipe
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
                if name not in ("images", "fill"):  # stand-ins and padding are counted where they are
                    assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_a_step_without_a_single_answer_divides_by_nothing(world, tmp_path):
    """Beside it, a step in which one rank has none: its terms at the head are those of the other rank alone."""
    with ShardWriter(tmp_path / "shards") as writer:
        for number, sample in enumerate(haystacks("train", 6, 2, 1, ("colour",), seed=1, num_scenes=576)):
            turns = sample.turns if number == 2 else sample.turns[:1]  # of ranks 0 and 1: none and none, the answer and none, none and none
            writer.write(Sample(sample.key, turns, sample.images))
    data = {"shards": [str(tmp_path / "shards")], "images": None, "questions": None, "shuffle": "none", "micro_batch": 1}
    run = world.run(tmp_path / "run", data=data, optimizer={"accumulation": 1})
    for result in run_ranks(2, looked_and_stepped, run, 3):
        records = result["records"]
        assert all(math.isfinite(value) for record in records for value in record.values())
        assert [record["rows"] for record in records] == [0, records[1]["rows"], 0]
        assert [record["sft"] > 0 for record in records] == [record["kl"] > 0 for record in records] == [False, True, False]
        assert result["seen"] == (0.0, 0.0, 0.0)


def looked_and_stepped(run, steps):
    engine.start_processes()
    seen = look(run, build(run))
    return rank_steps(run, steps) | {"seen": tuple(seen)}


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
    for rank in (0, 1):
        evidence = json.loads((run.output / f"nonfinite_rank{rank}.json").read_text())
        (batch,) = torch.load(run.output / f"nonfinite_rank{rank}.pt", weights_only=False)
        assert evidence["keys"] == [list(batch.keys)]
        assert evidence["step"] == 1


def test_a_gradient_that_is_not_finite_stops_before_the_optimizer_moves_too(world, tmp_path):
    run = world.run(tmp_path / "run", losses={"sft": 3e38})
    for kind, message, _ in run_ranks(2, poisoned_run, run):
        assert kind == "NonFiniteLoss"
        assert message == "the gradient is not finite although the loss is; the optimizer has not moved"
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_teacher_that_guesses_is_refused_before_step_1(world, tmp_path):
    run = world.run(tmp_path / "run", teacher={"check_answers": True})
    for kind, message, _ in run_ranks(2, poisoned_run, run):
        assert kind == "ValueError"
        assert "does not know the answers of ['train-0-" in message
        assert "a guess over the vocabulary costs 5." in message
    assert not (run.output / "metrics.jsonl").exists()


def test_a_model_that_cannot_take_the_images_is_refused_before_step_1(world, tmp_path):
    """Its config names another token as the one that stands for an image."""
    copied = shutil.copytree(world.teacher, tmp_path / "teacher")
    tree = json.loads((copied / "config.json").read_text())
    tree["image_token_id"] += 1
    (copied / "config.json").write_text(json.dumps(tree))
    run = world.run(tmp_path / "run", teacher={"path": copied})
    for kind, message, _ in run_ranks(2, poisoned_run, run):
        assert kind == "ValueError"
        assert f"the teacher {copied} cannot take the batch of ['train-0-" in message


def test_a_teacher_that_no_term_asks_is_not_loaded(world, tmp_path):
    """The baseline without it, from the same recipe: its weights need not even be there, and the numbers are those of a run without it."""
    teacher = shutil.copytree(world.teacher, tmp_path / "teacher")
    (teacher / "model.safetensors").unlink()
    changes = {"losses": {"align": 0.0, "match": 0.0, "kl": 0.0}, "gain": {"enabled": False}}
    runs = [world.run(tmp_path / name, teacher=place, **changes) for name, place in (("with", {"path": teacher}), ("without", None))]
    found = [run_ranks(2, rank_steps, run, 2)[0] for run in runs]
    assert "teacher" not in found[0]["bytes"]
    assert found[0]["records"] == found[1]["records"]


def next_batches(run, number):
    renderer = Renderer(load_processor(run.student.path), Pixels())
    return list(islice(build_stream(run, Dataset.open(list(run.data.shards)), renderer), number))


def first_look_of(run):
    engine.start_processes()
    training = build(run)
    before = torch.get_rng_state()
    seen = look(run, training)
    assert torch.equal(torch.get_rng_state(), before)
    return seen, training.stream.state_dict()["position"]


def test_the_first_look_measures_what_a_step_would(world, tmp_path):
    """A teacher whose head has ten rows more than the tokenizer has ids: their share is named, and left out of the nats."""
    model = world.load("teacher")
    model.resize_token_embeddings(world.vocabulary + 10)
    teacher = shutil.copytree(world.teacher, tmp_path / "teacher")
    model.save_pretrained(teacher)
    changes = {"data": {"micro_batch": 1, "shuffle": "none"}, "losses": {"kl": 0.0}, "teacher": {"path": teacher}}
    (seen, position), (other, _) = run_ranks(2, first_look_of, world.run(tmp_path / "run", **changes))
    assert seen == other
    assert position == 0
    batches = next_batches(world.run(tmp_path / "run", **changes), 2)
    with torch.no_grad():
        rows = torch.cat([model.lm_head(model.model(**b.inputs).last_hidden_state)[b.supervised] for b in batches])
    labels = torch.cat([b.labels[b.supervised] for b in batches])
    assert seen.teacher_nats == pytest.approx(F.cross_entropy(rows[:, : world.vocabulary], labels).item(), rel=1e-5)
    assert seen.cut_mass == pytest.approx(rows.softmax(-1)[:, world.vocabulary :].sum(-1).mean().item(), rel=1e-5)
    assert seen.cut_mass > 1e-3


def status_of_main(recipe):
    """Rank 1 dies in the second step; the other tells its status and what it wrote."""
    report = Reporter.step

    def report_and_die(self, done, values):
        report(self, done, values)
        if done == 2 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    Reporter.step, sys.stderr = report_and_die, io.StringIO()
    return main([str(recipe)]), sys.stderr.getvalue()


def test_the_death_of_another_rank_is_one_sentence(world, tmp_path):
    recipe = write_recipe(world.run(tmp_path / "run", checkpoint={"every_steps": 1}), tmp_path / "recipe.toml")
    processes, queue = start_ranks(2, status_of_main, recipe)
    rank, ok, result = queue.get()
    for process in processes:
        process.join()
    assert (rank, ok) == (0, True)
    status, said = torch.load(io.BytesIO(result), weights_only=False)
    assert status == 1
    assert said.startswith("laid: rank 0 lost another rank; the same command goes on from the newest checkpoint (")
    assert "Traceback" not in said


@pytest.fixture
def own_signals():
    """main() is the end of a process: it leaves signals ignored, which the tests after this one must not inherit."""
    kept = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_help_without_a_recipe(capsys, own_signals):
    assert main(["--local_rank=0"]) == 2
    assert "no recipe given; usage: deepspeed" in capsys.readouterr().err


def test_rank_0_says_once_which_kernels_serve(world, tmp_path):
    recipe = write_recipe(world.run(tmp_path / "run", steps=2), tmp_path / "recipe.toml")
    command = [sys.executable, "-m", "laid_ds.cli", "train", str(recipe), "--ranks", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("kernels")]
    assert said == ["kernels: attention by the CPU's flash attention, matching by chunked inside attention's backward pass"]


FAILS = """
import runpy
from laid_ds.run import loop
def train_step(*arguments, **named):
    raise RuntimeError("nobody expects this")
loop.train_step = train_step
runpy.run_module("laid_ds.train", run_name="__main__", alter_sys=True)
"""


def test_an_error_that_nobody_expects_ends_the_rank_with_its_data_workers(world, tmp_path):
    """Which take no SIGTERM, so that they would be waited for for ever."""
    run = world.run(tmp_path / "run", steps=2, data={"shards": [str(world.shards)], "workers": 2})
    recipe = write_recipe(run, tmp_path / "run.toml")
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = [sys.executable, "-c", FAILS, str(recipe)]
    found = subprocess.run(words, env=os.environ | rank, capture_output=True, text=True, timeout=300)
    assert found.returncode == 1, found.stderr
    assert "RuntimeError: nobody expects this" in found.stderr
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(recipe) in (p.info["cmdline"] or ())]
