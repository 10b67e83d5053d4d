"""Laws of attention that matches in its backward pass: it is attention, and beside it attention matching, with every gradient."""

from __future__ import annotations

import pytest
import torch
from test_attention_matching import OMEGAS, case

from laid_ds.kernels.attention_matching import attention_and_matching, attention_matching
from laid_ds.kernels.visible import first_visible

LEARNED = ["student_query", "student_key", "student_value", "mixing_logits"]
NONE = torch.tensor([[0] * 37, [0] * 37])
PADDED = torch.tensor([[0] * 30 + [-1] * 7, [0] * 37])
PACKED = torch.tensor([[0] * 5 + [1] * 20 + [2] + [-1] * 11, [3] * 36 + [4]])
SITUATIONS = {
    "causal": (NONE, None, None),
    "padded": (PADDED, None, None),
    "packed": (PACKED, None, None),
    "narrow teacher": (NONE, None, 6),
    "narrow student": (PACKED, 7, None),
    "narrower student": (PADDED, 4, 9),
    "both narrow": (PACKED, 7, 7),
}


def arguments(dtype=torch.float64, **sizes):
    x = case(dtype=dtype, **sizes)
    x.pop("query_offset")
    x["student_value"] = torch.randn(x["student_key"].shape, dtype=dtype, generator=torch.Generator().manual_seed(9)).requires_grad_()
    return x


def hidden(first, keys):
    """What a row does not see, as something to add to its scores."""
    key, row = torch.arange(keys), torch.arange(first.shape[1])
    return torch.zeros(1, dtype=torch.float64).masked_fill((key < first[..., None]) | (key > row[:, None]), -torch.inf)[:, None]


def attention(query, key, value, scale, mask):
    """(out, log-sum-exp), densely."""
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).mT * scale + mask.to(query.dtype)
    return scores.softmax(-1) @ value.repeat_interleave(groups, 1), scores.logsumexp(-1)


def together(x, first, segments, omega, teacher_window=None, teacher_lse=None, chunk_size=None):
    """(out, matching in the graph, where its value will be)."""
    seen = []
    mask = hidden(first, segments.shape[1])
    out, _, matching = attention_and_matching(
        lambda query, key, value: attention(query, key, value, x["student_scale"], mask),
        *(x[name] for name in ("student_query", "student_key", "student_value", "teacher_query", "teacher_key", "mixing_logits")),
        scale=x["student_scale"],
        teacher_scale=x["teacher_scale"],
        first=first,
        segments=segments,
        report=seen.append,
        omega=omega,
        teacher_window=teacher_window,
        teacher_lse=teacher_lse,
        chunk_size=chunk_size,
    )
    return out, matching, seen


def apart(x, first, segments, omega, student_window=None, teacher_window=None):
    out, _ = attention(x["student_query"], x["student_key"], x["student_value"], x["student_scale"], hidden(first, segments.shape[1]))
    others = {name: value for name, value in x.items() if name != "student_value"}
    windows = {"student_window": student_window, "teacher_window": teacher_window}
    return out, attention_matching(**others, segments=segments, omega=omega, **windows, implementation="reference")[0]


def gradients(x, out, matching, factor):
    """Of a loss that uses every row of the output, those of padding too."""
    upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(4))
    return torch.autograd.grad((out * upstream).sum() + factor * matching, [x[name] for name in LEARNED])


def check(x, first, segments, omega, student_window, teacher_window, factor=0.7, tolerance=1e-10, **how):
    out, matching, seen = together(x, first, segments, omega, teacher_window, **how)
    want_out, want = apart(x, first, segments, omega, student_window, teacher_window)
    assert matching == 0
    assert not seen
    found, wanted = gradients(x, out, matching, factor), gradients(x, want_out, want, factor)
    torch.testing.assert_close(out, want_out, rtol=tolerance, atol=tolerance)
    (value,) = seen
    torch.testing.assert_close(value, want, rtol=tolerance, atol=tolerance, check_dtype=False)
    for name, g, w in zip(LEARNED, found, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance * (1 + float(w.abs().max())), msg=lambda m, n=name: f"d {n}: {m}")


@pytest.mark.parametrize("omega", OMEGAS, ids=lambda o: o.kind)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_it_is_attention_and_matching(situation, omega):
    segments, student_window, teacher_window = SITUATIONS[situation]
    first = first_visible(2, 37, 0, segments, student_window)
    check(arguments(), first, segments, omega, student_window, teacher_window, chunk_size=8)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_teachers_log_sum_exp_changes_nothing(situation):
    """Also where the student sees less than the teacher, whose own then says how much of each head that is."""
    x, (segments, student_window, teacher_window) = arguments(), SITUATIONS[situation]
    first, teacher_first = (first_visible(2, 37, 0, segments, window) for window in (student_window, teacher_window))
    value = torch.zeros_like(x["teacher_key"])
    _, lse = attention(x["teacher_query"], x["teacher_key"], value, x["teacher_scale"], hidden(teacher_first, 37))
    check(x, first, segments, OMEGAS[1], student_window, teacher_window, teacher_lse=lse)


def test_padding_that_attention_sees_but_matching_does_not():
    """Without a mask, padding at the end sees all keys; its rows are not compared, and their gradient is attention's alone."""
    segments = torch.tensor([[0] * 30 + [-1] * 7] * 2)
    check(arguments(), torch.zeros(2, 37, dtype=torch.long), segments, OMEGAS[1], None, None, chunk_size=16)


@pytest.mark.parametrize("Hs, Ks, Ht, Kt", [(1, 1, 1, 1), (4, 1, 4, 4), (7, 7, 4, 1), (28, 4, 7, 1)])
@pytest.mark.parametrize("T", [1, 2, 63])
def test_awkward_sizes(T, Hs, Ks, Ht, Kt):
    segments = torch.zeros(1, T, dtype=torch.long)
    for window in (None, 5):
        first = first_visible(1, T, 0, segments, window)
        check(arguments(T=T, B=1, Hs=Hs, Ks=Ks, Ht=Ht, Kt=Kt), first, segments, OMEGAS[2], window, None)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("factor", [-3.5, 1e-9])
def test_any_factor(factor, window):
    check(arguments(), first_visible(2, 37, 0, NONE, window), NONE, OMEGAS[1], window, None, factor=factor)


@pytest.mark.parametrize("factor", [None, 0.0])
def test_unused_matching_leaves_attention_alone(factor):
    x = arguments()
    out, matching, seen = together(x, torch.zeros_like(NONE), NONE, OMEGAS[0])
    found = torch.autograd.grad(out.sum() + (0.0 if factor is None else factor * matching), [x[name] for name in LEARNED])
    wanted = torch.autograd.grad(apart(x, torch.zeros_like(NONE), NONE, OMEGAS[0])[0].sum(), [x[name] for name in LEARNED[:3]])
    assert not seen
    assert not found[3].any()
    torch.testing.assert_close(found[:3], wanted, rtol=1e-10, atol=1e-10)


def test_matching_alone():
    x = arguments()
    _, matching, seen = together(x, torch.zeros_like(NONE), NONE, OMEGAS[1])
    found = torch.autograd.grad(matching, [x[name] for name in LEARNED])
    want = apart(x, torch.zeros_like(NONE), NONE, OMEGAS[1])[1]
    wanted = torch.autograd.grad(want, [x[name] for name in LEARNED if name != "student_value"])
    torch.testing.assert_close(seen[0], want, rtol=1e-10, atol=1e-10)
    assert not found[2].any()
    torch.testing.assert_close((*found[:2], found[3]), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window", [None, 50])
def test_float32_at_a_length_with_several_chunks(window):
    segments = torch.zeros(1, 700, dtype=torch.long)
    first = first_visible(1, 700, 0, segments, window)
    check(arguments(torch.float32, T=700, B=1, Ds=32), first, segments, OMEGAS[1], window, None, tolerance=3e-4)


@pytest.mark.parametrize("window", [None, 3])
def test_finite_at_extreme_logits(window):
    x = arguments(torch.float32, size=30.0)
    x["student_scale"] = x["teacher_scale"] = 1.5
    out, matching, seen = together(x, first_visible(2, 37, 0, NONE, window), NONE, OMEGAS[1])
    assert all(g.isfinite().all() for g in gradients(x, out, matching, 1e-3))
    assert seen[0].isfinite()


def test_a_second_backward_is_an_error():
    x = arguments()
    out, matching, _ = together(x, torch.zeros_like(NONE), NONE, OMEGAS[0])
    (out.sum() + matching).backward()
    with pytest.raises(RuntimeError, match="second time"):
        matching.backward()
