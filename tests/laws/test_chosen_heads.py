"""Comparing chosen heads, or the rows that answer, alone: the definition written out; under ZeRO-3 as in plain torch; all else is free."""

from __future__ import annotations

import re

import pytest
import torch

from laid_ds.kernels.attention_matching import Omega
from laid_ds.method.align import compared_heads
from laid_ds.method.distill import Ask
from tests.laws.test_packing import CROSSED, TERMS, pair_of, prepare_of, samples_of
from tests.laws.test_world_size import assert_equal
from tests.support.processes import run_ranks
from tests.support.training import dense_sums, plain_steps, rank_steps

OMEGA = Omega(kind="frontier", gamma=4.0, frontier=5.0, width=2.0)
HEADS = (((1, 3),), ((0, 2), (1, 0)))  # of the layers CROSSED, in another order than the teacher's
ASK = Ask({"align": 1.0, "match": 0.3, "kl": 1.0, "sft": 1.0}, OMEGA)


@pytest.mark.parametrize("rows_from", ["all", "answers"])
@pytest.mark.parametrize("heads", ["all", HEADS], ids=["mixed", "chosen"])
@pytest.mark.parametrize("packed", [False, True])
def test_it_is_the_definition_written_out(world, heads, rows_from, packed):
    """Every loss and every gradient, of padded rows and of a packed one, against the samples alone, unpadded and dense."""
    student, teacher = pair_of(world, True, CROSSED, heads, rows_from)
    items = [item for item in samples_of(world) if item[1].images]  # the dense form knows no stand-in image
    batch = prepare_of(world, packed)([items] if packed else items)
    loss, sums = student(batch, teacher(batch), ASK)
    loss.backward()
    found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    mixing = student.align.mixing["0"] if heads == "all" else None
    wanted = dict.fromkeys(TERMS, 0.0)
    for item in items:
        alone = prepare_of(world, False)([item])
        parts = dense_sums(student.model, teacher.model, (student.tap, teacher.tap), CROSSED, mixing, alone, OMEGA, heads, rows_from)
        wanted = {term: wanted[term] + parts[term] for term in TERMS}
    assert {term: sums[term].item() for term in TERMS} == pytest.approx({term: wanted[term].item() for term in TERMS}, rel=2e-5)
    sum(ASK.factors[term] * wanted[term] for term in TERMS).backward()
    for name, p in student.named_parameters():
        if p.grad is not None and not name.startswith("align.mixing"):
            torch.testing.assert_close(found[name], p.grad, rtol=2e-4, atol=2e-5 * float(p.grad.abs().max()) + 1e-7, msg=name)
    assert any(name.startswith("align.mixing") for name in found) == (heads == "all")


def test_heads_that_are_not_compared_are_free(world):
    """The gradient of matching to their queries is 0."""
    student, teacher = pair_of(world, True, [(1, 1)], (((1, 3),),))
    batch = prepare_of(world, False)(samples_of(world)[:2])
    student(batch, teacher(batch), Ask({"match": 1.0}, OMEGA))[0].backward()
    free, compared = student.model.model.language_model.layers[1].self_attn.q_proj.weight.grad.unflatten(0, (2, -1))
    assert free.abs().max() == 0
    assert compared.abs().max() > 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_zero3_equals_plain_torch(world, tmp_path, ranks):
    """Samples of several lengths; the rows that answer are counted over all ranks."""
    chosen = {"align": {"pairs": CROSSED, "heads": HEADS}, "match": {"rows_from": "answers", "frontier_tokens": [2, 20], "width_tokens": 4}}
    plain = plain_steps(world.run(tmp_path / "plain", **chosen), 3, global_batch=4)
    del plain["weights"]["align.mixing.1"]
    for result in run_ranks(ranks, rank_steps, world.run(tmp_path / "run", data={"micro_batch": 4 // ranks}, **chosen), 3):
        assert_equal(result, plain)


@pytest.mark.parametrize(
    "heads, sentence",
    [
        ([[(0, 0)]], "1 lists for the 2 layer pairs"),
        ([[(0, 0)], []], "name at least one head"),
        ([[(0, 0)], [(1, 1), (1, 2)]], "none twice"),
        ([[(0, 0)], [(2, 1)]], "[2, 1] does not exist; the models have 2 and 4 heads"),
        ([[(0, 4)], [(1, 1)]], "[0, 4] does not exist"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(heads, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        compared_heads(heads, CROSSED, 2, 4)
