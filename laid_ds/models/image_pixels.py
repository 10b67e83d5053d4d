"""How large a model sees its images, as limits of area in pixels. Each family's processor says it in its own terms, and so the limits are
settings of that processor: what is set here in a run is what the exported folder says, and stock transformers does the same with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from transformers import ProcessorMixin

from laid_ds.files import read_json

PATCHES = 512  # of those that become a token each: 640 x 480 takes 391 of 28 x 28, 300 of 32 x 32

RECIPE, OPTION = "data.image_pixels = [{}, {}]", "--image-pixels {},{}"
"""How limits are given."""
SIZING = ("size", "min_patches", "max_patches", "min_pixels", "max_pixels", "crop_to_patches", "do_image_splitting", "image_grid_pinpoints")
"""Settings of image processors that decide at what size a picture is seen."""

Limits = tuple[int, int]
Settings = dict[str, Any]


def limit_pixels(processor: ProcessorMixin, limits: Limits | None, said: str = RECIPE) -> ProcessorMixin:
    """The processor, changed so that every image that the model sees has an area within `limits`; None leaves it as it is. said: how the
    limits were given, as errors write them.

    Tiles of one image count together, a thumbnail beside them does not. As its family sizes: the picture is resized, its proportions
    kept, to whole patches (Qwen2-VL to Qwen3.5, GLM, Ernie, PaddleOCR, VideoLLaMA3: a strip thinner than a patch takes a whole one and
    may exceed the limit; Pixtral, which never enlarges), laid out on that many tiles (InternVL), or resized by its longest side and then
    tiled (Idefics3, SmolVLM). Raises ValueError, with what could be had, where the family cannot keep within the limits.
    """
    if limits is not None:
        images = processor.image_processor
        processor.image_processor = type(images).from_dict(images.to_dict() | _settings(processor, limits, said))
    return processor


def sizing_note(processors: Mapping[str, ProcessorMixin]) -> str:
    """What a user should know where models, by name, of one way of sizing would see the same picture at other sizes; "" where none does."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, processor in processors.items():
        settings = processor.image_processor.to_dict()
        groups.setdefault((_kind(processor), json.dumps({key: settings.get(key) for key in SIZING}, default=dict)), []).append(name)
    differing = [kind for kind in {kind for kind, _ in groups} if sum(kind == other for other, _ in groups) > 1]
    said = [" and ".join(", ".join(names) for (other, _), names in groups.items() if other == kind) for kind in differing]
    return "; ".join(
        f"{names} see pictures at different sizes, as their folders say: --image-pixels asks all at the same" for names in said
    )


def write_limits(folder: Path, processor: ProcessorMixin, limits: Limits) -> None:
    """Say the limits in each file of a model folder that says how images are processed. processor: of this family. Raises as
    `limit_pixels`."""
    settings = _settings(processor, limits)
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = folder / name
        tree = read_json(path, plain=True) if path.is_file() else {}
        images = tree.get("image_processor") if name == "processor_config.json" else tree
        if images:
            older = {key: limit for key, limit in zip(("min_pixels", "max_pixels"), limits, strict=True) if key in images}
            images |= settings | older  # older names for the same come first in transformers
            path.write_text(json.dumps(tree, indent=2) + "\n")


def modest_limits(processor: ProcessorMixin) -> Limits | None:
    """Limits to start from, no wider than the processor's own: room for the pictures of common benchmarks (640 x 480), not for photographs;
    one tile where there are tiles. None where the family leaves nothing to choose, or its way is not known here."""
    images, rule = processor.image_processor, RULES.get(_kind(processor))
    if rule in (_resized, _still):
        frames = images.temporal_patch_size if rule is _still else 1
        least, most = (images.size[edge] // frames for edge in ("shortest_edge", "longest_edge"))
        return least, max(least, min(most, PATCHES * (images.patch_size * images.merge_size) ** 2))
    if rule is _tiled:
        return (images.size["height"] * images.size["width"],) * 2
    return None


def _kind(processor: ProcessorMixin) -> str:
    return type(processor.image_processor).__name__.removesuffix("Pil").removesuffix("Fast")


def _settings(processor: ProcessorMixin, limits: Limits, said: str = RECIPE) -> Settings:
    kind = _kind(processor)
    if kind not in RULES:
        raise ValueError(
            f"{said.format(*limits)}: how {kind} sizes images cannot be limited here; leave it out, and the limits of the"
            " model's own processor hold"
        )
    least, most, settings = RULES[kind](processor, limits)
    if least < limits[0] or most > limits[1]:
        can = f"{least:,} pixels" if least == most else f"{least:,} to {most:,} pixels"
        raise ValueError(
            f"{said.format(*limits)}: {kind} would show the model {can} of an image at the nearest; give limits that include"
            f" them ({said.format(least, most)}), or leave it out"
        )
    return settings


def _resized(processor: ProcessorMixin, limits: Limits, frames: int = 1) -> tuple[int, int, Settings]:
    """Limits of area, of whole patches. `frames`: how often a picture is counted."""
    images = processor.image_processor
    patch = (images.patch_size * images.merge_size) ** 2
    edges = {"shortest_edge": frames * limits[0], "longest_edge": frames * limits[1]}
    return max(limits[0], patch), max(limits[1], patch), {"size": edges}


def _still(processor: ProcessorMixin, limits: Limits) -> tuple[int, int, Settings]:
    """GLM counts a picture as a clip of as many frames as its patches are long."""
    return _resized(processor, limits, processor.image_processor.temporal_patch_size)


def _tiled(processor: ProcessorMixin, limits: Limits) -> tuple[int, int, Settings]:
    """From the least to the most tiles, by the proportions of the picture."""
    images = processor.image_processor
    tile = images.size["height"] * images.size["width"]
    cuts = processor._merge_kwargs(tokenizer_init_kwargs=processor.tokenizer.init_kwargs)["images_kwargs"].get("crop_to_patches")
    if not (images.crop_to_patches if cuts is None else cuts):
        return tile, tile, {}
    most = max(1, limits[1] // tile)
    least = min(most, -(-limits[0] // tile))
    return tile * least, tile * most, {"min_patches": least, "max_patches": most}


def _split(processor: ProcessorMixin, limits: Limits) -> tuple[int, int, Settings]:
    """The longest side of every picture is as long; a narrow strip has one row of tiles, a square as many rows as columns."""
    images = processor.image_processor
    side = images.max_image_size["longest_edge"]
    if not images.do_image_splitting:
        return side**2, side**2, {}
    longest = max(1, isqrt(limits[1]) // side)
    return longest * side**2, (longest * side) ** 2, {"size": {"longest_edge": longest * side}}


def _shrunk(processor: ProcessorMixin, limits: Limits) -> tuple[int, int, Settings]:
    """Pictures whose longer side is longer than allowed are made smaller."""
    patch = processor.patch_size * getattr(processor, "spatial_merge_size", 1)
    longest = max(1, isqrt(limits[1]) // patch) * patch
    return patch**2, longest**2, {"size": {"longest_edge": longest}}


def _fixed(processor: ProcessorMixin, limits: Limits) -> tuple[int, int, Settings]:
    """All pictures become one size."""
    images = processor.image_processor
    size = images.crop_size if getattr(images, "do_center_crop", False) else images.size
    area = size["height"] * size["width"]
    return area, area, {}


RULES: dict[str, Callable[[ProcessorMixin, Limits], tuple[int, int, Settings]]] = {
    **dict.fromkeys(("Qwen2VLImageProcessor", "VideoLlama3ImageProcessor", "PaddleOCRVLImageProcessor"), _resized),
    **dict.fromkeys(("Ernie4_5_VLMoeImageProcessor", "Ernie4_5_VL_MoeImageProcessor"), _resized),
    **dict.fromkeys(("Glm4vImageProcessor", "Glm46VImageProcessor"), _still),
    "GotOcr2ImageProcessor": _tiled,
    **dict.fromkeys(("Idefics3ImageProcessor", "SmolVLMImageProcessor"), _split),
    "PixtralImageProcessor": _shrunk,
    **dict.fromkeys(("CLIPImageProcessor", "SiglipImageProcessor"), _fixed),
}
"""Class of a family's image processor -> (least and most area it then shows, settings). Of LLaVA-NeXT and LLaVA-OneVision the model's own
config holds the list of sizes, too (image_grid_pinpoints), and they are not here."""
