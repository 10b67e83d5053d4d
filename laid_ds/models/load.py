"""Stock folders in: models from `from_pretrained`, sharded while they load under ZeRO-3 and refused when anything is missing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from laid_ds.files import read_json

transformers.utils.logging.disable_progress_bar()
# Qwen's decoder says that sliding windows are not implemented for this attention; the mask implements them (tests/laws/test_tap.py).
logging.getLogger("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl").addFilter(
    lambda record: "Sliding Window Attention is enabled" not in record.getMessage()
)


@contextmanager
def sharded_loading(deepspeed_config: dict[str, Any] | None) -> Iterator[None]:
    """Inside the block, models are partitioned as they load if the DeepSpeed config asks for ZeRO stage 3."""
    if (deepspeed_config or {}).get("zero_optimization", {}).get("stage") != 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    keep_alive = HfDeepSpeedConfig(deepspeed_config)  # transformers itself holds only a weak reference
    try:
        yield
    finally:
        del keep_alive
        unset_hf_deepspeed_config()


def load_config(path: str | Path) -> PretrainedConfig:
    """The config of a model folder. Raises ValueError when there is none, or what stands there is no JSON."""
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"no model at {path} (no config.json); give the folder that `save_pretrained` wrote")
    read_json(Path(path) / "config.json", plain=True)  # transformers' own errors name neither line nor cause
    return AutoConfig.from_pretrained(path, local_files_only=True)


def model_class(config: PretrainedConfig) -> type:
    """The auto class that makes the whole vision-language model of a config; a few families are listed as language models only."""
    known = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if known else AutoModelForCausalLM


def load_model(path: str | Path, dtype: str = "float32", deepspeed_config: dict[str, Any] | None = None) -> PreTrainedModel:
    """The vision-language model of a folder, in evaluation mode, on the CPU or partitioned.

    Raises ValueError when the folder is no model, or when the weights lack or exceed what the model needs.
    """
    config = load_config(path)
    with sharded_loading(deepspeed_config):
        try:
            model, report = model_class(config).from_pretrained(
                path, dtype=getattr(torch, dtype), output_loading_info=True, local_files_only=True
            )
        except OSError as error:
            raise ValueError(f"the model at {path} cannot be loaded: {error}") from None
    wrong = {name: sorted(report[name])[:3] for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[name]}
    if wrong:
        raise ValueError(f"the weights at {path} do not fit the model's config: {wrong}")
    model.config.use_cache = False
    return model
