"""Haystacks of text go the normal way: distilled on windows of facts, exported, asked by number of facts, probed for heads."""

from __future__ import annotations

import json

import pytest
import torch

from data_tools.text_facts import haystacks
from laid_ds import cli
from laid_ds.config import Run
from laid_ds.data.dataset import Dataset
from laid_ds.data.images import Pixels
from laid_ds.data.record import num_pieces
from laid_ds.data.writer import ShardWriter
from laid_ds.evaluation.haystack import window_of_size
from laid_ds.evaluation.window import curve
from laid_ds.models.load import load_model
from laid_ds.models.processor import Renderer, load_processor
from laid_ds.run.check import check
from laid_ds.run.loop import train
from laid_ds.runtime import engine
from laid_ds.runtime.stop import StopRequest
from tests.support.processes import run_ranks

STEPS = 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("facts") / "shards"
    with ShardWriter(folder) as writer:
        for sample in haystacks("train", 12, 8, 5, seed=3):
            writer.write(sample)
    return folder


def command(*arguments, capsys=None):
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(map(str, arguments)))
    assert stopped.value.code == 0
    return json.loads(capsys.readouterr().out) if capsys else None


def train_it(run: Run) -> None:
    engine.start_processes()
    train(run, StopRequest())


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3"])
def test_text_is_distilled_exported_and_asked_by_number_of_facts(worlds, shards, tmp_path, capsys, family):
    run = worlds(family).run(
        tmp_path / "run",
        steps=STEPS,
        student={"freeze_embeddings": family == "idefics3"},
        data={"shards": [str(shards)], "images": [2, 6], "questions": 3},
        match={"rows_from": "answers"},
        evaluation={"shards": str(shards), "every_steps": STEPS, "sizes": [1, 4], "haystacks": 3, "questions": 2},
    )
    check(run)
    run_ranks(1, train_it, run)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == STEPS
    assert all(record[name] > 0 for record in records for name in ("align", "match", "kl", "sft"))
    asked = [json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert [(line["step"], set(line["accuracy"])) for line in asked] == [(0, {"1", "4"}), (STEPS, {"1", "4"})]

    command("export", tmp_path / "run", tmp_path / "student")
    capsys.readouterr()
    before, after = load_model(worlds(family).student), load_model(tmp_path / "student")
    moved = [not a.equal(b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    table = before.get_input_embeddings().weight.equal(after.get_input_embeddings().weight)
    assert (table, any(moved)) == (family == "idefics3", True)
    out, sizes = tmp_path / "e" / "evaluation.json", ["--sizes=1,3,8", "--haystacks=5", "--questions=4", "--json"]
    command("eval", shards, f"laid={tmp_path / 'student'}", "--out", out, *sizes, capsys=capsys)
    answers = [json.loads(line) for line in out.with_name("evaluation.answers.jsonl").read_text().splitlines()[1:]]
    saved = json.loads(out.read_text())["models"]["laid"]["answers"]
    assert {size: [len(row) for row in rows] for size, rows in saved.items()} == {"1": [1] * 5, "3": [3] * 5, "8": [4] * 5}
    assert {answer["cluster"] for answer in answers} == set(Dataset.open(shards).keys[:5].astype(str)), "a haystack is one observation"
    assert {answer["size"] for answer in answers} == {1, 3, 8}
    assert {answer["unit"] for answer in answers} == {"texts"}
    assert all(0 <= answer["depth"] < 1 and answer["question"].endswith(":") and "\n" not in answer["question"] for answer in answers)
    assert curve(saved).keys() == {1, 3, 8}

    assert json.loads(out.read_text())["setting"]["unit"] == "texts"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", str(out.parent), "--baseline", "laid"])
    assert stopped.value.code == 0
    assert "accuracy by number of texts" in capsys.readouterr().out

    found = command("probe", tmp_path / "student", shards, "--images=8", "--haystacks=3", "--json", capsys=capsys)
    assert 0 < max(max(heads) for heads in found["mass"].values()) <= 1


def test_the_tokens_of_a_needle_are_its_line(worlds, shards):
    world, dataset = worlds("idefics3"), Dataset.open(shards)
    renderer = Renderer(load_processor(world.student), Pixels())
    tokenizer = renderer.processor.tokenizer
    for i in range(4):
        window = window_of_size(dataset.read(i), 5, 2)
        ids, shows = renderer(window).tokens["input_ids"], renderer.texts(window)
        assert len(ids) == len(shows)
        for number, text in enumerate(window.turns[0].segments):
            assert tokenizer.decode(ids[shows == number]).strip() == text.strip()
        assert num_pieces(window) == int(shows.max()), "the last one is the question"


def test_an_answer_is_only_found_in_its_own_line(worlds, shards):
    """What the model is asked does not hold the answer but in the needle: without that line, the name stands nowhere but by chance."""
    dataset = Dataset.open(shards)
    for i in range(12):
        window = window_of_size(dataset.read(i), 1, 1)
        (line, question), answer = window.turns[0].segments, window.turns[1].text
        assert line == f"{question} {answer}\n"
        assert torch.tensor(window.turns[0].needles).tolist() == [0]
