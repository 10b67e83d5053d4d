"""Losses at the head: chunks change nothing, the shared vocabulary is renormalised, and every gradient is autograd's on the dense loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from laid_ds.config import Losses
from laid_ds.method.losses import Shown, head_losses, inside, show

ROWS, HIDDEN, VOCABULARY = 13, 8, 31
FACTORS = {"sft": 0.7, "kl": 1.9}


def problem(dtype=torch.float64, bias=False):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, dtype=dtype, requires_grad=True)
    head = torch.nn.Linear(HIDDEN, VOCABULARY + 5, bias=bias, dtype=dtype)
    torch.nn.init.normal_(head.weight, generator=generator)
    labels = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    return hidden, head, labels, torch.randn(ROWS, VOCABULARY + 2, generator=generator, dtype=dtype)


def dense(hidden, head, labels, teacher, options):
    """Both sums as they are defined, with [R, V] in full."""
    logits, tau, beta = head(hidden)[:, :VOCABULARY], options.temperature, options.beta
    p, q = (x.div(tau).softmax(-1) for x in (teacher[:, :VOCABULARY], logits))
    m = beta * p + (1 - beta) * q
    divergence = {
        "kl": p * (p / q).log(),
        "reverse_kl": q * (q / p).log(),
        "jsd": beta * p * (p / m).log() + (1 - beta) * q * (q / m).log(),
    }[options.divergence]
    return {"sft": -logits.log_softmax(-1).gather(1, labels[:, None]).sum(), "kl": tau**2 * divergence.sum()}


@pytest.mark.parametrize("rows_per_chunk", [1, 5, 13, 20])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence, beta", [("kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1)])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_dense_definition(rows_per_chunk, temperature, divergence, beta, bias):
    hidden, head, labels, teacher = problem(bias=bias)
    options = Losses(temperature=temperature, rows_per_chunk=rows_per_chunk, divergence=divergence, beta=beta)
    loss, sums = head_losses(hidden, head, labels, VOCABULARY, FACTORS, Shown(teacher), options)
    expected = dense(hidden, head, labels, teacher, options)
    torch.testing.assert_close(sums, {term: total.detach() for term, total in expected.items()})
    wanted = sum(FACTORS[term] * total for term, total in expected.items())
    torch.testing.assert_close(loss, wanted)
    learned = (hidden, *head.parameters())
    torch.testing.assert_close(torch.autograd.grad(3 * loss, learned), torch.autograd.grad(3 * wanted, learned))


@pytest.mark.parametrize("term", FACTORS)
def test_a_term_without_a_factor_gets_no_gradient(term):
    hidden, head, labels, teacher = problem()
    loss, _ = head_losses(hidden, head, labels, VOCABULARY, {term: 2.0}, Shown(teacher))
    wanted = 2 * dense(hidden, head, labels, teacher, Losses())[term]
    torch.testing.assert_close(torch.autograd.grad(loss, hidden), torch.autograd.grad(wanted, hidden))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size, factored", [(5, True), (ROWS, False)])
def test_a_teacher_may_be_shown_as_hidden_states_and_a_head(size, factored, bias):
    """More rows than hidden states are wide: then the product is held as its factors, and nothing else changes."""
    hidden, head, labels, _ = problem()
    teacher, states = torch.nn.Linear(size, VOCABULARY + 2, bias=bias, dtype=torch.float64), torch.randn(ROWS, size, dtype=torch.float64)
    shown = show(teacher, states, VOCABULARY)
    assert (shown.weight is not None) == factored
    whole = Shown(teacher(states).detach())
    for found, expected in zip(*(head_losses(hidden, head, labels, VOCABULARY, FACTORS, x) for x in (shown, whole)), strict=True):
        torch.testing.assert_close(found, expected)


def test_columns_beyond_the_vocabulary_get_no_gradient():
    hidden, head, labels, teacher = problem()
    head_losses(hidden, head, labels, VOCABULARY, FACTORS, Shown(teacher))[0].backward()
    assert torch.equal(head.weight.grad[VOCABULARY:], torch.zeros(5, HIDDEN, dtype=torch.float64))


def test_no_rows_are_a_zero_with_a_gradient():
    """A rank without a supervised token must still run backward through its head."""
    hidden, head, labels, _ = problem()
    loss, sums = head_losses(hidden[:0], head, labels[:0], VOCABULARY, FACTORS)
    loss.backward()
    assert sums == {"sft": 0}
    assert torch.equal(head.weight.grad, torch.zeros_like(head.weight))


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "jsd"])
def test_a_divergence_is_zero_only_for_the_teacher_itself(divergence):
    hidden, head, labels, teacher = problem(torch.float32)
    options = Losses(divergence=divergence)
    loss, sums = head_losses(hidden, head, labels, VOCABULARY, {"kl": 1.0}, Shown(head(hidden).detach()), options)
    assert sums["kl"].abs() < 1e-5
    assert torch.autograd.grad(loss, hidden)[0].abs().max() < 1e-5
    assert head_losses(hidden, head, labels, VOCABULARY, {}, Shown(teacher), options)[1]["kl"] > 1


def test_halves_of_the_jsd_are_symmetric():
    """At beta = 1/2 teacher and student may change places."""
    hidden, head, labels, teacher = problem()
    logits, identity = head(hidden).detach()[:, :VOCABULARY], torch.nn.Linear(VOCABULARY, VOCABULARY, bias=False, dtype=torch.float64)
    identity.weight.data = torch.eye(VOCABULARY, dtype=torch.float64)
    pair, options = (logits, teacher[:, :VOCABULARY]), Losses(divergence="jsd")
    there, back = (head_losses(x, identity, labels, VOCABULARY, {}, Shown(y), options)[1]["kl"] for x, y in (pair, pair[::-1]))
    torch.testing.assert_close(there, back)


def test_a_teacher_that_rules_tokens_out_stays_finite():
    """Probabilities that underflow on either side add nothing that is not a number."""
    hidden, head, labels, teacher = problem(torch.float32)
    teacher[:, ::2] = -1e4
    for divergence in ("kl", "jsd"):
        loss, _ = head_losses(100 * hidden, head, labels, VOCABULARY, FACTORS, Shown(teacher), Losses(divergence=divergence))
        assert torch.isfinite(loss)
        assert torch.isfinite(torch.autograd.grad(loss, hidden)[0]).all()


def test_cross_entropy_is_torch_s():
    hidden, head, labels, _ = problem(torch.float32)
    loss, _ = head_losses(hidden, head, labels, VOCABULARY + 5, {"sft": 1 / ROWS})
    torch.testing.assert_close(loss, F.cross_entropy(head(hidden), labels), rtol=1e-6, atol=1e-6)


def test_bfloat16_rounds_like_autograd():
    """The products run in bf16, everything between in fp32; tolerance: a few units in the last of bf16's 8 bits."""
    hidden, head, labels, teacher = problem(torch.bfloat16)
    loss, sums = head_losses(hidden, head, labels, VOCABULARY, FACTORS, Shown(teacher), Losses(rows_per_chunk=5))
    assert loss.dtype == sums["kl"].dtype == torch.float32
    logits = head(hidden)[:, :VOCABULARY].float()
    p, q = teacher[:, :VOCABULARY].float().log_softmax(-1), logits.log_softmax(-1)
    wanted = 0.7 * F.cross_entropy(logits, labels, reduction="sum") + 1.9 * F.kl_div(q, p, reduction="sum", log_target=True)
    torch.testing.assert_close(loss, wanted)
    for found, exact in zip(*(torch.autograd.grad(x, (hidden, head.weight)) for x in (loss, wanted)), strict=True):
        torch.testing.assert_close(found, exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))


def test_work_inside_a_module_runs_between_its_hooks():
    head, order = torch.nn.Linear(2, 3), []
    head.register_forward_pre_hook(lambda *_: order.append("before"))
    head.register_forward_hook(lambda *_: order.append("after"))
    assert inside(head, lambda module, x: (order.append("work"), module, x), 5)[1:] == (head, 5)
    assert order == ["before", "work", "after"]
    assert head(torch.ones(2)).shape == (3,)
