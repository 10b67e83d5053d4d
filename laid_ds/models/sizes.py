"""How large a model is, from its config alone: it is made, and its decoder run, on the meta device, without weights or memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, PretrainedConfig, PreTrainedModel

from laid_ds.models.attention import attention_layers, attention_shape, decoder, rotary_planes
from laid_ds.models.load import model_class

NAME = "laid_sizes"
MEASURED_TOKENS = 1024


@dataclass(frozen=True)
class Sizes:
    """Counts of elements, and bytes where a name says so."""

    parameters: dict[str, int]
    """Elements by name; a tied head is counted once."""
    vision: frozenset[str]
    """Names of the parameters that are neither of the decoder nor of the head."""
    linear: tuple[tuple[str, int, int], ...]
    """Last name, outputs and inputs of each linear layer of the decoder's layers."""
    largest_module: int
    """Elements of the largest of: a decoder layer, the embedding, the head."""
    layers: int
    hidden: int
    heads: tuple[int, int, int]
    """(H, K, D)."""
    planes: int
    """P, rotary planes of a query head."""
    vocabulary: int
    kept_bytes: int
    """What one token leaves in one decoder layer for the backward pass, without activation checkpointing."""
    widest_bytes: int
    """The widest tensor among it (of the MLP), per token."""
    vision_layers: int
    vision_hidden: int
    patches_per_token: int

    def total(self) -> int:
        return sum(self.parameters.values())


def read_config(path: str | Path) -> PretrainedConfig:
    """A transformers config from a JSON file. Raises ValueError when there is none or it names no model_type."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no model config at {path}; give one with --student-config or --teacher-config (recipes/configs/ holds some)")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (json.JSONDecodeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a usable model config: {error}") from None


def model_sizes(config: PretrainedConfig, dtype: str) -> Sizes:
    """Sizes of the model that this config describes, with its parameters in `dtype`."""
    with torch.device("meta"):
        model = model_class(config).from_config(config, dtype=getattr(torch, dtype))
    text, vision = config.get_text_config(), config.vision_config
    inside, head = decoder(model), model.get_output_embeddings()
    language = {id(parameter) for module in (inside, head) for parameter in module.parameters()}
    parts = [*inside.layers, model.get_input_embeddings(), head]
    kept, widest = _kept_bytes(model)
    return Sizes(
        parameters={name: parameter.numel() for name, parameter in model.named_parameters()},
        vision=frozenset(name for name, parameter in model.named_parameters() if id(parameter) not in language),
        linear=tuple(
            (name.rsplit(".", 1)[-1], *module.weight.shape)
            for name, module in inside.layers.named_modules()
            if isinstance(module, torch.nn.Linear)
        ),
        largest_module=max(sum(parameter.numel() for parameter in part.parameters()) for part in parts),
        layers=len(inside.layers),
        hidden=text.hidden_size,
        heads=attention_shape(config),
        planes=rotary_planes(model, next(iter(attention_layers(model)))),
        vocabulary=text.vocab_size,
        kept_bytes=kept,
        widest_bytes=widest,
        vision_layers=getattr(vision, "depth", None) or vision.num_hidden_layers,
        vision_hidden=vision.hidden_size,
        patches_per_token=getattr(vision, "spatial_merge_size", 1) ** 2,
    )


def _kept_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """Bytes per token that autograd keeps of a forward pass through the decoder: in each layer, and of the widest tensor."""
    inside, kept = decoder(model).train(), {}
    inside.set_attn_implementation(NAME)
    owned = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    alive = []  # a storage's address may be given again once it is freed

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        embedded = torch.empty(1, MEASURED_TOKENS, inside.config.hidden_size, dtype=model.dtype, device="meta", requires_grad=True)
        inside(inputs_embeds=embedded, use_cache=False)
    return round(sum(kept.values()) / MEASURED_TOKENS / len(inside.layers)), max(kept.values()) // MEASURED_TOKENS


class _Flash(torch.autograd.Function):
    """Keeps what every flash kernel keeps: query, key, value, output and log-sum-exp; never [T, S]."""

    @staticmethod
    def forward(context, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query.transpose(1, 2))
        context.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output


def _attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options) -> tuple[Tensor, None]:
    return _Flash.apply(query, key, value), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda *arguments, **options: None)
