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

from laid_ds.models.folder import check_folder, check_weights, said_by

transformers.utils.logging.disable_progress_bar()
# Qwen's decoder says that sliding windows are not implemented for this attention; the mask implements them (tests/laws/test_tap.py).
logging.getLogger("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl").addFilter(
    lambda record: "Sliding Window Attention is enabled" not in record.getMessage()
)

# Its table of weights that do not fit is said here in one sentence.
logging.getLogger("transformers.modeling_utils").addFilter(lambda record: "LOAD REPORT" not in record.getMessage())


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


def load_config(path: str | Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a model folder. Raises ValueError when there is none, or when the folder is not a plain model (folder.py)."""
    check_folder(path, trust_remote_code)
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"no model at {path} (no config.json); give the folder that `save_pretrained` wrote")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # a family's own code may raise anything for values that it does not know
        raise ValueError(f"the config at {path} cannot be used: {said_by(error)}") from None


def model_class(config: PretrainedConfig) -> type:
    """The auto class that makes the whole vision-language model of a config; a few families are listed as language models only."""
    known = type(config) in AutoModelForImageTextToText._model_mapping
    own = getattr(config, "auto_map", None) or {}
    return AutoModelForImageTextToText if known or "AutoModelForImageTextToText" in own else AutoModelForCausalLM


def load_model(
    path: str | Path, dtype: str = "float32", deepspeed_config: dict[str, Any] | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The vision-language model of a folder, in evaluation mode, on the CPU or partitioned.

    Raises ValueError when the folder is no plain model (folder.py), or when the weights lack or exceed what the model needs.
    """
    if deepspeed_config is not None:
        open_model(path, trust_remote_code)  # transformers says less of weights that do not fit while it partitions
    with sharded_loading(deepspeed_config):
        model = _from_pretrained(path, trust_remote_code, dtype=getattr(torch, dtype))
    model.config.use_cache = False
    return model


def open_model(path: str | Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The same model on the meta device: of the weights only the headers are read, and what `load_model` refuses is refused."""
    return _from_pretrained(path, trust_remote_code, dtype=torch.float32, device_map="meta")


def _from_pretrained(path: str | Path, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    config = load_config(path, trust_remote_code)
    check_weights(path)
    try:
        model, report = model_class(config).from_pretrained(
            path,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # they are refused below, with the others
            **options,
        )
    except Exception as error:
        on_meta = options.get("device_map") == "meta"
        if not on_meta and not isinstance(error, OSError | ImportError | ValueError):  # may be the machine's fault, of its memory
            open_model(path, trust_remote_code)  # refuses what is the folder's
            raise
        raise ValueError(f"the model at {path} cannot be loaded: {said_by(error)}") from None
    wrong = {name: sorted(map(str, report[name]))[:3] for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[name]}
    if wrong:
        raise ValueError(f"the weights at {path} do not fit the model's config: {wrong}")
    return model
