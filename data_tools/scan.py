"""Read a shard without its index: every byte is checked against what this project would have written, and whole samples after a damaged
one are found again."""

import mmap
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from laid_ds.data.record import KEY, MAX_JSON_BYTES, DataError, Record, parse
from laid_ds.data.tar import (
    BLOCK,
    END_OF_ARCHIVE,
    MAGIC,
    MAGIC_PLACE,
    begins_as_of_others,
    begins_as_ours,
    padding,
    parse_tar_header,
    tar_header,
)

END_DAMAGED = "the end-of-archive blocks are missing or damaged"


@dataclass(frozen=True)
class Found:
    """A whole sample: where it lies and its record."""

    key: str
    offset: int
    num_bytes: int
    record: Record


@dataclass
class Scan:
    """The whole samples of a shard, and what else is wrong with it."""

    whole: list[Found] = field(default_factory=list)
    problems: list[DataError] = field(default_factory=list)


def is_ours(path: Path, indexed: bool) -> bool:
    """Whether this project wrote a shard: by its headers, or, where damage has left none, because the index names it."""
    if path.stat().st_size == 0:
        return indexed
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        head = data[:BLOCK]
        return begins_as_ours(head) or (not begins_as_of_others(head) and (indexed or data.find(MAGIC) >= 0))


def scan(path: Path) -> Scan:
    """All samples of a shard."""
    found = Scan()
    if path.stat().st_size == 0:
        found.problems.append(DataError(END_DAMAGED, shard=path.name, offset=0))
        return found
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _scan(data, path.name, found)
    return found


def _scan(data: mmap.mmap, shard: str, found: Scan) -> None:
    offset = 0
    while offset is not None and data[offset : offset + len(END_OF_ARCHIVE) + 1] != END_OF_ARCHIVE:
        try:
            sample = read_sample(data, offset, shard)
            found.whole.append(sample)
            offset += sample.num_bytes
        except DataError as error:
            found.problems.append(error)
            offset = _next_sample(data, offset + 1)


def read_sample(data: mmap.mmap, offset: int, shard: str) -> Found:
    """The sample that begins at `offset`, if all its bytes are as they were written."""
    rest = data[offset : offset + len(END_OF_ARCHIVE) + 1]
    if len(rest) <= len(END_OF_ARCHIVE) and len(rest) - rest.count(0) <= 1:
        raise DataError(END_DAMAGED, shard=shard, offset=offset)
    key = None
    try:
        name, num_bytes, crc32 = parse_tar_header(data[offset : offset + BLOCK])
        key, _, suffix = name.partition(".")
        if suffix != "json" or not KEY.fullmatch(key) or num_bytes > MAX_JSON_BYTES:
            raise DataError(f"member {name!r} begins no sample")
        text, place = _member(data, offset, name, num_bytes, crc32)
        record = parse(text)
        for index, info in enumerate(record.images):
            _, place = _member(data, place, f"{key}.{index:03d}.{info.fmt}", info.num_bytes, info.crc32)
    except DataError as error:
        raise DataError(error.reason, shard=shard, key=key or _key_after(data, offset), offset=offset) from None
    return Found(key, offset, place - offset, record)


def _member(data: mmap.mmap, place: int, name: str, num_bytes: int, crc32: int) -> tuple[bytes, int]:
    """The data of a member that must be exactly this one, and where the next begins."""
    start, end = place + BLOCK, place + BLOCK + num_bytes
    after = end + padding(num_bytes)
    if after > len(data):
        raise DataError(f"the shard ends inside {name}")
    if data[place:start] != tar_header(name, num_bytes, crc32):
        raise DataError(f"the tar header of {name} is damaged")
    content = data[start:end]
    if zlib.crc32(content) != crc32:
        raise DataError(f"the data of {name} do not match their crc32")
    if any(data[end:after]):
        raise DataError(f"the padding after {name} is damaged")
    return content, after


def _key_after(data: mmap.mmap, offset: int) -> str | None:
    """The key of a sample whose first header is damaged, from its first image."""
    following = _next_header(data, offset + 1)
    if following is None:
        return None
    key, _, suffix = _name_at(data, following).partition(".")
    return key if suffix.startswith("000.") else None


def _next_sample(data: mmap.mmap, start: int) -> int | None:
    """Where the next undamaged header of a JSON member begins, on a block boundary or not."""
    offset = _next_header(data, start)
    while offset is not None and not _name_at(data, offset).endswith(".json"):
        offset = _next_header(data, offset + 1)
    return offset


def _next_header(data: mmap.mmap, start: int) -> int | None:
    magic = data.find(MAGIC, start + MAGIC_PLACE)
    while magic >= 0 and not _is_header(data[magic - MAGIC_PLACE : magic - MAGIC_PLACE + BLOCK]):
        magic = data.find(MAGIC, magic + 1)
    return magic - MAGIC_PLACE if magic >= 0 else None


def _name_at(data: mmap.mmap, offset: int) -> str:
    return parse_tar_header(data[offset : offset + BLOCK])[0]


def _is_header(block: bytes) -> bool:
    try:
        parse_tar_header(block)
    except DataError:
        return False
    return True
