"""Stock folder out: the gain folded into the weights, nothing of laid_ds left in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from laid_ds.models.attention import attention_layers
from laid_ds.models.load import load_model
from laid_ds.models.processor import load_processor
from laid_ds.models.rope_gain import fold


def write_student(
    stock: str | Path, weights: Mapping[str, Tensor], gains: Mapping[int, Tensor], dtype: str, output: str | Path, card: str
) -> None:
    """Write model, processor and model card to `output`.

    stock: the folder the student was loaded from (config, processor, and any weights that were not trained);
    weights: the trained parameters under the model's own names; gains: decoder layer -> theta [H, P].
    The folder appears whole or not at all. Raises ValueError when `output` exists or a weight has no place in the model.
    """
    output = Path(output)
    if output.exists():
        raise ValueError(f"{output} exists; choose another folder or remove it")
    model = load_model(stock, "float32")
    unknown = model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"the checkpoint holds weights that the model at {stock} has no place for: {unknown[:3]}")
    layers = attention_layers(model)
    for layer, theta in gains.items():
        fold(layers[layer], theta)
    model.to(getattr(torch, dtype))
    model.config.use_cache = True
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    load_processor(stock).save_pretrained(partial)
    (partial / "README.md").write_text(card)
    os.replace(partial, output)
