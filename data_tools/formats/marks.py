"""Where images stand in a text: marks and images agree, or the entry is refused."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from laid_ds.data.record import DataError, Segment

IMAGE_MARK = "<image>"
FOREIGN_MARK = re.compile(
    r"(?!(?-i:<image>))<\|?(?:image|img|video|audio|speech|ImageHere|image-placeholder|(?:image|video|audio)[ _-]?\d+)\|?>", re.IGNORECASE
)


@dataclass(frozen=True)
class Place:
    """Where an image stands in a turn."""

    source: Any = None
    """The image, where it is given in place; else it is the next of the entry's images."""
    exact: bool = False
    """Stands for one image, never for all."""


Piece = str | Place


def pieces_of(text: str) -> list[Piece]:
    """A text cut at its image marks."""
    head, *tails = text.split(IMAGE_MARK)
    return [head, *(piece for tail in tails for piece in (Place(), tail))]


def refuse_foreign_marks(text: str) -> None:
    """A mark for something that would not be shown, or in another's spelling, must not become words to learn."""
    if found := FOREIGN_MARK.search(text):
        raise DataError(f"the text holds the mark {found[0]}; only {IMAGE_MARK} is known")


def interleave(texts: list[str], num_images: int) -> list[tuple[Segment, ...]]:
    """Consecutive texts with image indices in place of their marks, by the rules of `arrange`."""
    return arrange([pieces_of(text) for text in texts], num_images)


def arrange(turns: list[list[Piece]], num_images: int, unmarked: int = 0) -> list[tuple[Segment, ...]]:
    """Segments of consecutive turns. Every place has an image and every image a place, except: one mark may stand for all images together;
    without any, all images stand at the start of the turn `unmarked`."""
    places = [piece for turn in turns for piece in turn if isinstance(piece, Place)]
    if num_images and not places:
        places = [Place()]
        turns = [[*places, *turn] if number == unmarked else turn for number, turn in enumerate(turns)]
    if len(places) == num_images:
        groups = [[index] for index in range(num_images)]
    elif len(places) == 1 and num_images > 1 and not places[0].exact:
        groups = [list(range(num_images))]
    else:
        raise DataError(f"{len(places)} {IMAGE_MARK} marks for {num_images} images")
    remaining = iter(groups)
    return [_segments(turn, remaining) for turn in turns]


def _segments(turn: list[Piece], groups: Iterator[list[int]]) -> tuple[Segment, ...]:
    return joined(segment for piece in turn for segment in (next(groups) if isinstance(piece, Place) else [piece]))


def joined(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """The same with neighbouring texts as one and without empty texts; a single empty text where nothing is left."""
    found: list[Segment] = []
    for is_text, group in groupby(segments, key=lambda segment: isinstance(segment, str)):
        run = list(group)
        found += ["".join(run)] if is_text else run
    return tuple(segment for segment in found if segment != "") or ("",)
