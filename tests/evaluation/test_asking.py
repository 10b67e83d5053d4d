"""Asking a model: the teacher-forced score is what greedy decoding gives, and batches change nothing."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from laid_ds import cli
from laid_ds.data.dataset import Dataset
from laid_ds.data.haystack import draw_window
from laid_ds.data.images import Pixels
from laid_ds.evaluation.asking import ask
from laid_ds.evaluation.evaluate import How, evaluate_models
from laid_ds.evaluation.haystack import read_haystacks
from laid_ds.evaluation.tasks import Wish
from laid_ds.models.load import load_config
from laid_ds.models.processor import Renderer, load_processor
from laid_ds.report.write import write_report


@pytest.fixture(scope="module")
def renderer(world):
    return Renderer(load_processor(world.student), Pixels())


@pytest.fixture(scope="module")
def taught(world, renderer):
    """A student fitted to one haystack, so that some answers are right and some are wrong."""
    torch.manual_seed(0)
    model, dataset = world.load("student").train(), Dataset.open(world.shards)
    from laid_ds.data.batch import collate

    samples = [draw_window(dataset.read(i), 2, 1, ("evaluation", 2, dataset.read(i).key)) for i in range(3)]
    batch = collate([renderer(sample) for sample in samples], ["k"] * 3, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state[batch.supervised]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), batch.labels[batch.supervised])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_scores_are_those_of_greedy_decoding(world, renderer, taught):
    dataset = Dataset.open(world.shards)
    found = ask(taught, renderer, read_haystacks(dataset, 8), [2], questions=1)["2"]
    decoded = []
    for i in range(8):
        sample = draw_window(dataset.read(i), 2, 1, ("evaluation", 2, dataset.read(i).key))
        row = renderer(sample)
        start = int(torch.nonzero(row.supervised)[0])
        answer = row.tokens["input_ids"][row.supervised]
        reply = taught.generate(
            **{name: tokens[None, :start] for name, tokens in row.tokens.items()},
            **{name: torch.cat([image[name] for image in row.images]) for name in row.images[0]},
            attention_mask=torch.ones(1, start, dtype=torch.long),
            max_new_tokens=len(answer),
            do_sample=False,
        )[0, start:]
        decoded.append([int(torch.equal(reply, answer))])
    assert found == decoded
    assert 0 < sum(sum(row) for row in found) < 8


def test_batches_change_nothing(world, renderer, taught):
    samples = read_haystacks(Dataset.open(world.shards), 6)
    whole = ask(taught, renderer, samples, [1, 3], 2)
    assert whole == ask(taught, renderer, samples, [1, 3], 2, tokens_per_batch=1)
    assert [len(row) for row in whole["1"]] == [1] * 6
    assert [len(row) for row in whole["3"]] == [2] * 6


def test_results_file_is_extended_not_repeated_and_guards_its_setting(world, tmp_path):
    out, wish = tmp_path / "evaluation.json", Wish([1, 2], haystacks=4)
    evaluate_models([world.shards], {"student": world.student}, out, wish)
    first = json.loads(out.read_text())
    first["models"]["student"]["answers"]["1"] = "kept"
    out.write_text(json.dumps(first))
    evaluate_models([world.shards], {"student": world.student, "teacher": world.teacher}, out, wish)
    second = json.loads(out.read_text())
    assert second["models"]["student"] == first["models"]["student"]
    with pytest.raises(ValueError, match=r"made with another model 'student' \(other files.config.json.sha256, .*anew with --again"):
        evaluate_models([world.shards], {"student": world.teacher}, out, wish)
    assert json.loads(out.read_text()) == second
    evaluate_models([world.shards], {"student": world.teacher}, out, wish, How(again=True))
    third = json.loads(out.read_text())
    assert third["models"]["student"]["answers"] == second["models"]["teacher"]["answers"]
    assert set(second["models"]) == {"student", "teacher"}
    with pytest.raises(ValueError, match="was made with other sizes"):
        evaluate_models([world.shards], {"x": world.teacher}, out, Wish([1, 4], haystacks=4))

    summary = write_report(tmp_path, "student")
    page = summary.path.read_text()
    assert "<svg" in page
    assert "http://" not in page
    assert "https://" not in page
    assert set(summary.as_json()["models"]) == {"student", "teacher"}
    assert "window in images" in summary.as_text()
    with pytest.raises(ValueError, match="no model 'nobody'"):
        write_report(tmp_path, "nobody")


def test_baselines_without_training_are_asked_by_their_commands(world, taught, tmp_path, capsys):
    """YaRN is a folder, SelfExtend a way of asking; a window that holds everything changes nothing, another setting is asked anew."""
    student = shutil.copytree(world.student, tmp_path / "student")
    taught.save_pretrained(student)

    def run(*words):
        with pytest.raises(SystemExit) as exit_status:
            cli.main([str(word) for word in words])
        return exit_status.value.code or 0

    assert run("yarn", student, tmp_path / "yarn", "--factor", "4") == 0
    assert load_config(tmp_path / "yarn").get_text_config().rope_parameters["factor"] == 4
    out = tmp_path / "e.json"
    names = [f"{name}={student}" for name in ("student", "wide", "narrow")]
    words = ["eval", world.shards, *names, f"yarn={tmp_path / 'yarn'}", "--out", out, "--sizes", "2", "--haystacks", 8]
    assert run(*words, "--self-extend", "wide=4,10000", "--self-extend", "narrow=4,2") == 0
    found = json.loads(out.read_text())["models"]
    assert found["wide"]["answers"] == found["student"]["answers"]
    assert 0 < sum(sum(row) for row in found["wide"]["answers"]["2"]) < 8
    assert found["narrow"]["self_extend"] == [4, 2]
    assert run(*words, "--self-extend", "wide=4,10000") == 2
    assert "made with another model 'narrow' (other self_extend)" in capsys.readouterr().err
    assert run(*words, "--self-extend", "wide=4,10000", "--again") == 0
    again = json.loads(out.read_text())["models"]
    assert again["narrow"]["self_extend"] is None
    assert again["wide"] == found["wide"]
    assert run(*words, "--self-extend", "nobody=4,2") == 2
    assert "give NAME=GROUP,WINDOW, with the NAME of a model (student, wide, narrow, yarn)" in capsys.readouterr().err


def test_a_report_without_results_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="no results at"):
        write_report(tmp_path, "student")
