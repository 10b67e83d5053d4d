"""Laws 1 and 6: listening changes nothing, and recomputed activations change nothing that was heard."""

from __future__ import annotations

import pytest
import torch

from laid_ds.models.attention import NAME, Tap, assert_differentiable, decoder, enable_checkpointing, listen


def outputs(model, batch):
    hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden)
    logits[batch.supervised].logsumexp(-1).sum().backward()
    return logits.detach(), [p.grad for p in model.parameters()]


def test_tap_on_is_tap_off_is_sdpa_bit_for_bit(world):
    batch = world.batch()
    expected, gradients = outputs(world.load("student", "sdpa"), batch)
    for open_tap in (False, True):
        model, tap = world.load("student"), Tap([0, 1])
        listen(model, tap)
        if open_tap:
            with tap.open() as heads:
                logits, found = outputs(model, batch)
            assert sorted(heads) == [0, 1]
        else:
            logits, found = outputs(model, batch)
            assert not tap.captured
        assert torch.equal(logits, expected)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, gradients, strict=True))


def test_the_vision_tower_is_never_tapped(world):
    model, tap = world.load("student"), Tap([0, 1])
    listen(model, tap)
    assert decoder(model).config._attn_implementation == NAME
    assert model.model.visual.config._attn_implementation != NAME
    assert not any(hasattr(module, "_laid") for module in model.model.visual.modules())


def test_captured_tensors_and_window_are_those_of_the_layer(world):
    model, tap, batch = world.load("teacher"), Tap([0, 1]), world.batch()
    listen(model, tap)
    with tap.open() as heads:
        model.model(**batch.inputs, use_cache=False)
    rows, tokens = batch.labels.shape
    for layer, window in ((0, 10), (1, None)):
        assert heads[layer].query.shape == (rows, 4, tokens, 16)
        assert heads[layer].key.shape == (rows, 2, tokens, 16)
        assert heads[layer].window == window
        assert heads[layer].scale == pytest.approx(16**-0.5)


def test_the_sliding_window_holds(world):
    """Layer 0 has a window of 10 tokens: what comes out of it at token t depends on tokens t - 9 to t and no other."""
    model, outputs = world.load("student"), []
    listen(model, Tap([]))
    model.model.language_model.layers[0].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    ids = torch.arange(40)[None] + 20
    for change in (0, 5):
        with torch.no_grad():
            changed = ids.clone()
            changed[0, 12] += change
            model.model(input_ids=changed, use_cache=False)
    differs = (outputs[0] - outputs[1]).abs().amax(-1)[0] > 0
    assert differs.nonzero().flatten().tolist() == list(range(12, 22))


def gradients_through_the_tap(model, batch, checkpointing):
    tap = Tap([0, 1])
    if checkpointing:
        enable_checkpointing(model.train(), offload=checkpointing == "offload")
    listen(model, tap)
    with tap.open() as heads:
        model.model(**batch.inputs, use_cache=False)
    heard = {layer: (h.query.detach().clone(), h.key.detach().clone()) for layer, h in heads.items()}
    sum((h.query.square().sum() + h.key.sum()) for h in heads.values()).backward()
    return heard, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [True, "offload"])
def test_checkpointing_on_is_off(world, checkpointing):
    batch = world.batch()
    heard, plain = gradients_through_the_tap(world.load("student"), batch, False)
    heard_again, checkpointed = gradients_through_the_tap(world.load("student"), batch, checkpointing)
    for layer in heard:
        assert torch.equal(heard[layer][0], heard_again[layer][0])
        assert torch.equal(heard[layer][1], heard_again[layer][1])
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-6)


def test_two_models_of_one_config_do_not_share_their_attention(world):
    first, second = world.load("student"), world.load("student", "sdpa")
    listen(first, Tap([1]))
    assert second.model.language_model.config._attn_implementation == "sdpa"


def test_a_layer_without_attention_is_refused(world):
    with pytest.raises(ValueError, match=r"decoder layers \[7\] have no attention.*\[0, 1\]"):
        listen(world.load("student"), Tap([0, 7]))


def test_reentrant_checkpointing_is_refused(world):
    """It would cut the gradient of all that is heard, without a word."""
    model, tap = world.load("student").train(), Tap([1])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    listen(model, tap)
    with tap.open() as heads:
        model.model(**world.batch().inputs, use_cache=False)
    with pytest.raises(AssertionError, match=r"tapped tensors of layers \[1\] carry no gradient \(reentrant checkpointing"):
        assert_differentiable(heads)
