"""One forward pass of a decoder on the meta device: what autograd would keep of it, its matrix products, and its calls of attention.

Nothing has a value there, so whatever a family asks of values is settled before: which tokens see which (a mask is given), how far RoPE
stretches (its kind is set to the plain one), which expert gets which token (all get the first: the products have the same sizes).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from laid_ds.models.attention import decoder

NAME = "laid_sizes"
OUTSIDE = -1  # of the layers


@dataclass(frozen=True)
class Attention:
    """One attention layer of a decoder, as its attention function was called."""

    heads: int
    keys: int
    head_dim: int
    window: int | None
    """A row sees itself and window - 1 tokens before; None: all before."""
    masked: bool
    """Whether its mask is a tensor of T x T."""

    def scores(self, tokens: float) -> float:
        """Scores of one head over a row of so many tokens; causal: half of them exist."""
        seen = tokens if self.window is None else min(tokens, self.window)
        return seen * tokens - seen**2 / 2


@dataclass
class MetaRun:
    """What one forward pass over `tokens` tokens left behind."""

    tokens: int
    flops: int = 0
    """Of matrix products and convolutions; not of attention's scores."""
    attention: list[Attention] = field(default_factory=list)
    kept: Counter[int] = field(default_factory=Counter)
    """Bytes for the backward pass, by the layer that keeps a tensor first (OUTSIDE: before or after them)."""
    widest: int = 0
    """Bytes of the largest such tensor of a layer."""
    layer: int = OUTSIDE
    masks: Callable[[int], bool] = lambda layer: False


def meta_run(model: PreTrainedModel, tokens: int, masks: Callable[[int], bool]) -> MetaRun:
    """Run the decoder of a model on the meta device over one row of text. The model is not to be used afterwards.

    masks: whether a layer's mask is a tensor, as the family's forward pass with images would make it.
    """
    inside, run = decoder(model).train(), MetaRun(tokens, masks=masks)
    inside.set_attn_implementation(NAME)
    for module in inside.modules():
        _rotate_plainly(module)
    for number, layer in enumerate(inside.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: setattr(run, "layer", number))
        layer.register_forward_hook(lambda *_: setattr(run, "layer", OUTSIDE))
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    seen = torch.empty(1, 1, tokens, tokens, dtype=model.dtype, device="meta")  # a finished mask, so that none is made
    counter, token = FlopCounterMode(display=False), _running.set(run)
    try:
        with torch.autograd.graph.saved_tensors_hooks(_keeper(run, model), lambda tensor: tensor), counter, _OneExpert():
            inside(input_ids=ids, attention_mask=seen, use_cache=False)
    finally:
        _running.reset(token)
    run.flops = counter.get_total_flops()
    return run


def _keeper(run: MetaRun, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """A hook that counts each storage once, and none that a parameter owns."""
    owned = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    alive = []  # a storage's address may be given again once it is freed

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            owned.add(storage._cdata)
            alive.append(storage)
            run.kept[run.layer] += storage.nbytes()
            if run.layer != OUTSIDE:
                run.widest = max(run.widest, storage.nbytes())
        return tensor

    return keep


def _rotate_plainly(module: nn.Module) -> None:
    """Kinds of RoPE that look at the positions (dynamic, longrope) turn queries like the plain one, with other angles."""
    kind: Any = getattr(module, "rope_type", None)
    if isinstance(kind, str):
        module.rope_type = "default"
    elif isinstance(kind, dict):
        module.rope_type = dict.fromkeys(kind, "default")


class _OneExpert(TorchFunctionMode):
    """Grouped products of experts as one product; on meta torch knows them in bfloat16 alone."""

    def __torch_function__(self, function: Callable, types: Any, args: Sequence = (), kwargs: dict | None = None) -> Any:
        if function is torch._grouped_mm:
            return args[0] @ args[1][0]
        return function(*args, **(kwargs or {}))


class _Flash(torch.autograd.Function):
    """Keeps what every flash kernel keeps: query, key, value, output and log-sum-exp; never [T, S]."""

    @staticmethod
    def forward(context, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query.transpose(1, 2))
        context.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output


_running: ContextVar[MetaRun] = ContextVar("running")


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any):
    """transformers' attention interface."""
    run, (_, heads, _, size), keys = _running.get(), query.shape, key.shape[1]
    masked = run.masks(run.layer)
    run.attention.append(Attention(heads, keys, size, options.get("sliding_window"), masked))
    if masked:  # SDPA then takes no grouped heads: transformers repeats keys and values
        key, value = (torch.repeat_interleave(tensor, heads // keys, 1) if heads != keys else tensor for tensor in (key, value))
    return _Flash.apply(query, key, value), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda *arguments, **options: None)
