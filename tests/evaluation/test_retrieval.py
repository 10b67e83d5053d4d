"""Heads that look at the needle are found where they are, and layers are paired by depth."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from laid_ds import cli
from laid_ds.data.dataset import Dataset
from laid_ds.data.images import Pixels
from laid_ds.evaluation.haystack import window_of_size
from laid_ds.evaluation.retrieval import CLEAR, Retrieval
from laid_ds.models.processor import Renderer, load_processor


def found(mass: dict[int, list[float]]) -> Retrieval:
    return Retrieval(size=16, haystacks=32, mass=mass)


def test_heads_are_those_near_the_best_one_and_the_best_comes_first():
    retrieval = found({0: [0.01, 0.02], 1: [0.3, 0.7], 2: [0.36, 0.34]})
    assert retrieval.heads() == [(1, 1, 0.7), (2, 0, 0.36)]


def test_a_model_that_looks_nowhere_has_none_and_says_so():
    retrieval = found({0: [0.01, CLEAR - 0.01], 1: [0.02, 0.03]})
    assert retrieval.heads() == []
    assert retrieval.pairs(2) == []
    assert "does not retrieve" in retrieval.as_text()


def test_layers_are_paired_at_the_same_depth():
    deep = {layer: [0.0, 0.9] if layer == 18 else [0.8, 0.0] if layer == 17 else [0.01, 0.02] for layer in range(30)}
    assert found(deep).pairs(30) == [(17, 17), (18, 18)]
    assert found(deep).pairs(15) == [(8, 17), (9, 18)]
    assert found(deep).pairs(3) == [(1, 18)], "two teacher layers fall on one student layer: the stronger stays"
    assert found({0: [0.9], **{layer: [0.0] for layer in range(1, 30)}}).pairs(2) == [(0, 0)]


def test_heads_are_paired_at_the_same_share_and_never_twice():
    retrieval = found({0: [0.0] * 8, 1: [0.0, 0.0, 0.9, 0.8, 0.0, 0.0, 0.0, 0.7]})
    assert retrieval.couples([(3, 1)], 8) == [[(2, 2), (3, 3), (7, 7)]]
    assert retrieval.couples([(3, 1)], 4) == [[(1, 2), (2, 3), (3, 7)]], "1 is taken, so 3 takes the next"
    assert retrieval.couples([(3, 1)], 2) == [[(0, 2), (1, 3)]], "no more than the student has"


def test_a_head_that_looks_everywhere_alike_has_the_needles_share_of_what_it_sees(world, tmp_path, capsys):
    """Its query is made zero, so that it attends uniformly: its mass is 1 / (tokens up to the answering row), an image being one token."""
    model, head, width = world.load("teacher"), 2, 16
    attention = model.model.language_model.layers[1].self_attn
    assert attention.head_dim == width
    with torch.no_grad():
        attention.q_proj.weight[head * width : (head + 1) * width] = 0
        attention.q_proj.bias[head * width : (head + 1) * width] = 0
    flat = tmp_path / "flat"
    shutil.copytree(world.teacher, flat)
    model.save_pretrained(flat)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["probe", str(flat), str(world.shards), "--images=3", "--haystacks=5", "--student", str(world.student), "--json"])
    assert stopped.value.code == 0
    said = json.loads(capsys.readouterr().out)
    renderer, dataset = Renderer(load_processor(flat), Pixels()), Dataset.open(world.shards)
    rows = [renderer(window_of_size(dataset.read(i), 3, 1)).supervised for i in range(5)]
    shares = [1 / int(torch.nonzero(supervised)[0]) for supervised in rows]  # the row before the answer sees all before the answer
    assert said["mass"]["1"][head] == pytest.approx(sum(shares) / 5, rel=1e-5)
    assert sorted(said["mass"]) == ["0", "1"]
    assert (said["pairs"], said["heads"]) == ([], []), "no head of an untrained model looks at the needle"


@pytest.mark.parametrize(
    "change, sentence",
    [("--images=7", "has 6 images"), ("--haystacks=99", "99 haystacks asked for"), ("--student=nowhere", "no model at nowhere")],
)
def test_what_cannot_be_measured_is_one_sentence(world, capsys, change, sentence):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["probe", str(world.teacher), str(world.shards), "--images", "3", "--haystacks", "4", change])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err
