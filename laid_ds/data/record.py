"""One sample: interleaved text and images in turns, and its JSON form (`docs/data_format.md`). Standard library only.

A segment is a `str` (text) or an `int` (index into the sample's images); on disk {"t": text} or {"i": index}.
"""

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from laid_ds.data.header import FORMATS, read_header

VERSION = 1
MAX_IMAGES = 1000  # member names hold three digits
MAX_JSON_BYTES = 64 << 20
ROLES = ("system", "user", "assistant", "tool")
IMAGE_FIELDS = {"w", "h", "fmt", "bytes", "crc32"}
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")  # stock readers cut a member name at its first dot

Segment = str | int


@dataclass(frozen=True)
class Origin:
    """Where a sample lies: shard file, key, and byte offset of its first tar header."""

    shard: str
    key: str
    offset: int


class DataError(ValueError):
    """A record, shard or data set that is not what it declares. The message names shard, key and offset where known."""

    def __init__(self, reason: str, *, shard: str | None = None, key: str | None = None, offset: int | None = None):
        place = {"shard": shard, "key": key, "offset": offset}
        known = ", ".join(f"{name} {value}" for name, value in place.items() if value is not None)
        super().__init__(f"{reason} [{known}]" if known else reason)
        self.reason, self.shard, self.key, self.offset = reason, shard, key, offset

    def __reduce__(self):
        return _rebuild_error, (self.reason, self.shard, self.key, self.offset)

    def at(self, origin: Origin | None) -> "DataError":
        """The same error with its place filled in."""
        if origin is None:
            return self
        return DataError(self.reason, shard=origin.shard, key=origin.key, offset=origin.offset)


def _rebuild_error(reason, shard, key, offset):
    return DataError(reason, shard=shard, key=key, offset=offset)


@dataclass(frozen=True)
class Turn:
    """One speaker's turn. A question is a user turn; the assistant turn after it is its answer."""

    role: str
    segments: tuple[Segment, ...]
    needles: tuple[int, ...] = ()
    """Images that this turn's question needs; in a sample without images, texts of its first question (`num_pieces`)."""
    choices: tuple[str, ...] = ()
    """The answers to choose from, word for word, where the question has such a list."""
    supervised: bool = True
    """Whether the words of an assistant turn are to be learned; without, they are only read."""

    @property
    def text(self) -> str:
        """The text segments alone, joined."""
        return "".join(segment for segment in self.segments if isinstance(segment, str))


@dataclass(frozen=True)
class ImageInfo:
    """What the record declares about one encoded image; width and height are those of the upright picture."""

    width: int
    height: int
    fmt: str
    num_bytes: int
    crc32: int


@dataclass(frozen=True)
class Sample:
    """Turns and their encoded images, with where they come from and what they may be used for."""

    key: str
    turns: tuple[Turn, ...]
    images: tuple[bytes, ...] = ()
    source: str = ""
    licence: str = ""
    tokens: Mapping[str, int] = field(default_factory=dict)
    """Exact length per processor fingerprint, where it was measured."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin | None = None
    haystack: bool = False
    """Each question stands alone and stays true whichever images are left out or moved, but its needles and `fixed` ones
    (data/haystack.py)."""
    fixed: tuple[int, ...] = ()
    """Images that stay where they are in every window: pictures to choose from, say."""


@dataclass(frozen=True)
class Record:
    """A sample without its image bytes: what the JSON member holds."""

    turns: tuple[Turn, ...]
    images: tuple[ImageInfo, ...]
    source: str
    licence: str
    tokens: Mapping[str, int]
    meta: Mapping[str, Any]
    haystack: bool = False
    fixed: tuple[int, ...] = ()


def num_pieces(sample: Sample | Record) -> int:
    """How many things a haystack holds, which its needles count from 0: images; or, in a sample without images whose questions record
    needles, the texts of its first question before the last one, which is what is asked."""
    asked = [turn for turn in sample.turns if turn.role == "user"]
    if sample.images or not asked or not all(turn.needles for turn in asked):
        return len(sample.images)
    return len(asked[0].segments) - 1


def describe(image: bytes) -> ImageInfo:
    """Format and upright size from the header bytes alone; no pixel is decompressed."""
    try:
        fmt, width, height = read_header(image)
    except ValueError as error:
        raise DataError(str(error)) from None
    if width < 1 or height < 1:
        raise DataError(f"{fmt} image of {width} x {height} pixels")
    return ImageInfo(width, height, fmt, len(image), zlib.crc32(image))


def estimate_tokens(turns: Sequence[Turn], images: Sequence[ImageInfo]) -> int:
    """Length without a tokenizer: 4 bytes of text a token, 28 x 28 pixels an image token, 2 marks an image, 5 marks a turn."""
    text = sum((len(turn.text.encode()) + 3) // 4 + 5 for turn in turns)
    shown = [segment for turn in turns for segment in turn.segments if isinstance(segment, int)]
    return text + sum(-(-images[i].width // 28) * -(-images[i].height // 28) + 2 for i in shown)


def record_of(sample: Sample) -> Record:
    """The sample without its image bytes, checked."""
    try:
        check_key(sample.key)
        infos = tuple(describe(image) for image in sample.images)
        record = Record(sample.turns, infos, sample.source, sample.licence, sample.tokens, sample.meta, sample.haystack, sample.fixed)
        _check_record(record)
    except DataError as error:
        raise DataError(error.reason, key=sample.key) from None
    return record


def encode(sample: Sample) -> bytes:
    """The JSON member of a sample. The same sample always gives the same bytes."""
    return encode_record(record_of(sample), sample.key)


def encode_record(record: Record, key: str) -> bytes:
    """The JSON member of a record that `record_of` or `parse` checked."""
    fields = {
        "v": VERSION,
        "turns": [_turn_to_json(turn) for turn in record.turns],
        "images": [
            {"w": info.width, "h": info.height, "fmt": info.fmt, "bytes": info.num_bytes, "crc32": info.crc32} for info in record.images
        ],
        "source": record.source,
        "licence": record.licence,
        "tokens": dict(record.tokens),
        "meta": dict(record.meta),
    }
    if record.haystack:
        fields["haystack"] = True
    if record.fixed:
        fields["fixed"] = list(record.fixed)
    try:
        data = json.dumps(fields, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"meta cannot be written as JSON: {error}", key=key) from error
    if len(data) > MAX_JSON_BYTES:
        raise DataError(f"record of {len(data)} bytes; the limit is {MAX_JSON_BYTES}", key=key)
    return data


def decode(data: bytes, images: Sequence[bytes], origin: Origin, *, check_images: bool = True) -> Sample:
    """Inverse of `encode`. `check_images=False` where a checksum over the whole sample already held."""
    record = parse(data, origin)
    if len(images) != len(record.images):
        raise DataError(f"record declares {len(record.images)} images, {len(images)} are there").at(origin)
    if check_images:
        for index, (image, info) in enumerate(zip(images, record.images, strict=True)):
            if len(image) != info.num_bytes or zlib.crc32(image) != info.crc32:
                raise DataError(f"image {index} does not match its declared size and crc32").at(origin)
    facts = (record.turns, tuple(images), record.source, record.licence, record.tokens, record.meta, origin)
    return Sample(origin.key, *facts, record.haystack, record.fixed)


def parse(data: bytes, origin: Origin | None = None) -> Record:
    """Read the JSON member and check every field. Any defect is a `DataError` that names the place."""
    try:
        return _parse(data)
    except DataError as error:
        raise error.at(origin) from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number too long, nested too deep
        raise DataError(f"record is not readable JSON: {error}").at(origin) from error


def check_key(key: str) -> None:
    """A key names the members of its sample: no dot, no slash, at most 80 characters."""
    if not isinstance(key, str) or not KEY.fullmatch(key):
        raise DataError(f"key {key!r} must be 1-80 of A-Z a-z 0-9 _ - and start with a letter or digit")


def _parse(data: bytes) -> Record:
    if len(data) > MAX_JSON_BYTES:
        raise DataError(f"record of {len(data)} bytes; the limit is {MAX_JSON_BYTES}")
    fields = json.loads(data.decode(), parse_constant=_no_constant)
    if b"\\u" in data:  # an escape can spell half a surrogate pair, which no UTF-8 file can hold
        json.dumps(fields, ensure_ascii=False).encode()
    _expect_keys(fields, {"v", "turns", "images", "source", "licence", "tokens", "meta"}, {"haystack", "fixed"}, "record")
    if fields["v"] != VERSION or isinstance(fields["v"], bool):
        raise DataError(f"record version {fields['v']!r}; this reader knows {VERSION}")
    record = Record(
        turns=tuple(_turn_from_json(turn) for turn in _expect_list(fields["turns"], "turns")),
        images=tuple(_image_from_json(image) for image in _expect_list(fields["images"], "images")),
        source=fields["source"],
        licence=fields["licence"],
        tokens=fields["tokens"],
        meta=fields["meta"],
        haystack=fields.get("haystack", False),
        fixed=tuple(_expect_list(fields.get("fixed", []), "fixed")),
    )
    _check_record(record)
    return record


def _check_record(record: Record) -> None:
    _expect(len(record.images) <= MAX_IMAGES, f"{len(record.images)} images; the limit is {MAX_IMAGES}")
    _expect(len(record.turns) > 0, "a sample needs at least one turn")
    for turn in record.turns:
        _check_turn(turn, len(record.images), num_pieces(record))
    shown = {segment for turn in record.turns for segment in turn.segments if isinstance(segment, int)}
    hidden = set(range(len(record.images))) - shown
    _expect(not hidden, f"images {sorted(hidden)[:5]} are shown in no turn")
    _expect(isinstance(record.haystack, bool), f"haystack is {str(record.haystack)[:40]!r}, not true or false")
    for image in record.fixed:
        _expect_image(image, len(record.images))
    _expect(len(set(record.fixed)) == len(record.fixed), f"fixed names an image twice: {list(record.fixed)[:20]}")
    for name in ("source", "licence"):
        _expect_text(getattr(record, name), name)
    _expect(isinstance(record.tokens, Mapping) and isinstance(record.meta, Mapping), "tokens and meta must be objects")
    for name, count in record.tokens.items():
        _expect_text(name, "token count name")
        _expect(_is_count(count), f"token count {name!r} is {str(count)[:40]!r}")
    _expect(all(isinstance(name, str) for name in record.meta), "names in meta must be text")


def _check_turn(turn: Turn, num_images: int, pieces: int) -> None:
    _expect(turn.role in ROLES, f"role {str(turn.role)[:40]!r} is none of {', '.join(ROLES)}")
    _expect(len(turn.segments) > 0, f"a {turn.role} turn without segments")
    for segment in turn.segments:
        if isinstance(segment, str):
            _expect_text(segment, "text segment")
        else:
            _expect_image(segment, num_images)
    for needle in turn.needles:
        _expect_needle(needle, num_images, pieces)
    for choice in turn.choices:
        _expect_text(choice, "choice")
    _expect(turn.role == "user" or not (turn.needles or turn.choices), "needles and choices belong to a user turn")
    _expect(isinstance(turn.supervised, bool), f"supervised is {str(turn.supervised)[:40]!r}, not true or false")
    _expect(turn.supervised or turn.role == "assistant", "only an assistant turn can be left out of what is learned (supervised false)")


def _turn_to_json(turn: Turn) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": turn.role, "segments": [_segment_to_json(segment) for segment in turn.segments]}
    if turn.needles:
        fields["needles"] = list(turn.needles)
    if turn.choices:
        fields["choices"] = list(turn.choices)
    if not turn.supervised:
        fields["supervised"] = False
    return fields


def _turn_from_json(fields: Any) -> Turn:
    _expect_keys(fields, {"role", "segments"}, {"needles", "choices", "supervised"}, "turn")
    return Turn(
        role=fields["role"],
        segments=tuple(_segment_from_json(value) for value in _expect_list(fields["segments"], "segments")),
        needles=tuple(_expect_list(fields.get("needles", []), "needles")),
        choices=tuple(_expect_list(fields.get("choices", []), "choices")),
        supervised=fields.get("supervised", True),
    )


def _segment_to_json(segment: Segment) -> dict[str, Segment]:
    return {"t": segment} if isinstance(segment, str) else {"i": segment}


def _segment_from_json(value: Any) -> Segment:
    if isinstance(value, dict) and len(value) == 1:
        if isinstance(value.get("t"), str):
            return value["t"]
        if _is_count(value.get("i")):
            return value["i"]
    raise DataError(f'segment {str(value)[:60]} is neither {{"t": text}} nor {{"i": index}}')


def _image_from_json(fields: Any) -> ImageInfo:
    _expect_keys(fields, IMAGE_FIELDS, set(), "image")
    width, height, fmt, num_bytes, crc32 = fields["w"], fields["h"], fields["fmt"], fields["bytes"], fields["crc32"]
    if not (_is_count(width) and _is_count(height) and _is_count(num_bytes) and _is_count(crc32) and width and height):
        raise DataError(f"image {str(fields)[:120]} needs whole numbers in w, h, bytes and crc32")
    if fmt not in FORMATS:
        raise DataError(f"image format {str(fmt)[:40]!r} is none of {', '.join(FORMATS)}")
    return ImageInfo(width, height, fmt, num_bytes, crc32)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _expect(holds: bool, reason: str) -> None:
    if not holds:
        raise DataError(reason)


def _expect_text(value: Any, name: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{name} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{name} holds half a surrogate pair") from None


def _expect_image(index: Any, num_images: int) -> None:
    if not _is_count(index) or index >= num_images:
        raise DataError(f"image index {str(index)[:40]}; the sample has {num_images} images")


def _expect_needle(index: Any, num_images: int, pieces: int) -> None:
    if num_images:
        _expect_image(index, num_images)
    found = f"needle {str(index)[:40]}; the first question of the sample has {pieces} texts before what it asks, and there are no images"
    _expect(_is_count(index) and index < pieces, found)


def _expect_list(value: Any, name: str) -> list:
    _expect(isinstance(value, list), f"{name} is {type(value).__name__}, not a list")
    return value


def _expect_keys(fields: Any, required: set[str], optional: set[str], name: str) -> None:
    if not isinstance(fields, dict):
        raise DataError(f"{name} is {type(fields).__name__}, not an object")
    if fields.keys() != required:
        missing, unknown = required - fields.keys(), fields.keys() - required - optional
        _expect(not missing, f"{name} lacks {', '.join(sorted(missing))}")
        _expect(not unknown, f"{name} has unknown fields {str(sorted(unknown))[:80]}")


def _no_constant(name: str) -> None:
    raise DataError(f"{name} is not a JSON number")
