"""The fused kernels on a GPU are the definition: values and every gradient, at awkward sizes. Needs torch, triton and numpy alone.

The definition is computed in float64 from the very inputs that the kernels get, so that a tolerance is that of the kernels' own rounding.
"""

from __future__ import annotations

import pytest
import torch
from gpu_device import DEVICE, DTYPES, GPU_ALONE, HALVES, KERNELS_ON_GPU, STAND_IN, TWO_GPUS

from laid_ds.kernels import switch
from laid_ds.kernels.attention_matching import Omega, attention_matching
from laid_ds.kernels.attention_profile import attention_profile
from laid_ds.kernels.head_alignment import head_alignment
from laid_ds.kernels.switch import TOLERANCES, mismatch

pytestmark = KERNELS_ON_GPU

NAMES = ["student_query", "student_key", "mixing_logits"]
OMEGAS = [Omega(), Omega("frontier", gamma=3.0, frontier=20.0, width=8.0), Omega("power", delta_0=8.0, alpha=1.5)]
TOKENS = 40 if STAND_IN else 300
DIM = 16 if STAND_IN else 128


def case(T=TOKENS, S=None, B=2, Hs=4, Ks=2, Ht=6, Kt=3, Ds=DIM, Dt=DIM, dtype=torch.float32, device=DEVICE, size=1.0):
    """Arguments of a problem, the learned ones requiring grad; the rows are the last T of S tokens."""
    S, g = S or T, torch.Generator().manual_seed(0)
    shapes = {
        "student_query": (B, Hs, T, Ds),
        "student_key": (B, Ks, S, Ds),
        "teacher_query": (B, Ht, T, Dt),
        "teacher_key": (B, Kt, S, Dt),
    }
    x = {name: (torch.randn(shape, generator=g) * size).to(device, dtype) for name, shape in shapes.items()}
    x["mixing_logits"] = torch.randn(Hs, Ht, generator=g).to(device)
    for name in NAMES:
        x[name].requires_grad_()
    return x | {"student_scale": Ds**-0.5, "teacher_scale": 0.7 * Dt**-0.5, "query_offset": S - T}


def run(x, implementation="fused", **options):
    loss, _ = attention_matching(**x, **options, implementation=implementation)
    gradients = torch.autograd.grad(loss, [x[name] for name in NAMES])
    return {"the loss": loss.detach()} | {f"d {name}": gradient for name, gradient in zip(NAMES, gradients, strict=True)}


def exact(x, **options):
    double = {n: v.detach().double().requires_grad_(n in NAMES) if torch.is_tensor(v) else v for n, v in x.items()}
    return run(double, "reference", **options)


def assert_exact(x, tolerance=None, implementation="fused", **options):
    wrong = mismatch(run(x, implementation, **options), exact(x, **options), tolerance or TOLERANCES[x["student_query"].dtype])
    assert not wrong, wrong


def options_of(situation, x):
    (B, _, T, _), S = x["student_query"].shape, x["student_key"].shape[2]
    Hs, Ht = x["student_query"].shape[1], x["teacher_query"].shape[1]
    g, device = torch.Generator().manual_seed(1), x["student_query"].device
    few = torch.stack([torch.randperm(Ht, generator=g)[: min(3, Ht)] for _ in range(Hs)]).to(device)
    segments = torch.full((B, S), 0)
    segments[:, S // 3 :], segments[:, S // 3 + 1 :], segments[0, -S // 8 :] = 1, 2, -1  # one sample of one token, padding in one row
    row_mask = torch.rand(B, T, generator=g) < 0.7
    positions = torch.randint(0, 3, (B, S), generator=g).cumsum(1)
    masks = {"segments": segments.to(device), "row_mask": row_mask.to(device), "positions": positions.to(device)}
    return {
        "causal": {},
        "packed": {"segments": masks["segments"]},
        "one hot": {"teacher_heads": few[:, :1]},
        "few heads": {"teacher_heads": few},
        "windows": {"student_window": S // 4 + 1, "teacher_window": S // 7 + 1},
        "narrow student": {"student_window": S // 6 + 1},
        "narrow student, few heads": {"student_window": S // 6 + 1, "teacher_heads": few},
        "everything": masks | {"teacher_heads": few[:, :2], "student_window": S // 5 + 1, "teacher_window": S // 3 + 1},
    }[situation]


SITUATIONS = [
    "causal",
    "packed",
    "one hot",
    "few heads",
    "windows",
    "narrow student",
    "narrow student, few heads",
    "everything",
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_fused_matching_is_the_definition(situation, dtype):
    x = case(S=TOKENS + 9, dtype=dtype)
    assert_exact(x, omega=OMEGAS[1], **options_of(situation, x))


@pytest.mark.parametrize("omega", [OMEGAS[0], OMEGAS[2]], ids=lambda omega: omega.kind)
@pytest.mark.parametrize("situation", ["one hot", "everything", "causal"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_omega(dtype, situation, omega):
    x = case(dtype=dtype)
    assert_exact(x, omega=omega, **options_of(situation, x))


@pytest.mark.parametrize("situation", ["one hot", "few heads", "causal"])
def test_a_token_alone_has_no_loss_and_no_gradient(situation):
    """Exactly 0 by the definition; the kernels' two ways to a score may differ by a rounding."""
    x = case(T=1, dtype=torch.float16)
    assert all(value.abs().max() < 1e-5 for value in run(x, omega=OMEGAS[1], **options_of(situation, x)).values())


@pytest.mark.parametrize("T", [2, 17] if STAND_IN else [2, 63, 64, 129, 1000])
@pytest.mark.parametrize("situation", ["one hot", "causal"])
def test_lengths(situation, T):
    x = case(T=T, B=1, dtype=torch.float16)
    assert_exact(x, omega=OMEGAS[1], **options_of(situation, x))


@pytest.mark.parametrize(
    "heads", [(1, 1, 1, 1), (7, 7, 4, 1)] if STAND_IN else [(1, 1, 1, 1), (7, 7, 4, 1), (28, 4, 40, 8), (16, 2, 40, 8)]
)
@pytest.mark.parametrize("situation", ["one hot", "causal", "narrow student"])
def test_heads(situation, heads):
    x = case(B=1, **dict(zip(("Hs", "Ks", "Ht", "Kt"), heads, strict=True)), dtype=torch.float16)
    assert_exact(x, omega=OMEGAS[1], **options_of(situation, x))


@pytest.mark.parametrize("dims", [(8, 24)] if STAND_IN else [(64, 64), (80, 128), (96, 256), (256, 256), (128, 320)])
@pytest.mark.parametrize("situation", ["one hot", "few heads", "causal"])
def test_head_dims(situation, dims):
    x = case(B=1, Ds=dims[0], Dt=dims[1], dtype=torch.float16)
    assert_exact(x, omega=OMEGAS[1], **options_of(situation, x))


@pytest.mark.parametrize("situation", ["one hot", "causal", "everything"])
def test_given_log_sum_exps_change_nothing(situation):
    x = case(dtype=torch.float16)
    options = {"omega": OMEGAS[1], **options_of(situation, x)}
    lse = {}
    for side in ("student", "teacher"):
        window, where = options.get(f"{side}_window"), {name: options[name] for name in ("segments",) if name in options}
        profile = attention_profile(
            x[f"{side}_query"], x[f"{side}_key"], scale=x[f"{side}_scale"], window=window, **where, implementation="chunked"
        )
        lse[f"{side}_lse"] = profile.lse.nan_to_num(0.0)
    wrong = mismatch(run(x, **options, **lse), exact(x, **options), TOLERANCES[torch.float16])
    assert not wrong, wrong


@pytest.mark.parametrize("situation", ["one hot", "causal"])
def test_strides_of_the_inputs_change_nothing(situation):
    """Heads beside each other within a token, as transformers lays them out, and rows of a larger tensor."""
    x = case(dtype=torch.float16)
    options = {"omega": OMEGAS[1], **options_of(situation, x)}
    wanted = run(x, **options)
    for name in ("student_query", "student_key", "teacher_query", "teacher_key"):
        wide = torch.cat([x[name].detach().transpose(1, 2)] * 2, -1).contiguous()
        x[name] = wide[..., : wide.shape[-1] // 2].transpose(1, 2).requires_grad_(name in NAMES)
        assert not x[name].is_contiguous()
    found = run(x, **options)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("situation", ["one hot", "causal"])
def test_no_counted_row_is_zero(situation):
    x = case(dtype=torch.float16)
    options = options_of(situation, x)
    for masks in (
        {"row_mask": torch.zeros(2, TOKENS, dtype=torch.bool, device=DEVICE)},
        {"segments": torch.full((2, TOKENS), -1, device=DEVICE)},
    ):
        assert not any(value.any() for value in run(x, **options, **masks).values())


@pytest.mark.parametrize("situation", SITUATIONS)
def test_runs_repeat_bit_for_bit(situation):
    x = case(dtype=torch.float16)
    options = {"omega": OMEGAS[1], **options_of(situation, x)}
    first, second = run(x, **options), run(x, **options)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("situation", ["one hot", "causal"])
def test_autocast_around_it_changes_nothing(situation):
    x = case()
    wanted = run(x, **options_of(situation, x))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = run(x, **options_of(situation, x))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("situation", ["one hot", "causal", "narrow student"])
def test_finite_at_extreme_scores(situation):
    x = case(size=30.0, dtype=torch.float16) | {"student_scale": 1.5, "teacher_scale": 1.5}
    assert all(value.isfinite().all() for value in run(x, omega=OMEGAS[1], **options_of(situation, x)).values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("situation", ["causal", "everything"])
def test_chunked_matching_is_the_definition_there_too(situation, dtype):
    x = case(dtype=dtype)
    assert_exact(x, implementation="chunked", omega=OMEGAS[1], chunk_size=24, **options_of(situation, x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ["chunked", "fused"])
def test_the_profile_is_the_definition(implementation, dtype):
    x = case(dtype=dtype)
    query, key = x["student_query"].detach(), x["student_key"].detach()
    more = options_of("everything", x)
    planes = torch.tensor([[0, DIM // 2], [3, DIM // 2 + 3]], device=DEVICE)
    marked = (torch.arange(TOKENS, device=DEVICE) % 3 == 0).expand(2, -1)
    options = {"planes": planes, "marked": marked, "window": TOKENS // 3, "segments": more["segments"], "positions": more["positions"]}
    found = attention_profile(query, key, scale=DIM**-0.5, **options, implementation=implementation)
    wanted = attention_profile(query.double(), key.double(), scale=DIM**-0.5, **options, implementation="reference")
    for name in ("entropy_sum", "bin_mass", "bin_pairs", "far_mass", "plane_response", "marked_mass"):
        wrong = mismatch({name: getattr(found, name)}, {name: getattr(wanted, name)}, 2e-3)
        assert not wrong, wrong


@pytest.mark.parametrize("reduction", ["relative", "mean", "sum"])
def test_head_alignment_is_that_of_the_cpu(reduction):
    x = case(dtype=torch.float16)
    heads = [x[name] for name in ("student_query", "student_key", "teacher_query", "teacher_key")]
    found, count = head_alignment(*heads, x["mixing_logits"], reduction=reduction, segments=options_of("packed", x)["segments"])
    here = [y.detach().double().cpu().requires_grad_(y.requires_grad) for y in (*heads, x["mixing_logits"])]
    wanted, want_count = head_alignment(*here, reduction=reduction, segments=options_of("packed", x)["segments"].cpu())
    assert count == want_count
    torch.testing.assert_close(found.double().cpu(), wanted, rtol=1e-3, atol=0)
    gradients = zip(torch.autograd.grad(found, heads[:2]), torch.autograd.grad(wanted, here[:2]), strict=True)
    assert not any(mismatch({"d": got.cpu()}, {"d": want}, 5e-3) for got, want in gradients)


@GPU_ALONE
@pytest.mark.parametrize("situation", SITUATIONS)
def test_auto_trusts_the_fused_kernel_here(situation, caplog):
    x = case(dtype=torch.bfloat16)
    run(x, "auto", omega=OMEGAS[1], **options_of(situation, x))
    assert switch.used()["attention_matching"] == "fused", caplog.text


@GPU_ALONE
def test_on_another_stream():
    x = case(dtype=torch.bfloat16)
    options = {"omega": OMEGAS[1], **options_of("one hot", x)}
    wanted = run(x, **options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = run(x, **options)
    stream.synchronize()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@TWO_GPUS
@pytest.mark.parametrize("implementation", ["auto", "chunked", "fused"])
def test_on_a_card_that_is_not_the_current_one(implementation):
    x = case(dtype=torch.bfloat16, device=torch.device("cuda", 1))
    assert torch.cuda.current_device() == 0
    assert_exact(x, implementation=implementation, omega=OMEGAS[1], **options_of("one hot", x))


@GPU_ALONE
@pytest.mark.parametrize("situation", ["one hot", "causal"])
def test_offsets_beyond_two_to_the_31(situation):
    """The last rows of 65,536 tokens over so many key heads that their numbers exceed 2^31; the last heads against the definition."""
    heads, dim, keys = 136, 256, 65536
    assert heads * dim * keys > 2**31
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of GPU memory")
    g = torch.Generator(DEVICE).manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=g, device=DEVICE, dtype=torch.bfloat16)

    query, key = draw(1, heads, 16, dim).requires_grad_(), draw(1, heads, keys, dim).requires_grad_()
    taught_query, taught_key = draw(1, 2, 16, dim), draw(1, 2, keys, dim)
    mixing = torch.zeros(heads, 2, device=DEVICE, requires_grad=True)
    choice = (torch.arange(heads, device=DEVICE) % 2)[:, None] if situation == "one hot" else None
    how = {"student_scale": dim**-0.5, "teacher_scale": dim**-0.5, "query_offset": keys - 16, "omega": OMEGAS[1]}
    loss, _ = attention_matching(query, key, taught_query, taught_key, mixing, **how, teacher_heads=choice, implementation="fused")
    d_query, d_key = torch.autograd.grad(loss, [query, key])
    few = [x.detach()[:, -2:].clone().requires_grad_() for x in (query, key)]
    choice = None if choice is None else choice[-2:]
    want, _ = attention_matching(
        *few, taught_query, taught_key, mixing.detach()[-2:], **how, teacher_heads=choice, implementation="reference"
    )
    wanted = dict(zip(("d query", "d key"), torch.autograd.grad(want, few), strict=True))
    wrong = mismatch({"d query": d_query[:, -2:], "d key": d_key[:, -2:]}, wanted, TOLERANCES[torch.bfloat16])
    assert not wrong, wrong


@GPU_ALONE
@pytest.mark.parametrize("situation", ["one hot", "causal"])
def test_memory_grows_no_faster_than_the_tokens(situation):
    def added(tokens: int) -> int:
        x = case(T=tokens, B=1, dtype=torch.bfloat16)
        options = options_of(situation, x)
        run(x, **options)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(x, **options)
        return torch.cuda.max_memory_allocated() - before

    fixed = 2 * 2**30 if situation == "causal" else 0  # the dense form's score buffers
    assert added(32768) < 4.5 * added(8192) + fixed
