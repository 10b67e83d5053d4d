"""What other people's files look like: entries of a JSON list or of JSON lines, and images under one root. All of it is untrusted."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from laid_ds.data.images import check_limits
from laid_ds.data.record import DataError, Segment, describe

CHUNK = 1 << 20
MAX_ENTRY_CHARACTERS = 256 << 20
MAX_IMAGE_BYTES = 128 << 20
IMAGE_MARK = "<image>"

Entry = dict[str, Any]


def entries(path: Path) -> Iterator[Any]:
    """The entries of a JSON list or a JSON-lines file, one at a time: such lists can be larger than memory."""
    with open(path, encoding="utf-8-sig") as file:
        try:
            start = file.read(1)
            while start.isspace():
                start = file.read(1)
            file.seek(0)
            yield from _list_entries(file, path) if start == "[" else _line_entries(file, path)
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None


def read_json(path: Path) -> Any:
    """A JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {error}") from None


def _line_entries(file, path: Path) -> Iterator[Any]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: {error}") from None


def _list_entries(file, path: Path) -> Iterator[Any]:
    decoder, text, number = json.JSONDecoder(), file.read(CHUNK).lstrip()[1:], 0
    while True:
        text = text.lstrip()
        if text.startswith("]"):
            if (text[1:] + file.read(CHUNK)).strip():
                raise DataError(f"{path}: there is more after the end of the list")
            return
        try:
            entry, end = decoder.raw_decode(text)
            after = text[end:].lstrip()
            if not after:
                raise ValueError("the list does not end")
        except (ValueError, RecursionError) as error:
            more = file.read(max(CHUNK, len(text)))
            if not more or len(text) > MAX_ENTRY_CHARACTERS or isinstance(error, RecursionError):
                raise DataError(f"{path}, entry {number}: {error}") from None
            text += more
            continue
        if not after.startswith((",", "]")):
            raise DataError(f"{path}, entry {number}: a comma or the end of the list must follow")
        yield entry
        number += 1
        text = after.removeprefix(",")


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


class ImageRoot:
    """Reads images under one folder; no name leads out of it."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        if not self.folder.is_dir():
            raise DataError(f"image root {folder} is no folder")

    def read(self, name: str) -> bytes:
        """The bytes of an image, which must have a known format and legal size."""
        path = self._path(name)
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise DataError(f"image {name!r} has {path.stat().st_size} bytes; the limit is {MAX_IMAGE_BYTES}")
        data = path.read_bytes()
        try:
            info = describe(data)
            check_limits(info.width, info.height)
        except DataError as error:
            raise DataError(f"image {name!r}: {error.reason}") from None
        return data

    def _path(self, name: str) -> Path:
        if "://" in name:
            raise DataError(f"image {name[:200]!r} is a URL; fetch it into the image root and name the file")
        try:
            path = (self.folder / name).resolve()
            inside = path.is_relative_to(self.folder) and path.is_file()
        except (ValueError, OSError, RuntimeError) as error:  # a null character, a name too long, a loop of links
            raise DataError(f"image name {name[:200]!r}: {error}") from None
        if not path.is_relative_to(self.folder):
            raise DataError(f"image name {name[:200]!r} leads out of the image root")
        if not inside:
            raise DataError(f"image {name[:200]!r} is not in {self.folder}")
        return path


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
