"""Fields of an entry, checked as they are taken, and texts with image marks."""

from typing import Any

from laid_ds.data.record import DataError, Segment

IMAGE_MARK = "<image>"

Entry = dict[str, Any]


def take(entry: Any, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
    """A field of an entry that must be of this type; absent or null gives the default, or is an error if that is None."""
    if not isinstance(entry, dict):
        raise DataError(f"an entry is {type(entry).__name__}, not an object")
    value = entry.get(name)
    if value is None and default is not None:
        return default
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise DataError(f"field {name!r} is {'missing' if name not in entry else type(value).__name__}; it must be {expected}")
    return value


def take_strings(entry: Any, name: str, default: list | None = None) -> list[str]:
    """A field that must be a list of text."""
    values = take(entry, name, list, default)
    if not all(isinstance(value, str) for value in values):
        raise DataError(f"field {name!r} must hold text alone")
    return values


def image_names(entry: Entry) -> list[str]:
    """The names in `images`, or in `image`, which may be one name or a list."""
    names = take(entry, "images", (str, list), take(entry, "image", (str, list), []))
    names = [names] if isinstance(names, str) else names
    if not all(isinstance(name, str) for name in names):
        raise DataError("image names must be text")
    return names


def identity(entry: Entry) -> dict[str, Any]:
    """What the entry calls itself, for the sample's meta."""
    return {"id": entry["id"]} if entry.get("id") is not None else {}


def interleave(texts: list[str], num_images: int) -> list[tuple[Segment, ...]]:
    """Replace the image marks in consecutive texts by image indices. Every mark has an image and every image a mark, except: one mark, or
    none, stands for all images together."""
    marks = sum(text.count(IMAGE_MARK) for text in texts)
    if marks == num_images:
        return _interleave(texts, [[index] for index in range(num_images)])
    if marks == 1:
        return _interleave(texts, [list(range(num_images))])
    if marks == 0:
        first, *others = _interleave(texts, [])
        return [(*range(num_images), *first), *others]
    raise DataError(f"{marks} {IMAGE_MARK} marks for {num_images} images")


def _interleave(texts: list[str], groups: list[list[int]]) -> list[tuple[Segment, ...]]:
    remaining = iter(groups)
    turns: list[tuple[Segment, ...]] = []
    for text in texts:
        head, *tails = text.split(IMAGE_MARK)
        segments: list[Segment] = [head]
        for tail in tails:
            segments += [*next(remaining), tail]
        turns.append(tuple(segment for segment in segments if segment != "") or ("",))
    return turns
