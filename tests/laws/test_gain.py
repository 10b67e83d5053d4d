"""Law 2: gain 1 is the identity, folded is unfolded, and the exported folder needs nothing of this project."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from laid_ds.models.attention import attention_layers, listen
from laid_ds.models.export import write_student
from laid_ds.models.rope_gain import BOUND, apply_gain, fold, gain, gain_shapes, responder


def random_gains(model) -> nn.ParameterDict:
    torch.manual_seed(3)
    return nn.ParameterDict({str(layer): torch.randn(shape) for layer, shape in gain_shapes(model).items()})


def with_gains(model, thetas):
    listen(model, gains={int(layer): responder(thetas, int(layer)) for layer in thetas})
    return model


def logits(model, batch):
    with torch.no_grad():
        return model.lm_head(model.model(**batch.inputs, use_cache=False).last_hidden_state)[batch.segments >= 0]


def test_a_gain_of_one_is_the_identity(world):
    batch, model = world.batch(), world.load("student")
    expected = logits(world.load("student", "sdpa"), batch)
    zeros = nn.ParameterDict({layer: torch.zeros_like(theta) for layer, theta in random_gains(model).items()})
    assert torch.equal(logits(with_gains(model, zeros), batch), expected)


def test_folded_is_unfolded_and_differs_from_no_gain(world):
    batch, thetas = world.batch(), random_gains(world.load("student"))
    plain = logits(world.load("student"), batch)
    unfolded = logits(with_gains(world.load("student"), thetas), batch)
    folded = world.load("student")
    for layer, attention in attention_layers(folded).items():
        fold(attention, thetas[str(layer)])
    torch.testing.assert_close(logits(folded, batch), unfolded, rtol=0, atol=1e-5)
    assert (unfolded - plain).abs().max() > 1e-2


def test_a_plane_of_a_head_scales_its_contribution_to_the_scores(world):
    torch.manual_seed(0)
    query, key, theta = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(2, 4)
    g = gain(theta)
    by_plane = [sum(query[..., d][..., :, None] * key[..., d][..., None, :] for d in (f, f + 4)) for f in range(4)]
    expected = sum(g[None, :, f, None, None] * scores for f, scores in enumerate(by_plane))
    torch.testing.assert_close(apply_gain(query, theta) @ key.mT, expected)


def test_gain_stays_inside_its_bound_and_starts_with_slope_one():
    theta = torch.tensor([[-1e4, -1.0, 0.0, 1.0, 1e4]], requires_grad=True)
    g = gain(theta)
    assert (g >= 1 / BOUND - 1e-6).all()
    assert (g <= BOUND + 1e-5).all()
    g.sum().backward()
    assert theta.grad[0, 2] == pytest.approx(1.0)


STOCK = """
import sys
sys.modules["laid_ds"] = None  # importing it now fails
import torch
from transformers import AutoModelForImageTextToText
folder, inputs, output = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder)
batch = torch.load(inputs)
with torch.no_grad():
    logits = model(**batch).logits
    answer = model.generate(**{name: tensor[:1] if tensor.ndim == 2 and name != "pixel_values" and name != "image_grid_thw" else tensor
                               for name, tensor in batch.items()}, max_new_tokens=3, do_sample=False)
torch.save((logits, answer), output)
"""


def test_the_exported_folder_loads_where_laid_ds_cannot_be_imported(world, tmp_path):
    batch, thetas = world.batch(samples=1), random_gains(world.load("student"))
    expected = logits(with_gains(world.load("student"), thetas), batch)
    model = world.load("student")
    gains = {int(layer): theta.detach() for layer, theta in thetas.items()}
    write_student(world.student, dict(model.state_dict()), gains, "float32", tmp_path / "out", "card")
    torch.save(batch.inputs, tmp_path / "inputs.pt")
    command = [sys.executable, "-c", STOCK, str(tmp_path / "out"), str(tmp_path / "inputs.pt"), str(tmp_path / "result.pt")]
    subprocess.run(command, check=True, cwd=tmp_path)
    found, answer = torch.load(tmp_path / "result.pt")
    torch.testing.assert_close(found[batch.segments >= 0], expected, rtol=0, atol=1e-5)
    assert answer.shape[1] > batch.inputs["input_ids"].shape[1]
    assert (tmp_path / "out" / "README.md").read_text() == "card"


def test_export_leaves_an_existing_folder_alone(world, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="exists; choose another folder"):
        write_student(world.student, {}, {}, "float32", tmp_path / "out", "card")


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_a_plane_of_each_layout_scales_its_contribution_to_the_scores(layout):
    torch.manual_seed(0)
    query, key, theta = torch.randn(1, 2, 3, 10), torch.randn(1, 2, 3, 10), torch.randn(2, 4)
    pairs = [(f, f + 4) if layout == "half" else (2 * f, 2 * f + 1) for f in range(4)]
    factors = [(pair, gain(theta)[None, :, f, None, None]) for f, pair in enumerate(pairs)] + [((8, 9), 1.0)]
    expected = sum(factor * sum(query[..., d][..., :, None] * key[..., d][..., None, :] for d in pair) for pair, factor in factors)
    torch.testing.assert_close(apply_gain(query, theta, layout) @ key.mT, expected)


def normalised(name: str, width: int) -> nn.Module:
    attention = nn.Module()
    attention.head_dim = 4
    setattr(attention, name, nn.LayerNorm(width, bias=False))
    return attention


def test_a_gain_per_head_is_refused_where_heads_share_a_norm():
    with pytest.raises(ValueError, match="4 weights for a head dim of 4: a gain with 2 rows does not fold"):
        fold(normalised("q_norm", 4), torch.zeros(2, 2))


def test_a_norm_of_queries_and_keys_together_is_refused():
    with pytest.raises(ValueError, match="qk_norm has no weight for the queries alone"):
        fold(normalised("qk_norm", 4), torch.zeros(1, 2))
