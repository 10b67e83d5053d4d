"""LoRA (Hu et al., 2022) by `peft`: low-rank factors beside the decoder's own weights, which stay frozen, and their merge for export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from laid_ds.config import Lora
from laid_ds.models.attention import decoder

A, B, BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."  # peft's names


def add_lora(model: PreTrainedModel, options: Lora, seed: int) -> None:
    """Freeze the model and put factors, which start as nothing, beside the linear layers of its decoder that `options.targets` names.

    The model may be partitioned. Raises ValueError when `peft` is not installed and for a name that is no linear layer there.
    """
    check_peft()
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    settings = LoraConfig(
        r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout, target_modules=_targets(model, options.targets)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(model.dtype)


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes as if it had no factors."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert not any(layer.disable_adapters for layer in layers)
    for layer in layers:
        layer._disable_adapters = True  # peft's enable_adapters(False) would also switch the factors' gradients off
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def check_peft() -> None:
    """Raises ValueError when `peft` is not installed."""
    if find_spec("peft") is None:
        raise ValueError("student.lora needs the extra: pip install 'laid-ds[lora]'")


def factor_elements(model: PreTrainedModel, options: Lora) -> int:
    """Elements of all factors beside this model's layers. Raises ValueError for a target that is no linear layer of the decoder."""
    layers = [model.get_submodule(name) for name in _targets(model, options.targets)]
    return sum(options.rank * (layer.in_features + layer.out_features) for layer in layers)


def merge_lora(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Weights under peft's names -> those of the stock model, in fp32: W + scale B A, with scale = alpha / rank."""
    merged = {name.replace(BASE, "."): tensor.float() for name, tensor in weights.items() if not name.endswith((A, B))}
    for name in weights:
        if name.endswith(A):
            layer = name.removesuffix(A)
            merged[f"{layer}.weight"] = merged[f"{layer}.weight"] + scale * weights[layer + B].float() @ weights[name].float()
    return merged


def _targets(model: PreTrainedModel, names: tuple[str, ...]) -> list[str]:
    """Full names of the decoder's linear layers whose last name is asked for."""
    inside = {id(module) for layer in decoder(model).layers for module in layer.modules() if isinstance(module, nn.Linear)}
    linear = [name for name, module in model.named_modules() if id(module) in inside]
    known = {name.rsplit(".", 1)[-1] for name in linear}
    unknown = sorted(set(names) - known)
    if unknown:
        raise ValueError(f"student.lora.targets: {unknown} are no linear layers of the decoder, which has {sorted(known)}")
    return [name for name in linear if name.rsplit(".", 1)[-1] in names]
