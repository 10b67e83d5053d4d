"""Text and images to tensors with the model's own processor, without torchvision, and which tokens are the answers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Protocol
from unicodedata import normalize

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from laid_ds.files import read_json
from laid_ds.models.chat import Said, Span, Template, TurnLike, learn_template, say, where
from laid_ds.models.folder import check_folder, first_paragraph, said_by
from laid_ds.models.numbering import numbered

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


class SampleLike(Protocol):
    """Turns and their encoded images (data.record.Sample is one)."""

    key: str
    turns: tuple[TurnLike, ...]
    images: tuple[bytes, ...]


class RecordLike(Protocol):
    """A sample whose images are only described (data.record.Record is one)."""

    turns: tuple[TurnLike, ...]
    images: tuple[SizeLike, ...]


class SizeLike(Protocol):
    width: int
    height: int


class PixelsLike(Protocol):
    """How encoded images become pixels of a wanted size (data.images.Pixels is one)."""

    def decode(self, data: bytes) -> Image.Image: ...
    def resize(self, image: Image.Image, width: int, height: int) -> Image.Image: ...


@cache
def offline(stock: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A family's processor class without its video part, which would need torchvision. It keeps its name, and so the folders it writes."""

    def check(self, argument_name: str, argument):
        return None if argument_name == "video_processor" else super(made, self).check_argument_for_proper_class(argument_name, argument)

    made = type(
        stock.__name__,
        (stock,),
        {
            "check_argument_for_proper_class": check,
            "get_attributes": classmethod(lambda cls: [name for name in super(made, cls).get_attributes() if name != "video_processor"]),
        },
    )
    return made


def load_processor(path: str | Path, trust_remote_code: bool = False) -> ProcessorMixin:
    """The processor of a model folder, of whatever family. Raises ValueError when the folder holds none, or none for images and text."""
    path = Path(path)
    check_folder(path, trust_remote_code)
    if not (path / "tokenizer_config.json").is_file():
        raise ValueError(f"{path} holds no processor (no tokenizer_config.json); copy the processor files of the model there")
    _check_sees(path)
    stock = _own_class(path) if trust_remote_code else None
    stock = stock or getattr(transformers, _processor_class(path))
    try:
        processor = offline(stock).from_pretrained(path, **({"trust_remote_code": True} if trust_remote_code else {}))
    except ImportError as error:
        raise ValueError(f"the {stock.__name__} at {path} needs a package that is not installed: {first_paragraph(error)}") from None
    except Exception as error:  # transformers raises anything on files that are missing or lack something
        raise ValueError(
            f"the {stock.__name__} at {path} cannot be loaded: {said_by(error)}; copy all processor files of the model there"
        ) from None
    _check_tokenizer(processor, path)
    if type(processor.image_processor).__name__.removesuffix("Fast") == "Qwen2VLImageProcessor":  # torchvision's, where that is installed
        processor.image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
    return processor


def check_chat_template(processor: ProcessorMixin, path: str | Path) -> None:
    """Raises ValueError when a processor does not say how a conversation becomes text."""
    if processor.chat_template is None:
        elsewhere = "; the tokenizer's own stands in tokenizer_config.json" if processor.tokenizer.chat_template else ""
        raise ValueError(f"the processor at {path} has no chat template{elsewhere}: copy the model's as {path}/chat_template.jinja")


def _check_sees(path: Path) -> None:
    """Raises ValueError when no file says how images become tensors."""
    names = ("preprocessor_config.json", "processor_config.json")
    found = [read_json(path / name, plain=True) for name in names if (path / name).is_file()]
    if not any("image_processor_type" in tree or "image_processor" in tree or "image_mean" in tree for tree in found):
        raise ValueError(
            f"{path} does not say how images are processed (no preprocessor_config.json, and no image_processor in processor_config.json);"
            " copy the processor files of the model there"
        )


def _check_tokenizer(processor: ProcessorMixin, path: Path) -> None:
    """Raises ValueError when the words are not there: transformers makes a tokenizer of nothing but special tokens without them."""
    files = sorted(set(processor.tokenizer.vocab_files_names.values()) | {"tokenizer.json"})
    if not any((path / name).is_file() for name in files):
        raise ValueError(f"{path} holds no vocabulary (none of {', '.join(files)}); copy the processor files of the model there")


def _own_class(path: Path) -> type[ProcessorMixin] | None:
    """The processor class in the folder's own code, where it names one."""
    for file in PROCESSOR_FILES:
        tree = read_json(path / file, plain=True) if (path / file).is_file() else {}
        names = tree.get("auto_map") or {}
        name = names.get("AutoProcessor") if isinstance(names, dict) else None
        if name is not None:
            return get_class_from_dynamic_module(name, str(path), local_files_only=True)
    return None


def _processor_class(path: Path) -> str:
    """The name that the folder gives its processor, else that of its family. Raises ValueError when transformers has none of that name."""
    for file in PROCESSOR_FILES:
        name = read_json(path / file, plain=True).get("processor_class") if (path / file).is_file() else None
        if not isinstance(name, str | None):
            raise ValueError(f"{path / file}: processor_class is {name!r}; give the name of a class, such as 'Qwen2_5_VLProcessor'")
        known = getattr(transformers, name, None) if name else None
        if isinstance(known, type) and issubclass(known, ProcessorMixin):
            return name
    config = read_json(path / "config.json", plain=True) if (path / "config.json").is_file() else {}
    if config.get("model_type") in PROCESSOR_MAPPING_NAMES:
        return PROCESSOR_MAPPING_NAMES[config["model_type"]]
    raise ValueError(
        f"{path} names no processor class of transformers {transformers.__version__}; copy the processor files of the model there"
    )


def check_same_tokenizer(student: ProcessorMixin, teacher: ProcessorMixin) -> int:
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


def check_same_pictures(student: ProcessorMixin, teacher: ProcessorMixin) -> None:
    """Raises ValueError when the two processors make other numbers of the same pixels: the teacher is shown the student's."""
    names = ("image_mean", "image_std", "do_normalize", "do_rescale", "rescale_factor", "patch_size", "merge_size", "temporal_patch_size")
    for name in names:
        ours, theirs = (getattr(processor.image_processor, name, None) for processor in (student, teacher))
        if ours != theirs:
            raise ValueError(
                f"student and teacher process images differently ({name} is {ours} and {theirs}), and the teacher is shown the student's:"
                " take a pair that agrees"
            )


def check_tokens(processor: ProcessorMixin, config: PretrainedConfig, rows: int, path: str | Path) -> None:
    """Raises ValueError when the model at `path`, whose head has `rows` rows, lacks tokens of the tokenizer, or knows its images by
    another token than the processor writes."""
    if len(processor.tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(processor.tokenizer)} tokens, the head of the model at {path} only {rows}; do they belong?"
        )
    known = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    if known not in (None, processor.image_token_id):
        raise ValueError(
            f"the model at {path} finds its images at token {known} (config.json), the processor writes {processor.image_token_id}"
            f" ({processor.image_token}); take the processor that belongs to it"
        )


@dataclass(frozen=True)
class Rendered:
    """One sample as tensors; the fields are those of data.batch.Rendered."""

    tokens: dict[str, Tensor]
    images: list[dict[str, Tensor]]
    image_axis: int
    shows: Tensor
    supervised: Tensor
    trailing: int
    positions: Tensor | None


@dataclass(frozen=True)
class _Picture:
    """An image as the model gets it."""

    tensors: dict[str, Tensor]
    ids: Tensor
    """The tokens that stand in the text where the image is."""


class Renderer:
    """Samples to tensors; keeps the tensors of recently seen images (haystacks repeat them) up to a number of bytes.

    What a family's model wants beside pixels, what stands for an image in the text, and along which axis images follow each other is
    learned from its processor, by giving it one small image.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        pixels: PixelsLike,
        cache_bytes: int = 256 << 20,
        positions: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
        number_images: bool = False,
    ):
        """positions: numbers the tokens of a sample (models.positions.position_rule), for samples that will share a row.
        number_images: "Image 7: " stands before the seventh image (models.numbering)."""
        self.processor, self.pixels, self.cache_bytes, self.positions = processor, pixels, cache_bytes, positions
        self.number_images = number_images
        self._pictures: OrderedDict[bytes, _Picture] = OrderedDict()
        self._cached_bytes, self._texts, self._lengths = 0, {}, {}
        self._options = processor._merge_kwargs(tokenizer_init_kwargs=processor.tokenizer.init_kwargs, return_tensors="pt")["images_kwargs"]
        self._learn_the_family()

    def _learn_the_family(self) -> None:
        side = 32 if self._patch() is None else self._patch()
        blank = Image.new("RGB", (side, side))
        example = self.processor(text=[self.processor.image_token], images=[blank], return_tensors="pt")
        per_token = {name for name, tensor in example.items() if tensor.shape == example["input_ids"].shape}
        self._type_names = sorted(per_token - {"input_ids", "attention_mask"})
        self._image_names = sorted(example.keys() - per_token)
        one, two = (self._process([blank] * number)[0]["pixel_values"].shape for number in (1, 2))
        self._image_axis = next(axis for axis, (a, b) in enumerate(zip(one, two, strict=True)) if a != b)
        tensors, (text,) = self._process([blank])
        self._blank = _Picture({name: tensors[name] for name in self._image_names}, self._ids(text))

    def __call__(self, sample: SampleLike) -> Rendered:
        """The sample's conversation under the chat template; every assistant turn and its end mark are supervised.

        A sample without an image gets the smallest one after its last token: causal attention keeps it from changing anything, and under
        ZeRO-3 every rank then runs the vision tower. Raises ValueError (what `pixels` raises) for an image that cannot be read.
        """
        return self._render(sample)

    def texts(self, sample: SampleLike) -> Tensor:
        """[T]: which text of the sample's first question a token of the call's result belongs to, or -1; for a sample without images, whose
        needles are such texts. A token that two texts share is the later one's. Raises ValueError as a call."""
        said, first = say(self._template, sample.turns), next(i for i, turn in enumerate(sample.turns) if turn.role == "user")
        ids, offsets = self._encode(said)
        found = torch.full((len(ids) + len(self._blank.ids),), -1)
        for number, (start, stop) in enumerate(where(self._template, sample.turns, first)):
            found[: len(ids)][(offsets[:, 0] < stop) & (offsets[:, 1] > start)] = number
        return found

    def prompt(self, sample: SampleLike) -> Rendered:
        """The sample's turns, of which the last is a question, and what the chat template writes to have it answered. Nothing is
        supervised, and no image stands in where there is none: what is generated follows the last token. Raises ValueError as a call."""
        return self._render(sample, prompt=True)

    def _render(self, sample: SampleLike, prompt: bool = False) -> Rendered:
        ids, supervised, shown = self._tokens(sample, prompt)
        pictures = [self._picture(sample.images[i]) for i in shown]
        places = torch.nonzero(ids == self.processor.image_token_id).flatten().tolist()
        if len(places) != len(pictures):
            raise ValueError(f"the chat template writes {len(places)} image marks for the {len(pictures)} images that the turns show")
        if not pictures and not prompt:
            pictures, places = [self._blank], [len(ids)]
        parts, begin = [], 0
        for place, picture in zip(places, pictures, strict=True):
            parts += [(ids[begin:place], supervised[begin:place]), (picture.ids, torch.zeros(len(picture.ids), dtype=torch.bool))]
            begin = place + 1
        parts.append((ids[begin:], supervised[begin:]))
        all_ids, all_supervised = (torch.cat(column) for column in zip(*parts, strict=True))
        return self._rendered(all_ids, all_supervised, pictures, trailing=0 if shown or prompt else len(self._blank.ids))

    def count(self, record: RecordLike) -> int:
        """The tokens that a sample will have, without its images (and without a stand-in)."""
        ids, _, shown = self._tokens(record)
        return len(ids) + sum(self.image_length(record.images[i].width, record.images[i].height) - 1 for i in shown)

    def image_length(self, width: int, height: int) -> int:
        """Tokens of an image of this size, with its own marks."""
        if (width, height) not in self._lengths:
            _, (text,) = self._process([self._sized(Image.new("RGB", (width, height)))])
            self._lengths[width, height] = len(self._ids(text))
        return self._lengths[width, height]

    def _rendered(self, ids: Tensor, supervised: Tensor, pictures: list[_Picture], trailing: int) -> Rendered:
        tokens, images = {"input_ids": ids}, [picture.tensors for picture in pictures]
        if self._type_names:
            types = torch.as_tensor(self.processor.create_mm_token_type_ids([ids.tolist()])[0])
            tokens |= dict.fromkeys(self._type_names, types)
        is_image = ids == self.processor.image_token_id
        lengths = torch.tensor([int((picture.ids == self.processor.image_token_id).sum()) for picture in pictures], dtype=torch.long)
        shows = torch.full_like(ids, -1)
        shows[is_image] = torch.arange(len(pictures)).repeat_interleave(lengths)
        positions = None
        if self.positions is not None:
            grids = {name: torch.cat([image[name] for image in images]) for name in self._image_names if name == "image_grid_thw"}
            positions = self.positions({name: row[None] for name, row in tokens.items()} | grids)
        return Rendered(tokens, images, self._image_axis, shows, supervised, trailing, positions)

    @cached_property
    def _template(self) -> Template:
        return learn_template(self.processor)

    def _tokens(self, sample: SampleLike | RecordLike, prompt: bool = False) -> tuple[Tensor, Tensor, list[int]]:
        """Token ids with one mark per image [T'], which of them are answers [T'], and the images in the order shown."""
        said = say(self._template, numbered(sample.turns) if self.number_images else sample.turns, prompt)
        ids, offsets = self._encode(said)
        supervised = answer_tokens(said.text, said.spans, offsets)
        shown = [segment for turn in sample.turns for segment in turn.segments if isinstance(segment, int)]
        return ids, supervised, shown

    def _encode(self, said: Said) -> tuple[Tensor, Tensor]:
        """Token ids [T'], and the characters that each token stands for [T', 2]."""
        tokenizer = self.processor.tokenizer
        begins = tokenizer.bos_token is None or said.text.startswith(tokenizer.bos_token)
        if said.literal:
            ids, offsets = encode_literally(tokenizer, said.text, said.literal, add_special_tokens=not begins)
        else:
            encoded = tokenizer(said.text, return_offsets_mapping=True, add_special_tokens=not begins)
            ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        return torch.tensor(ids, dtype=torch.long), torch.from_numpy(np.array(offsets, np.int64).reshape(-1, 2))

    def _picture(self, image: bytes) -> _Picture:
        if image not in self._pictures:
            tensors, (text,) = self._process([self._sized(self.pixels.decode(image))])
            kept = {name: tensors[name].clone() for name in self._image_names}
            self._pictures[image] = _Picture(kept, self._ids(text))
            self._cached_bytes += sum(tensor.nbytes for tensor in kept.values())
        found = self._pictures[image]
        self._pictures.move_to_end(image)
        while self._cached_bytes > self.cache_bytes:
            _, forgotten = self._pictures.popitem(last=False)
            self._cached_bytes -= sum(tensor.nbytes for tensor in forgotten.tensors.values())
        return found

    def _process(self, images: list[Image.Image]) -> tuple[Mapping[str, Tensor], list[str]]:
        """Tensors of some images, and for each the text that stands for it."""
        laid_out, *_ = self.processor.prepare_inputs_layout(images=images, text=[self.processor.image_token * len(images)])
        return self.processor._process_images(laid_out, **self._options)

    def _ids(self, text: str) -> Tensor:
        """Token ids of the text of an image; images of one size have the same."""
        if text not in self._texts:
            self._texts[text] = torch.tensor(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._texts[text]

    def _patch(self) -> int | None:
        """The side of the smallest image, in Qwen's way of sizing images."""
        found = self.processor.image_processor
        return found.patch_size * found.merge_size if isinstance(found, Qwen2VLImageProcessorPil) else None

    def _sized(self, found: Image.Image) -> Image.Image:
        """The image; where its family sizes as Qwen does, in the size at which the processor would see it, so that `pixels` resizes."""
        geometry = self.processor.image_processor
        if self._patch() is None:
            return found
        limits = {"min_pixels": geometry.size["shortest_edge"], "max_pixels": geometry.size["longest_edge"]}
        height, width = smart_resize(found.height, found.width, factor=self._patch(), **limits)
        return self.pixels.resize(found, width, height)


def encode_literally(tokenizer: PreTrainedTokenizerBase, text: str, literal: list[Span], add_special_tokens: bool) -> tuple[list, list]:
    """Token ids and offsets of a text of which some spans, each a mark of the model, are to be read as text: as `sanitize_control_tokens`
    of stock `apply_chat_template` reads them. Raises ValueError where the tokenizer cannot do that."""
    ids = tokenizer("")["input_ids"] if add_special_tokens else []
    if ids not in ([], [tokenizer.bos_token_id]):
        raise ValueError(f"the tokenizer puts more than a first token around a text, and this one holds {text[slice(*literal[0])]!r}")
    offsets = [(0, 0)] * len(ids)
    for number, (begin, end) in enumerate(pairwise([0, *chain.from_iterable(literal), len(text)])):
        if begin < end:
            found, places = _encode_apart(tokenizer, text[begin:end], as_text=number % 2 == 1, first=begin == 0)
            ids, offsets = ids + found, offsets + [(begin + first, begin + last) for first, last in places]
    return ids, offsets


def _encode_apart(tokenizer: PreTrainedTokenizerBase, piece: str, as_text: bool, first: bool) -> tuple[list, list]:
    """Token ids and offsets of a piece of a text. After a line end, whose tokens are taken away again: a tokenizer may put a space before
    what it takes for the start of a text."""

    def encode(text: str) -> tuple[list, list]:
        if as_text:
            ids = tokenizer._encode_without_added_tokens(text)
            return ids, [(len(text) - len(piece), len(text))] * len(ids)
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        return encoded["input_ids"], encoded["offset_mapping"]

    lead = tokenizer("\n", add_special_tokens=False)["input_ids"]
    ids, offsets = encode("\n" + piece)
    if first or ids[: len(lead)] != lead:
        ids, offsets = encode(piece)
    else:
        ids, offsets = ids[len(lead) :], [(start - 1, stop - 1) for start, stop in offsets[len(lead) :]]
    if as_text and tokenizer.convert_tokens_to_ids(piece) in ids:
        raise ValueError(f"the tokenizer reads {piece!r} as a mark of the model even where it is text")
    return ids, offsets


def answer_tokens(text: str, spans: list[Span], offsets: Tensor) -> Tensor:
    """[T] bool: the tokens of the spans, from the characters [T, 2] that each token stands for.

    A token across the edge of an answer is the answer's if all that it holds beyond is whitespace, and is not if all that it holds of the
    answer is whitespace. Raises ValueError for a token that holds more of both, and for characters of an answer without a token.
    """
    starts, stops = offsets.unbind(1)
    supervised = torch.zeros(len(offsets), dtype=torch.bool)
    for start, stop in spans:
        inside = (starts < stop) & (stops > start)
        supervised |= inside
        for token in torch.nonzero(inside & ((starts < start) | (stops > stop))).flatten().tolist():
            first, last = offsets[token].tolist()
            own, other = text[max(first, start) : min(last, stop)], text[first:start] + text[stop:last]
            if own.strip() and other.strip():
                raise ValueError(f"the token {text[first:last]!r} holds {own!r} of an answer and {other!r} of what stands beside it")
            supervised[token] = bool(own.strip())
        _check_covered(text, start, stop, offsets[inside])
    return supervised


def _check_covered(text: str, start: int, stop: int, tokens: Tensor) -> None:
    """Raises ValueError unless the tokens [N, 2] stand for all of text[start:stop] but whitespace and marks that join the letter before."""
    begins = [*tokens[:, 0].tolist(), stop]
    ends = [start, *tokens[:, 1].cummax(0).values.tolist()]
    for end, begin in zip(ends, begins, strict=True):
        missing = text[end:begin].strip()
        if missing and len(normalize("NFC", text[max(0, end - 1) : begin])) > begin - end:
            raise ValueError(f"the tokenizer has no token for {missing[:40]!r} in the answer {text[start:stop][:40]!r}")
