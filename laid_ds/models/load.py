"""Stock folders in: models from `from_pretrained`, sharded while they load under ZeRO-3 and refused when anything is missing."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from laid_ds.models.processor import OfflineProcessor, SampleLike, train_processor

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
    """The config of a model folder. Raises ValueError when there is none."""
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"no model at {path} (no config.json); give the folder that `save_pretrained` wrote")
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


def write_new_model(
    model_config: str | Path, output: str | Path, corpus: Sequence[SampleLike], vocabulary: int, image_tokens: int, seed: int
) -> int:
    """Write a model with random weights and its processor as an ordinary folder; returns its number of parameters.

    model_config: JSON with the fields of a transformers config (model_type, text_config, vision_config); the vocabulary, the ids of
    special tokens and the images' normalisation come from `corpus`. Raises ValueError for a wrong config and for a folder that exists.
    """
    path, output = Path(model_config), Path(output)
    if output.exists():
        raise ValueError(f"{output} exists; choose another folder or remove it")
    if not path.is_file():
        raise ValueError(f"no model config at {path}")
    try:
        tree = json.loads(path.read_text())
        vision = tree["vision_config"]
        processor = train_processor(corpus, vocabulary, vision["patch_size"], vision["spatial_merge_size"], image_tokens)
        config = _with_tokens(tree, processor)
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{path} is not a usable model config: {error!r}") from None
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    return sum(parameter.numel() for parameter in model.parameters())


def _with_tokens(tree: dict[str, Any], processor: OfflineProcessor) -> PretrainedConfig:
    """The config with everything that the tokenizer decides filled in."""
    tokenizer = processor.tokenizer
    marks = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = tree["text_config"] | ends | {"vocab_size": len(tokenizer)}
    return AutoConfig.for_model(**(tree | ids | {"text_config": text}))
