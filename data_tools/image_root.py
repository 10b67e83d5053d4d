"""Images under one root, read by name, or given in place. All of it is untrusted.

An image in a format that shards do not hold becomes a PNG of the same pixels; nothing else about a sound image is changed.
"""

import base64
import binascii
import copy
import io
import math
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from laid_ds.data.header import FORMATS
from laid_ds.data.images import MAX_PIXELS, MAX_SIDE, PIL_ERRORS, Pixels, check_limits, upright
from laid_ds.data.record import DataError, describe

MAX_IMAGE_BYTES = 128 << 20
RE_ENCODED = ("BMP", "DIB", "TIFF", "AVIF")
DATA_URL = "data:"
DICT_FIELDS = {"path", "bytes", "width", "height", "id", "format"}
JPEG_QUALITY = 95


class ImageRoot:
    """Reads images under one folder; no name leads out of it. `changes` counts what was done to them."""

    def __init__(self, folder: Path, *, decode: bool = True, shrink: bool = False, keep_rest: bool = False, follow_links: bool = False):
        """decode: to the last row, not the header alone. shrink: scale down an image beyond the limits, which is else refused. keep_rest: a
        document may lose images that cannot be read. follow_links: links in the folder may lead out of it, names still may not."""
        self.given, self.folder = Path(os.path.abspath(folder)), folder.resolve()
        self.decode, self.shrink, self.keep_rest, self.follow_links = decode, shrink, keep_rest, follow_links
        self.changes: Counter[str] = Counter()
        if not self.folder.is_dir():
            raise DataError(f"image root {folder} is no folder")

    def anew(self) -> "ImageRoot":
        """The same root with nothing counted yet."""
        other = copy.copy(self)
        other.changes = Counter()
        return other

    def read(self, source: str | dict[str, Any]) -> bytes:
        """The bytes of an image, which must have a known format and legal size. It is named by its path, or given as a data: URL or as
        {"path", "bytes"} with bytes in base64."""
        name, data = self._bytes(source)
        if len(data) > MAX_IMAGE_BYTES:
            raise DataError(f"image {name!r} has {len(data)} bytes; the limit is {MAX_IMAGE_BYTES}")
        try:
            return self._legal(data)
        except DataError as error:
            raise DataError(f"image {name!r}: {error.reason}") from None

    def read_all(self, sources: Iterable[str | dict[str, Any]]) -> tuple[bytes, ...]:
        """The bytes of several images."""
        return tuple(self.read(source) for source in sources)

    def read_or_lose(self, source: str | dict[str, Any] | None) -> bytes | None:
        """The bytes of an image, or None where it cannot be read and the rest is to be kept."""
        try:
            return self.read(source)
        except DataError:
            if not self.keep_rest:
                raise
            self.changes["images_lost"] += 1
            return None

    def _bytes(self, source: Any) -> tuple[str, bytes]:
        """What an image is called in a sentence, and its bytes."""
        if isinstance(source, str) and source.startswith(DATA_URL):
            kind, _, text = source.partition(",")
            if not kind.endswith(";base64"):
                raise DataError(f"image {source[:40]!r} is a data: URL without base64")
            return kind[:200], _from_base64(text, kind)
        if isinstance(source, str):
            path = self._path(source)
            if path.stat().st_size > MAX_IMAGE_BYTES:  # before it is read
                raise DataError(f"image {source!r} has {path.stat().st_size} bytes; the limit is {MAX_IMAGE_BYTES}")
            return source, path.read_bytes()
        if not isinstance(source, dict):
            raise DataError(f"an image is {type(source).__name__}; it must be a file name, a data: URL, or an object with path or bytes")
        path, text = source.get("path"), source.get("bytes")
        unknown = sorted(name for name in source.keys() - DICT_FIELDS if source[name] is not None)
        if unknown:
            raise DataError(f"an image object has the unknown field {unknown[0][:40]!r}; it may have path and bytes")
        if isinstance(text, str) and text:
            return f"{path or 'bytes'}"[:200], _from_base64(text, path or "bytes")
        if text or not isinstance(path, str):
            raise DataError("an image object must have a path, or bytes in base64")
        return self._bytes(path)

    def _legal(self, data: bytes) -> bytes:
        """The image as a shard can hold it."""
        fmt, width, height = _kind(data)
        if self.shrink and (max(width, height) > MAX_SIDE or width * height > MAX_PIXELS):
            shrunk = _shrunk(upright(data), "JPEG" if fmt == "jpg" else "PNG")
            self.changes["images_shrunk"] += 1
            return shrunk
        _check_limits(width, height)
        if fmt not in FORMATS:
            encoded = _encoded(upright(data), "PNG")
            self.changes[f"images_re_encoded_{fmt}"] += 1
            return encoded
        if self.decode:
            Pixels(decoder="pil").decode(data)
        return data

    def _path(self, name: str) -> Path:
        name = name.removeprefix("file://")
        if "://" in name:
            raise DataError(f"image {name[:200]!r} is a URL; fetch it into the image root and name the file")
        by_link = False
        try:
            for spelling in dict.fromkeys((name, name.lstrip("/"), name.replace("\\", "/").lstrip("/"))):
                path = (self.folder / spelling).resolve()
                if path.is_relative_to(self.folder) and path.is_file():
                    return path
                linked = self._linked(spelling)
                if linked is not None and self.follow_links:
                    return linked
                by_link |= linked is not None
        except (ValueError, OSError, RuntimeError) as error:  # a null character, a name too long, a loop of links
            raise DataError(f"image name {name[:200]!r}: {error}") from None
        if by_link:
            raise DataError(f"image name {name[:200]!r} leads out of the image root by a link; --follow-links allows that")
        if not path.is_relative_to(self.folder):
            raise DataError(f"image name {name[:200]!r} leads out of the image root")
        raise DataError(f"image {name[:200]!r} is not in {self.folder}")

    def _linked(self, name: str) -> Path | None:
        """The file of a name that, as it is written, stays in the root: `..` is taken off before any link is followed."""
        for root in (self.folder, self.given):
            path = Path(os.path.normpath(root / name))
            if path.is_relative_to(root) and path.is_file():
                return path
        return None


def _from_base64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"image {name[:200]!r} is not base64: {error}") from None


def _kind(data: bytes) -> tuple[str, int, int]:
    """Format and size by the header, of an image that a shard holds or that is re-encoded."""
    try:
        info = describe(data)
        return info.fmt, info.width, info.height
    except DataError as error:
        try:
            with Image.open(io.BytesIO(data), formats=RE_ENCODED) as image:
                return image.format.lower(), *image.size
        except PIL_ERRORS:
            raise error from None


def _check_limits(width: int, height: int) -> None:
    try:
        check_limits(width, height)
    except DataError as error:
        raise DataError(f"{error.reason}; --shrink scales it down") from None


def _shrunk(image: Image.Image, fmt: str) -> bytes:
    scale = min(MAX_SIDE / max(image.size), math.sqrt(MAX_PIXELS / (image.width * image.height)))
    width, height = (max(1, int(side * scale)) for side in image.size)
    return _encoded(image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0), fmt)


def _encoded(image: Image.Image, fmt: str) -> bytes:
    file = io.BytesIO()
    image.save(file, fmt, **({"quality": JPEG_QUALITY, "subsampling": 0} if fmt == "JPEG" else {}))
    return file.getvalue()
