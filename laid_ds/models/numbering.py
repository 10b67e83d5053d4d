"""Numbered images: "Image 7: " before each, so that a model can name what it looks at. A way of training that asking must share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from laid_ds.files import read_json
from laid_ds.models.chat import TurnLike

FILE = "laid.json"
"""Beside the files of an exported model; nothing but laid_ds reads it."""
FIELD = "number_images"


def numbered(turns: Sequence[TurnLike]) -> tuple[TurnLike, ...]:
    """The turns (dataclasses) with a number before each image, in the order in which images are shown, from 1, as part of the text before
    it. Images in an answer count, and get no number: what is learned stays as it is."""
    found, shown = [], 0
    for turn in turns:
        if turn.role == "assistant":
            shown += sum(isinstance(segment, int) for segment in turn.segments)
            found.append(turn)
            continue
        segments: list[str | int] = []
        for segment in turn.segments:
            if isinstance(segment, int):
                shown += 1
                _add(segments, f"Image {shown}: ")
                segments.append(segment)
            else:
                _add(segments, segment)
        found.append(replace(turn, segments=tuple(segments)))
    return tuple(found)


def _add(segments: list[str | int], text: str) -> None:
    """Text that follows text is one segment with it: a template may write something between segments."""
    if segments and isinstance(segments[-1], str):
        segments[-1] += text
    else:
        segments.append(text)


def numbers_images(folder: str | Path) -> bool:
    """Whether the model of a folder was trained with numbered images, as its export wrote down."""
    path = Path(folder) / FILE
    return bool(read_json(path).get(FIELD)) if path.is_file() else False


def record_numbering(folder: Path, number_images: bool) -> None:
    """Write down how a model was trained; nothing stays of what the folder it was made from said."""
    (folder / FILE).unlink(missing_ok=True)
    if number_images:
        (folder / FILE).write_text(json.dumps({FIELD: True}) + "\n")


def numbering_note(name: str, trained: bool, asked: bool) -> str:
    """What a user should know where a model is asked otherwise than it was trained; "" where it is not."""
    if trained == asked:
        return ""
    how = "with numbered images and is asked without" if trained else "without numbered images and is asked with them"
    return f"{name} was trained {how}: its answers may suffer"
