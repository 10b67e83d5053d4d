"""A model folder that is not what it should be is refused by name before anything is loaded, and whole before a byte of code of its own
runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import dynamic_module_utils

from laid_ds.models.export import write_student
from laid_ds.models.folder import check_folder, check_weights, read_header
from laid_ds.models.load import load_config, load_model, open_model
from laid_ds.models.processor import load_processor
from laid_ds.models.sizes import model_sizes, read_config
from laid_ds.run.build import build
from laid_ds.runtime import engine
from tests.support.processes import run_ranks

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"
CODE = """
import transformers

class Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLForConditionalGeneration):
    mine = True

class OwnProcessor(transformers.Qwen2_5_VLProcessor):
    mine = True
"""


@pytest.fixture
def folder(world, tmp_path) -> Path:
    return Path(shutil.copytree(world.student, tmp_path / "model"))


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "processor_config.json", "chat_template.jinja", "model.safetensors"])
def test_a_pointer_in_the_place_of_a_file_is_named(folder, name):
    (folder / name).write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{folder / name} is a git-lfs pointer, not the file itself; run `git lfs pull`"):
        load_model(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json", "generation_config.json"]
)
def test_a_file_that_is_cut_is_named(folder, name):
    (folder / name).write_text((folder / name).read_text()[:-5])
    with pytest.raises(ValueError, match=rf"{folder / name} is not valid JSON, line \d+: "):
        check_folder(folder)


@pytest.mark.parametrize(
    "change_bytes, sentence",
    [
        (lambda data: data[: len(data) // 2], r"has \d+ bytes, its header says \d+; copy it again"),
        (lambda data: data + b"more", r"has \d+ bytes, its header says \d+; copy it again"),
        (lambda data: data[:100], r"\(100 bytes\) has no safetensors header, or is cut inside it"),
        (lambda data: b"", r"\(0 bytes\) has no safetensors header, or is cut inside it"),
        (lambda data: b"\x02\0\0\0\0\0\0\0[]", r"\(10 bytes\) has no safetensors header, or is cut inside it"),
    ],
)
def test_weights_that_are_not_whole_are_refused(folder, change_bytes, sentence):
    file = folder / "model.safetensors"
    file.write_bytes(change_bytes(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"{file} {sentence}"):
        check_weights(folder)


def test_weights_of_pickle_are_read_whole_or_refused(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert load_model(folder).num_parameters() == open_model(folder).num_parameters()
    (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"pytorch_model.bin is cut: its end is missing"):
        load_model(folder)


def test_a_header_is_that_of_the_library(folder):
    header = read_header(folder / "model.safetensors")
    weights = load_file(folder / "model.safetensors")
    assert {name: tuple(entry["shape"]) for name, entry in header.items()} == {name: tuple(w.shape) for name, w in weights.items()}


def test_what_is_opened_is_what_is_loaded(folder, tmp_path):
    """In one file and in many; of a model that does not fit both say the same."""
    loaded = load_model(folder)
    loaded.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    for path in (folder, tmp_path / "many"):
        opened = open_model(path)
        assert {p.device.type for p in opened.parameters()} == {"meta"}
        assert {n: p.shape for n, p in opened.named_parameters()} == {n: p.shape for n, p in loaded.named_parameters()}
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layers.1.self_attn.q_proj.weight" in name)
    save_file(weights | {name: torch.zeros(3, 3), "stray": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    for load in (load_model, open_model):
        with pytest.raises(ValueError, match=r"do not fit .*'unexpected_keys': \['stray'\], 'mismatched_keys': .*q_proj"):
            load(folder)


def refusal_under_zero3(run):
    engine.start_processes()
    try:
        build(run)
    except ValueError as error:
        return str(error)


def test_partitioned_weights_of_another_size_are_refused_too(world, folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layers.1.self_attn.q_proj.weight" in name)
    save_file(weights | {name: torch.zeros(3, 3)}, folder / "model.safetensors", metadata={"format": "pt"})
    for said in run_ranks(2, refusal_under_zero3, world.run(tmp_path / "run", student={"path": folder})):
        assert f"the weights at {folder} do not fit the model's config: " in said


@pytest.mark.parametrize(
    "config, sign",
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "config.json says awq"),
        ({"quantization_config": {"quant_method": "gptq"}}, "config.json says gptq"),
        ({"quantization_config": {"load_in_4bit": True}}, "config.json says load_in_4bit"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "config.json says fp8"),
    ],
)
def test_a_quantised_model_is_refused_by_name(folder, config, sign):
    change(folder / "config.json", **config)
    with pytest.raises(ValueError, match=rf"the model at {folder} is quantised \({sign}\)"):
        load_config(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_weights_that_are_no_plain_numbers_are_refused(folder, dtype):
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "q_proj.weight" in name)
    save_file(weights | {name: weights[name].to(dtype)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"is quantised \(model.safetensors holds {name} as "):
        load_model(folder)


def test_an_adapter_is_never_put_on_top_of_weights(world, folder, tmp_path):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(world.student), "peft_type": "LORA"}))
    for load in (load_model, load_config, load_processor):
        with pytest.raises(ValueError, match=r"an adapter lies beside the weights .*: if they do, remove adapter_config.json"):
            load(folder)
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"holds an adapter, not a model: merge it into its base"):
        load_model(folder)


def test_a_processor_without_words_or_eyes_is_refused(folder):
    (folder / "tokenizer.json").rename(folder / "elsewhere")
    with pytest.raises(ValueError, match=r"holds no vocabulary \(none of .*tokenizer.json"):
        load_processor(folder)
    (folder / "elsewhere").rename(folder / "tokenizer.json")
    tree = json.loads((folder / "processor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(tree.pop("image_processor")))
    (folder / "processor_config.json").write_text(json.dumps(tree))
    assert load_processor(folder).image_processor.patch_size == 16  # where older versions wrote it
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"does not say how images are processed"):
        load_processor(folder)


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"model_type": "qwen9"}, "model type `qwen9` but Transformers does not recognize"),
        ({"text_config": {"num_attention_heads": "four"}}, "expected int, got str"),
    ],
)
def test_a_config_that_transformers_does_not_take_is_one_line(folder, values, sentence):
    change(folder / "config.json", **values)
    with pytest.raises(ValueError, match=sentence) as refusal:
        load_config(folder)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith(f"the config at {folder} cannot be used: ")


@pytest.mark.parametrize(
    "values, of_text, sentence",
    [
        ({}, {"num_attention_heads": 0}, "ZeroDivisionError"),
        ({}, {"hidden_act": "bogus"}, "KeyError: 'bogus'"),
        ({}, {"rope_parameters": {"rope_type": "bogus", "rope_theta": 1e4}}, "KeyError: 'bogus'"),
        ({"dtype": "float99"}, {}, "float99"),
        ({}, {"vocab_size": 10}, "AssertionError: Padding_idx must be within"),
        ({}, {"hidden_size": -4}, "negative dimension"),
    ],
)
def test_values_of_which_no_model_can_be_made_are_one_line(folder, values, of_text, sentence):
    """Whoever reads the folder: the dry run and `laid plan` on the meta device, the ranks and `laid eval` with its weights."""
    tree = json.loads((folder / "config.json").read_text())
    change(folder / "config.json", **values, text_config=tree["text_config"] | of_text)
    for read in (open_model, load_model, lambda path: model_sizes(read_config(path / "config.json"), "float32")):
        with pytest.raises(ValueError, match=sentence) as refusal:
            read(folder)
        assert "\n" not in str(refusal.value)
        assert read not in (open_model, load_model) or str(folder) in str(refusal.value)


def test_code_in_the_folder_runs_only_where_it_is_trusted(folder, tmp_path, monkeypatch):
    """Never asked about on the terminal; trusted, it trains, and an exported folder brings it along."""
    monkeypatch.setattr("builtins.input", lambda *text: pytest.fail("a question on the terminal"))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    (folder / "own_code.py").write_text(CODE)
    weights = {name: parameter.detach().clone() for name, parameter in load_model(folder).named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})  # own code knows no older names
    for name, map_of in (
        ("config.json", {"AutoModelForImageTextToText": "own_code.Qwen2_5_VLForConditionalGeneration"}),
        ("processor_config.json", {"AutoProcessor": "own_code.OwnProcessor"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["own_code.Tokenizer", None]}),
    ):
        change(folder / name, auto_map=map_of)
        for load in (load_model, load_config, load_processor):
            with pytest.raises(ValueError, match=r"wants code of its own to run \(auto_map in .*\): set trust_remote_code = true"):
                load(folder)
        if name == "tokenizer_config.json":
            change(folder / name, auto_map={})
    assert load_model(folder, trust_remote_code=True).mine
    assert load_processor(folder, trust_remote_code=True).mine
    write_student(folder, {}, {}, "float32", tmp_path / "out", "card", trust_remote_code=True)
    assert load_model(tmp_path / "out", trust_remote_code=True).mine
