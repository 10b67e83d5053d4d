"""What turns queries, keys and values into the decoder's output, with the log-sum-exp of each row where it is asked for.

A mask is None (causal), transformers' dense one, or `bounds`: where the samples of packed rows begin and end. With bounds no mask is made:
time and memory are linear in the row. FlashAttention 2 or 4 serve where they are installed, torch's own kernels elsewhere.
The branches for CUDA are checked against CPU stand-ins of the kernels they call; `laid doctor` checks those of a GPU where it stands.

Letters: B batch, T query rows, S >= T keys, of which the last T are the rows' own, H query heads, K key heads, D head dim, N packed
samples. No log-sum-exp here carries a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from inspect import signature
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from laid_ds.kernels.switch import note

ROWS = 512  # query rows at a time in a sliding window on the CPU
HALVES = (torch.bfloat16, torch.float16)

Result = tuple[Tensor, Tensor | None]
"""Output [B, H, T, D] and log-sum-exp [B, H, T] (natural, float32, without a gradient) or None."""


def has_lse(device: str, dtype: torch.dtype) -> bool:
    """Whether attention on this type of device, in this dtype, gives its log-sum-exp."""
    return device == "cpu" or (device == "cuda" and dtype in HALVES)


def is_bounds(mask: Tensor | None) -> bool:
    """Whether a mask is `bounds`, int32 [N + 1] on the CPU: sample n is keys bounds[n] to bounds[n + 1] of the B S laid end to end."""
    return mask is not None and mask.ndim == 1


def bounds_until(bounds: Tensor, tokens: int, stop: int) -> Tensor:
    """`bounds` of rows of so many tokens, each cut off at `stop`."""
    row, place = bounds[:-1] // tokens, bounds[:-1] % tokens
    return torch.cat([(row * stop + place)[place < stop], bounds[-1:] // tokens * stop])


def first_seen(mask: Tensor | None, batch: int, tokens: int, window: int | None) -> Tensor:
    """[B, T] int64 on the CPU: the first key that each row sees under causal attention, mask None (no window cuts it) or `bounds`."""
    if mask is None:
        return torch.zeros(batch, tokens, dtype=torch.long)
    starts = torch.zeros(batch * tokens, dtype=torch.long)
    starts[mask[:-1].long()] = mask[:-1].long()
    starts = starts.cummax(0).values.view(batch, tokens) - torch.arange(batch)[:, None] * tokens
    return starts if window is None else torch.maximum(starts, torch.arange(tokens) - window + 1)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, window: int | None = None, causal: bool = True
) -> Result:
    """Attention of query [B, H, T, D] over key, value [B, K, S, D], with the log-sum-exp if there is one.

    mask: None (causal, or all keys), `bounds` (causal; with `window`, a row sees itself and the window - 1 tokens of its sample before it),
    or dense [B, 1, T, S], bool, which says all. Query row t is the token of key t + S - T. On the CPU the output for T = S and the first
    and the last kind of mask is that of SDPA, bit for bit.
    """
    device = query.device.type
    if device == "cuda" and query.dtype in HALVES and causal and (mask is None or is_bounds(mask)):
        rows = torch.arange(len(query) + 1, dtype=torch.int32) * key.shape[2] if mask is None else mask
        note("attention", _kernel().__name__.strip("_"))
        return _varlen(query, key, value, rows, scale, window if is_bounds(mask) else None)
    note("attention", "the CPU's flash attention" if device == "cpu" else "SDPA")
    kernel = _flash_cpu if device == "cpu" else _sdpa
    return _segments(kernel, query, key, value, mask, scale, window) if is_bounds(mask) else kernel(query, key, value, mask, scale, causal)


def _flash_cpu(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool = True) -> Result:
    """What SDPA calls on a CPU, with the log-sum-exp that SDPA throws away."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    groups = query.shape[1] // key.shape[1]
    if mask is not None and groups > 1:  # as transformers' SDPA: only without a mask do query heads share keys as they are
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    causal = causal and mask is None and query.shape[2] > 1
    if causal and key.shape[2] > query.shape[2]:
        return _Behind.apply(query, key, value, scale)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
    return out, lse.detach().float()


class _Behind(torch.autograd.Function):
    """Causal flash attention of rows behind the first of their keys, on the CPU, whose kernel knows no such thing: over the keys before
    all rows and over the rows' own, put together by their log-sum-exps. The gradients of each part follow from the whole's output and
    log-sum-exp, as those of each tile of a flash kernel do."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        flash, found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, []
        for keys, causal in _Behind.parts(query, key):
            found.append(flash(query, key[:, :, keys], value[:, :, keys], 0.0, causal, scale=scale))
        lse = torch.logaddexp(*(lse for _, lse in found))
        out = sum(out * (own - lse).exp()[..., None] for out, own in found).to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scale, shown = scale, lse.float()
        ctx.mark_non_differentiable(shown)
        return out, shown

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor, _) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        backward, found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, []
        for keys, causal in _Behind.parts(query, key):
            found.append(backward(d_out, query, key[:, :, keys], value[:, :, keys], out, lse, 0.0, causal, scale=ctx.scale))
        (d_query, *before), (more, *own) = found
        return d_query.add_(more), *(torch.cat(parts, 2) for parts in zip(before, own, strict=True)), None

    @staticmethod
    def parts(query: Tensor, key: Tensor) -> tuple[tuple[slice, bool], tuple[slice, bool]]:
        """The keys before all rows, and the rows' own, with what is causal."""
        before = key.shape[2] - query.shape[2]
        return (slice(before), False), (slice(before, None), True)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool = True) -> Result:
    """For devices and dtypes without a flash kernel."""
    before, keys = key.shape[2] - query.shape[2], key.shape[2]
    if causal and mask is None and before:
        mask = _band(before, keys, 0, keys, query.device)
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal and mask is None, scale=scale, enable_gqa=True), None


def _segments(kernel, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scale: float, window: int | None) -> Result:
    """Sample by sample; under a window that is shorter than the sample, a stretch of rows at a time."""
    outs, lses, before = [], [], key.shape[2] - query.shape[2]
    for row, first, start, stop in _pieces(bounds, query.shape[2], key.shape[2], window):
        whole = (first == start or before > 0) and (window is None or stop - first <= window)
        band = None if whole else _band(start, stop, first, window, query.device)
        own = query[row, None, :, start - before : stop - before]
        out, lse = kernel(own, key[row, None, :, first:stop], value[row, None, :, first:stop], band, scale)
        outs.append(out)
        lses.append(lse)
    return _rows(outs, len(query)), None if any(lse is None for lse in lses) else _rows(lses, len(query))


def _pieces(bounds: Tensor, tokens: int, keys: int, window: int | None) -> list[tuple[int, int, int, int]]:
    """(batch row, first key, first query, end) of stretches of queries that see one stretch of keys; places among the row's keys."""
    pieces = []
    for sample in pairwise(bounds.tolist()):
        row, offset = divmod(sample[0], keys)
        stop = offset + sample[1] - sample[0]
        own = max(offset, keys - tokens)  # the sample's first query
        step = stop - own if window is None or stop - offset <= window else max(window, ROWS)
        for begin in range(own, stop, step) if own < stop else ():
            first = offset if window is None else max(offset, begin - window + 1)
            pieces.append((row, first, begin, min(begin + step, stop)))
    return pieces


def _band(start: int, stop: int, first: int, window: int, device: torch.device) -> Tensor:
    """[1, 1, queries, keys] bool: queries start..stop see keys first..stop, themselves and window - 1 before."""
    distance = torch.arange(start, stop, device=device)[:, None] - torch.arange(first, stop, device=device)
    return ((distance >= 0) & (distance < window))[None, None]


def _rows(parts: list[Tensor], batch: int) -> Tensor:
    """Parts [1, H, t, ...] of rows laid end to end -> [B, H, T, ...]."""
    return torch.cat(parts, 2)[0].unflatten(1, (batch, -1)).transpose(0, 1)


def _varlen(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scale: float, window: int | None) -> Result:
    """A CUDA kernel for samples of any length laid end to end."""
    return varlen(_kernel(), query, key, value, bounds, scale, window)


def varlen(kernel: Varlen, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scale: float, window: int | None) -> Result:
    """Causal attention of packed rows as `attend` means it, by one of `varlen_kernels`."""
    kept, bounds, key_bounds = _met(bounds, len(query), query.shape[2], key.shape[2])
    rows = [query.transpose(1, 2).flatten(0, 1), *(_laid_end_to_end(x, kept) for x in (key, value))]  # [B T or their keys, heads, D]
    assert all(x.stride(-1) == 1 for x in rows), [x.stride() for x in rows]  # no kernel reads other strides of a head
    longest = int(bounds.diff().max()), int(key_bounds.diff().max())
    out, lse = kernel(*rows, (bounds.to(query.device), key_bounds.to(query.device)), longest, scale, window)
    shape = len(query), query.shape[2]
    return out.unflatten(0, shape).transpose(1, 2), lse.detach().unflatten(1, shape).transpose(0, 1)


def _met(bounds: Tensor, batch: int, tokens: int, keys: int) -> tuple[list[int], Tensor, Tensor]:
    """Of the samples that have queries: the first key in each row, and the bounds of queries and keys, each laid end to end."""
    if tokens == keys:
        return [0] * batch, bounds, bounds
    firsts, lengths = [], []
    for start, stop in pairwise(bounds.tolist()):
        row, offset = divmod(start, keys)
        own = min(offset + stop - start - (keys - tokens), stop - start)
        if own > 0:
            lengths.append((own, stop - start))
            firsts += [offset] * (row == len(firsts))
    ends = F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (0, 0, 1, 0))
    return firsts, ends[:, 0].contiguous(), ends[:, 1].contiguous()


def _laid_end_to_end(x: Tensor, firsts: list[int]) -> Tensor:
    """[keys, heads, D] of x [B, heads, S, D], each row from its first key on."""
    x = x.transpose(1, 2)
    return x.flatten(0, 1) if not any(firsts) else torch.cat([row[first:] for row, first in zip(x, firsts, strict=True)])


Varlen = Callable[..., tuple[Tensor, Tensor]]
"""(query [T, H, D], key, value [S, K, D], bounds of both, longest of both, scale, window) -> (output [T, H, D], log-sum-exp [H, T])."""


@cache
def _kernel() -> Varlen:
    """FlashAttention 4 or 2 where installed, else torch's."""
    found = varlen_kernels(torch.cuda.get_device_capability()[0])
    kernels = [kernel for kernel in found.values() if not isinstance(kernel, str)]
    if not kernels:
        raise ValueError(f"no kernel for packed rows can be used here: {'; '.join(f'{name}: {why}' for name, why in found.items())}")
    return kernels[0]


def varlen_kernels(major: int) -> dict[str, Varlen | str]:
    """The kernels for packed rows by name, best first, or why one cannot serve; major: of the GPU's compute capability."""
    flash_4 = _flash_4 if _installed("flash_attn.cute") else "not installed: pip install 'laid-ds[fa4]' (for Hopper and Blackwell)"
    flash_2 = _flash_2 if _installed("flash_attn.flash_attn_interface") else "not installed: pip install 'laid-ds[flash]' builds it"
    return {
        "FlashAttention 4": flash_4 if major >= 9 else "the GPU is older than Hopper",
        "FlashAttention 2": flash_2,
        "torch varlen": _torch_varlen if _shares_keys() else "this torch's varlen_attn cannot share keys among heads: 2.13 can",
    }


def _shares_keys() -> bool:
    from torch.nn.attention import varlen

    return "enable_gqa" in signature(varlen.varlen_attn).parameters


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that would hold it
        return False


def _flash_4(query, key, value, bounds, longest, scale, window) -> tuple[Tensor, Tensor]:
    from flash_attn.cute import flash_attn_varlen_func

    seen = (None if window is None else window - 1, 0)
    return flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=bounds[0],
        cu_seqlens_k=bounds[1],
        max_seqlen_q=longest[0],
        max_seqlen_k=longest[1],
        softmax_scale=scale,
        causal=True,
        window_size=seen,
        return_lse=True,
    )[:2]


def _flash_2(query, key, value, bounds, longest, scale, window) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_varlen_func

    seen = (-1 if window is None else window - 1, 0)
    return flash_attn_varlen_func(
        query, key, value, *bounds, *longest, softmax_scale=scale, causal=True, window_size=seen, return_attn_probs=True
    )[:2]


def _torch_varlen(query, key, value, bounds, longest, scale, window) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    seen = (-1 if window is None else window - 1, 0)
    return varlen_attn(
        query,
        key,
        value,
        *bounds,
        *longest,
        return_aux=AuxRequest(lse=True),
        scale=scale,
        window_size=seen,
        enable_gqa=query.shape[1] != key.shape[1],
    )
