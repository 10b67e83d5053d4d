"""Every row of the table of families, on tiny random models: the tap changes nothing, the probe agrees, a folded gain is a stock model's.

The run writes docs/families.md from what it measured, and the file in the tree must be that.
"""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from laid_ds import cli
from laid_ds.models.attention import (
    NAME,
    Captured,
    Tap,
    assert_differentiable,
    attention_layers,
    decoder,
    enable_checkpointing,
    last_hidden_state,
    listen,
    whole_rows,
)
from laid_ds.models.backends import is_bounds
from laid_ds.models.export import fold_gains, write_student
from laid_ds.models.family import Decoder, Family, check_sliceable, families, family, trainable
from laid_ds.models.load import load_model, model_class
from laid_ds.models.positions import position_rule
from laid_ds.models.probe import Measured, measure, probe
from laid_ds.models.rope_gain import gain_shapes, responder
from laid_ds.models.shared_tower import image_sizes
from tests.models.family_models import CONFIGS, IMAGE, IMAGES, TOKENS, inputs, packed, tiny_model

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
ROWS = list(families())
each_family = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.model_type}-{row.decoder}")


def tiny(row: Family) -> PreTrainedModel:
    return tiny_model(row.model_type, row.decoder)


def logits_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, use_cache=False).logits


def test_every_row_has_a_tiny_model_and_the_other_way_round():
    assert {(row.model_type, row.decoder) for row in ROWS} == CONFIGS.keys()
    assert len({row.model_type for row in ROWS}) >= 28
    assert len({row.model_type for row in ROWS if row.gain != "none"}) >= 24


def dense_lse(heard: Captured) -> Tensor:
    """By its definition, from the scores of all pairs."""
    tokens, groups = heard.query.shape[2], heard.query.shape[1] // heard.key.shape[1]
    seen = torch.ones(tokens, tokens).tril().bool() if heard.mask is None else heard.mask
    scores = heard.query.double() @ heard.key.double().repeat_interleave(groups, 1).mT * heard.scale
    return scores.masked_fill(~seen, -torch.inf).logsumexp(-1).float()


@each_family
def test_the_tap_changes_nothing_and_hears_the_decoder_alone(row):
    """Also where the tap asks for the log-sum-exp, which on a CPU comes from the kernel that SDPA itself calls."""
    batch, found = inputs(row.model_type, num_tokens=20), []
    for listening in (False, True):
        model = tiny(row)
        layers = attention_layers(model)
        tap = Tap(list(layers), lse=True)
        if listening:
            listen(model, tap)
        with tap.open() as heads:
            logits = logits_of(model, batch)
        logits.logsumexp(-1).sum().backward()
        found.append((logits.detach(), [p.grad for p in model.parameters()]))
    assert sorted(heads) == sorted(layers)
    assert all(h.query.requires_grad and h.key.requires_grad for h in heads.values())
    for heard in heads.values():
        torch.testing.assert_close(heard.lse, dense_lse(heard), rtol=0, atol=2e-6)
    own = set(layers.values())
    towers = [m for m in model.modules() if isinstance(m, PreTrainedModel) and "Vision" in type(m).__name__]
    assert all(tower.config._attn_implementation != NAME for tower in towers)
    assert all(hasattr(module, "_laid") == (module in own) for module in model.modules())
    (expected, gradients), (logits, heard) = found
    assert torch.equal(logits, expected)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(heard, gradients, strict=True))


@pytest.mark.parametrize("row", [row for row in ROWS if row.model_type in IMAGES], ids=lambda row: f"{row.model_type}-{row.decoder}")
def test_the_image_is_seen(row):
    model, batch = tiny(row), inputs(row.model_type)
    name = next(name for name in batch if "pixel_values" in name)
    with torch.no_grad():
        plain, changed = logits_of(model, batch), logits_of(model, batch | {name: batch[name].flip(-1)})
    assert not torch.equal(plain, changed)


@pytest.mark.parametrize("row", [row for row in ROWS if row.model_type in IMAGES], ids=lambda row: f"{row.model_type}-{row.decoder}")
def test_a_token_changes_those_before_it_only_where_images_are_blocks(row):
    """The last token of the image is changed where it enters the first layer."""
    model, batch, found = tiny(row), inputs(row.model_type), []
    last = int((batch["input_ids"][0] == IMAGE).nonzero()[-1])

    def change(module, args, kwargs):
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        hidden[:, last] += 1
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    with torch.no_grad():
        found.append(logits_of(model, batch)[:, :last])
        decoder(model).layers[0].register_forward_pre_hook(change, with_kwargs=True)
        found.append(logits_of(model, batch)[:, :last])
    assert torch.equal(*found) != row.image_blocks


@each_family
def test_the_head_turns_the_last_hidden_state_into_the_logits(row):
    model, batch = tiny(row), inputs(row.model_type)
    with torch.no_grad():
        hidden = last_hidden_state(model, **batch)
        torch.testing.assert_close(model.get_output_embeddings()(hidden), logits_of(model, batch), rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def measured() -> dict[Family, Measured]:
    """What the probe found, every row compared with the table on the way."""
    return {row: probe(tiny(row)) for row in ROWS}


@each_family
def test_the_probe_agrees_with_the_table_and_with_the_shapes_of_gains(row, measured):
    found = measured[row]
    assert (found.layout, found.positions, found.gain) == (row.layout, row.positions, row.gain)
    if row.gain != "none":
        shapes = gain_shapes(tiny(row))
        assert all(dims in (0, 2 * shapes[layer][1]) for layer, dims in found.rotary_dims.items())
        assert shapes.keys() == found.rotary_dims.keys()


@pytest.mark.parametrize("row", [row for row in ROWS if row.gain != "none"], ids=lambda row: f"{row.model_type}-{row.decoder}")
def test_a_folded_gain_exports_and_loads_in_stock_classes(row, tmp_path):
    model, batch = tiny(row), inputs(row.model_type)
    generator = torch.Generator().manual_seed(2)
    thetas = {str(layer): torch.randn(shape, generator=generator) for layer, shape in gain_shapes(model).items()}
    with torch.no_grad():
        plain = logits_of(model, batch)
        listen(model, gains={int(layer): responder(thetas, int(layer), row.layout) for layer in thetas})
        expected = logits_of(model, batch)
    model.save_pretrained(tmp_path / "stock")
    gains = {int(layer): theta for layer, theta in thetas.items()}
    write_student(tmp_path / "stock", {}, gains, "float32", tmp_path / "out", "card")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    stock = model_class(config).from_pretrained(tmp_path / "out")
    with torch.no_grad():
        found = logits_of(stock, batch)
    assert stock.config.get_text_config()._attn_implementation != NAME
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - plain).abs().max() > 1e-4


@each_family
def test_checkpointing_on_is_off_for_what_is_heard(row):
    batch, found = inputs(row.model_type), []
    for checkpointing in (False, True):
        model = tiny(row).train()
        if checkpointing:
            enable_checkpointing(model)
        tap = Tap(list(attention_layers(model)))
        listen(model, tap)
        torch.manual_seed(0)
        with tap.open() as heads:
            logits_of(model, batch)
        assert_differentiable(heads)
        sum(h.query.square().sum() + h.key.sum() for h in heads.values()).backward()
        found.append((heads, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (plain, expected), (heard, gradients) = found
    assert all(torch.equal(heard[layer].query, plain[layer].query) and torch.equal(heard[layer].key, plain[layer].key) for layer in plain)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-5)


def test_an_export_in_bfloat16_is_off_by_its_rounding_alone(tmp_path):
    """The fold is done in fp32 and cast once, so the folder is the folded fp32 model rounded once."""
    model = tiny_model("qwen3_vl", "qwen3_vl_text")
    gains = {layer: torch.linspace(-1, 1, 4).view(shape) for layer, shape in gain_shapes(model).items()}
    model.save_pretrained(tmp_path / "stock")
    write_student(tmp_path / "stock", {}, gains, "bfloat16", tmp_path / "out", "card")
    fold_gains(model, gains)
    found = load_model(tmp_path / "out", "bfloat16")
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(found.parameters(), model.parameters(), strict=True))


def positions_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """The position ids that the model gives a row, as its rotary module gets them."""
    found: list[Tensor] = []

    def keep(module, args, kwargs):
        found.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

    handle = decoder(model).rotary_emb.register_forward_pre_hook(keep, with_kwargs=True)
    logits_of(model, batch)
    handle.remove()
    return found[0]


def two_samples(row: Family) -> list[dict[str, Tensor]]:
    return [inputs(row.model_type, seed=0, num_tokens=21), inputs(row.model_type, seed=1, num_tokens=13)]


each_packable = pytest.mark.parametrize("row", [row for row in ROWS if row.packable], ids=lambda row: f"{row.model_type}-{row.decoder}")


@each_packable
def test_two_samples_in_one_row_are_the_two_alone(row):
    """Hidden states and every gradient, with positions numbered by the model's own code; and no mask is made."""
    rows, found = two_samples(row), []
    number = position_rule(tiny(row).config)
    for together in (False, True):
        model = tiny(row).train()
        if together:
            enable_checkpointing(model)
        tap = Tap(list(attention_layers(model)), lse=True)
        listen(model, tap)
        with tap.open() as heads:
            if together:
                positions = torch.cat([number(batch) for batch in rows], 1)
                positions = positions if row.positions == "1d" else positions[:, None]
                hidden = last_hidden_state(model, **packed(rows), position_ids=positions)
                assert all(is_bounds(heard.mask) for heard in heads.values())
            else:
                hidden = torch.cat([last_hidden_state(model, **batch) for batch in rows], 1)
        hidden.square().sum().backward()
        found.append((hidden.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, heads))
    (expected, gradients, alone), (hidden, shared, together) = found
    torch.testing.assert_close(hidden, expected, rtol=0, atol=2e-6)
    assert shared.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(shared[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 1e-6)
    for layer, heard in together.items():  # the tap kept the second sample of those alone
        tokens = alone[layer].query.shape[2]
        torch.testing.assert_close(heard.lse[:, :, -tokens:], alone[layer].lse, rtol=0, atol=2e-5)


@each_packable
def test_positions_are_numbered_as_the_model_numbers_them(row):
    model, batch = tiny(row), inputs(row.model_type)
    found, expected = position_rule(model.config)(batch), positions_of(model, batch)
    assert torch.equal(found[0], torch.arange(found.shape[1]))
    assert torch.equal(found[:1] if row.positions == "1d" else found[1:], expected if row.positions == "1d" else expected[-3:, 0])


@pytest.mark.parametrize("name", ["qwen3_5", "gemma3"])
def test_families_that_are_not_packable_give_others_logits_and_are_refused(name):
    (row,) = [row for row in ROWS if row.model_type == name]
    model, rows = tiny(row), two_samples(row)
    text = torch.cat([torch.arange(batch["input_ids"].shape[1]) for batch in rows])[None]
    with torch.no_grad():
        axes = torch.cat([positions_of(model, batch) for batch in rows], -1)
        positions = text if row.positions == "1d" else torch.cat([text[None], axes.expand(3, 1, -1)])
        alone = torch.cat([logits_of(model, batch) for batch in rows], 1)
        assert (logits_of(model, packed(rows) | {"position_ids": positions}) - alone).abs().max() > 1e-3
    with pytest.raises(ValueError, match=rf"{name} .*mixes samples that share a row .*leave out data.tokens_per_pack"):
        last_hidden_state(model, **packed(rows), position_ids=positions)


def test_a_packed_row_under_another_attention_is_refused():
    model, rows = tiny_model("internvl", "qwen2"), [inputs("internvl"), inputs("internvl")]
    with pytest.raises(ValueError, match=r"would make a dense mask for it: put it on `laid` with listen"):
        last_hidden_state(model, **packed(rows), position_ids=torch.arange(9).repeat(1, 2))


def test_an_omni_model_without_a_mask_is_refused():
    batch = inputs("qwen2_5_omni_thinker")
    del batch["attention_mask"]
    with pytest.raises(ValueError, match="qwen2_5_omni_thinker counts positions along one axis unless"):
        last_hidden_state(tiny_model("qwen2_5_omni_thinker", "qwen2_5_omni_text"), **batch)


SLICED = {"inputs_embeds", "position_ids", "visual_pos_masks", "deepstack_visual_embeds"}  # along its tokens, or by the images among them


@each_family
def test_ranks_can_share_a_row_where_the_decoder_is_handed_its_tokens_alone_and_only_attention_looks_at_others(row):
    """By what the decoder is handed, by its layers, and by the masks that reach them: none is a tensor of T x T."""
    model, received = tiny(row), {}
    tap = Tap(list(attention_layers(model)))
    listen(model, tap)

    def keep(module, args, kwargs):
        assert not args
        received.update({name: value for name, value in kwargs.items() if isinstance(value, Tensor | list | tuple | dict)})

    decoder(model).register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad(), tap.open() as heads, whole_rows(model):
        last_hidden_state(model, **inputs(row.model_type, num_tokens=20))
    only_attention = len(heads) == len(decoder(model).layers)
    no_mask = all(heard.mask is None or is_bounds(heard.mask) for heard in heads.values())
    assert (received.keys() <= SLICED and only_attention and no_mask) == row.sliceable


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.sliceable and row.model_type in IMAGES], ids=lambda row: f"{row.model_type}-{row.decoder}"
)
def test_images_are_shared_out_where_the_encoder_is_handed_what_tells_them_apart(row):
    """By what it is really called with."""
    model, handed = tiny(row), []
    inside = getattr(model, "model", model)
    encode = inside.get_image_features

    def keep(*args, **kwargs):
        handed.append(image_sizes(dict(zip(signature(encode).parameters, args, strict=False)) | kwargs))
        return encode(*args, **kwargs)

    inside.get_image_features = keep
    with torch.no_grad():
        last_hidden_state(model, **inputs(row.model_type))
    assert len(handed) == 1
    assert (handed[0] is not None) == row.shares_images


def test_33_of_the_44_rows_can_be_shared_and_the_others_say_why_not():
    assert (sum(row.sliceable for row in ROWS), len(ROWS)) == (33, 44)
    with pytest.raises(ValueError, match=r"^rows of gemma3 with gemma3_text cannot be shared .*: its mask is dense; set sequence_par"):
        check_sliceable(tiny_model("gemma3", "gemma3_text").config)
    with pytest.raises(ValueError, match=r"^rows of qwen3_5 with qwen3_5_text .*: its linear attention carries a state along the row;"):
        check_sliceable(tiny_model("qwen3_5", "qwen3_5_text").config)


def page(measured: dict[Family, Measured]) -> str:
    """docs/families.md."""
    heads = [
        "model_type",
        "decoder",
        "layout",
        "positions",
        "gain",
        "query norm",
        "packable",
        "sliceable",
        "image blocks",
        "tier",
        "run on",
    ]
    lines = [" | ".join(heads), " | ".join(["---"] * len(heads))]
    for row, found in measured.items():
        marks = ["yes" if mark else "no" for mark in (row.packable, row.sliceable, row.shares_images, row.image_blocks)]
        run_on = "image and text" if row.model_type in IMAGES else "text"
        cells = [f"`{row.model_type}`", f"`{row.decoder}`", found.layout, found.positions, found.gain, found.query_norm or "none"]
        lines.append(" | ".join([*cells, *marks, row.tier, run_on]))
    return INTRODUCTION + "\n".join(f"| {line} |" for line in lines) + "\n"


INTRODUCTION = """# Families

Written by `pytest tests/models/test_families.py` from tiny random models of every row, in fp32; do not edit it by hand.
`laid models` prints the table, `laid models PATH` measures a folder.

- layout: the two coordinates of rotary plane f are f and f + P (half), or 2f and 2f + 1 (interleaved).
- positions: one per token (1d), or time, height and width on stretches of planes (mrope) or on mixed planes (mrope_interleaved).
- gain: where a RoPE gain folds: per head, shared by the heads of a layer (their queries share one norm), or nowhere.
- query norm: how the norm that the gain folds into uses its weight.
- packable: two samples in one row give the hidden states of the two alone (2e-6) and all their gradients, with position ids that start
  again, checkpointing on, and no mask at all.
- sliceable: ranks can share a row (`sequence_parallel`): its decoder is handed embeddings, positions and rows of images alone, only its
  attention looks at other tokens, and it needs no dense mask.
- shares images: those ranks encode its images once, each some of them; else each of them all.
- image blocks: tokens of one image see each other in both directions, so the mask is dense.
- tier: A trains, folds and packs; B trains and folds; C trains without a gain.
- run on: what the tiny model was given. A row run on text alone says nothing measured about its images.

In every row the logits and all gradients under a tap that asks for queries, keys and their log-sum-exp are those of SDPA, bit for bit,
and the vision tower is not tapped.
In tiers A and B a folded gain, exported and loaded by stock classes, gives the logits of the unfolded one within 1e-5.

"""


def test_the_page_is_what_this_run_found(measured):
    found, expected = PAGE.read_text() if PAGE.is_file() else "", page(measured)
    PAGE.write_text(expected)
    assert found == expected, "docs/families.md was not up to date; it is now"


def config_of(family_type: str, **text: object) -> PreTrainedConfig:
    return AutoConfig.for_model(family_type, text_config=text)


def test_an_unknown_family_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"'bert' is not in the table of families; choose one of `laid models`, or add a line"):
        family(AutoConfig.for_model("bert"))


def test_an_unknown_decoder_of_a_known_family_is_refused():
    with pytest.raises(ValueError, match=r"internvl with the text decoder 'gpt2' .* \(known: qwen2, qwen3\)"):
        family(config_of("internvl", model_type="gpt2"))


def test_capped_scores_and_capped_logits_are_refused():
    with pytest.raises(ValueError, match=r"paligemma caps its attention scores \(attn_logit_softcapping=50.0\)"):
        family(config_of("paligemma", model_type="gemma2"))
    with pytest.raises(ValueError, match=r"gemma3 caps its logits \(final_logit_softcapping=30.0\)"):
        trainable(config_of("gemma3", final_logit_softcapping=30.0))


def test_a_model_that_is_not_what_the_table_says_is_refused_with_the_expectation(monkeypatch):
    wrong = {"qwen2": Decoder("interleaved", "mrope", "head")}
    monkeypatch.setattr("laid_ds.models.family.DECODERS", wrong)
    with pytest.raises(ValueError, match=r"layout is 'half', expected 'interleaved'; positions is '1d', expected 'mrope'"):
        probe(tiny_model("internvl", "qwen2"))


def test_a_gain_is_refused_where_nothing_folds():
    with pytest.raises(ValueError, match=r"folds nowhere in llama4 .*gain.enabled=false"):
        gain_shapes(tiny_model("llama4", "llama4_text"))


def test_images_without_token_types_are_refused():
    batch = inputs("qwen2_5_vl")
    del batch["mm_token_type_ids"]
    with pytest.raises(ValueError, match="images came without mm_token_type_ids"):
        last_hidden_state(tiny_model("qwen2_5_vl", "qwen2_5_vl_text"), **batch)


def test_two_models_of_one_config_object_do_not_share_what_is_heard():
    config = AutoConfig.for_model("internvl", **(TOKENS | CONFIGS["internvl", "qwen2"]))
    (first, second), taps = (model_class(config).from_config(config) for _ in range(2)), (Tap([0]), Tap([0, 1]))
    for model, tap in zip((first, second), taps, strict=True):
        listen(model, tap)
    with taps[0].open() as heads, taps[1].open() as others:
        logits_of(first, inputs("internvl"))
        assert not others
        logits_of(second, inputs("internvl", seed=1))
    assert (sorted(heads), sorted(others)) == ([0], [0, 1])
    assert not torch.equal(heads[0].query, others[0].query)


def test_measuring_leaves_the_model_as_it_was():
    model, batch = tiny_model("qwen3_vl", "qwen3_vl_text").train(), inputs("qwen3_vl")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    listen(model, Tap([0]))
    measure(model)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert attention_layers(model)[0]._laid.tap.layers == [0]
    logits_of(model, batch)


def test_a_model_in_bfloat16_is_measured_too():
    model = tiny_model("glm4v", "glm4v_text").to(torch.bfloat16)
    assert probe(model).rotary_dims == {0: 4, 1: 4}


def test_slow_planes_of_a_long_context_model_are_seen_to_turn():
    tree = CONFIGS["glm4v", "glm4v_text"]
    rope = tree["text_config"]["rope_parameters"] | {"rope_theta": 1e8, "mrope_section": [2, 1, 1]}
    text = tree["text_config"] | {"rope_parameters": rope, "hidden_size": 64, "head_dim": 16}
    config = AutoConfig.for_model("glm4v", **tree | {"text_config": text})
    found = probe(model_class(config).from_config(config))
    assert found.rotary_dims == {0: 8, 1: 8}
    assert found.axes == "tthw"


def test_load_model_takes_every_class_of_the_table(tmp_path):
    tiny_model("phi4_multimodal", "phi4_multimodal").save_pretrained(tmp_path / "phi")
    assert type(load_model(tmp_path / "phi")).__name__ == "Phi4MultimodalForCausalLM"


def test_the_command_prints_the_table(capsys):
    with pytest.raises(SystemExit):
        cli.main(["models", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == len(ROWS)
    assert {"model_type", "layout", "positions", "gain", "packable", "tier"} <= rows[0].keys()
    with pytest.raises(SystemExit):
        cli.main(["models"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(ROWS) + 1
    assert lines[0].split()[:3] == ["model_type", "decoder", "layout"]


def test_the_command_measures_a_folder(tmp_path, capsys):
    tiny_model("qwen3_vl", "qwen3_vl_text").save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        cli.main(["models", str(tmp_path / "model"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["model_type"], found["gain"], found["axes"], found["query_norm"]) == ("qwen3_vl", "layer", "thwt", "w")


def test_the_command_refuses_a_folder_without_a_model_in_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_status:
        cli.main(["models", str(tmp_path)])
    assert exit_status.value.code == 2
    assert capsys.readouterr().err.startswith("laid: no model at ")
