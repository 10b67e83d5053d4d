"""A fused kernel is used only after it has given what the chunked one gives here; one that is wrong is told of once, and not used.

The interpreter stands in for the GPU: "auto" is made to believe that Triton can run on the CPU.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager

import pytest
import torch
from kernel_cases import IN_INTERPRETER
from test_attention_matching import NAMES, OMEGAS, SITUATIONS, case, options_of, run

from laid_ds.kernels import switch
from laid_ds.kernels.attention_matching import attention_matching, fused, trial
from laid_ds.kernels.attention_profile import attention_profile
from laid_ds.kernels.attention_profile import fused as fused_profile
from laid_ds.kernels.head_alignment import head_alignment

pytestmark = IN_INTERPRETER


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(switch, "can_be_fused", lambda device: True)
    monkeypatch.setattr(switch, "_mismatches", {})
    monkeypatch.setattr(switch, "_used", {})
    for name, value in {"TOKENS": 32, "BORDER": 13, "WINDOW": 7}.items():  # the interpreter is slow
        monkeypatch.setattr(trial, name, value)


def scaled(real, which):
    """A kernel that is wrong in the loss or in one gradient: as if a compiler had dropped a part of it."""

    def wrong(problem, query, key, mixing, chunk_size=None):
        if which == "the loss":
            loss = real(problem, query, key, mixing, chunk_size)
            return loss + 0.2 * loss.detach()
        inputs = {"d student_query": query, "d student_key": key, "d mixing_logits": mixing}
        inputs[which] = inputs[which] * 1.0
        inputs[which].register_hook(lambda gradient: gradient * 1.2)
        return real(problem, *inputs.values(), chunk_size)

    return wrong


@pytest.mark.parametrize(
    "situation, dtype", [*((situation, torch.float32) for situation in SITUATIONS), ("causal", torch.float16), ("one hot", torch.float16)]
)
def test_a_right_kernel_is_used_after_one_trial(situation, dtype, caplog):
    x = case(T=19, S=22, dtype=dtype)
    options = options_of(situation, x) | {"omega": OMEGAS[1]}
    for _ in range(2):
        run(x, **options)
    assert switch.used() == {"attention_matching": "fused"}
    assert list(switch._mismatches.values()) == [""]
    assert not caplog.records


@pytest.mark.parametrize("which", ["the loss", "d student_query", "d student_key", "d mixing_logits"])
@pytest.mark.parametrize("situation", ["causal", "one hot", "narrow student"])
def test_a_wrong_kernel_is_told_of_in_one_sentence_and_chunked_goes_on(situation, which, monkeypatch, caplog):
    x = case(T=19, S=22)
    options = options_of(situation, x)
    if situation == "one hot" and which == "d mixing_logits":
        pytest.skip("one head's share does not move: its gradient is 0")
    monkeypatch.setattr(fused, "attention_matching", scaled(fused.attention_matching, which))
    with caplog.at_level(logging.WARNING):
        found = [run(x, **options) for _ in range(3)]
    wanted = run(x, **options, implementation="chunked")
    for loss, count, gradients in found:
        assert (loss, count) == wanted[:2]
        assert all(torch.equal(got, want) for got, want in zip(gradients, wanted[2], strict=True))
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith("laid: the fused kernel of attention_matching is not used on cpu for float32 heads 4/2 x 8 of 6/3 x 16: ")
    assert f"{which} is off by 0.2 of its largest entry, 0.002 is allowed; the chunked one goes on" in said
    assert "\n" not in said


def test_what_is_wrong_for_some_masks_only_is_found_there(monkeypatch, caplog):
    real = fused.attention_matching
    monkeypatch.setattr(
        fused, "attention_matching", lambda problem, *rest: real(problem, *rest) * (1.1 if problem.teacher_alone is not None else 1)
    )
    x = case(T=19)
    run(x)
    assert switch.used() == {"attention_matching": "fused"}
    run(x, student_window=4)
    assert switch.used() == {"attention_matching": "chunked"}
    assert len(caplog.records) == 1


@pytest.mark.parametrize("error", [RuntimeError("out of resource: shared memory\nRequired: 300000"), NotImplementedError()])
def test_a_kernel_that_does_not_compile_is_told_of(error, monkeypatch, caplog):
    def fails(*_):
        raise error

    monkeypatch.setattr(fused, "attention_matching", fails)
    run(case(T=19))
    assert switch.used() == {"attention_matching": "chunked"}
    (record,) = caplog.records
    assert f": {type(error).__name__}: {'out of resource: shared memory' if error.args else 'no reason given'}; " in record.getMessage()


def test_a_kernel_that_gives_nan_is_wrong(monkeypatch, caplog):
    real = fused.attention_matching
    monkeypatch.setattr(fused, "attention_matching", lambda *problem: real(*problem) * torch.nan)
    run(case(T=19))
    assert "the loss is off by inf" in caplog.text


def test_a_trial_draws_no_random_number_and_works_without_gradients():
    before = torch.get_rng_state()
    with torch.inference_mode():
        attention_matching(**case(T=19))
    assert switch.used() == {"attention_matching": "fused"}
    assert torch.equal(before, torch.get_rng_state())


def test_double_precision_is_never_fused(caplog):
    run(case(T=19, dtype=torch.float64))
    assert switch.used() == {"attention_matching": "chunked"}
    assert not caplog.records


def test_the_profile_is_tried_too(monkeypatch, caplog):
    g = torch.Generator().manual_seed(0)
    x = {"query": torch.randn(2, 4, 37, 8, generator=g), "key": torch.randn(2, 2, 37, 8, generator=g), "scale": 0.4}
    attention_profile(**x)
    assert switch.used() == {"attention_profile": "fused"}
    real = fused_profile.attention_profile
    monkeypatch.setattr(switch, "_mismatches", {})
    monkeypatch.setattr(fused_profile, "_between", lambda beyond: beyond * 1.1)
    got = attention_profile(**x)
    assert real is fused_profile.attention_profile
    assert switch.used() == {"attention_profile": "chunked"}
    torch.testing.assert_close(got.bin_mass, attention_profile(**x, implementation="chunked").bin_mass, rtol=0, atol=0)
    assert "bin_" in caplog.text


@pytest.mark.parametrize("implementation", ["reference", "chunked", "fused"])
def test_autocast_around_a_kernel_changes_nothing(implementation):
    x = case(T=19)
    wanted = run(x, implementation=implementation)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = attention_matching(**x, implementation=implementation)
    got = torch.autograd.grad(loss, [x[name] for name in NAMES])
    assert loss == wanted[0]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted[2], strict=True))


def test_autocast_around_head_alignment_changes_nothing():
    x = case(T=19, Ds=16)
    heads = [x[name].detach().requires_grad_() for name in ("student_query", "student_key", "teacher_query", "teacher_key")]
    wanted = head_alignment(*heads, x["mixing_logits"])[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert head_alignment(*heads, x["mixing_logits"])[0] == wanted


def test_triton_launches_where_the_tensors_are(monkeypatch):
    entered = []

    @contextmanager
    def device(which):
        entered.append(which)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    with switch.exactly_on(torch.device("cuda", 1)):
        assert entered == [torch.device("cuda", 1)]
        assert not torch.is_autocast_enabled("cuda")
