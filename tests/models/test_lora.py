"""LoRA: factors train beside a frozen model under ZeRO-3, a run goes on from its checkpoint, and the exported folder has them merged."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText

from laid_ds.config import Lora
from laid_ds.export import export_run
from laid_ds.models.attention import decoder, listen
from laid_ds.models.lora import add_lora, merge_lora
from laid_ds.models.rope_gain import responder
from laid_ds.plan.pair import lora_parameters, read_pair
from laid_ds.run.build import build
from laid_ds.run.check import check
from laid_ds.runtime import checkpoint, distributed, engine
from tests.laws.test_resume import killed, lines, whole_run
from tests.support.processes import run_ranks

OPTIONS = {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "k_proj", "o_proj", "down_proj"]}


def lora_run(world, output, **student):
    return world.run(
        output,
        student={"lora": OPTIONS, "gradient_checkpointing": True} | student,
        data={"micro_batch": 1},
        optimizer={"lr": 3e-3, "gain_lr": 3e-2},
        align={"pairs": "proportional"},
    )


def trained_weights(run):
    """Of a finished run, put together again: what is trained, and every weight of the model with its factors in place."""
    engine.start_processes()
    training = build(run)
    checkpoint.restore(training.student, checkpoint.latest(run.output))
    import deepspeed

    parameters = dict(training.student.module.named_parameters())
    trained = sorted(name for name, parameter in parameters.items() if parameter.requires_grad)
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return trained, {name: parameter.detach().clone() for name, parameter in parameters.items()}, distributed.rank()


def test_the_exported_folder_is_the_trained_model_with_its_factors_merged(world, tmp_path):
    run = lora_run(world, tmp_path / "run")
    run_ranks(2, whole_run, run)
    (trained, weights, _), _ = run_ranks(2, trained_weights, run)
    assert {name.split(".")[-3] for name in trained if name.startswith("model.")} == {"lora_A", "lora_B"}
    assert sum(name.startswith("align.gain") for name in trained) == 2
    assert sum(weights[name].numel() for name in trained if name.startswith("model.")) == sum(lora_parameters(read_pair(run)))

    model = world.load("student")
    stock = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_lora(model, Lora(**OPTIONS), seed=0)
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items() if name.startswith("model.")})
    gains = {str(layer): weights[f"align.gain.{layer}"] for layer in range(2)}
    listen(model, gains={layer: responder(gains, layer) for layer in range(2)})
    export_run(run.output, tmp_path / "out")
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    batch = world.batch()
    with torch.no_grad():
        expected, found = (m.eval()(**batch.inputs, use_cache=False).logits[batch.segments >= 0] for m in (model, exported))
        plain = world.load("student")(**batch.inputs, use_cache=False).logits[batch.segments >= 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - plain).abs().max() > 1e-2
    for name, tensor in exported.state_dict().items():  # nothing else has moved
        if name.endswith("q_proj.bias"):
            continue  # the gain folds into it, and it is 0 in a new model
        moved = name.startswith("model.language_model.layers") and name.split(".")[-2] in OPTIONS["targets"] and name.endswith("weight")
        assert torch.equal(tensor, stock[name]) != moved, name


def test_a_run_with_factors_goes_on_after_kill_on_other_ranks_too(world, tmp_path):
    straight, moved = lora_run(world, tmp_path / "straight"), lora_run(world, tmp_path / "moved")
    run_ranks(2, whole_run, straight)
    killed(moved, ranks=2, step=3)
    alone = moved.model_copy(update={"data": moved.data.model_copy(update={"micro_batch": 2})})
    run_ranks(1, whole_run, alone)
    for line, other in zip(lines(moved), lines(straight), strict=True):
        for name in ("loss", "align", "match", "gradient_norm"):
            assert line[name] == pytest.approx(other[name], rel=1e-5), (line["step"], name)


def test_factors_start_as_nothing_and_alike_for_one_seed(world):
    batch, models = world.batch(), [world.load("student") for _ in range(3)]
    for model in models[1:]:
        add_lora(model, Lora(rank=3), seed=7)
    with torch.no_grad():
        plain, *others = (model(**batch.inputs, use_cache=False).logits for model in models)
    assert all(torch.equal(plain, other) for other in others)
    first, second = ({name: p for name, p in model.named_parameters() if p.requires_grad} for model in models[1:])
    assert all(torch.equal(parameter, second[name]) for name, parameter in first.items())
    assert len(first) == 2 * 2 * 7
    assert all(".layers." in name and "visual" not in name for name in first)
    assert decoder(models[1]).layers[0].self_attn.q_proj.lora_A["default"].weight.shape == (3, 32)


def test_the_merge_is_that_of_peft(world):
    model = world.load("student")
    add_lora(model, Lora(rank=3, alpha=5.0), seed=7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    merged = merge_lora(model.state_dict(), 5.0 / 3)
    assert merged.keys() == world.load("student").state_dict().keys()
    layer = decoder(model).layers[1].mlp.up_proj
    layer.merge()
    torch.testing.assert_close(merged["model.language_model.layers.1.mlp.up_proj.weight"], layer.base_layer.weight)


def test_what_lora_cannot_do_is_refused(world, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"student.lora.targets: \['qkv'\] are no linear layers of the decoder, which has \['down_proj', "):
        add_lora(world.load("student"), Lora(targets=("q_proj", "qkv")), seed=0)
    run = lora_run(world, tmp_path / "run", lora=OPTIONS | {"targets": ["o_proj"]})
    with pytest.raises(ValueError, match=r"the keys of layer 0 are compared, and LoRA on \['o_proj'\] cannot move them: add k_proj"):
        check(run)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"student.lora needs the extra: pip install 'laid-ds\[lora\]'"):
        add_lora(world.load("student"), Lora(), seed=0)
