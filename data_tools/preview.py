"""Look at samples: one by key, or several as text and a contact sheet."""

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from laid_ds.data.dataset import Dataset
from laid_ds.data.haystack import why_whole
from laid_ds.data.images import Pixels
from laid_ds.data.record import Sample, Turn, describe

TILE, CAPTION, COLUMNS = 128, 14, 8


def cat(folder: str, key: str, images_folder: Path | None) -> dict[str, Any]:
    """A sample, as its record says it; its image files into a folder if one is given."""
    dataset = Dataset.open(folder)
    sample = dataset.read(dataset.find(key))
    infos = [describe(image) for image in sample.images]
    if images_folder is not None:
        images_folder.mkdir(parents=True, exist_ok=True)
        for index, (image, info) in enumerate(zip(sample.images, infos, strict=True)):
            (images_folder / f"{key}.{index:03d}.{info.fmt}").write_bytes(image)
    return {
        "key": key,
        "shard": sample.origin.shard,
        "offset": sample.origin.offset,
        "turns": [_turn(turn) for turn in sample.turns],
        "images": [f"{info.width}x{info.height} {info.fmt}, {info.num_bytes} bytes" for info in infos],
        "source": sample.source,
        "licence": sample.licence,
        "tokens": dict(sample.tokens),
        "meta": dict(sample.meta),
        "windows": why_whole(sample) or "allowed",
        "fixed": list(sample.fixed),
    }


def preview(folder: str, first: int, count: int, sheet: Path | None) -> dict[str, Any]:
    """The text of a few samples, and their images on one PNG; needles have a red frame."""
    dataset = Dataset.open(folder)
    samples = [dataset.read(i) for i in range(first, min(first + count, len(dataset)))]
    if sheet is not None:
        contact_sheet(samples).save(sheet, "PNG")
    return {"samples": [{"key": sample.key, "text": "\n".join(text_of(turn) for turn in sample.turns)} for sample in samples]}


def text_of(turn: Turn) -> str:
    """A turn on one line, images as [0]."""
    return f"{turn.role}: " + "".join(segment if isinstance(segment, str) else f"[{segment}]" for segment in turn.segments)


def contact_sheet(samples: list[Sample]) -> Image.Image:
    """All images of the samples as tiles."""
    tiles = [tile for sample in samples for tile in _tiles(sample)] or [Image.new("RGB", (TILE, TILE + CAPTION), "white")]
    rows = -(-len(tiles) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * TILE, rows * (TILE + CAPTION)), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % COLUMNS * TILE, number // COLUMNS * (TILE + CAPTION)))
    return sheet


def _tiles(sample: Sample) -> list[Image.Image]:
    needles = {needle for turn in sample.turns for needle in turn.needles}
    tiles = []
    for index, data in enumerate(sample.images):
        tile = Image.new("RGB", (TILE, TILE + CAPTION), "white")
        picture = ImageOps.contain(Pixels().decode(data), (TILE - 6, TILE - 6))
        tile.paste(picture, (3, 3))
        draw = ImageDraw.Draw(tile)
        if index in needles:
            draw.rectangle((0, 0, picture.width + 5, picture.height + 5), outline="red", width=3)
        draw.text((3, TILE), f"{sample.key[-12:]} [{index}]", fill="black")
        tiles.append(tile)
    return tiles


def _turn(turn: Turn) -> dict[str, Any]:
    shown: dict[str, Any] = {"role": turn.role, "text": text_of(turn).removeprefix(f"{turn.role}: ")}
    if turn.needles:
        shown["needles"] = list(turn.needles)
    if turn.choices:
        shown["choices"] = list(turn.choices)
    if not turn.supervised:
        shown["supervised"] = False
    return shown
