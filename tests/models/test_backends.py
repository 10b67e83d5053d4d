"""Attention of packed samples, under windows and in batches, equals the dense definition on every backend.

What CUDA would call is replaced by a dense stand-in with its signature.
"""

from __future__ import annotations

import sys
import types
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from laid_ds.models import backends
from laid_ds.models.attention import Listening, Tap, laid_attention, listen
from laid_ds.models.backends import attend, has_lse
from laid_ds.models.extension import self_extend
from laid_ds.models.masks import _is_plain_window
from tests.models.family_models import inputs, tiny_model

BOUNDS = {1: [0, 700, 1000, 1001, 1300], 2: [0, 400, 650, 1300]}  # one row of four samples; rows of 650 with two and with one


def heads(batch: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = 1300 // batch
    return [torch.randn(batch, number, tokens, 16, generator=generator, requires_grad=True) for number in (4, 2, 2)]


def dense(query: Tensor, key: Tensor, value: Tensor, bounds: list[int], scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    """By the definition, all pairs written out; the queries are those of the last keys."""
    batch, tokens, before = query.shape[0], key.shape[2], key.shape[2] - query.shape[2]
    number = torch.zeros(batch * tokens, dtype=torch.long)
    for n, (start, stop) in enumerate(pairwise(bounds)):
        number[start:stop] = n
    number = number.view(batch, 1, tokens)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    seen = (number[..., :, None] == number[..., None, :]) & (distance >= 0) & (distance < (window or tokens))
    scores = (query @ key.repeat_interleave(2, 1).mT * scale).masked_fill(~seen[..., before:, :], -torch.inf)
    return scores.softmax(-1) @ value.repeat_interleave(2, 1), scores.logsumexp(-1)


def stand_in(query, key, value, bounds, key_bounds, longest, longest_keys, *, return_aux, scale, window_size, enable_gqa):
    """torch.nn.attention.varlen.varlen_attn, dense: each sample's queries are those of its last keys."""
    assert enable_gqa
    assert return_aux.lse
    assert bounds.dtype == key_bounds.dtype == torch.int32
    assert bounds[-1] == len(query)
    assert key_bounds[-1] == len(key)
    assert (longest, longest_keys) == (int(bounds.diff().max()), int(key_bounds.diff().max()))
    assert bounds.diff().min() > 0  # not every kernel takes a sample without queries
    left, right = window_size
    assert right == 0
    outs, lses = [], []
    for (start, stop), (first, last) in zip(pairwise(bounds.tolist()), pairwise(key_bounds.tolist()), strict=True):
        rows = [x.transpose(0, 1)[None] for x in (query[start:stop], key[first:last], value[first:last])]
        out, lse = dense(*rows, [0, last - first], scale, None if left < 0 else left + 1)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


def flash_2(query, key, value, *bounds_and_longest, softmax_scale, causal, window_size, return_attn_probs):
    """flash_attn.flash_attn_varlen_func of release 2."""
    assert causal
    assert return_attn_probs
    aux = varlen.AuxRequest(lse=True)
    made = stand_in(query, key, value, *bounds_and_longest, return_aux=aux, scale=softmax_scale, window_size=window_size, enable_gqa=True)
    return *made, None


def flash_4(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, **options):
    """flash_attn.cute.flash_attn_varlen_func of release 4, which has other arguments in the fourth place."""
    assert qv is None
    assert options.pop("return_lse")
    left, right = options["window_size"]
    window = (-1 if left is None else left, right)
    return flash_2(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options | {"window_size": window, "return_attn_probs": True}
    )[:2]


KERNELS = {"torch": ("_torch_varlen", None, stand_in), "flash 2": ("_flash_2", "flash_attn", flash_2)}
KERNELS["flash 4"] = ("_flash_4", "flash_attn.cute", flash_4)


@pytest.fixture(params=["cpu", "sdpa", *KERNELS])
def backend(request, monkeypatch):
    """The function that a device would run: the CPU's own, SDPA's, and those for CUDA with a stand-in for the kernel."""
    if request.param == "cpu":
        return attend
    if request.param == "sdpa":
        return lambda query, key, value, mask, *rest: backends._segments(backends._sdpa, query, key, value, mask, *rest)
    chosen, module, kernel = KERNELS[request.param]
    monkeypatch.setattr(backends, "_kernel", lambda: getattr(backends, chosen))
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    if module is not None:
        package = types.ModuleType(module)
        package.flash_attn_varlen_func = kernel
        monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
        monkeypatch.setitem(sys.modules, module, package)
    return backends._varlen


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("window", [None, 7, 600])
@pytest.mark.parametrize("before", [0, 1, 345, 649])
def test_packed_samples_are_what_the_definition_says(backend, batch, window, before):
    """before: keys ahead of the first query, which then may lie inside a sample."""
    bounds = torch.tensor(BOUNDS[batch], dtype=torch.int32)
    ours, theirs = heads(batch), heads(batch)
    out, lse = backend(ours[0][:, :, before:], *ours[1:], bounds, 0.3, window)
    expected, expected_lse = dense(theirs[0][:, :, before:], *theirs[1:], BOUNDS[batch], 0.3, window)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)
    if lse is not None:
        assert not lse.requires_grad
        torch.testing.assert_close(lse, expected_lse, rtol=0, atol=2e-6)
    out.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("stop", [100, 400, 401, 649, 650])
def test_bounds_of_rows_that_are_cut_off(stop):
    """One sample each, a border and a whole row among them."""
    whole = [0, 400, 650, 1300]
    cut = backends.bounds_until(torch.tensor(whole, dtype=torch.int32), 650, stop)
    assert cut.tolist() == [*[start for start in (0, 400) if start < stop], stop, 2 * stop]
    assert backends.is_bounds(cut)
    assert cut.dtype == torch.int32


def test_whole_causal_rows_that_begin_behind_their_first_key():
    """Without samples, under the kernels for any dtype too; half precision is rounded once more."""
    for batch, before, dtype, atol in ((2, 200, torch.float32, 2e-6), (1, 1299, torch.float32, 2e-6), (1, 300, torch.bfloat16, 2e-2)):
        ours = [x.detach().to(dtype).requires_grad_() for x in heads(batch)]
        theirs = [x.detach().float().requires_grad_() for x in ours]
        expected, _ = dense(theirs[0][:, :, before:], *theirs[1:], [n * 1300 // batch for n in range(batch + 1)], 0.3, None)
        for function in (attend, lambda *heads: backends._sdpa(*heads)):
            for x in ours:
                x.grad = None
            out, _ = function(ours[0][:, :, before:], *ours[1:], None, 0.3)
            torch.testing.assert_close(out.float(), expected, rtol=0, atol=atol)
            out.float().square().sum().backward()
            gradients = torch.autograd.grad(expected.square().sum(), theirs, retain_graph=True)
            for a, b in zip(ours, gradients, strict=True):
                torch.testing.assert_close(a.grad.float(), b, rtol=1e-4, atol=10 * atol * float(b.abs().max()))


@pytest.mark.parametrize("tokens", [4096, 16384])
def test_no_mask_of_a_packed_row_grows_with_the_row(tokens, monkeypatch):
    """Under a window, the largest mask is that of one stretch of rows, however long the row."""
    sizes, band = [], backends._band
    monkeypatch.setattr(backends, "_band", lambda *arguments: sizes.append(band(*arguments).numel()) or band(*arguments))
    query = torch.randn(1, 1, tokens, 8)
    attend(query, query, query, torch.tensor([0, tokens], dtype=torch.int32), 1.0, 64)
    assert max(sizes) == 512 * (512 + 63)


def test_a_sliding_window_on_cuda_is_bounds_where_rows_see_one_run_of_keys():
    """Elsewhere, and with padding or a cache, it is the dense mask. (The device is only a name here: nothing is computed on it.)"""
    known, mixed = (tiny_model(*key).config.get_text_config() for key in (("aya_vision", "cohere2"), ("gemma3", "gemma3_text")))
    window = {"kv_length": 9, "local_size": 4, "q_offset": 0}
    assert _is_plain_window(9, config=known, **window)
    assert not _is_plain_window(9, config=mixed, **window)
    assert not _is_plain_window(1, config=known, **window)
    assert not _is_plain_window(9, config=known, **window | {"local_size": None})
    assert not _is_plain_window(9, config=known, **window, attention_mask=torch.ones(1, 9))


def test_a_log_sum_exp_where_there_is_none_is_refused():
    assert has_lse("cpu", torch.float32)
    assert has_lse("cuda", torch.bfloat16)
    assert not has_lse("cuda", torch.float32)
    assert not has_lse("mps", torch.bfloat16)
    module, query = torch.nn.Module(), torch.empty(1, 2, 5, 8, device="meta")
    module._laid = Listening(1, Tap([1], lse=True))
    with pytest.raises(ValueError, match=r"asked for in layer 1, and attention on meta in torch.float32 gives none: use bfloat16"):
        laid_attention(module, query, query, query, None)


def test_a_log_sum_exp_under_dropout_is_refused():
    model = tiny_model("internvl", "qwen2").train()
    listen(model, Tap([0], lse=True))
    model.model.language_model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"attention_dropout is 0.1: there is no log-sum-exp of attention under dropout"):
        model(**inputs("internvl"), use_cache=False)


def test_selfextend_gives_no_log_sum_exp():
    model = tiny_model("internvl", "qwen2")
    self_extend(model, 2, 8)
    for layer in model.model.language_model.layers:
        layer.self_attn._laid.tap = Tap([0], lse=True)
    with pytest.raises(ValueError, match="SelfExtend gives no log-sum-exp of attention; use the plain attention"):
        model(**inputs("internvl"), use_cache=False)
