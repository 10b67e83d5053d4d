"""Stock folder out: the gain folded into the weights, nothing of laid_ds left in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from laid_ds.disk import whole_folder
from laid_ds.models.attention import attention_layers
from laid_ds.models.folder import copy_beside
from laid_ds.models.image_pixels import Limits, write_limits
from laid_ds.models.load import load_model
from laid_ds.models.numbering import record_numbering
from laid_ds.models.probe import probe
from laid_ds.models.processor import load_processor
from laid_ds.models.rope_gain import fold


def write_student(
    stock: str | Path,
    weights: Mapping[str, Tensor],
    gains: Mapping[int, Tensor],
    dtype: str,
    output: str | Path,
    card: str,
    trust_remote_code: bool = False,
    image_pixels: Limits | None = None,
    number_images: bool = False,
) -> None:
    """Write model, processor and model card to `output`.

    stock: the folder the student was loaded from (config, processor, and any weights that were not trained);
    weights: the trained parameters under the model's own names; gains: decoder layer -> theta [H, P] or [1, P];
    image_pixels: the limits within which it saw its images, which the folder's processor is to keep;
    number_images: how it was trained, which the folder tells those who ask it.
    The folder appears whole or not at all. Raises ValueError when `output` exists, a weight has no place in the model, or the model is
    not what the table of families says, so that a gain would fold into something else; DiskError when the disk has no room for it.
    """
    output = Path(output)
    if output.exists():
        raise ValueError(f"{output} exists; choose another folder or remove it")
    model = load_model(stock, "float32", trust_remote_code=trust_remote_code)
    unknown = model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"the checkpoint holds weights that the model at {stock} has no place for: {unknown[:3]}")
    if gains:
        fold_gains(model, gains)
    model.to(getattr(torch, dtype))
    model.config.use_cache = True
    with whole_folder(output, f"the model {output.name}", sum(p.numel() * p.element_size() for p in model.parameters())) as partial:
        model.save_pretrained(partial)
        copy_beside(Path(stock), partial, code=trust_remote_code)
        if image_pixels is not None:
            write_limits(partial, load_processor(partial, trust_remote_code), image_pixels)
        record_numbering(partial, number_images)
        (partial / "README.md").write_text(card)


def fold_gains(model: PreTrainedModel, gains: Mapping[int, Tensor]) -> None:
    """Fold every layer's gain into the model, which is probed first. Raises ValueError when the probe does."""
    layout, layers = probe(model).layout, attention_layers(model)
    for layer, theta in gains.items():
        fold(layers[layer], theta, layout)
