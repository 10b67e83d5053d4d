"""Losses at the head: chunks change nothing, the shared vocabulary is renormalised, and every gradient equals the dense one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from laid_ds.losses import head_losses, weighted_mean

ROWS, HIDDEN, VOCABULARY = 13, 8, 31


def problem():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, requires_grad=True)
    head = torch.nn.Linear(HIDDEN, VOCABULARY + 5, bias=False)
    torch.nn.init.normal_(head.weight, generator=generator)
    labels = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    return hidden, head, labels, torch.randn(ROWS, VOCABULARY, generator=generator)


@pytest.mark.parametrize("chunks", [1, 2, 13, 20])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_chunks_equal_the_dense_definition(chunks, temperature):
    hidden, head, labels, teacher = problem()
    sums = head_losses(hidden, head, labels, VOCABULARY, teacher, temperature, chunks)
    logits = head(hidden)[:, :VOCABULARY]
    p, q = (x.div(temperature).softmax(-1) for x in (teacher, logits))
    expected = {"sft": -logits.log_softmax(-1).gather(1, labels[:, None]).sum(), "kl": temperature**2 * (p * (p / q).log()).sum()}
    for term in sums:
        torch.testing.assert_close(sums[term], expected[term])
        found = torch.autograd.grad(sums[term], (hidden, head.weight), retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(expected[term], (hidden, head.weight), retain_graph=True))


def test_columns_beyond_the_vocabulary_get_no_gradient():
    hidden, head, labels, teacher = problem()
    sum(head_losses(hidden, head, labels, VOCABULARY, teacher).values()).backward()
    assert torch.equal(head.weight.grad[VOCABULARY:], torch.zeros(5, HIDDEN))


def test_no_rows_are_a_zero_with_a_gradient():
    """A rank without a supervised token must still run backward through its head."""
    hidden, head, labels, _ = problem()
    sums = head_losses(hidden[:0], head, labels[:0], VOCABULARY, None, chunks=2)
    sums["sft"].backward()
    assert sums["sft"] == 0
    assert head.weight.grad is not None


def test_kl_is_zero_only_for_the_teacher_itself():
    hidden, head, labels, teacher = problem()
    same = head_losses(hidden, head, labels, VOCABULARY, head(hidden)[:, :VOCABULARY].detach())["kl"]
    assert same.abs() < 1e-5
    assert head_losses(hidden, head, labels, VOCABULARY, teacher)["kl"] > 1


def test_one_division_over_the_step():
    sums = {"sft": torch.tensor(6.0), "kl": torch.tensor(4.0)}
    assert weighted_mean(sums, {"sft": 3, "kl": 2}, {"sft": 1.0, "kl": 0.5}) == pytest.approx(3.0)


def test_cross_entropy_is_torch_s():
    hidden, head, labels, _ = problem()
    torch.testing.assert_close(
        head_losses(hidden, head, labels, VOCABULARY + 5)["sft"] / ROWS, F.cross_entropy(head(hidden), labels), rtol=1e-6, atol=1e-6
    )
