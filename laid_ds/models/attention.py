"""The attention function `laid`: SDPA's output, a gain on the queries, and a tap that hands out queries and keys after RoPE.

It is set on the decoder only. A tap that is closed stores nothing; the output is the same, bit for bit, whether it is open or closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "laid"  # a name with "flash" or "/" in it would make transformers look for a package or a hub kernel


@dataclass(frozen=True)
class Captured:
    """What one attention layer compared in one forward pass."""

    query: Tensor
    """[B, H, T, D] after RoPE, and after the gain if there is one."""
    key: Tensor
    """[B, K, T, D] after RoPE, not repeated."""
    scale: float
    """Factor on the scores, from the model's own call."""
    window: int | None
    """Sliding window of the layer in tokens (a row sees itself and window - 1 tokens before), or None."""


@dataclass
class Tap:
    """Collects `Captured` of chosen decoder layers while it is open."""

    layers: Sequence[int]
    captured: dict[int, Captured] = field(default_factory=dict)
    is_open: bool = False

    @contextmanager
    def open(self) -> Iterator[dict[int, Captured]]:
        """Collect inside the block. Recomputation in the backward pass happens outside it, so nothing is stored twice."""
        self.captured, self.is_open = {}, True
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


def laid_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **kwargs
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H, T, D], key and value [B, K, S, D] -> ([B, T, H, D], None)."""
    listening: Listening | None = getattr(module, "_laid", None)
    if listening is not None and listening.gain is not None:
        query = listening.gain(query)
    if listening is not None and listening.tap is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        listening.tap.take(listening.layer, Captured(query, key, scale, kwargs.get("sliding_window")))
    attend = sdpa_attention_forward if listening is None else listening.attend
    return attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(NAME, laid_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # an unregistered name would silently get no mask at all


def decoder(model: PreTrainedModel) -> nn.Module:
    """The text decoder, the module that owns `.layers`."""
    found = model.get_decoder()
    return found if hasattr(found, "layers") else found.model


def vision_tower(model: PreTrainedModel) -> nn.Module:
    """The image encoder, with the projector where the family keeps it inside. Raises ValueError when none of the usual names is there."""
    names = ("visual", "vision_tower", "vision_model", "vision_embed_tokens")
    for name in names:
        if hasattr(model.model, name):
            return getattr(model.model, name)
    raise ValueError(f"{type(model).__name__} has no vision tower under the names {', '.join(names)}; set student.freeze_vision = false")


def attention_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Decoder layer index -> its attention module; layers without attention (linear attention, convolution) are left out."""
    return {i: layer.self_attn for i, layer in enumerate(decoder(model).layers) if hasattr(layer, "self_attn")}


def listen(
    model: PreTrainedModel,
    tap: Tap | None = None,
    gains: dict[int, Callable[[Tensor], Tensor]] | None = None,
    attend: Callable[..., tuple[Tensor, None]] = sdpa_attention_forward,
) -> None:
    """Put the model's decoder on the `laid` attention function, with a tap, gains and what attends. The vision tower is left as it is.

    Raises ValueError for a tapped layer that has no attention.
    """
    attentions = attention_layers(model)
    missing = [layer for layer in (tap.layers if tap else ()) if layer not in attentions]
    if missing:
        raise ValueError(f"decoder layers {missing} have no attention to listen to; layers with attention: {sorted(attentions)}")
    decoder(model).set_attn_implementation(NAME)
    for index, attention in attentions.items():
        object.__setattr__(attention, "_laid", Listening(index, tap, (gains or {}).get(index), attend))


def rotary_planes(model: PreTrainedModel, layer: int) -> int:
    """P, the number of rotary planes of a query head of a layer; layers of different types may differ."""
    rotary, kinds = decoder(model).rotary_emb, getattr(model.config.get_text_config(), "layer_types", None)
    of_kind = getattr(rotary, f"{kinds[layer]}_inv_freq", None) if kinds else None
    return (rotary.inv_freq if of_kind is None else of_kind).numel()


def last_hidden_state(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    """[B, T, hidden]: what the decoder hands to the head. The head is left out where the model's classes allow it, else run on one row.

    Raises ValueError for images without what tells their tokens from text, since positions would silently count along one axis.
    """
    if "image_grid_thw" in inputs and not inputs.keys() & {"mm_token_type_ids", "position_ids"}:
        raise ValueError("images came without mm_token_type_ids: pass all that the processor returns, or position_ids")
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


def attention_shape(model_config: PretrainedConfig) -> tuple[int, int, int]:
    """(H, K, D) of the decoder."""
    config = model_config.get_text_config()
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
