"""Laws of the attention profile, against statistics of a plain softmax taken here row by row."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import FAST, LENGTHS

from laid_ds.kernels.attention_profile import attention_profile, distance_bins

PLANES = torch.tensor([[0, 4], [1, 5], [2, 6], [3, 7]])
SUMS = ["entropy_sum", "bin_mass", "bin_pairs", "far_mass", "far_pairs", "plane_response", "marked_mass"]


def case(T=37, S=None, B=2, H=4, K=2, D=8, dtype=torch.float32, seed=0, size=1.0):
    S, g = S or T, torch.Generator().manual_seed(seed)
    draw = lambda *shape: (torch.randn(shape, generator=g, dtype=torch.float64) * size).to(dtype)  # noqa: E731
    return {"query": draw(B, H, T, D), "key": draw(B, K, S, D), "scale": 0.4, "query_offset": S - T}


def masks(x, seed=0):
    (B, _, T, _), S, g = x["query"].shape, x["key"].shape[2], torch.Generator().manual_seed(seed)
    segments = (torch.rand(B, S, generator=g) < 0.1).long().cumsum(1)
    segments[0, -3:] = -1
    return {
        "segments": segments,
        "row_mask": torch.rand(B, T, generator=g) < 0.8,
        "positions": torch.randint(0, 3, (B, S), generator=g).cumsum(1) - 1,
        "marked": torch.rand(B, S, generator=g) < 0.3,
    }


def by_hand(x, *, bins, far, segments=None, row_mask=None, positions=None, marked=None, window=None):
    """One row of one head at a time."""
    (B, H, T, _), S = x["query"].shape, x["key"].shape[2]
    out = {n: torch.zeros(H, dtype=torch.float64) for n in ("entropy_sum", "far_mass", "marked_mass")}
    out |= {"bin_mass": torch.zeros(H, len(bins)).double(), "plane_response": torch.zeros(H, len(PLANES)).double()}
    out |= {"bin_pairs": torch.zeros(len(bins)).double(), "far_pairs": torch.zeros(()).double()}
    lse, count = torch.full((B, H, T), torch.nan).double(), 0
    for b in range(B):
        where = list(range(S)) if positions is None else positions[b].tolist()
        for t in range(T):
            m = t + x["query_offset"]
            segment = None if segments is None else int(segments[b, m])
            if segment == -1 or (row_mask is not None and not row_mask[b, t]):
                continue
            count += 1
            seen = [n for n in range(m + 1) if (segments is None or segments[b, n] == segment) and (window is None or m - n < window)]
            delta = [max(where[m] - where[n], 0) for n in seen]
            for d in delta:
                out["bin_pairs"][max(e for e in range(len(bins)) if bins[e] <= d)] += 1
                out["far_pairs"] += d >= far
            for h in range(H):
                q, k = x["query"][b, h, t].double() * x["scale"], x["key"][b, h * x["key"].shape[1] // H, seen].double()
                p = torch.softmax(k @ q, 0)
                lse[b, h, t] = math.log(sum(math.exp(v) for v in (k @ q).tolist()))
                out["entropy_sum"][h] -= sum(v * math.log(v) for v in p.tolist())
                for i, (n, d) in enumerate(zip(seen, delta, strict=True)):
                    out["bin_mass"][h, max(e for e in range(len(bins)) if bins[e] <= d)] += p[i]
                    out["far_mass"][h] += p[i] * (d >= far)
                    out["marked_mass"][h] += p[i] * bool(marked is not None and marked[b, n])
                    if d >= far:
                        out["plane_response"][h] += (q[PLANES] * k[i, PLANES]).sum(-1).abs()
    return lse, count, out


SITUATIONS = {
    "causal": {},
    "packed": {"use": ["segments", "marked"]},
    "window": {"window": 6},
    "everything": {"use": ["segments", "row_mask", "positions", "marked"], "window": 9},
}


@pytest.mark.parametrize("implementation", ["reference", *FAST])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_is_the_definition(situation, implementation):
    x = case(T=21, S=25, dtype=torch.float32 if implementation == "fused" else torch.float64)
    options = dict(SITUATIONS[situation])
    use = options.pop("use", [])
    options |= {"bins": [0, 1, 3, 8], "far": 5} | {n: v for n, v in masks(x).items() if n in use}
    lse, count, want = by_hand(x, **options)
    got = attention_profile(**x, **options, planes=PLANES, chunk_size=4, implementation=implementation)
    assert got.row_count == count
    close = {"rtol": 1e-5, "atol": 1e-4, "check_dtype": False} if implementation == "fused" else {}
    torch.testing.assert_close(got.lse, lse, equal_nan=True, **close)
    torch.testing.assert_close(got.entropy.nansum((0, 2)), want["entropy_sum"], **close)
    for name in SUMS if "marked" in use else SUMS[:-1]:
        torch.testing.assert_close(getattr(got, name), want[name], msg=lambda m, n=name: f"{n}: {m}", **close)


@pytest.mark.parametrize("T, implementation", LENGTHS)
@pytest.mark.parametrize("H, K", [(1, 1), (4, 1), (7, 7), (28, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_implementation_is_the_reference(T, H, K, dtype, implementation):
    x = case(T=T, B=1, H=H, K=K, dtype=dtype)
    got, want = (attention_profile(**x, planes=PLANES, implementation=i) for i in (implementation, "reference"))
    assert got.bins.tolist() == distance_bins(T - 1)
    for name in ["lse", "entropy", *SUMS[:-1]]:
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("chunk_size", [1, 5, 36, 37, 100])
def test_chunk_size_changes_nothing(chunk_size):
    x = case()
    got, want = (attention_profile(**x, **masks(x), planes=PLANES, chunk_size=c) for c in (chunk_size, None))
    for name in ["lse", "entropy", *SUMS]:
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_all_mass_and_all_pairs_are_in_the_bins(implementation):
    x = case(T=50, B=1)
    profile = attention_profile(**x, far=0, implementation=implementation)
    torch.testing.assert_close(profile.bin_mass.sum(1), torch.full((4,), 50.0).double())
    torch.testing.assert_close(profile.far_mass, profile.bin_mass.sum(1), rtol=1e-6, atol=0)
    assert float(profile.bin_pairs.sum()) == float(profile.far_pairs) == 50 * 51 / 2


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_finite_at_extreme_logits(implementation):
    profile = attention_profile(**case(size=100.0), implementation=implementation)  # scores of about +-1e4
    assert profile.lse.abs().max() > 8000
    assert profile.entropy.isfinite().all()
    assert (profile.entropy > -2e-3).all()  # two units in the last place of such a log-sum-exp


@pytest.mark.parametrize("implementation", FAST)
def test_given_log_sum_exp_is_used_and_changes_nothing(implementation):
    x = case()
    want = attention_profile(**x, implementation="reference")
    got = attention_profile(**x, lse=want.lse, implementation=implementation)
    torch.testing.assert_close(got.bin_mass, want.bin_mass, rtol=1e-5, atol=1e-5)
    wrong = attention_profile(**x, lse=want.lse + 1, implementation=implementation)
    torch.testing.assert_close(wrong.bin_mass, want.bin_mass / math.e, rtol=1e-5, atol=1e-5)


def test_row_sampling_is_unbiased():
    x = case(T=60)
    x |= masks(x) | {"far": 4}
    full = attention_profile(**x)
    generator = torch.Generator().manual_seed(1)
    draws = [attention_profile(**x, rows=12, generator=generator) for _ in range(200)]
    assert {d.row_count for d in draws} == {full.row_count}
    for name in ("entropy_sum", "far_mass", "marked_mass"):
        values = torch.stack([getattr(d, name) for d in draws])
        assert ((values.mean(0) - getattr(full, name)).abs() < 3.5 * values.std(0) / 200**0.5).all(), name  # 4 heads are tested at once


def test_distance_bins():
    assert distance_bins(0) == [0]
    assert distance_bins(1) == [0, 1]
    assert distance_bins(9) == [0, 1, 2, 4, 8]
    assert distance_bins(9, per_octave=2) == [0, 1, 2, 3, 4, 6, 8]


BAD = {
    "key": {"key": torch.zeros(2, 3, 37, 8)},
    "scale": {"scale": -1.0},
    "bins": {"bins": [0, 4, 4]},
    "planes": {"planes": torch.tensor([[0, 8]])},
    "marked": {"marked": torch.ones(2, 37)},
    "window": {"window": 0},
    "lse": {"lse": torch.zeros(2, 2, 37)},
    "segments": {"segments": torch.tensor([[0] * 20 + [1] * 17, [1] * 20 + [0] * 17])},
    "implementation": {"implementation": "magic"},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    with pytest.raises(ValueError, match=rf"(?s)^{name}.* (is|has|holds) .*expected"):
        attention_profile(**case() | BAD[name])
