"""A folder loads whole or not at all, whether its weights are in one file or many, and an export keeps what lay beside the weights."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from laid_ds.models.export import write_student
from laid_ds.models.load import load_model
from laid_ds.models.processor import load_processor
from tests.models.family_models import tiny_model


@pytest.fixture
def folder(tmp_path):
    tiny_model("internvl", "qwen3").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def changed(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_many_files_are_the_one_file(folder, tmp_path):
    model = load_model(folder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    sharded = load_model(tmp_path / "sharded").state_dict()
    assert all(torch.equal(tensor, sharded[name]) for name, tensor in model.state_dict().items())


def test_a_missing_weight_is_refused(folder):
    changed(folder, lambda weights: weights.pop(next(name for name in weights if "layers.1.self_attn.q_proj" in name)))
    with pytest.raises(ValueError, match=r"do not fit the model's config: \{'missing_keys': .*q_proj"):
        load_model(folder)


def test_a_weight_too_many_is_refused(folder):
    changed(folder, lambda weights: weights.update(stray=torch.zeros(2)))
    with pytest.raises(ValueError, match=r"'unexpected_keys': \['stray'\]"):
        load_model(folder)


def test_a_shard_that_is_gone_is_refused(folder, tmp_path):
    load_model(folder).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    next((tmp_path / "sharded").glob("model-00002-*.safetensors")).unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(tmp_path / "sharded")


def test_an_export_keeps_the_processor_and_the_generation_config(world, tmp_path):
    stock = shutil.copytree(world.student, tmp_path / "stock")
    (stock / "generation_config.json").write_text(json.dumps({"do_sample": False, "max_new_tokens": 7}))
    write_student(stock, {}, {}, "float32", tmp_path / "out", "card")
    beside = {path.name for path in stock.iterdir()} - {"config.json", "model.safetensors"}
    assert beside <= {path.name for path in (tmp_path / "out").iterdir()}
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["max_new_tokens"] == 7
    assert load_processor(tmp_path / "out").tokenizer.get_vocab() == load_processor(stock).tokenizer.get_vocab()
