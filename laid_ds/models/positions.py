"""Position ids of one sample, as its model would number it: for samples that share a row and so must bring theirs along."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PretrainedConfig

from laid_ds.models.family import check_packable
from laid_ds.models.load import model_class

Rule = Callable[[Mapping[str, Tensor]], Tensor]


def position_rule(config: PretrainedConfig) -> Rule:
    """From one sample's inputs to its position ids: [1, T] counting tokens, or [4, T] where a token has a place in time, height and width
    (the first row counts tokens; transformers finds the samples of a row by it).

    The model's own code numbers the axes; the model is made on the meta device, without weights. Raises ValueError for a family that
    cannot be packed.
    """
    if check_packable(config).positions == "1d":
        return lambda inputs: _count(inputs)
    with torch.device("meta"):
        model = model_class(config).from_config(config)
    number = (model.model if hasattr(model.model, "get_rope_index") else model).get_rope_index
    names = inspect.signature(number).parameters

    def rule(inputs: Mapping[str, Tensor]) -> Tensor:
        mask = {"attention_mask": torch.ones_like(inputs["input_ids"])}
        axes, _ = number(**{name: tensor for name, tensor in (mask | dict(inputs)).items() if name in names})
        return torch.cat([_count(inputs), axes[:, 0].long()])

    return rule


def _count(inputs: Mapping[str, Tensor]) -> Tensor:
    return torch.arange(inputs["input_ids"].shape[1])[None]
