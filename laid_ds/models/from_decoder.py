"""Models made of others: a vision-language model around the decoder of a pretrained text model, and a model of which some decoder layers
are left. Both are ordinary folders, written whole or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from laid_ds.disk import whole_folder
from laid_ds.models.attention import decoder
from laid_ds.models.folder import check_folder, copy_beside, first_paragraph, said_by
from laid_ds.models.load import load_model, model_class
from laid_ds.models.new_model import KINDS, NEUTRAL, describe_videos, read_new_config, values_of

PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Fields of a decoder's config with one entry for each layer."""


def write_around_decoder(
    model_config: str | Path, pretrained: str | Path, output: str | Path, template: str | None, image_tokens: int, seed: int
) -> int:
    """Write a vision-language model whose decoder and tokenizer are a pretrained text model's, and whose tower is random; returns its
    number of parameters.

    model_config: JSON with model_type, vision_config and what else the family's config wants beside text_config, which is the decoder's;
    pretrained: a folder of a causal language model, or a GGUF file of one, which is dequantised to fp32 (needs the package gguf);
    template: the chat template as text; None: the tokenizer's own. The family's marks of images become new tokens: their embeddings are
    the mean of the others. Raises ValueError for a config or a decoder that cannot be used, and for a folder that exists.
    """
    output = Path(output)
    if output.exists():
        raise ValueError(f"{output} exists; choose another folder or remove it")
    tree = read_new_config(Path(model_config), ["vision_config"])
    kind = KINDS[tree["model_type"]]
    text, tokenizer = _load_text_model(Path(pretrained), {f"{name}_token": mark for name, mark in kind.marks.items()})
    with values_of(Path(model_config)):
        processor = kind.processor(tokenizer, tree, image_tokens, NEUTRAL)
    processor.chat_template = template if template is not None else tokenizer.chat_template
    if processor.chat_template is None:
        raise ValueError(f"the tokenizer of {pretrained} has no chat template: give one (--template)")
    _grow(text, len(processor.tokenizer))
    model = _model_around(text, tree, processor, seed)
    with whole_folder(output, f"the model {output.name}", num_bytes(model)) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        describe_videos(partial / "processor_config.json", kind.videos)
    return model.num_parameters()


def _load_text_model(path: Path, marks: dict[str, str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in fp32, and its tokenizer with these special tokens beside its own. Raises ValueError where none can be
    read."""
    if not path.exists():
        raise ValueError(f"no decoder at {path}: give the folder of a causal language model, or a GGUF file")
    folder, options = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    if path.is_dir():
        check_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, extra_special_tokens=marks, **options)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **options)
    except ImportError as error:
        raise ValueError(f"{path} cannot be read: {first_paragraph(error)} (pip install 'laid-ds[study]')") from None
    except Exception as error:  # transformers raises anything on files that are not what they should be
        raise ValueError(f"{path} is no causal language model that transformers reads: {said_by(error)}") from None
    return model, tokenizer


def _grow(text: PreTrainedModel, tokens: int) -> None:
    """As many rows of embeddings as tokens; new ones are the mean of the old."""
    old = text.get_input_embeddings().weight.shape[0]
    if tokens <= old:
        return
    text.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        for table in {text.get_input_embeddings().weight, text.get_output_embeddings().weight}:
            table[old:] = table[:old].mean(0)


def _model_around(text: PreTrainedModel, tree: dict[str, Any], processor: Any, seed: int) -> PreTrainedModel:
    """The family's model with this decoder and a random tower. Raises ValueError where decoder and family do not fit."""
    tokenizer, marks = processor.tokenizer, KINDS[tree["model_type"]].marks
    own = text.config.to_dict()
    own = {
        name: value
        for name, value in own.items()
        if name not in ("quantization_config", "architectures", "transformers_version", "_name_or_path")
    }
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    parts = {"text_config": own | ends, "image_token_id": processor.image_token_id, "tie_word_embeddings": own["tie_word_embeddings"]}
    try:
        config = AutoConfig.for_model(**(tree | ids | parts))
        torch.manual_seed(seed)
        model = model_class(config).from_config(config, dtype=torch.float32)
    except Exception as error:  # a family's own code may raise anything for values that do not go together
        raise ValueError(f"{tree['model_type']} takes no such config: {said_by(error)}") from None
    ours, theirs = decoder(model), decoder(text)
    if type(ours) is not type(theirs):
        raise ValueError(f"the decoder is a {type(theirs).__name__}, and {tree['model_type']} has a {type(ours).__name__} around it")
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        model.get_output_embeddings().weight.copy_(text.get_output_embeddings().weight)
    return model


def write_with_layers(stock: str | Path, output: str | Path, layers: Sequence[int]) -> int:
    """Write the model at `stock` with only these decoder layers, in this order; returns its number of parameters. Processor and chat
    template come along. Raises ValueError for layers that do not exist or come twice, for a model that says more of its layers by number
    than is understood here, and for a folder that exists."""
    stock, output = Path(stock), Path(output)
    if output.exists():
        raise ValueError(f"{output} exists; choose another folder or remove it")
    model = load_model(stock)
    text, had = model.config.get_text_config(), len(decoder(model).layers)
    wrong = [layer for layer in layers if not 0 <= layer < had]
    if wrong or len(set(layers)) != len(layers) or not layers:
        raise ValueError(f"--layers {','.join(map(str, layers))}: name some of the layers 0 to {had - 1} of {stock}, each once")
    lists = {name: value for name, value in text.to_dict().items() if isinstance(value, list) and len(value) == had}
    if unknown := sorted(lists.keys() - set(PER_LAYER)):
        raise ValueError(f"{stock} says {', '.join(unknown)} for each of its {had} layers, and which of that stays is not known here")
    whole = decoder(model)
    whole.layers = nn.ModuleList([whole.layers[layer] for layer in layers])
    for name, value in lists.items():
        setattr(text, name, [value[layer] for layer in layers])
    text.num_hidden_layers = len(layers)
    model.config.use_cache = True
    with whole_folder(output, f"the model {output.name}", num_bytes(model)) as partial:
        model.save_pretrained(partial)
        copy_beside(stock, partial)
    return model.num_parameters()


def num_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
