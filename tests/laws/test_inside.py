"""Where attention's backward pass matches: the same losses and gradients as matching by itself, and it does so wherever it can."""

from __future__ import annotations

import pytest
import torch

from laid_ds.config import Match
from laid_ds.kernels.attention_matching import Omega
from laid_ds.method.distill import Ask
from laid_ds.models.attention import enable_checkpointing, last_hidden_state
from tests.laws.test_packing import CROSSED, TERMS, pair_of
from tests.support.training import dense_sums

OMEGA = Omega(kind="frontier", gamma=4.0, frontier=5.0, width=2.0)
ASK = Ask({"align": 1.0, "match": 0.3, "kl": 1.0, "sft": 1.0}, OMEGA)


def step(world, batch, inside: bool, checkpointing=False, match_rows=None, pairs="proportional"):
    """Sums, gradients, and the layers whose attention matched."""
    student, teacher = pair_of(world, inside, pairs)
    student.match = Match(rows=match_rows)
    if checkpointing:
        enable_checkpointing(student.train().model, offload=checkpointing == "offload")
    loss, sums = student(batch, teacher(batch), ASK)
    layers = [layer for layer, heads in student.tap.captured.items() if heads.beside is not None]
    loss.backward()
    return {term: sums[term].item() for term in TERMS}, {n: p.grad for n, p in student.named_parameters() if p.grad is not None}, layers


@pytest.mark.parametrize("checkpointing", [False, True, "offload"])
@pytest.mark.parametrize("pairs", ["proportional", CROSSED], ids=["same windows", "other windows"])
@pytest.mark.parametrize("packed, layers", [(False, [1]), (True, [0, 1])])  # a window over padded rows is a dense mask
def test_it_is_matching_by_itself(world, packed, layers, pairs, checkpointing):
    batch = world.batch(packed=packed)
    sums, gradients, inside = step(world, batch, True, checkpointing, pairs=pairs)
    wanted, wanted_gradients, apart = step(world, batch, False, pairs=pairs)
    assert (inside, apart) == (layers, [])
    assert sums == pytest.approx(wanted, rel=1e-5)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=2e-4, atol=2e-5 * float(gradient.abs().max()) + 1e-7, msg=name)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("pairs", ["proportional", CROSSED], ids=["same windows", "other windows"])
def test_it_is_the_definition_written_out(world, pairs, inside):
    """The student's layer with the narrower window is compared with the teacher's mixture inside that window."""
    batch = world.batch(samples=1)
    assert batch.labels.shape[1] > 2 * 10  # tokens of the window
    sums, gradients, _ = step(world, batch, inside, pairs=pairs)
    student, teacher = pair_of(world, inside, pairs)
    mixing = student.align.mixing["0"]
    wanted = dense_sums(student.model, teacher.model, (student.tap, teacher.tap), student.align.pairs, mixing, batch, OMEGA)
    assert sums == pytest.approx({term: value.item() for term, value in wanted.items()}, rel=2e-5)
    sum(ASK.factors[term] * value for term, value in wanted.items()).backward()
    own = {name: p.grad for name, p in student.named_parameters() if p.grad is not None and not name.startswith("align.mixing")}
    found = gradients["align.mixing.0"] + gradients["align.mixing.1"]
    torch.testing.assert_close(found, mixing.grad, rtol=2e-4, atol=2e-6)
    for name, gradient in own.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=2e-4, atol=2e-5 * float(gradient.abs().max()) + 1e-7, msg=name)


def test_a_sample_of_the_rows_is_matched_apart(world):
    assert step(world, world.batch(), True, match_rows=5)[2] == []


def test_between_two_steps_the_model_attends_as_ever(world):
    """The window is measured in training, on other rows than those of the last step."""
    student, teacher = pair_of(world, lse=True)
    batch, other = world.batch(), world.batch(samples=1)
    with torch.no_grad():
        expected = last_hidden_state(student.model, **other.inputs)
    loss, _ = student(batch, teacher(batch), ASK)
    loss.backward()
    with torch.no_grad():
        assert torch.equal(last_hidden_state(student.model, **other.inputs), expected)


def test_without_gradients_the_sum_is_there_at_once(world):
    student, teacher = pair_of(world, lse=True)
    batch = world.batch()
    with torch.no_grad():
        _, sums = student(batch, teacher(batch), ASK)
    assert sums["match"].item() == pytest.approx(step(world, batch, False)[0]["match"], rel=1e-5)
