"""A config that a new model is made from is understood whole, or refused in one sentence, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from laid_ds import cli
from laid_ds.data.dataset import Dataset
from laid_ds.models.new_model import read_new_config, write_new_model
from tests.support.world import tiny_config

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
GIVEN = sorted([*RECIPES.glob("*model*.json"), *RECIPES.glob("first_day/*.json"), *RECIPES.glob("study/*model*.json")])
PUBLISHED = sorted(RECIPES.glob("configs/*.json"))


@pytest.mark.parametrize("path", GIVEN + PUBLISHED, ids=lambda path: path.stem)
def test_what_comes_along_and_what_is_published_is_understood(path):
    assert read_new_config(path) == json.loads(path.read_text())


def test_a_config_around_a_decoder_needs_no_text():
    path = RECIPES / "study" / "real" / "model.json"
    assert read_new_config(path, ["vision_config"])["scale_factor"] == 4
    with pytest.raises(ValueError, match="text_config is null; say how large the model shall be"):
        read_new_config(path)


@pytest.mark.parametrize(
    "whole, text, vision, sentence",
    [
        ({"model_type": "bert"}, {}, {}, "no processor is made for model_type 'bert'"),
        ({"model_type": None}, {}, {}, "no processor is made for model_type None"),
        ({"foo": 1}, {}, {}, "foo is no field of qwen2_5_vl; remove it"),
        ({}, {"hiden_size": 8}, {}, "text_config.hiden_size is no field of qwen2_5_vl_text; did you mean text_config.hidden_size?"),
        ({}, {}, {"dept": 1}, "vision_config.dept is no field of qwen2_5_vl_vision; did you mean vision_config.depth?"),
        ({"vision_config": None}, {}, None, "vision_config is null; say how large the model shall be"),
        ({"text_config": {}}, None, {}, "text_config is {}; say how large the model shall be, or the family's own size would be made"),
        ({"text_config": {"hidden_size": 8}}, None, {}, "text_config has no num_hidden_layers; say how large"),
        ({}, {"hidden_size": -4}, {}, "text_config.hidden_size is -4; give numbers above 0"),
        ({}, {"num_attention_heads": 0}, {}, "text_config.num_attention_heads is 0; give numbers above 0"),
        ({}, {"num_hidden_layers": 0}, {}, "text_config.num_hidden_layers is 0; give numbers above 0"),
        ({}, {}, {"patch_size": 0}, "vision_config.patch_size is 0; give numbers above 0"),
        ({}, {"hidden_size": "x"}, {}, "is not a usable model config: Validation error for field 'hidden_size'"),
        ({}, {"hidden_act": "bogus"}, {}, "no qwen2_5_vl model can be made of this config (KeyError: 'bogus')"),
        ({}, {"num_key_value_heads": 3}, {}, "num_key_value_heads is 3, and the 2 heads of text_config are no multiple of it"),
        ({}, {}, {"patch_size": "x"}, "is not a usable model config: "),
    ],
)
def test_what_is_not_understood_is_one_sentence(world, tmp_path, whole, text, vision, sentence):
    path, corpus = tmp_path / "model.json", Dataset.open(world.shards)
    tree = tiny_config("student", "qwen2_5_vl", 32) | whole
    for part, more in (("text_config", text), ("vision_config", vision)):
        tree |= {part: tree[part] | more} if more is not None else {}
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError) as refusal:
        write_new_model(path, tmp_path / "out", [corpus.read(0)], vocabulary=300, image_tokens=1, seed=0)
    said = str(refusal.value)
    assert said.startswith(str(path)), said
    assert sentence in said, said
    assert "\n" not in said
    assert [file.name for file in tmp_path.iterdir()] == ["model.json"]


ODD = ["--vocabulary=-5", "--vocabulary=255", "--image-tokens=0", "--image-tokens=-3", f"--seed={10**22}", "--seed=-1"]


@pytest.mark.parametrize("option", ODD)
def test_numbers_out_of_range_are_refused_by_name(world, tmp_path, capsys, option):
    with pytest.raises(SystemExit) as status:
        cli.main(["init", str(world.folder / "student.json"), str(tmp_path / "out"), "--corpus", str(world.shards), option])
    assert status.value.code == 2
    error = capsys.readouterr().err
    assert option.partition("=")[0] in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
