"""The attention function `laid`: SDPA's output, a gain on the queries, and a tap that hands out queries and keys after RoPE.

It is set on the decoder only. A tap that is closed stores nothing; the output is the same, bit for bit, whether it is open or closed.
Rows that hold several samples (their position ids start again) get no mask but the samples' bounds: time and memory stay linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from laid_ds.models.backends import Result, attend, bounds_until, first_seen, has_lse, is_bounds
from laid_ds.models.cut import cut_inputs
from laid_ds.models.family import DECODERS, ONE_AXIS_WITHOUT_MASK, check_packable, family
from laid_ds.models.masks import cut_masks, laid_mask, packed_rows, unpadded_rows
from laid_ds.models.shared_tower import shared_tower
from laid_ds.sequence import ALONE, SequenceGroup, Stretch

NAME = "laid"  # a name with "flash" or "/" in it would make transformers look for a package or a hub kernel


@dataclass(frozen=True)
class Captured:
    """What one attention layer compared in one forward pass."""

    query: Tensor
    """[B, H, T, D] after RoPE, and after the gain if there is one."""
    key: Tensor
    """[B, K, S, D] after RoPE, not repeated: of whole rows, also where the queries are a rank's own tokens alone."""
    scale: float
    """Factor on the scores, from the model's own call."""
    window: int | None
    """Sliding window of the layer in tokens (a row sees itself and window - 1 tokens before), or None."""
    mask: Tensor | None = None
    """None (causal), the bounds of packed samples in whole rows, or a dense mask (see backends)."""
    lse: Tensor | None = None
    """[B, H, T] float32: log-sum-exp of each row's scaled scores over the keys it sees, without a gradient, if the tap asked for it."""
    beside: Tensor | None = None
    """What a companion of the tap computes beside attention: a scalar in the graph."""
    heads: tuple[int, ...] | None = None
    """Which of the layer's query heads are here, each with a key head of its own; None: all."""


class Companion(Protocol):
    """Attention that computes something beside its output, see `Tap.open`."""

    def __call__(
        self, attend: Callable[..., Result], query: Tensor, key: Tensor, value: Tensor, scale: float, first: Tensor, rows: Stretch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(output, log-sum-exp, scalar), the first two as attend(query, key, value) gives them for a stretch of rows and the keys until its
        end; row t of it sees the keys first[b, t] .. rows.start + t."""


@dataclass
class Tap:
    """Collects `Captured` of chosen decoder layers while it is open."""

    layers: Sequence[int]
    lse: bool = False
    """Whether the log-sum-exp is asked for; ask only where `gives_lse`."""
    captured: dict[int, Captured] = field(default_factory=dict)
    companions: dict[int, Companion] = field(default_factory=dict)
    is_open: bool = False

    @contextmanager
    def open(self, companions: dict[int, Companion] | None = None) -> Iterator[dict[int, Captured]]:
        """Collect inside the block. Recomputation in the backward pass happens outside it, so nothing is stored twice.

        companions: layer -> what attends there in place of `backends.attend`, where gradients are on and rows see one run of keys; until
        the tap opens again, since recomputing must call the same.
        """
        self.captured, self.companions, self.is_open = {}, companions or {}, True
        try:
            yield self.captured
        finally:
            self.is_open = False

    def take(self, layer: int, captured: Captured) -> None:
        if self.is_open and layer in self.layers:
            self.captured[layer] = captured


@dataclass
class Listening:
    """What the attention function finds on a decoder layer's attention module (set as a plain attribute, not a submodule)."""

    layer: int
    tap: Tap | None = None
    gain: Callable[[Tensor], Tensor] | None = None
    attend: Callable[..., tuple[Tensor, None]] = sdpa_attention_forward
    """What turns queries, keys and values into the output."""
    group: SequenceGroup = ALONE
    """The ranks that share a row: queries are of this one's tokens, and keys and values are gathered."""


def laid_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **kwargs
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H, T, D], key and value [B, K, S, D] -> ([B, T, H, D], None)."""
    listening: Listening | None = getattr(module, "_laid", None)
    if listening is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if listening.gain is not None:
        query = listening.gain(query)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window, tap = kwargs.get("sliding_window"), listening.tap
    asks_lse = tap is not None and tap.lse and listening.layer in tap.layers  # also while closed: recomputing must call the same kernel
    lse, mask, beside = None, attention_mask, None
    if asks_lse or is_bounds(mask) or listening.group.size > 1:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        _check_backend(listening, query, mask, kwargs.get("dropout", 0.0), asks_lse, causal)
        companion = tap.companions.get(listening.layer) if tap is not None and torch.is_grad_enabled() else None
        key, value = listening.group.whole_heads(key, value)
        if companion is not None and not (causal and (mask is None or is_bounds(mask))):
            companion = None
        out, lse, beside = _attend(listening.group, query, key, value, mask, scale, window, causal, companion)
        if mask is None and not causal:  # every row sees all
            mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=query.device).expand(1, 1, query.shape[2], key.shape[2])
        out = out.transpose(1, 2).contiguous()
    else:
        out, _ = listening.attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if tap is not None:
        tap.take(listening.layer, Captured(query, key, scale, window, mask, lse if asks_lse else None, beside))
    return out, None


def _attend(
    group: SequenceGroup,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    window: int | None,
    causal: bool,
    companion: Companion | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(output, log-sum-exp, what the companion computes) of this rank's queries over whole rows, one stretch of them after the other."""
    found, tokens = [], key.shape[2]
    for rows in group.stretches(tokens):
        bounds = bounds_until(mask, tokens, rows.stop) if is_bounds(mask) and rows.stop < tokens else mask
        how = partial(attend, mask=bounds, scale=scale, window=window)
        parts = query[:, :, rows.at], key[:, :, : rows.stop], value[:, :, : rows.stop]
        if companion is None:
            found.append((*how(*parts, causal=causal), None))
        else:
            first = first_seen(bounds, len(query), rows.stop, window)[:, rows.start :]
            found.append(companion(how, *parts, scale, first, rows))
    if len(found) == 1:
        return found[0]
    outs, lses, besides = zip(*found, strict=True)
    return torch.cat(outs, 2), None if lses[0] is None else torch.cat(lses, 2), None if companion is None else sum(besides)


def _check_backend(listening: Listening, query: Tensor, mask: Tensor | None, dropout: float, asks_lse: bool, causal: bool) -> None:
    """Raises ValueError for a log-sum-exp, packed samples or shared rows where this attention has none."""
    device, dtype = query.device.type, query.dtype
    dense = not causal or (mask is not None and not is_bounds(mask))
    what = "the log-sum-exp of attention" if asks_lse else "packed samples" if is_bounds(mask) else "rows that ranks share"
    if dense and listening.group.size > 1:
        raise ValueError(f"layer {listening.layer} attends under a dense mask, which ranks cannot share: set sequence_parallel = 1")
    if listening.attend is not sdpa_attention_forward:
        raise ValueError(f"{type(listening.attend).__name__} gives no {what.removeprefix('the ')}; use the plain attention of the model")
    if dropout:
        raise ValueError(
            f"attention_dropout is {dropout}: there is no {what.removeprefix('the ')} under dropout; set it to 0 in the config"
        )
    if asks_lse and not (has_lse(device, dtype) and (device == "cpu" or not dense)):
        raise ValueError(
            f"{what} was asked for in layer {listening.layer}, and attention on {device} in {dtype}{' under a dense mask' if dense else ''}"
            " gives none: use bfloat16 without image blocks, or a tap without lse"
        )


@contextmanager
def whole_rows(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block no row of this model is padded before its end: under `laid`, its sliding windows need no dense mask. Whatever else
    than SDPA attends there sees the masks that it knows."""
    plain = all(getattr(getattr(a, "_laid", None), "attend", None) is sdpa_attention_forward for a in attention_layers(model).values())
    with unpadded_rows(plain):
        yield


def listen_to_windows(model: PreTrainedModel) -> None:
    """Put a decoder with sliding windows on `laid`, where that can do without dense masks (whole_rows); others are left as they are."""
    config = model.config.get_text_config()
    known = DECODERS.get(config.model_type)
    if known is not None and known.packable and "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        listen(model)


def gives_lse(config: PretrainedConfig, dtype: torch.dtype) -> bool:
    """Whether a model of this config, on this machine, hands out the log-sum-exp of its attention."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dropout = getattr(config.get_text_config(), "attention_dropout", 0.0)
    return has_lse(device, dtype) and not dropout and (device == "cpu" or family(config).packable)


AttentionInterface.register(NAME, laid_attention)
AttentionMaskInterface.register(NAME, laid_mask)  # an unregistered name would silently get no mask at all


def decoder(model: PreTrainedModel) -> nn.Module:
    """The text decoder, the module that owns `.layers`."""
    found = model.get_decoder()
    return found if hasattr(found, "layers") else found.model


def vision_tower(model: PreTrainedModel) -> nn.Module:
    """The image encoder, with the projector where the family keeps it inside. Raises ValueError when none of the usual names is there."""
    names = ("visual", "vision_tower", "vision_model", "vision_embed_tokens", "vision_encoder", "image_tower")
    whole = getattr(model, "model", model)
    for name in names:
        if hasattr(whole, name):
            return getattr(whole, name)
    raise ValueError(f"{type(model).__name__} has no vision tower under the names {', '.join(names)}; set student.freeze_vision = false")


def attention_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Decoder layer index -> its attention module; layers without attention (linear attention, convolution) are left out."""
    return {i: layer.self_attn for i, layer in enumerate(decoder(model).layers) if hasattr(layer, "self_attn")}


def listen(
    model: PreTrainedModel,
    tap: Tap | None = None,
    gains: dict[int, Callable[[Tensor], Tensor]] | None = None,
    attend: Callable[..., tuple[Tensor, None]] = sdpa_attention_forward,
    group: SequenceGroup = ALONE,
) -> None:
    """Put the model's decoder on the `laid` attention function, with a tap, gains, what attends, and the ranks that share its rows. The
    vision tower is left as it is.

    Raises ValueError for a tapped layer that has no attention.
    """
    attentions = attention_layers(model)
    missing = [layer for layer in (tap.layers if tap else ()) if layer not in attentions]
    if missing:
        raise ValueError(f"decoder layers {missing} have no attention to listen to; layers with attention: {sorted(attentions)}")
    inside = decoder(model)
    towers = [module.config for module in inside.modules() if isinstance(module, PreTrainedModel) and module.config is not inside.config]
    kept = [(config, config._attn_implementation) for config in towers]  # of a decoder that holds the vision tower
    inside.set_attn_implementation(NAME)
    for config, implementation in kept:
        config._attn_implementation = implementation
    for index, attention in attentions.items():
        object.__setattr__(attention, "_laid", Listening(index, tap, (gains or {}).get(index), attend, group))


def group_of(model: PreTrainedModel) -> SequenceGroup:
    """The ranks that share the rows of a model (listen)."""
    found = [getattr(attention, "_laid", None) for attention in attention_layers(model).values()]
    return found[0].group if found and found[0] is not None else ALONE


@contextmanager
def untouched(model: PreTrainedModel, tap: Tap) -> Iterator[None]:
    """Inside the block the model's decoder attends without gains, and another tap listens. For forward passes without gradients."""
    before = {attention: attention._laid for attention in attention_layers(model).values()}
    for attention, listening in before.items():
        object.__setattr__(attention, "_laid", replace(listening, gain=None, tap=tap))
    try:
        yield
    finally:
        for attention, listening in before.items():
            object.__setattr__(attention, "_laid", listening)


def rotary_planes(model: PreTrainedModel, layer: int) -> int:
    """P, the number of rotary planes of a query head of a layer; layers of different types may differ."""
    rotary, kinds = decoder(model).rotary_emb, getattr(model.config.get_text_config(), "layer_types", None)
    of_kind = getattr(rotary, f"{kinds[layer]}_inv_freq", None) if kinds else None
    return (rotary.inv_freq if of_kind is None else of_kind).numel()


def last_hidden_state(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    """[B, T, hidden]: what the decoder hands to the head. The head is left out where the model's classes allow it, else run on one row.
    Of rows that ranks share (listen), [B, t, hidden]: this rank's own tokens. Inputs are of whole rows all the same.

    Position ids among the inputs say that rows hold several samples; the model must be under `laid` (listen). Raises ValueError for images
    without what tells their tokens from text, since positions would silently count along one axis, and for samples packed into rows of
    a family that mixes them.
    """
    known = DECODERS.get(model.config.get_text_config().model_type)
    one_axis = known is not None and known.positions == "1d"
    if "image_grid_thw" in inputs and not one_axis and not inputs.keys() & {"mm_token_type_ids", "position_ids"}:
        raise ValueError("images came without mm_token_type_ids: pass all that the processor returns, or position_ids")
    if "position_ids" not in inputs:
        if model.config.model_type in ONE_AXIS_WITHOUT_MASK and "image_grid_thw" in inputs and "attention_mask" not in inputs:
            raise ValueError(f"{model.config.model_type} counts positions along one axis unless it gets an attention_mask or position_ids")
        return _hidden(model, inputs)
    check_packable(model.config)
    if decoder(model).config._attn_implementation != NAME:
        raise ValueError("samples are packed into one row, and the model would make a dense mask for it: put it on `laid` with listen()")
    with packed_rows():
        return _hidden(model, inputs)


def _hidden(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    group = group_of(model)
    if group.size == 1:
        return _run(model, inputs)
    with cut_masks(inputs), cut_inputs(decoder(model), group), shared_tower(model, group, inputs) as own:
        return _run(model, own)


def _run(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    whole = getattr(model, "model", None)
    if whole is not None and whole is not decoder(model):
        return whole(**inputs, use_cache=False).last_hidden_state
    found: list[Tensor] = []
    handle = decoder(model).register_forward_hook(lambda module, arguments, output: found.append(output.last_hidden_state))
    try:
        model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    return found[0]


def attention_shape(model_config: PretrainedConfig, layer: int = -1) -> tuple[int, int, int]:
    """(H, K, D) of a decoder layer; the layers of a few families differ."""
    config = model_config.get_text_config().per_layer_config[layer]
    heads = config.num_attention_heads
    return heads, config.num_key_value_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def enable_checkpointing(model: PreTrainedModel, offload: bool = False) -> None:
    """Non-reentrant activation checkpointing: the reentrant kind would silently cut the gradient of every tapped tensor.

    offload: the decoder layers' inputs wait for the backward pass in the CPU's memory.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in decoder(model).layers if offload else ():
        layer._gradient_checkpointing_func = _checkpoint_on_cpu


def _checkpoint_on_cpu(layer: Callable[..., Any], hidden: Tensor, *others: Any) -> Any:
    """layer(hidden, *others), checkpointed with `hidden` on the CPU; the copies are differentiable, so its gradient comes back."""

    def run(waiting: Tensor, *others: Any) -> Any:
        return layer(waiting.to(hidden_device), *others)

    hidden_device = hidden.device
    return checkpoint(run, hidden.cpu(), *others, use_reentrant=False)


def assert_differentiable(captured: dict[int, Captured]) -> None:
    """A student's tapped tensors must carry gradients whenever gradients are on."""
    if torch.is_grad_enabled():
        broken = [layer for layer, c in captured.items() if not (c.query.requires_grad and c.key.requires_grad)]
        assert not broken, f"tapped tensors of layers {broken} carry no gradient (reentrant checkpointing, or a frozen decoder?)"
