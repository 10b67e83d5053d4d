"""How large a model is, from its config alone: it is made, and its decoder run, on the meta device, without weights or memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from laid_ds.models.attention import attention_shape, decoder, vision_tower
from laid_ds.models.family import Family, trainable
from laid_ds.models.folder import first_paragraph, said_by
from laid_ds.models.load import model_class
from laid_ds.models.meta_run import OUTSIDE, Attention, MetaRun, meta_run
from laid_ds.models.rope_gain import gain_shapes

MEASURED_TOKENS = 1024
MERGED_SIDES = ("spatial_merge_size", "scale_factor", "downsample_factor", "pooling_kernel_size")
BLOCKS_IN_WINDOWS = ("gemma4_text",)  # tokens of an image see each other in the layers with windows alone
SHRUNK_SIDES = ("downsample_ratio", "pixel_shuffle_ratio")
MERGED_PATCHES = {"minicpmv4_6": 16.0, "got_ocr2": 16.0, "molmo2": 4.0, "phi4_multimodal": 4.0}  # in their code; no config says it


@dataclass(frozen=True)
class Sizes:
    """Counts of elements, and bytes where a name says so."""

    name: str
    """model_type of the whole model."""
    parameters: dict[str, int]
    """Elements by name; a tied head is counted once."""
    vision: frozenset[str] | None
    """Names of the parameters that student.freeze_vision freezes; None where it finds no vision tower."""
    constant: frozenset[str]
    """Names of the parameters that no run trains (biases that a router moves by itself)."""
    embedding: str
    """Name of the table that student.freeze_embeddings freezes."""
    images: int
    """Elements that only images pass: the vision tower and what joins it to the decoder."""
    linear: tuple[tuple[str, int, int], ...]
    """Last name, outputs and inputs of each linear layer of the decoder's layers."""
    largest_module: int
    """Elements of the largest of: a decoder layer, and what any other module holds by itself (the embedding, the head)."""
    layers: int
    hidden: int
    heads: tuple[int, int, int]
    """(H, K, D)."""
    gains: tuple[tuple[int, int], ...] | None
    """Shape of the gain of each layer that has attention; None where a gain folds nowhere."""
    vocabulary: int
    flops_per_token: int
    """Of the matrix products of decoder and head, forward, and of the experts that a token meets; attention's scores are not among them."""
    attention: dict[Attention, int]
    """Layers of each kind of attention; what is not among them has linear attention or a convolution."""
    kept_bytes: int
    """What one token leaves in one decoder layer, in the mean, for the backward pass, without activation checkpointing."""
    heaviest_bytes: int
    """The same in the layer that keeps most."""
    outside_bytes: int
    """The same before and after all layers (rotations, the last norm)."""
    widest_bytes: int
    """The widest tensor among it (of the MLP), per token."""
    vision_layers: int
    vision_hidden: int
    patches_per_token: float
    values_per_token: float
    """Numbers in the pictures behind each image token: channels of pixels, as often as the family's tensors hold them."""
    sliceable: bool
    """Whether ranks can share its rows (sequence_parallel)."""
    shares_images: bool
    """Whether they then encode its images once, each some of them."""

    def total(self) -> int:
        return sum(self.parameters.values())


def read_config(path: str | Path) -> PretrainedConfig:
    """A transformers config from a JSON file. Raises ValueError when there is none or it cannot be used."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no model config at {path}; give one with --student-config or --teacher-config (recipes/configs/ holds some)")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a family's own code may raise anything for values that it does not know
        raise ValueError(f"{path} is not a usable model config: {said_by(error)}") from None


def model_sizes(config: PretrainedConfig, dtype: str) -> Sizes:
    """Sizes of the model that this config describes, with its parameters in `dtype`.

    Raises ValueError for a family that is not trained here, for a config of which no model can be made, and for a decoder that does not run
    without weights.
    """
    expected, text = trainable(config), config.get_text_config()
    model = _made(config, dtype)
    inside, head = decoder(model), model.get_output_embeddings()
    language = _language(model)
    gains = None if expected.gain == "none" else tuple(gain_shapes(model).values())
    run = _run(model, expected)
    of_layers = [run.kept[layer] for layer in range(len(inside.layers))]
    return Sizes(
        name=config.model_type,
        parameters={name: parameter.numel() for name, parameter in model.named_parameters()},
        vision=_tower_names(model),
        constant=frozenset(name for name, parameter in model.named_parameters() if not parameter.requires_grad),
        embedding=next(name for name, parameter in model.named_parameters() if parameter is model.get_input_embeddings().weight),
        images=sum(
            parameter.numel() for name, parameter in model.named_parameters() if id(parameter) not in language and "audio" not in name
        ),
        linear=tuple(
            (name.rsplit(".", 1)[-1], *module.weight.shape)
            for name, module in inside.layers.named_modules()
            if isinstance(module, nn.Linear)
        ),
        largest_module=max(
            *(sum(parameter.numel() for parameter in layer.parameters()) for layer in inside.layers),
            *(sum(parameter.numel() for parameter in module.parameters(recurse=False)) for module in model.modules()),
        ),
        layers=len(inside.layers),
        hidden=text.hidden_size,
        heads=attention_shape(config),
        gains=gains,
        vocabulary=text.vocab_size,
        flops_per_token=run.flops // MEASURED_TOKENS + 2 * head.weight.numel(),
        attention=dict(Counter(run.attention)),
        kept_bytes=round(sum(of_layers) / MEASURED_TOKENS / len(of_layers)),
        heaviest_bytes=max(of_layers) // MEASURED_TOKENS,
        outside_bytes=run.kept[OUTSIDE] // MEASURED_TOKENS,
        widest_bytes=run.widest // MEASURED_TOKENS,
        **_of_vision(config),
        sliceable=expected.sliceable,
        shares_images=expected.shares_images,
    )


def _made(config: PretrainedConfig, dtype: str) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            return model_class(config).from_config(config, dtype=getattr(torch, dtype))
    except Exception as error:  # a family's own code may raise anything for numbers that do not go together
        raise ValueError(
            f"no {config.model_type} model can be made of this config ({type(error).__name__}: {first_paragraph(error)})"
        ) from error


def _run(model: PreTrainedModel, expected: Family) -> MetaRun:
    """The decoder's forward pass."""
    try:
        return meta_run(model, MEASURED_TOKENS, partial(_is_masked, model.config.get_text_config(), expected))
    except Exception as error:
        raise ValueError(
            f"{expected.model_type} with the text decoder {expected.decoder} cannot be planned: without weights its decoder does not run"
            f" ({type(error).__name__}: {first_paragraph(error)})"
        ) from error


def _is_masked(text: PretrainedConfig, expected: Family, layer: int) -> bool:
    """Whether a layer's mask is a tensor: where images are blocks, and for windows and chunks of families that do not pack (attention.py
    gives the others bounds in place of a mask)."""
    kind = (getattr(text, "layer_types", None) or {layer: "full_attention"})[layer]
    if kind == "full_attention":
        return expected.image_blocks and expected.decoder not in BLOCKS_IN_WINDOWS
    return not expected.packable and kind in ("sliding_attention", "chunked_attention")


def _language(model: PreTrainedModel) -> set[int]:
    """Ids of the parameters of decoder and head, without encoders that the decoder holds inside."""
    inside = decoder(model)
    encoders = [module for module in inside.modules() if isinstance(module, PreTrainedModel) and module.config is not inside.config]
    encoded = {id(parameter) for module in encoders for parameter in module.parameters()}
    own = {id(parameter) for module in (inside, model.get_output_embeddings()) for parameter in module.parameters()}
    return own - encoded


def _tower_names(model: PreTrainedModel) -> frozenset[str] | None:
    try:
        tower = {id(parameter) for parameter in vision_tower(model).parameters()}
    except ValueError:  # it says that nothing can be frozen, which is the answer
        return None
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in tower)


def _of_vision(config: PretrainedConfig) -> dict[str, Any]:
    """Layers and width of the vision tower, and what stands behind each image token, as the family's config says it."""
    vision = config.vision_config
    fields = config.to_dict() | vision.to_dict() | {"model_type": config.model_type}
    patches, side = _patches_per_token(fields), fields.get("patch_size") or 14
    side = max(side) if isinstance(side, list | tuple) else side
    return {
        "vision_layers": fields.get("depth") or vision.num_hidden_layers,
        "vision_hidden": fields.get("embed_dim") or vision.hidden_size,
        "patches_per_token": patches,
        "values_per_token": patches * 3 * side**2 * fields.get("temporal_patch_size", 1),
    }


def _patches_per_token(fields: dict[str, Any]) -> float:
    """By the names that families give it: a square of patches is merged, or so many tokens are left of an image, or each patch is one."""
    for name in MERGED_SIDES:
        if fields.get(name):
            return float(fields[name]) ** 2
    for name in SHRUNK_SIDES:
        if fields.get(name):
            return float(fields[name]) ** -2
    latents = (fields.get("perceiver_config") or {}).get("resampler_n_latents")
    queries = fields.get("projector_patch_to_query_dict") or {}
    left = fields.get("mm_tokens_per_image") or latents
    if queries:
        return max(int(patches) / tokens for patches, tokens in queries.items())
    if left:
        size, patch = (max(value) if isinstance(value, list | tuple) else value for value in (fields["image_size"], fields["patch_size"]))
        return (size // patch) ** 2 / left
    return MERGED_PATCHES.get(fields["model_type"], 1.0)
