"""A model with random weights and its processor, made without any download, as an ordinary folder: for tests and the demo."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    Idefics3Processor,
    InternVLProcessor,
    LlavaProcessor,
    PretrainedConfig,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from laid_ds.disk import whole_folder
from laid_ds.files import read_json
from laid_ds.models.attention import attention_shape
from laid_ds.models.chat import turn_text
from laid_ds.models.folder import said_by
from laid_ds.models.load import model_class
from laid_ds.models.processor import SampleLike, offline
from laid_ds.models.sizes import model_sizes

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDS = {"end_of_text": "<|endoftext|>", "start": "<|im_start|>", "end": "<|im_end|>"}
QWEN_MARKS = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>", "image": "<|image_pad|>", "video": "<|video_pad|>"}
INTERNVL_MARKS = {"start_image": "<img>", "end_image": "</img>", "context_image": "<IMG_CONTEXT>", "video": "<video>"}


@dataclass(frozen=True)
class Kind:
    """How the processor of some families is made."""

    shown: str
    """What the chat template writes for an image."""
    marks: dict[str, str]
    """Special tokens by name; NAME_token_id goes into the config."""
    processor: Callable[[Qwen2Tokenizer, dict[str, Any], int, dict[str, list[float]]], ProcessorMixin]
    """(tokenizer, config tree, most tokens of an image, mean and deviation of colours) -> processor."""
    videos: str | None = None
    """Class of the family's video processor. Only torchvision can make one, but a folder that does not describe it opens nowhere."""


def _qwen(stock: type[ProcessorMixin]) -> Callable[..., ProcessorMixin]:
    def make(tokenizer: Qwen2Tokenizer, tree: dict[str, Any], image_tokens: int, colours: dict[str, list[float]]) -> ProcessorMixin:
        vision = tree["vision_config"]
        pixels = (vision["patch_size"] * vision["spatial_merge_size"]) ** 2
        images = Qwen2VLImageProcessorPil(
            min_pixels=pixels,
            max_pixels=pixels * image_tokens,
            patch_size=vision["patch_size"],
            merge_size=vision["spatial_merge_size"],
            temporal_patch_size=2,
            **colours,
        )
        return offline(stock)(image_processor=images, tokenizer=tokenizer, chat_template=_template(QWEN))

    return make


def _internvl(tokenizer: Qwen2Tokenizer, tree: dict[str, Any], image_tokens: int, colours: dict[str, list[float]]) -> ProcessorMixin:
    """One tile an image; the config's downsample_ratio and not `image_tokens` says how many tokens it takes."""
    side, patch = tree["vision_config"]["image_size"][0], tree["vision_config"]["patch_size"][0]
    images = GotOcr2ImageProcessorPil(size={"height": side, "width": side}, min_patches=1, max_patches=1, **colours)
    length = int((side // patch * tree.get("downsample_ratio", 0.5)) ** 2)
    return offline(InternVLProcessor)(
        image_processor=images, tokenizer=tokenizer, image_seq_length=length, chat_template=_template(INTERNVL)
    )


def _llava(tokenizer: Qwen2Tokenizer, tree: dict[str, Any], image_tokens: int, colours: dict[str, list[float]]) -> ProcessorMixin:
    """One token for each patch of CLIP's square image."""
    side, patch = tree["vision_config"]["image_size"], tree["vision_config"]["patch_size"]
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}, **colours)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template(LLAVA),
    )


def _idefics3(tokenizer: Qwen2Tokenizer, tree: dict[str, Any], image_tokens: int, colours: dict[str, list[float]]) -> ProcessorMixin:
    """One tile an image; the config's scale_factor says how many tokens it takes."""
    side, patch = tree["vision_config"]["image_size"], tree["vision_config"]["patch_size"]
    edge = {"longest_edge": side}
    images = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False, **colours)
    length = (side // patch // tree.get("scale_factor", 2)) ** 2
    return Idefics3Processor(image_processor=images, tokenizer=tokenizer, image_seq_len=length, chat_template=_template(LLAVA))


QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
INTERNVL = "<IMG_CONTEXT>"
LLAVA = "<image>"
KINDS = {
    "qwen2_vl": Kind(QWEN, QWEN_MARKS, _qwen(Qwen2VLProcessor), "Qwen2VLVideoProcessor"),
    "qwen2_5_vl": Kind(QWEN, QWEN_MARKS, _qwen(Qwen2_5_VLProcessor), "Qwen2VLVideoProcessor"),
    "qwen3_vl": Kind(QWEN, QWEN_MARKS, _qwen(Qwen3VLProcessor), "Qwen3VLVideoProcessor"),
    "internvl": Kind(INTERNVL, INTERNVL_MARKS, _internvl, "InternVLVideoProcessor"),
    "llava": Kind(LLAVA, {"image": LLAVA}, _llava),
    "idefics3": Kind(LLAVA, {"fake_image": "<fake_token_around_image>", "image": LLAVA, "global_image": "<global-img>"}, _idefics3),
}

SIZED = {"text_config": ("hidden_size", "num_hidden_layers")}
COMMON_FIELDS = (
    *("model_type", "torch_dtype", "auto_map", "_name_or_path", "_attn_implementation", "attn_implementation", "num_labels"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "use_cache", "initializer_range"),
    *("rope_theta", "rope_scaling", "partial_rotary_factor", "head_dim"),
)
"""Fields that transformers takes, or brings into another form, or reads where it finds them, for every class of configs."""
NEUTRAL = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
AS_IMAGES = ("size", "patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std")


def _template(shown: str) -> str:
    return CHAT_TEMPLATE.replace("IMAGE", shown)


def write_new_model(
    model_config: str | Path, output: str | Path, corpus: Sequence[SampleLike], vocabulary: int, image_tokens: int, seed: int
) -> int:
    """Write a model with random weights and its processor as an ordinary folder; returns its number of parameters.

    model_config: JSON with the fields of a transformers config (model_type, text_config, vision_config); the vocabulary, the ids of
    special tokens and the images' normalisation come from `corpus`. Raises ValueError for a wrong config, for a family that no processor
    is made for here, and for a folder that exists.
    """
    path, output = Path(model_config), Path(output)
    if output.exists():
        raise ValueError(f"{output} exists; choose another folder or remove it")
    tree = read_new_config(path)
    with values_of(path):
        processor = train_processor(corpus, vocabulary, tree, image_tokens)
        config = _with_tokens(tree, processor)
    heads, key_heads, _ = attention_shape(config)
    if heads % key_heads:
        raise ValueError(
            f"{path}: num_key_value_heads is {key_heads}, and the {heads} heads of text_config are no multiple of it; make them one"
        )
    try:
        model_sizes(config, "float32")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    torch.manual_seed(seed)
    model = model_class(config).from_config(config)
    with whole_folder(output, f"the model {output.name}", sum(p.numel() * p.element_size() for p in model.parameters())) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        describe_videos(partial / "processor_config.json", KINDS[tree["model_type"]].videos)
    return sum(parameter.numel() for parameter in model.parameters())


def read_new_config(path: Path, parts: Sequence[str] = ("text_config", "vision_config")) -> dict[str, Any]:
    """The fields of a config that a new model is made from; `parts` say how large it is.

    Raises ValueError where there are none, for a family that no processor is made for, for a part that leaves its size to the family (its
    own would be made, of billions), for sizes below 1, and for a field that the family does not know and would keep without a word.
    """
    if not path.is_file():
        raise ValueError(f"no model config at {path}")
    tree = read_json(path)
    if tree.get("model_type") not in tuple(KINDS):
        raise ValueError(f"{path}: no processor is made for model_type {tree.get('model_type')!r}; choose one of {', '.join(KINDS)}")
    for part in parts:
        said = tree.get(part) if isinstance(tree.get(part), dict) else {}
        lacking = [name for name in SIZED.get(part, ()) if name not in said]
        if not said or lacking:
            found = f"has no {lacking[0]}" if said else f"is {json.dumps(tree.get(part))}"
            raise ValueError(f"{path}: {part} {found}; say how large the model shall be, or the family's own size would be made")
    _check_sizes(path, tree)
    with values_of(path):
        config = AutoConfig.for_model(**deepcopy(tree))  # which it changes
    _check_fields(path, tree, config)
    return tree


@contextmanager
def values_of(path: Path) -> Iterator[None]:
    """What a family's own code raises inside the block, of values that it cannot take, is one sentence about the file."""
    try:
        yield
    except OSError:  # of a picture of the corpus
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a usable model config: {said_by(error)}") from None


def _check_sizes(path: Path, tree: dict[str, Any], inside: str = "") -> None:
    """Raises ValueError for a number of things, or a length, below 1: some families make a model of it that cannot see or say anything."""
    for name, value in tree.items():
        if isinstance(value, dict):
            _check_sizes(path, value, f"{inside}{name}.")
        elif name.startswith("num_") or name.endswith(("_size", "_heads", "depth", "scale_factor", "_ratio")):
            numbers = [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int | float)]
            if any(number <= 0 for number in numbers):
                raise ValueError(f"{path}: {inside}{name} is {json.dumps(value)}; give numbers above 0")


def _check_fields(path: Path, tree: dict[str, Any], config: PretrainedConfig, inside: str = "") -> None:
    """Raises ValueError for a field that a config's class does not know, at whatever depth, where the class says what it knows."""
    if not is_dataclass(config):
        return
    known = {field.name for field in fields(config)} | set(config.attribute_map) | set(COMMON_FIELDS)
    for name, value in tree.items():
        if name not in known:
            near = get_close_matches(name, known, n=1)
            meant = f"did you mean {inside}{near[0]}?" if near else "remove it"
            raise ValueError(f"{path}: {inside}{name} is no field of {config.model_type}; {meant}")
        part = getattr(config, name, None)
        if isinstance(value, dict) and isinstance(part, PretrainedConfig):
            _check_fields(path, value, part, f"{inside}{name}.")


def train_processor(corpus: Sequence[SampleLike], vocabulary: int, tree: dict[str, Any], max_image_tokens: int) -> ProcessorMixin:
    """A processor for the family of a config tree: a byte-level BPE tokenizer trained on the corpus' text, and images normalised by the
    mean and deviation of the corpus' images (of at most 500). Raises ValueError for a family that none is made for."""
    if tree["model_type"] not in KINDS:
        raise ValueError(f"no processor is made for model_type {tree['model_type']!r}; choose one of {', '.join(KINDS)}")
    kind = KINDS[tree["model_type"]]
    mean, deviation = _statistics([image for sample in corpus for image in sample.images][:500])
    tokenizer = _train_tokenizer([turn_text(turn) for sample in corpus for turn in sample.turns], vocabulary, kind.marks)
    return kind.processor(tokenizer, tree, max_image_tokens, {"image_mean": mean, "image_std": deviation})


def describe_videos(path: Path, kind: str | None) -> None:
    """Add to a processor's file how frames are seen: as its images are. Without it `AutoProcessor` does not open the folder."""
    tree = read_json(path)
    if kind is not None:
        shared = {name: tree["image_processor"][name] for name in AS_IMAGES if name in tree["image_processor"]}
        path.write_text(json.dumps(tree | {"video_processor": {"video_processor_type": kind} | shared}, indent=2) + "\n")


def _train_tokenizer(texts: Sequence[str], vocabulary: int, marks: dict[str, str]) -> Qwen2Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    roles = ("system", "user", "assistant")  # words of the template, not of the corpus
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(chain(texts, roles), trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    named = {f"{name}_token": mark for name, mark in (ENDS | marks).items()}
    tokenizer = Qwen2Tokenizer(vocab=bpe.get_vocab(), merges=merges, extra_special_tokens=named)
    tokenizer.pad_token, tokenizer.eos_token = "<|endoftext|>", "<|im_end|>"
    return tokenizer


def _statistics(images: Sequence[bytes]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each colour channel in [0, 1]; those of many public processors where there is no image."""
    if not images:
        return NEUTRAL["image_mean"], NEUTRAL["image_std"]
    pixels = np.concatenate([_rgb(image).reshape(-1, 3) for image in images]) / 255
    return pixels.mean(0).tolist(), pixels.std(0).tolist()


def _rgb(image: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(image)) as opened:
        return np.asarray(opened.convert("RGB"), np.float64)


def _with_tokens(tree: dict[str, Any], processor: ProcessorMixin) -> PretrainedConfig:
    """The config with everything that the tokenizer decides filled in."""
    tokenizer, marks = processor.tokenizer, KINDS[tree["model_type"]].marks
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = tree["text_config"] | ends | {"vocab_size": len(tokenizer)}
    return AutoConfig.for_model(**(tree | ids | {"image_token_id": processor.image_token_id, "text_config": text}))
