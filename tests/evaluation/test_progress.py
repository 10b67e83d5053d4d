"""Held-out evaluation in training: it is the evaluation of the saved model, shared over ranks, and it changes nothing of the run."""

from __future__ import annotations

import json

import pytest

from data_tools.synth import haystacks
from laid_ds.config import Evaluation
from laid_ds.data.dataset import Dataset
from laid_ds.data.images import Pixels
from laid_ds.data.writer import ShardWriter
from laid_ds.evaluation import progress
from laid_ds.evaluation.asking import ask
from laid_ds.evaluation.haystack import read_haystacks
from laid_ds.evaluation.window import curve
from laid_ds.export import export_run
from laid_ds.models.load import load_model
from laid_ds.models.processor import Renderer, load_processor
from laid_ds.run.loop import train
from laid_ds.runtime import engine
from laid_ds.runtime.stop import StopRequest
from tests.support.processes import run_ranks


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Yes/no questions: a student that has learned to answer at all is right about half of the time."""
    folder = tmp_path_factory.mktemp("held-out") / "shards"
    with ShardWriter(folder) as writer:
        for sample in haystacks("test", 7, 6, 2, ("yes-no",), seed=5, num_scenes=576):
            writer.write(sample)
    return folder


def whole_run(run):
    engine.start_processes()
    train(run, StopRequest())


def metrics(run):
    records = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in ("seconds", "peak_bytes")} for record in records]


def test_it_is_the_evaluation_of_the_exported_model_and_changes_nothing(world, tmp_path, held_out):
    asked = {"shards": str(held_out), "every_steps": 12, "sizes": (1, 3, 6), "haystacks": 7, "questions": 2}
    changes = {"steps": 24, "optimizer": {"lr": 5e-3}, "losses": {"kl": 0.0}, "match": {"rows": 5}, "data": {"shards": [str(held_out)]}}
    with_it = world.run(tmp_path / "with", evaluation=asked, **changes)
    without = world.run(tmp_path / "without", **changes)
    run_ranks(2, whole_run, with_it)
    run_ranks(2, whole_run, without)
    assert metrics(with_it) == metrics(without)
    lines = [json.loads(line) for line in (with_it.output / progress.FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 12, 24]
    assert any(0 < accuracy < 1 for accuracy in lines[-1]["accuracy"].values())

    export_run(with_it.output, tmp_path / "model")
    for folder, line in ((world.student, lines[0]), (tmp_path / "model", lines[-1])):
        model, renderer = load_model(folder), Renderer(load_processor(folder), Pixels())
        expected = curve(ask(model, renderer, read_haystacks(Dataset.open(held_out), 7), (1, 3, 6), 2))
        assert {int(size): accuracy for size, accuracy in line["accuracy"].items()} == pytest.approx(expected)


def test_the_threshold_is_set_by_the_first_measurement_and_a_repeated_step_replaces_its_line(tmp_path):
    path = tmp_path / "evaluation.jsonl"
    assert progress.record(path, 0, {1: 0.9, 10: 0.5}, chance=0.5)["threshold"] == pytest.approx(0.5 + 0.6 * 0.4)
    progress.record(path, 4, {1: 1.0, 10: 0.9}, chance=0.5)
    found = progress.record(path, 4, {1: 1.0, 10: 0.8}, chance=0.5)
    assert (found["window"], found["censored"], found["threshold"]) == (10.0, True, pytest.approx(0.74))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 4]
    assert progress.sentence(found) == "held out after step 4: accuracy by images  1: 1.00  10: 0.80  window >= 10.0 images"


def test_a_first_measurement_that_is_not_above_chance_sets_no_threshold(tmp_path):
    path = tmp_path / "evaluation.jsonl"
    for step, accuracy in ((0, {1: 0.5, 10: 0.5}), (4, {1: 1.0, 10: 0.8})):
        found = progress.record(path, step, accuracy, chance=0.5)
        assert (found["threshold"], found["window"], found["censored"]) == (None, None, None)
    assert progress.sentence(found).endswith("1: 1.00  10: 0.80  no window (the first measurement was not above chance)")
    assert [json.loads(line)["chance"] for line in path.read_text().splitlines()] == [0.5, 0.5]


def test_too_few_haystacks_are_refused_before_the_run(held_out):
    with pytest.raises(ValueError, match=f"8 haystacks asked for, the data set {held_out} has 7"):
        progress.held_out(Evaluation(shards=str(held_out), haystacks=8))


def test_sizes_that_the_held_out_haystacks_do_not_hold_are_left_out_and_recorded(held_out, tmp_path):
    allowed = progress.held_out(Evaluation(shards=str(held_out), haystacks=7, sizes=(1, 6, 7, 50)))
    assert (allowed.sizes, allowed.choices) == ([1, 6], 2)
    progress.record(tmp_path / "e.jsonl", 0, {1: 1.0, 6: 0.9}, 0.5, allowed.left_out)
    (line,) = (tmp_path / "e.jsonl").read_text().splitlines()
    assert json.loads(line)["left_out"] == dict.fromkeys(("7", "50"), "7 of 7 haystacks do not allow it (test-5-000000 has 6 images)")
    with pytest.raises(ValueError, match=r"nothing can be measured in .*not measured at 7, 50 images: 7 of 7 haystacks do not allow it"):
        progress.held_out(Evaluation(shards=str(held_out), haystacks=7, sizes=(7, 50)))
