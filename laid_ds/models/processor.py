"""Text and images to tensors with the model's own processor, without torchvision, and with the answers marked for supervision."""

from __future__ import annotations

import io
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import Qwen2_5_VLProcessor, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

ANSWER, END = "\ue000", "\ue001"  # private-use marks around answers; removed again after the chat template has run
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


class TurnLike(Protocol):
    """A turn: a role, and text (str) and images (int) in order (data.record.Turn is one)."""

    role: str
    segments: tuple[str | int, ...]


class SampleLike(Protocol):
    """Turns and their encoded images (data.record.Sample is one)."""

    key: str
    turns: tuple[TurnLike, ...]
    images: tuple[bytes, ...]


class PixelsLike(Protocol):
    """How encoded images become pixels of a wanted size (data.images.Pixels is one)."""

    def decode(self, data: bytes) -> Image.Image: ...
    def resize(self, image: Image.Image, width: int, height: int) -> Image.Image: ...


class OfflineProcessor(Qwen2_5_VLProcessor):
    """The family's processor without its video part, which would need torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument):
        return None if argument_name == "video_processor" else super().check_argument_for_proper_class(argument_name, argument)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def load_processor(path: str | Path) -> OfflineProcessor:
    """The processor of a model folder. Raises ValueError when the folder holds none."""
    if not (Path(path) / "tokenizer_config.json").is_file():
        raise ValueError(f"{path} holds no processor (no tokenizer_config.json); copy the processor files of the model there")
    processor = OfflineProcessor.from_pretrained(path)
    if not isinstance(processor.image_processor, Qwen2VLImageProcessorPil):
        processor.image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
    return processor


def train_processor(
    corpus: Sequence[SampleLike], vocabulary: int, patch_size: int, merge_size: int, max_image_tokens: int
) -> OfflineProcessor:
    """A processor made without any download: a byte-level BPE tokenizer trained on the corpus' text, an image processor of the given
    geometry that normalises by the mean and deviation of the corpus' images (of at most 500)."""
    texts = [turn_text(turn) for sample in corpus for turn in sample.turns]
    images = [image for sample in corpus for image in sample.images][:500]
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    roles = ("system", "user", "assistant")  # words of the template, not of the corpus
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(chain(texts, roles), trainer)
    merges = [tuple(merge) for merge in _merges(bpe)]
    tokenizer = Qwen2Tokenizer(vocab=bpe.get_vocab(), merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    tokenizer.pad_token, tokenizer.eos_token = "<|endoftext|>", "<|im_end|>"
    pixels = (patch_size * merge_size) ** 2
    mean, deviation = _statistics(images)
    image_processor = Qwen2VLImageProcessorPil(
        min_pixels=pixels,
        max_pixels=pixels * max_image_tokens,
        patch_size=patch_size,
        merge_size=merge_size,
        temporal_patch_size=2,
        image_mean=mean,
        image_std=deviation,
    )
    return OfflineProcessor(image_processor=image_processor, tokenizer=tokenizer, chat_template=CHAT_TEMPLATE)


def turn_text(turn: TurnLike) -> str:
    """The text segments of a turn, joined."""
    return "".join(segment for segment in turn.segments if isinstance(segment, str))


def _statistics(images: Sequence[bytes]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each colour channel in [0, 1]."""
    pixels = np.concatenate([_rgb(image).reshape(-1, 3) for image in images]) / 255
    return pixels.mean(0).tolist(), pixels.std(0).tolist()


def _rgb(image: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(image)) as opened:
        return np.asarray(opened.convert("RGB"), np.float64)


def _merges(bpe: Tokenizer) -> list[list[str]]:
    return json.loads(bpe.to_str())["model"]["merges"]


def check_same_tokenizer(student: OfflineProcessor, teacher: OfflineProcessor) -> int:
    """The number of real tokens both models share. Heads may be longer (padding rows); the ids must be the same.

    Raises ValueError when a token has another id or exists on one side only: KL between such models would compare different words.
    """
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    if ours != theirs:
        differing = sorted({token for token, _ in ours.items() ^ theirs.items()})
        raise ValueError(
            f"the tokenizers differ in {len(differing)} tokens (first: {differing[:3]}); student and teacher must share one tokenizer"
        )
    return len(student.tokenizer)


@dataclass(frozen=True)
class Rendered:
    """One sample as tensors; the fields are those of data.batch.Rendered."""

    input_ids: Tensor
    token_types: Tensor
    supervised: Tensor
    pixel_values: Tensor
    image_grid_thw: Tensor
    trailing: int


class Renderer:
    """Samples to tensors; keeps the patches of recently seen images (haystacks repeat them) up to a number of bytes."""

    def __init__(self, processor: OfflineProcessor, pixels: PixelsLike, cache_bytes: int = 256 << 20):
        self.processor, self.pixels, self.cache_bytes = processor, pixels, cache_bytes
        self._patches: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()
        self._cached_bytes = 0

    def __call__(self, sample: SampleLike) -> Rendered:
        """The sample's conversation under the chat template; every assistant turn and its end mark are supervised.

        A sample without an image gets the smallest legal one after its last token: causal attention keeps it from changing anything,
        and under ZeRO-3 every rank then runs the vision tower. Raises ValueError (what `pixels` raises) for an image that cannot be read.
        """
        ids, supervised, shown = self._tokens(sample)
        images = [sample.images[i] for i in shown] or [self._blank()]
        patches, grids = zip(*self._processed(images), strict=True)
        lengths = torch.stack(grids).prod(-1) // self.processor.image_processor.merge_size**2
        trailing = 0 if shown else int(lengths[0]) + 2
        if not shown:
            marks = self.processor.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"])
            ids, supervised = torch.cat([ids, torch.tensor(marks)]), torch.cat([supervised, torch.zeros(3, dtype=torch.bool)])
        repeats = torch.ones_like(ids)
        is_image = ids == self.processor.image_token_id
        if int(is_image.sum()) != len(images):
            raise ValueError(f"{int(is_image.sum())} image marks in the text for {len(images)} images")
        repeats[is_image] = lengths
        return Rendered(
            input_ids=ids.repeat_interleave(repeats),
            token_types=is_image.long().repeat_interleave(repeats),
            supervised=supervised.repeat_interleave(repeats),
            pixel_values=torch.cat(patches),
            image_grid_thw=torch.stack(grids),
            trailing=trailing,
        )

    def _tokens(self, sample: SampleLike) -> tuple[Tensor, Tensor, list[int]]:
        """Token ids with one mark per image [T'], which of them are answers [T'], and the images in the order shown."""
        text, spans = self._text(sample)
        encoded = self.processor.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        starts = torch.tensor([start for start, _ in encoded["offset_mapping"]])
        supervised = torch.zeros(len(starts), dtype=torch.bool)
        for start, stop in spans:
            supervised |= (starts >= start) & (starts < stop)
        shown = [segment for turn in sample.turns for segment in turn.segments if isinstance(segment, int)]
        return torch.tensor(encoded["input_ids"]), supervised, shown

    def _text(self, sample: SampleLike) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and the spans of its answers with their end marks."""
        marked = self.processor.apply_chat_template([_message(turn) for turn in sample.turns], tokenize=False)
        end_mark = self.processor.tokenizer.eos_token
        pieces, spans, length = [], [], 0
        for number, piece in enumerate(marked.replace(END, ANSWER).split(ANSWER)):
            pieces.append(piece)
            if number % 2:  # odd pieces are answers; the end mark that follows belongs to them
                spans.append((length, length + len(piece) + len(end_mark)))
            length += len(piece)
        return "".join(pieces), spans

    def _processed(self, images: list[bytes]) -> list[tuple[Tensor, Tensor]]:
        """(patches [n, values], grid [3]) of each image."""
        new = [image for image in dict.fromkeys(images) if image not in self._patches]
        if new:
            done = self.processor.image_processor([self._sized(image) for image in new], return_tensors="pt")
            grids = done["image_grid_thw"]
            for image, patches, grid in zip(new, done["pixel_values"].split(grids.prod(-1).tolist()), grids, strict=True):
                self._patches[image] = (patches.clone(), grid)
                self._cached_bytes += patches.nbytes
        found = [self._patches[image] for image in images]
        for image in images:
            self._patches.move_to_end(image)
        while self._cached_bytes > self.cache_bytes:
            _, (patches, _) = self._patches.popitem(last=False)
            self._cached_bytes -= patches.nbytes
        return found

    def _sized(self, image: bytes) -> Image.Image:
        """The image in the size at which the processor would see it, so that the processor has nothing left to resize."""
        found, geometry = self.pixels.decode(image), self.processor.image_processor
        factor = geometry.patch_size * geometry.merge_size
        limits = {"min_pixels": geometry.size["shortest_edge"], "max_pixels": geometry.size["longest_edge"]}
        height, width = smart_resize(found.height, found.width, factor=factor, **limits)
        return self.pixels.resize(found, width, height)

    def _blank(self) -> bytes:
        side = self.processor.image_processor.patch_size * self.processor.image_processor.merge_size
        buffer = io.BytesIO()
        Image.new("RGB", (side, side)).save(buffer, "PNG")
        return buffer.getvalue()


def _message(turn: TurnLike) -> dict:
    parts = [{"type": "image"} if isinstance(segment, int) else {"type": "text", "text": segment} for segment in turn.segments]
    if turn.role == "assistant":
        parts = [{"type": "text", "text": ANSWER}, *parts, {"type": "text", "text": END}]
    return {"role": turn.role, "content": parts}
