"""Laws of attention matching, against a definition written out here row by row with plain softmax."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import FAST, IN_INTERPRETER, LENGTHS

from benchmarks import attention_matching as bench
from benchmarks import measure
from laid_ds.kernels.attention_matching import Omega, attention_matching

OMEGAS = [Omega(), Omega("frontier", gamma=3.0, frontier=9.0, width=4.0), Omega("power", delta_0=5.0, alpha=1.5)]
NEARER = [Omega("frontier", gamma=-0.9, frontier=9.0, width=4.0), Omega("power", delta_0=5.0, alpha=-1.5)]
NAMES = ["student_query", "student_key", "mixing_logits"]


def case(T=37, S=None, B=2, Hs=4, Ks=2, Ht=6, Kt=3, Ds=8, Dt=16, dtype=torch.float32, seed=0, size=1.0):
    """Arguments of a small problem, the learned ones requiring grad; the rows are the last T of S tokens."""
    S, g = S or T, torch.Generator().manual_seed(seed)
    shapes = [(B, Hs, T, Ds), (B, Ks, S, Ds), (B, Ht, T, Dt), (B, Kt, S, Dt), (Hs, Ht)]
    dtypes = [dtype] * 4 + [torch.promote_types(dtype, torch.float32)]
    names = ["student_query", "student_key", "teacher_query", "teacher_key", "mixing_logits"]
    x = {
        name: (torch.randn(shape, generator=g, dtype=torch.float64) * size).to(kind).requires_grad_(name in NAMES)
        for name, shape, kind in zip(names, shapes, dtypes, strict=True)
    }
    return x | {"student_scale": Ds**-0.5, "teacher_scale": 0.3, "query_offset": S - T}


def omega_at(omega: Omega, delta: float) -> float:
    if omega.kind == "frontier":
        return 1 + omega.gamma / (1 + math.exp(-(delta - omega.frontier) / omega.width))
    return (1 + delta / omega.delta_0) ** omega.alpha if omega.kind == "power" else 1.0


def by_hand(
    x,
    *,
    query_offset,
    omega,
    segments=None,
    row_mask=None,
    positions=None,
    student_window=None,
    teacher_window=None,
    teacher_heads=None,
):
    """The definition, one row of one head at a time: (loss, rows counted x heads)."""
    B, Hs, T, _ = x["student_query"].shape
    S, Ht = x["student_key"].shape[2], x["teacher_query"].shape[1]
    loss, count = torch.zeros((), dtype=torch.float64), 0
    logits = x["mixing_logits"].double()
    if teacher_heads is not None:
        keep = torch.zeros(Hs, Ht, dtype=torch.bool).scatter(1, teacher_heads, True)
        logits = logits.masked_fill(~keep, -torch.inf)
    pi = torch.softmax(logits, -1)

    def scores(side, b, h, t, seen, scale):
        q, k = x[f"{side}_query"], x[f"{side}_key"]
        return k[b, h * k.shape[1] // q.shape[1], seen].double() @ q[b, h, t].double() * scale

    for b in range(B):
        for t in range(T):
            m = t + query_offset
            segment = None if segments is None else int(segments[b, m])
            if segment == -1 or (row_mask is not None and not row_mask[b, t]):
                continue
            alike = [n for n in range(m + 1) if segments is None or int(segments[b, n]) == segment]
            seen_s = [n for n in alike if student_window is None or m - n < student_window]
            seen_t = [n for n in alike if teacher_window is None or m - n < teacher_window]
            where = positions[b].tolist() if positions is not None else list(range(S))
            w = torch.tensor([omega_at(omega, max(where[m] - where[n], 0)) for n in seen_s], dtype=torch.float64)
            w = w / w.mean()
            a = torch.zeros(Ht, S, dtype=torch.float64)
            for j in range(Ht):
                a[j, seen_t] = torch.softmax(scores("teacher", b, j, t, seen_t, x["teacher_scale"]), 0)
            a = a[:, seen_s]
            for i in range(Hs):
                log_q = torch.log_softmax(scores("student", b, i, t, seen_s, x["student_scale"]), 0)
                p = pi[i] @ a / (pi[i] @ a.sum(1))
                log_p = torch.where(p > 0, p, 1.0).log()
                loss = loss + (w * (p * (log_p - log_q) - p + log_q.exp())).sum()
                count += 1
    return loss, count


def run(x, upstream=1.0, **options):
    """(loss, count, gradients) of one call."""
    loss, count = attention_matching(**x, **options)
    return loss.detach(), count, torch.autograd.grad(loss * upstream, [x[n] for n in NAMES])


def assert_same(got, want, rtol=2e-4, atol=2e-5):
    """Two results of `run` agree; gradients to `atol` of the largest entry, which float32 sums of mixed sign need."""
    torch.testing.assert_close(got[0].double(), want[0].double(), rtol=rtol, atol=atol)
    assert got[1] == want[1]
    for name, g, w in zip(NAMES, got[2], want[2], strict=True):
        g, w = g.double(), w.double()
        torch.testing.assert_close(g, w, rtol=rtol, atol=atol * (1 + float(w.abs().max())), msg=lambda m, n=name: f"d {n}: {m}")


def masks(x, seed=0):
    """Segments with padding at both ends, a row mask, and positions that crawl (as under M-RoPE)."""
    B, _, T, _ = x["student_query"].shape
    S, g = x["student_key"].shape[2], torch.Generator().manual_seed(seed)
    segments = (torch.rand(B, S, generator=g) < 0.12).long().cumsum(1)
    segments[0, -min(3, S - 1) :] = -1 if S > 1 else 0
    segments[-1, : min(2, S - 1)] = -1
    positions = torch.randint(0, 3, (B, S), generator=g).cumsum(1) - 1
    return {"segments": segments, "row_mask": torch.rand(B, T, generator=g) < 0.8, "positions": positions}


def own_lse(x, side, window=None, segments=None):
    """Log-sum-exp of one model's scaled scores over the keys that each row sees there."""
    query, key = x[f"{side}_query"].detach(), x[f"{side}_key"].detach()
    S = key.shape[2]
    last = torch.arange(query.shape[2])[:, None] + x["query_offset"]
    seen = (torch.arange(S) <= last) & (last - torch.arange(S) < (window or S))
    if segments is not None:
        seen = seen & (segments[:, last] == segments[:, None])
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * x[f"{side}_scale"]
    return scores.masked_fill(~(seen if segments is None else seen[:, None]), -torch.inf).logsumexp(-1)


TOP_3 = torch.tensor([[0, 3, 4], [5, 1, 2], [1, 0, 2], [3, 0, 5]])
SITUATIONS = {
    "causal": {},
    "packed": {"use": ["segments"]},
    "positions": {"use": ["positions"]},
    "windows": {"student_window": 7, "teacher_window": 4},
    "narrow student": {"student_window": 4, "teacher_window": 9},
    "narrow student, top 2": {"student_window": 4, "teacher_heads": TOP_3[:, :2]},
    "narrow student, one hot": {"student_window": 4, "teacher_heads": TOP_3[:, 2:]},
    "narrow student, everything": {
        "use": ["segments", "row_mask", "positions"],
        "student_window": 6,
        "teacher_window": 13,
        "teacher_heads": TOP_3,
    },
    "narrow teacher": {"teacher_window": 5},
    "top 2": {"teacher_heads": TOP_3[:, :2]},
    "one hot": {"teacher_heads": TOP_3[:, 2:]},
    "everything": {"use": ["segments", "row_mask", "positions"], "student_window": 9, "teacher_window": 6, "teacher_heads": TOP_3},
}


def options_of(situation, x):
    options = dict(SITUATIONS[situation])
    use = options.pop("use", [])
    return options | {name: value for name, value in masks(x).items() if name in use}


@pytest.mark.parametrize("omega", [*OMEGAS, *NEARER], ids=["uniform", "frontier", "power", "near frontier", "near power"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_reference_is_the_definition(situation, omega):
    x = case(T=11, S=14, dtype=torch.float64)
    options = options_of(situation, x)
    want, count = by_hand(x, omega=omega, query_offset=3, **options)
    got = run(x, omega=omega, **options, implementation="reference")
    assert_same(got, (want.detach(), count, torch.autograd.grad(want, [x[n] for n in NAMES])), 1e-9, 1e-9)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("omega", OMEGAS, ids=lambda o: o.kind)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_every_implementation_is_the_reference(situation, omega, implementation):
    x = case(S=45)
    options = options_of(situation, x) | {"omega": omega}
    want = run(x, **options, implementation="reference")
    assert_same(run(x, **options, chunk_size=8, implementation=implementation), want)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("omega", NEARER, ids=lambda o: o.kind)
@pytest.mark.parametrize("situation", ["everything", "one hot"])
def test_near_keys_may_weigh_more(situation, omega, implementation):
    x = case(S=45)
    options = options_of(situation, x) | {"omega": omega}
    assert_same(run(x, **options, chunk_size=8, implementation=implementation), run(x, **options, implementation="reference"))


@pytest.mark.parametrize("T, implementation", LENGTHS)
@pytest.mark.parametrize("Hs, Ks, Ht, Kt", [(1, 1, 1, 1), (4, 1, 4, 4), (7, 7, 4, 1), (4, 4, 28, 4), (28, 4, 7, 1)])
def test_awkward_sizes(T, Hs, Ks, Ht, Kt, implementation):
    x = case(T=T, B=1, Hs=Hs, Ks=Ks, Ht=Ht, Kt=Kt)
    want = run(x, omega=OMEGAS[1], implementation="reference")
    assert_same(run(x, omega=OMEGAS[1], implementation=implementation), want)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("omega", OMEGAS, ids=lambda o: o.kind)
@pytest.mark.parametrize(
    "Ds, Dt, situation",
    [
        (256, 256, "everything"),
        (256, 256, "one hot"),
        (200, 16, "one hot"),
        (16, 130, "top 2"),
        (130, 256, "narrow student, everything"),
    ],
)
def test_wide_heads(Ds, Dt, situation, omega, implementation):
    x = case(T=19, S=23, B=1, Ks=1, Ds=Ds, Dt=Dt)
    options = options_of(situation, x) | {"omega": omega}
    assert_same(run(x, **options, implementation=implementation), run(x, **options, implementation="reference"))


SIZES = [  # T, S, (Hs, Ks, Ht, Kt), windows of student and teacher, rows
    (1, 6, (1, 1, 2, 1), (1, None), None),
    (2, 2, (4, 1, 4, 4), (1, None), None),
    (37, 37, (7, 7, 4, 1), (3, 8), 9),
    (41, 63, (4, 2, 6, 3), (5, None), None),
    (41, 63, (4, 4, 28, 4), (16, 17), 12),
]


@pytest.mark.parametrize("mixed", [None, 2])
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("T, S, heads, windows, rows", SIZES)
@pytest.mark.parametrize("implementation", FAST)
def test_every_gradient_of_a_student_with_the_narrower_window(implementation, T, S, heads, windows, rows, packed, with_lse, mixed):
    """Against autograd of the reference in float64; the log-sum-exps given are those of each model by itself."""
    exact = implementation == "chunked"
    x = case(T, S, **dict(zip(("Hs", "Ks", "Ht", "Kt"), heads, strict=True)), dtype=torch.float64 if exact else torch.float32)
    segments = masks(x)["segments"] if packed else None
    options = {"omega": OMEGAS[1], "segments": segments, "student_window": windows[0], "teacher_window": windows[1], "rows": rows}
    if mixed:
        options["teacher_heads"] = torch.stack([torch.arange(heads[0]) % heads[2], (torch.arange(heads[0]) + 1) % heads[2]], 1)
    double = {n: v.detach().double().requires_grad_(n in NAMES) if torch.is_tensor(v) else v for n, v in x.items()}
    want = run(double, **options, generator=seeded(), implementation="reference")
    given = {f"{side}_lse": own_lse(x, side, w, segments) for side, w in zip(("student", "teacher"), windows, strict=True)}
    got = run(x, **options, **(given if with_lse else {}), generator=seeded(), chunk_size=7, implementation=implementation)
    assert_same(got, want, *((1e-10, 1e-10) if exact else ()))


def three_keys(head_scores, student_scores, **options):
    """Row 2 of three keys with these scores in the two teacher heads and in the student, whose window leaves out the first key."""
    x = {"student_key": torch.eye(3)[None, None], "teacher_key": torch.eye(3)[None, None], "mixing_logits": torch.zeros(1, 2)}
    x |= {"student_query": torch.zeros(1, 1, 3, 3), "teacher_query": torch.zeros(1, 2, 3, 3)}
    x["student_query"][0, 0, 2], x["teacher_query"][0, :, 2] = torch.tensor(student_scores), torch.tensor(head_scores)
    for name in NAMES:
        x[name].requires_grad_()
    row_mask = torch.tensor([[False, False, True]])
    return run(x, student_scale=1.0, teacher_scale=1.0, student_window=2, row_mask=row_mask, **options)


@pytest.mark.parametrize("teacher_heads", [None, torch.tensor([[1, 0]])], ids=["dense", "sparse"])
@pytest.mark.parametrize("outside", [[math.log(0.01), math.log(0.99)], [2000.0, 2000.0]], ids=["1 % or 99 %", "nearly all"])
@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_a_head_counts_by_its_mass_inside_the_window(implementation, outside, teacher_heads):
    """Mass of 0.99 and 0.01 inside: the target is (0.90, 0.09) + (0.002, 0.008), not the mean of (0.91, 0.09) and (0.2, 0.8).

    The same where both heads have e^2000 times as much outside.
    """
    inside = [[0.90, 0.09], [0.002, 0.008]]
    scores = [[out, *map(math.log, head)] for out, head in zip(outside, inside, strict=True)]
    how = {"teacher_heads": teacher_heads, "implementation": implementation}
    loss, _, gradients = three_keys(scores, [0.0, math.log(0.902), math.log(0.098)], **how)
    assert abs(float(loss)) < 1e-6
    assert all(float(g.abs().max()) < 1e-4 for g in gradients)
    loss, _, (_, _, d_mixing) = three_keys(scores, [0.0, math.log(0.5546), math.log(0.4454)], **how)
    p, q = torch.tensor([0.902, 0.098]), torch.tensor([0.5546, 0.4454])
    assert float(loss) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-3)
    b, share = torch.tensor([[0.90, 0.09], [0.002, 0.008]]), torch.tensor([0.99, 0.01])
    wanted = share * ((b / share[:, None]) @ (p / q).log() - loss)  # rho_j (g_j - E)
    torch.testing.assert_close(d_mixing[0], wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", *FAST])
@pytest.mark.parametrize("omega", OMEGAS, ids=lambda o: o.kind)
def test_one_head_is_renormalised_within_the_window(omega, implementation):
    """As if its own window were the student's; for logits that leave one head, and for one chosen head, there bit for bit."""
    x = case(S=45)
    x["mixing_logits"] = (1e4 * torch.nn.functional.one_hot(TOP_3[:, 2], 6).float()).requires_grad_()
    how = {"omega": omega, "student_window": 5, "implementation": implementation}
    got, want = (run(x, teacher_window=window, **how) for window in (None, 5))
    assert_same(got, want)
    assert not got[2][2].any()
    chosen = {"teacher_heads": TOP_3[:, 2:]} | how
    got, want = (run(x, teacher_window=window, **chosen) for window in (8, 5))
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(g, w) for g, w in zip(got[2], want[2], strict=True))


@pytest.mark.parametrize("implementation", ["reference", *FAST])
@pytest.mark.parametrize("student_window, teacher_window", [(37, None), (40, 50), (60, 37)])
def test_windows_that_hide_nothing_change_no_bit(student_window, teacher_window, implementation):
    x = case()
    got = run(x, student_window=student_window, teacher_window=teacher_window, implementation=implementation)
    want = run(x, implementation=implementation)
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(g, w) for g, w in zip(got[2], want[2], strict=True))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_chunk_size_changes_nothing(data):
    T = data.draw(st.integers(1, 40))
    x = case(T=T, S=T + data.draw(st.integers(0, 9)), seed=data.draw(st.integers(0, 99)))
    options = masks(x) | {"omega": data.draw(st.sampled_from(OMEGAS)), "student_window": data.draw(st.sampled_from([None, 1, 6]))}
    options |= {"teacher_window": data.draw(st.sampled_from([None, 4, 9]))}
    assert_same(run(x, **options, chunk_size=data.draw(st.integers(1, 50))), run(x, **options, implementation="reference"))


@pytest.mark.parametrize("implementation", ["reference", *FAST])
@pytest.mark.parametrize("omega, window", [*((omega, None) for omega in OMEGAS), (OMEGAS[1], 4)])
def test_packing_and_padding_change_nothing(omega, window, implementation):
    lengths = [5, 1, 17, 8]
    alone = [case(T=n, B=1, seed=n) for n in lengths]
    for x in alone:
        x["mixing_logits"] = alone[0]["mixing_logits"]
    options = {"omega": omega, "student_window": window, "implementation": implementation}
    singles = [run(x, **options) for x in alone]
    pad = 4
    packed = {
        n: torch.cat([x[n].detach() for x in alone] + [torch.ones_like(alone[0][n][:, :, :pad])], 2)
        for n in alone[0]
        if n.endswith(("query", "key"))
    }
    packed = alone[0] | {n: t.requires_grad_(n in NAMES) for n, t in packed.items()}
    segments = torch.tensor([0, 1, 2, 3, -1]).repeat_interleave(torch.tensor([*lengths, pad]))[None]
    loss, count, (d_query, d_key, d_mixing) = run(packed, segments=segments, chunk_size=6, **options)
    want_query, want_key = (torch.cat([s[2][k] for s in singles], 2) for k in (0, 1))
    assert not d_query[:, :, -pad:].any()
    assert not d_key[:, :, -pad:].any()
    want = sum(s[0] for s in singles), sum(s[1] for s in singles), (want_query, want_key, sum(s[2][2] for s in singles))
    assert_same((loss, count, (d_query[:, :, :-pad], d_key[:, :, :-pad], d_mixing)), want)


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_uniform_one_head_each_is_the_ordinary_row_kl(implementation):
    x = case(T=50, B=2, Hs=4, Ks=2, Ht=4, Kt=4, Ds=16)
    heads = torch.tensor([[2], [0], [3], [1]])
    loss, count = attention_matching(**x, teacher_heads=heads, implementation=implementation)
    hidden = torch.full((50, 50), -torch.inf).triu(1)
    p = torch.softmax(x["teacher_query"] @ x["teacher_key"].mT * 0.3 + hidden, -1)[:, heads[:, 0]]
    q = torch.softmax(x["student_query"] @ x["student_key"].repeat_interleave(2, 1).mT * 16**-0.5 + hidden, -1)
    kl = torch.xlogy(p, p).sum(-1) - (p * torch.where(hidden == 0, q, 1.0).log()).sum(-1)
    torch.testing.assert_close(loss / count, kl.mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", *FAST])
@pytest.mark.parametrize("omega", OMEGAS, ids=lambda o: o.kind)
def test_student_equal_to_teacher_has_no_loss_and_no_gradient(omega, implementation):
    x = case(Hs=6, Ks=3, Ds=16)
    with torch.no_grad():
        x["student_query"].copy_(x["teacher_query"])
        x["student_key"].copy_(x["teacher_key"])
    x["student_scale"] = x["teacher_scale"]
    loss, count, gradients = run(x, omega=omega, teacher_heads=torch.arange(6)[:, None], implementation=implementation)
    assert abs(float(loss)) / count < 1e-6
    assert all(float(g.abs().max()) < 1e-5 for g in gradients)


@pytest.mark.parametrize("omega", OMEGAS, ids=lambda o: o.kind)
@pytest.mark.parametrize("window", [None, 2])
def test_gradients_in_float64(omega, window):
    x = case(T=6, B=1, Ht=4, Kt=2, Ds=4, dtype=torch.float64)
    options = {"omega": omega, "segments": torch.tensor([[0, 0, 0, 0, 1, 1]]), "student_window": window}

    def reference(*learned):
        return attention_matching(**x | dict(zip(NAMES, learned, strict=True)), **options, implementation="reference")[0]

    assert torch.autograd.gradcheck(reference, [x[n] for n in NAMES])
    assert_same(run(x, **options, implementation="chunked"), run(x, **options, implementation="reference"), 1e-10, 1e-10)


# the interpreter has no products of bfloat16
BFLOAT16, FLOAT16 = (torch.bfloat16, 2e-2), (torch.float16, 3e-3)  # one rounding of the gradient is 2^-9 and 2^-12


@pytest.mark.parametrize(
    "dtype, rtol, implementation", [(*BFLOAT16, "chunked"), (*FLOAT16, "chunked"), pytest.param(*FLOAT16, "fused", marks=IN_INTERPRETER)]
)
def test_low_precision_inputs_are_accumulated_in_float32(dtype, rtol, implementation):
    x = case(T=63, dtype=dtype)
    exact = {n: v.detach().double().requires_grad_(n in NAMES) if torch.is_tensor(v) else v for n, v in x.items()}
    got, want = run(x, omega=OMEGAS[1], implementation=implementation), run(exact, omega=OMEGAS[1], implementation="reference")
    assert got[0].dtype == torch.float32
    assert [g.dtype for g in got[2]] == [dtype, dtype, torch.float32]
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=0)
    for g, w in zip(got[2], want[2], strict=True):
        torch.testing.assert_close(g.double(), w.double(), rtol=rtol, atol=rtol * float(w.abs().max()))


@pytest.mark.parametrize("implementation", ["reference", *FAST])
@pytest.mark.parametrize("omega", OMEGAS, ids=lambda o: o.kind)
@pytest.mark.parametrize("dtype, window", [(torch.float32, None), (torch.float16, None), (torch.float32, 3)])
def test_finite_at_extreme_logits_and_rows_that_see_one_key(dtype, window, omega, implementation):
    x = case(T=40, size=30.0, dtype=dtype)
    x["student_scale"] = x["teacher_scale"] = 1.5  # scores of about +-1e4
    segments = torch.tensor([[0] * 10 + list(range(1, 31)), [0] * 40])
    loss, _, gradients = run(x, omega=omega, segments=segments, student_window=window, implementation=implementation)
    assert loss.isfinite()
    assert loss > 1000
    assert all(g.isfinite().all() for g in gradients)


def test_terms_are_never_negative():
    for seed in range(20):
        x = case(T=1, S=20, B=1, Hs=1, Ks=1, Ht=1, Kt=1, seed=seed)
        assert attention_matching(**x, omega=Omega("power", delta_0=1.0, alpha=3.0))[0] > 0


@pytest.mark.parametrize("implementation", FAST)
def test_any_scalar_upstream_gradient(implementation):
    x = case()
    want = run(x, implementation=implementation)
    got = run(x, upstream=-3.5, implementation=implementation)
    assert_same((got[0], got[1], [g / -3.5 for g in got[2]]), want, 1e-5, 1e-6)


@pytest.mark.parametrize("implementation", FAST)
def test_second_backward_is_a_clear_error(implementation):
    loss, _ = attention_matching(**case(), implementation=implementation)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


@pytest.mark.parametrize("implementation", FAST)
def test_given_log_sum_exp_changes_nothing(implementation):
    x = case(Ds=16)
    lse = {f"{side}_lse": own_lse(x, side) for side in ("student", "teacher")}
    want = run(x, implementation="reference")
    assert_same(run(x, **lse, implementation=implementation), want)
    wrong = run(x, **{name: value + 1 for name, value in lse.items()}, implementation=implementation)
    assert abs(float(wrong[0] / want[0]) - 1) > 1e-3  # it is used


@pytest.mark.parametrize("omega", OMEGAS, ids=lambda o: o.kind)
@pytest.mark.parametrize("window", [None, 6])
def test_row_sampling_is_unbiased(omega, window):
    x = case(T=60)
    options = masks(x) | {"omega": omega, "student_window": window}
    full, count = attention_matching(**x, **options)
    generator = torch.Generator().manual_seed(1)
    draws = [attention_matching(**x, **options, rows=12, generator=generator) for _ in range(200)]
    assert {c for _, c in draws} == {count}
    sums = torch.stack([loss.detach() for loss, _ in draws])
    assert abs(sums.mean() - full) < 3 * sums.std() / 200**0.5
    assert sums.std() > 0


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_row_sampling_repeats_with_its_generator_and_is_exact_with_all_rows():
    x = case()
    assert_same(run(x, rows=9, generator=seeded()), run(x, rows=9, generator=seeded(), implementation="reference"))
    assert_same(run(x, rows=10_000), run(x))


@pytest.mark.parametrize("window", [None, 5])
def test_local_rows_against_gathered_keys_add_up(window):
    x = case(T=40)
    segments = masks(x)["segments"]
    options = {"omega": OMEGAS[1], "segments": segments, "student_window": window}
    full = run(x, **options)
    parts = []
    for start, stop in ((0, 13), (13, 14), (14, 40)):
        local = x | {n: x[n][:, :, start:stop].detach().requires_grad_(n in NAMES) for n in ("student_query", "teacher_query")}
        parts.append(run(local | {"query_offset": start}, **options))
    d_query = torch.cat([p[2][0] for p in parts], 2)
    assert_same(
        (sum(p[0] for p in parts), sum(p[1] for p in parts), (d_query, sum(p[2][1] for p in parts), sum(p[2][2] for p in parts))), full
    )


def test_teacher_gets_no_gradient_and_frozen_student_costs_none():
    x = case()
    x["teacher_query"].requires_grad_()
    loss, _ = attention_matching(**x)
    loss.backward()
    assert x["teacher_query"].grad is None
    with torch.no_grad():
        assert not attention_matching(**x)[0].requires_grad


def test_no_counted_row_is_zero():
    x = case()
    loss, count, gradients = run(x, row_mask=torch.zeros(2, 37, dtype=torch.bool))
    assert (float(loss), count) == (0.0, 0)
    assert not any(g.any() for g in gradients)


BAD = {
    "student_query": {"student_query": torch.zeros(2, 4, 8)},
    "student_key": {"student_key": torch.zeros(2, 3, 37, 8)},
    "teacher_query": {"teacher_query": torch.zeros(2, 6, 36, 16)},
    "teacher_key": {"teacher_key": torch.zeros(2, 4, 37, 16)},
    "mixing_logits": {"mixing_logits": torch.zeros(6, 4)},
    "student_scale": {"student_scale": 0.0},
    "teacher_scale": {"teacher_scale": math.inf},
    "segments": {"segments": torch.tensor([[0] * 20 + [1] * 17, [1] * 20 + [0] * 17])},
    "row_mask": {"row_mask": torch.ones(2, 37)},
    "positions": {"positions": torch.ones(2, 36, dtype=torch.long)},
    "student_window": {"student_window": 0},
    "query_offset": {"query_offset": 1},
    "rows": {"rows": 0},
    "teacher_heads": {"teacher_heads": torch.tensor([[0, 0]] * 4)},
    "student_lse": {"student_lse": torch.zeros(2, 6, 37)},
    "teacher_lse": {"teacher_lse": torch.zeros(2, 6, 36), "student_window": 5},
    "implementation": {"implementation": "magic"},
    "chunk_size": {"chunk_size": -1},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    with pytest.raises(ValueError, match=rf"(?s)^{name}.* (is|has|holds) .*expected"):
        attention_matching(**case() | BAD[name])


@pytest.mark.parametrize(
    "segments, message",
    [([0, 0, -1, 0, 1], "padding inside"), ([0, 1, 0, 1, 1], "sorted"), ([0, 0, -2, 1, 1], "-2")],
)
def test_segments_that_are_not_sorted_runs_are_refused(segments, message):
    with pytest.raises(ValueError, match=f"segments.*{message}"):
        attention_matching(**case(T=5, B=1), segments=torch.tensor([segments]))


def test_mixed_devices_are_refused():
    x = case() | {"teacher_key": torch.zeros(2, 3, 37, 16, device="meta")}
    with pytest.raises(ValueError, match="teacher_key is on meta: expected cpu"):
        attention_matching(**x)


@pytest.mark.parametrize("field, value", [("gamma", -1.5), ("width", 0.0), ("delta_0", -1.0), ("kind", "linear"), ("alpha", math.nan)])
def test_negative_or_undefined_omega_is_refused(field, value):
    with pytest.raises(ValueError, match=rf"omega\.{field} is .*expected"):
        Omega(**{field: value})


@pytest.mark.parametrize("student_window", [None, 512])
def test_peak_memory_grows_no_faster_than_the_tokens(student_window):
    """A process of its own per size, as process memory never shrinks; one head's map of 8192 tokens alone would be 268 MB."""
    short, long = (measure.added_peak_mb(bench.inputs, bench.ours, tokens, "uniform", student_window) for tokens in (2048, 8192))
    assert long < 4 * short
    assert long < 200
