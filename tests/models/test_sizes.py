"""Sizes read off configs against models that are really made and run, in every row of the table of families."""

from __future__ import annotations

from collections import Counter
from math import prod

import pytest
import torch
from transformers import AutoConfig

from laid_ds.models.attention import decoder, listen, vision_tower
from laid_ds.models.family import families
from laid_ds.models.load import model_class
from laid_ds.models.rope_gain import gain_shapes
from laid_ds.models.sizes import model_sizes, read_config
from tests.models.family_models import CONFIGS, IMAGES, TOKENS, inputs, tiny_model

ROWS = list(families())
each_family = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.model_type}-{row.decoder}")
WITHOUT_TOWER = {"phi4_multimodal"}


def config_of(row, **changes):
    return AutoConfig.for_model(row.model_type, **(TOKENS | CONFIGS[row.model_type, row.decoder] | changes))


@each_family
def test_parameters_gains_and_what_is_frozen_are_those_of_the_model(row):
    model, sizes = tiny_model(row.model_type, row.decoder), model_sizes(config_of(row), "float32")
    assert sizes.parameters == {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sizes.total() == model.num_parameters()
    assert sizes.gains == (None if row.gain == "none" else tuple(gain_shapes(model).values()))
    assert (sizes.vision is None) == (row.model_type in WITHOUT_TOWER)
    assert sizes.constant == {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if sizes.vision is not None:
        vision_tower(model).requires_grad_(False)
        assert sizes.vision | sizes.constant == {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        assert 0 < sum(sizes.parameters[name] for name in sizes.vision) <= sizes.images


def kept_in_layers(model, batch):
    """Bytes that autograd keeps of each decoder layer in a real forward pass: every storage once, none of a parameter's."""
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    kept, seen, alive, running = Counter(), set(), [], [None]

    def keep(tensor):
        address = tensor.untyped_storage().data_ptr()
        alive.append(tensor)
        if running[0] is not None and address not in seen | parameters:
            kept[running[0]] += tensor.untyped_storage().nbytes()
        seen.add(address)
        return tensor

    for number, layer in enumerate(decoder(model).layers):
        layer.register_forward_pre_hook(lambda *_, number=number: running.__setitem__(0, number))
        layer.register_forward_hook(lambda *_: running.__setitem__(0, None))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch, use_cache=False)
    return kept


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@each_family
def test_what_a_layer_keeps_is_what_a_real_one_keeps(row, dtype):
    """Images included; masks of T x T are no part of the sizes and come on top. Sliding windows are longer than the row: only a CPU makes a
    mask for them."""
    changes = (
        {"sliding_window": 1024} if row.packable and "sliding_window" in CONFIGS[row.model_type, row.decoder].get("text_config", {}) else {}
    )
    config, width = config_of(row), {"float32": 4, "bfloat16": 2}[dtype]
    for name, value in changes.items():
        setattr(config.get_text_config(), name, value)
    model = model_class(config).from_config(config, dtype=getattr(torch, dtype)).train()
    listen(model)
    batch = {
        name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in inputs(row.model_type, num_tokens=240).items()
    }
    kept, tokens, sizes = kept_in_layers(model, batch), batch["input_ids"].shape[1], model_sizes(config, dtype)
    masked = sum(number for kind, number in sizes.attention.items() if kind.masked)
    assert sizes.layers * sizes.kept_bytes * tokens + masked * width * tokens**2 == pytest.approx(kept.total(), rel=0.05)
    heaviest = sizes.heaviest_bytes * tokens + min(masked, 1) * width * tokens**2
    assert 0.95 * max(kept.values()) < heaviest < 1.2 * max(kept.values())  # above: the masked layer may be another one


PADDED_OR_MARKED = {  # the tiny images are too small to be merged as large ones are, or have tokens between their rows as well
    *("got_ocr2", "molmo2", "phi4_multimodal", "llava_onevision", "llava_next", "llava_next_video"),
    "video_llama_3",  # merges as the processor says
}


@pytest.mark.parametrize("row", [row for row in ROWS if row.model_type in IMAGES.keys() - PADDED_OR_MARKED], ids=lambda row: row.model_type)
def test_patches_behind_a_token_are_those_of_an_image(row):
    tokens, tensors = IMAGES[row.model_type]
    shape = next(shape for name, shape in tensors.items() if "pixel_values" in name)
    patches = prod(shape[:-1]) if len(shape) <= 3 else prod(shape) // (3 * 14 * 14)  # rows of patches, or pixels
    if row.model_type == "paddleocr_vl":
        patches = shape[0]
    assert model_sizes(config_of(row), "float32").patches_per_token == patches / tokens


def test_products_of_a_dense_decoder_are_two_for_each_weight():
    row = next(row for row in ROWS if row.model_type == "qwen2_5_vl")
    model = tiny_model(row.model_type, row.decoder)
    weights = [p for p in decoder(model).layers.parameters() if p.ndim == 2] + [model.get_output_embeddings().weight]
    assert model_sizes(config_of(row), "float32").flops_per_token == 2 * sum(weight.numel() for weight in weights)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_experts_are_those_that_a_token_meets(dtype):
    row = next(row for row in ROWS if row.model_type == "qwen3_vl_moe")
    sizes, model = model_sizes(config_of(row), dtype), tiny_model(row.model_type, row.decoder)
    layers = decoder(model).layers
    dense = sum(p.numel() for p in layers.parameters() if p.ndim == 2) + model.get_output_embeddings().weight.numel()
    experts = sum(p.numel() for p in layers.parameters() if p.ndim == 3)
    assert sizes.flops_per_token == 2 * (dense + experts * 2 // 4)  # 2 of 4 experts


def test_scores_of_a_window_are_those_of_its_band():
    row = next(row for row in ROWS if row.model_type == "gemma3")
    windows = {kind.window: kind for kind in model_sizes(config_of(row), "float32").attention}
    assert set(windows) == {None, 8}
    for window, kind in windows.items():
        seen = torch.ones(100, 100).tril()
        exact = seen.sum() if window is None else (seen - seen.tril(-window)).sum()
        assert kind.scores(100) == pytest.approx(float(exact), rel=0.02, abs=100)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0},
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_how_rope_stretches_does_not_change_the_sizes(rope):
    row = next(row for row in ROWS if (row.model_type, row.decoder) == ("internvl", "qwen2"))
    tree = CONFIGS[row.model_type, row.decoder]
    stretched = config_of(row, text_config=tree["text_config"] | {"rope_parameters": rope})
    assert model_sizes(stretched, "bfloat16") == model_sizes(config_of(row), "bfloat16")


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("{", "is not a usable model config"),
        ('{"hidden_size": 8}', "is not a usable model config"),
        ('{"model_type": "nothing_of_ours"}', "is not a usable model config"),
        ('{"model_type": "qwen2_5_vl", "text_config": {"num_hidden_layers": "many"}}', "is not a usable model config"),
    ],
)
def test_a_file_that_is_no_config_is_named_in_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"{path} {sentence}") as found:
        read_config(path)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"num_attention_heads": 0}, "no qwen2_5_vl model can be made of this config"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1]}},
            "qwen2_5_vl .* cannot be planned: without weights",
        ),
    ],
)
def test_numbers_that_do_not_go_together_are_a_sentence(changes, sentence):
    row = next(row for row in ROWS if row.model_type == "qwen2_5_vl")
    tree = CONFIGS[row.model_type, row.decoder]
    with pytest.raises(ValueError, match=sentence) as found:
        model_sizes(config_of(row, text_config=tree["text_config"] | changes), "float32")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("model_type, sentence", [("qwen3", "'qwen3' is not in the table"), ("llava", "'qwen2' is not in the table")])
def test_what_is_not_trained_is_not_planned_either(model_type, sentence):
    config = AutoConfig.for_model(model_type, **({} if model_type == "qwen3" else {"text_config": {"model_type": "qwen2"}}))
    with pytest.raises(ValueError, match=sentence):
        model_sizes(config, "float32")
