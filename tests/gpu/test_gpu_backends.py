"""Every kernel of attention that is installed on a GPU machine gives what the definition says. Needs torch and numpy alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gpu_device import DEVICE, HAS_GPU, ON_GPU, TWO_GPUS

from laid_ds.doctor.attention import BOUNDS, DIM, MASKS, TOKENS, defined, drawn, results
from laid_ds.kernels.switch import TOLERANCES, mismatch
from laid_ds.models import backends

pytestmark = ON_GPU
KERNELS = backends.varlen_kernels(torch.cuda.get_device_capability()[0]) if HAS_GPU else backends.varlen_kernels(9)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", backends.HALVES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_outputs_log_sum_exps_and_gradients(name, dtype, mask):
    if isinstance(KERNELS[name], str):
        pytest.skip(f"{name}: {KERNELS[name]}")
    bounds, window, before = MASKS[mask]
    how = {"scale": DIM**-0.5, "window": window}
    inputs = drawn(DEVICE, dtype, before)
    found = results(partial(backends.varlen, KERNELS[name], bounds=torch.tensor(bounds, dtype=torch.int32), **how), inputs)
    wanted = results(partial(defined, bounds=bounds, **how), [x.detach().double().requires_grad_() for x in inputs])
    wrong = mismatch(found, wanted, TOLERANCES[dtype])
    assert not wrong, wrong


@pytest.mark.parametrize("dtype", [*backends.HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_attend_takes_a_kernel_that_is_right(mask, dtype):
    """Whatever `attend` chooses, by device and dtype."""
    bounds, window, before = MASKS[mask]
    inputs = drawn(DEVICE, dtype, before)
    packed = None if mask in ("causal", "shared, whole") else torch.tensor(bounds, dtype=torch.int32)
    found = results(partial(backends.attend, mask=packed, scale=DIM**-0.5, window=window), inputs)
    wanted = results(
        partial(defined, bounds=bounds, scale=DIM**-0.5, window=window), [x.detach().double().requires_grad_() for x in inputs]
    )
    assert ("log-sum-exp" in found) == backends.has_lse("cuda", dtype)
    wrong = mismatch(found, {name: wanted[name] for name in found}, TOLERANCES[dtype])
    assert not wrong, wrong


def test_two_rows_of_a_batch_do_not_see_each_other():
    inputs = [torch.cat([x.detach(), x.detach().flip(2)]).requires_grad_() for x in drawn(DEVICE, torch.bfloat16)]
    out, lse = backends.attend(*inputs, None, DIM**-0.5)
    for row in range(2):
        want, want_lse = backends.attend(*(x[row : row + 1] for x in inputs), None, DIM**-0.5)
        torch.testing.assert_close((out[row : row + 1], lse[row : row + 1]), (want, want_lse))
    assert not lse.requires_grad


def test_an_empty_sample_between_two_changes_nothing():
    inputs = drawn(DEVICE, torch.bfloat16)
    with_empty = torch.tensor([0, BOUNDS[1], BOUNDS[1], *BOUNDS[2:]], dtype=torch.int32)
    out, lse = backends.attend(*inputs, with_empty, DIM**-0.5)
    want, want_lse = backends.attend(*inputs, torch.tensor(BOUNDS, dtype=torch.int32), DIM**-0.5)
    torch.testing.assert_close((out, lse), (want, want_lse))
    assert out.shape[2] == TOKENS


@TWO_GPUS
def test_on_a_card_that_is_not_the_current_one():
    inputs = drawn(torch.device("cuda", 1), torch.bfloat16)
    found = results(partial(backends.attend, mask=None, scale=DIM**-0.5), inputs)
    wanted = results(
        partial(defined, bounds=(0, TOKENS), scale=DIM**-0.5, window=None), [x.detach().double().requires_grad_() for x in inputs]
    )
    assert not mismatch(found, wanted, TOLERANCES[torch.bfloat16])
