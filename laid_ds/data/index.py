"""Shards and their index: plain webdataset tars whose every byte is checked, written whole or not at all, read by offset.

A data set is a folder: `shard-*.tar`, an energon offset table `shard-*.tar.idx` beside each, one line per shard in `index.jsonl`, and
`dataset.json`, written last, which is also a wids index. `docs/data_format.md` states every field.
"""

import hashlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32 as crc32_of  # zlib's numbers, about ten times faster

from laid_ds.data.record import (
    MAX_JSON_BYTES,
    DataError,
    Origin,
    Record,
    Sample,
    decode,
    encode_record,
    estimate_tokens,
    parse,
    record_of,
)

BLOCK = 512
END_OF_ARCHIVE = bytes(2 * BLOCK)
INDEX = "index.jsonl"
DATASET = "dataset.json"
ESTIMATE = "estimate"
MAX_SAMPLE_BYTES = (1 << 31) - (1 << 20)  # one pread
MAX_OPEN_SHARDS = 128
SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.tar")


def tar_header(name: str, num_bytes: int, crc32: int) -> bytes:
    """The one header this project writes for a member. The owner's name carries the data's crc32, so a shard checks itself."""
    header = bytearray(BLOCK)
    fields = {
        0: name.encode("ascii"),
        100: b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % num_bytes + b"00000000000\0" + b" " * 8 + b"0",
        257: b"ustar\x0000" + b"crc32-%08x" % crc32,
        329: b"0000000\0" * 2,
    }
    for place, value in fields.items():
        header[place : place + len(value)] = value
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def parse_tar_header(header: bytes) -> tuple[str, int, int]:
    """(name, size, crc32) of a member; any byte that `tar_header` would not have written is a `DataError`."""
    try:
        name = header[:100].rstrip(b"\0").decode("ascii")
        num_bytes, crc32 = int(header[124:135], 8), int(header[271:279], 16)
    except ValueError:
        raise DataError("tar header is damaged or not written by this project") from None
    if tar_header(name, num_bytes, crc32) != header:
        raise DataError("tar header is damaged or not written by this project")
    return name, num_bytes, crc32


def padding(num_bytes: int) -> int:
    """Bytes from the end of a member's data to the next block."""
    return -num_bytes % BLOCK


def pack_sample(sample: Sample, record: Record) -> bytes:
    """The tar members of a sample: the JSON first, then the images in order."""
    text = encode_record(record, sample.key)
    members = [(f"{sample.key}.json", text, crc32_of(text))]
    for index, (image, info) in enumerate(zip(sample.images, record.images, strict=True)):
        members.append((f"{sample.key}.{index:03d}.{info.fmt}", image, info.crc32))
    pieces = []
    for name, data, crc32 in members:
        pieces += [tar_header(name, len(data), crc32), data, bytes(padding(len(data)))]
    packed = b"".join(pieces)
    if len(text) > MAX_JSON_BYTES or len(packed) > MAX_SAMPLE_BYTES:
        raise DataError(f"sample of {len(packed)} bytes; the limit is {MAX_SAMPLE_BYTES}", key=sample.key)
    return packed


def split_sample(packed: bytes) -> list[memoryview]:
    """Member data of a packed sample whose checksum held, JSON first. Views, no copies."""
    view, parts, place, end = memoryview(packed), [], 0, len(packed)
    while place < end:
        start = place + BLOCK
        num_bytes = int(packed[place + 124 : place + 135], 8)
        place = start + num_bytes + -num_bytes % BLOCK
        parts.append(view[start : start + num_bytes])
    return parts


@dataclass
class ShardIndex:
    """One line of `index.jsonl`: a shard and, in columns, its samples."""

    name: str
    num_bytes: int = 0
    sha256: str = ""
    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=lambda: [0])
    """Start of each sample and the end of the last."""
    crc32: list[int] = field(default_factory=list)
    """Over all bytes of a sample: headers, data, padding."""
    images: list[int] = field(default_factory=list)
    tokens: dict[str, list[int]] = field(default_factory=lambda: {ESTIMATE: []})
    """Lengths under each name that every sample of the shard has; "estimate" always."""

    def add(self, key: str, packed: bytes, record: Record) -> None:
        """Append a sample that was written at the end of the shard."""
        counts = {**record.tokens, ESTIMATE: estimate_tokens(record.turns, record.images)}
        known = self.tokens if self.keys else {name: [] for name in counts}
        self.tokens = {name: column for name, column in known.items() if name in counts}
        for name, column in self.tokens.items():
            column.append(counts[name])
        self.keys.append(key)
        self.offsets.append(self.offsets[-1] + len(packed))
        self.crc32.append(crc32_of(packed))
        self.images.append(len(record.images))

    def line(self) -> bytes:
        """The JSON line."""
        fields = {
            "shard": self.name,
            "bytes": self.num_bytes,
            "sha256": self.sha256,
            "keys": self.keys,
            "offsets": self.offsets,
            "crc32": self.crc32,
            "images": self.images,
            "tokens": self.tokens,
        }
        return json.dumps(fields, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> "ShardIndex":
        """Inverse of `line`."""
        fields = json.loads(line)
        name = fields.pop("shard")
        if not SHARD_NAME.fullmatch(name):  # it becomes part of paths and of download commands
            raise DataError(f"{name[:80]!r} cannot be the name of a shard")
        return cls(name, fields.pop("bytes"), **fields)

    def energon_offsets(self) -> bytes:
        """The `.tar.idx` that megatron-energon reads."""
        return np.asarray(self.offsets, "<u8").tobytes()


def fingerprint_of(shards: Sequence[ShardIndex]) -> str:
    """Identity of a data set: names, sizes, counts and contents of its shards, in order."""
    facts = [[shard.name, shard.num_bytes, len(shard.keys), shard.sha256] for shard in shards]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def dataset_json(shards: Sequence[ShardIndex], index: bytes) -> bytes:
    """`dataset.json`, a function of the index alone: a reader that regenerates it finds any changed byte."""
    fields = {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "laid_version": 1,
        "samples": sum(len(shard.keys) for shard in shards),
        "bytes": sum(shard.num_bytes for shard in shards),
        "fingerprint": fingerprint_of(shards),
        "index_sha256": hashlib.sha256(index).hexdigest(),
        "shardlist": [
            {"url": shard.name, "nsamples": len(shard.keys), "filesize": shard.num_bytes, "sha256": shard.sha256} for shard in shards
        ],
    }
    return json.dumps(fields, indent=1).encode() + b"\n"


def read_index(index: bytes, dataset: bytes, where: str) -> list[ShardIndex]:
    """The shards of a data set, after the check that both files are those that were written."""
    try:
        shards = [ShardIndex.from_line(line) for line in index.splitlines()]
        intact = dataset_json(shards, index) == dataset
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise DataError(f"{where}: {INDEX} and {DATASET} do not agree; `laid-data index` makes them anew from the shards")
    return shards


def write_whole(path: Path, data: bytes) -> None:
    """Put a file at its final name with all its bytes on disk, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    publish(temporary, path)


def publish(temporary: Path, path: Path) -> None:
    """Rename, and make the rename itself durable."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


class ShardWriter:
    """Writes samples into shards. A shard has its final name only when it is whole; the set has `dataset.json` only when it is.

    The same samples give the same bytes. After a crash, `resume=True` goes on behind the last whole shard: `samples_done` says how many
    samples that is, so that the caller skips them.
    """

    def __init__(
        self,
        folder: str | Path,
        prefix: str = "shard",
        *,
        samples_per_shard: int = 256,
        bytes_per_shard: int = 512 << 20,
        resume: bool = False,
    ):
        if samples_per_shard < 1 or bytes_per_shard < 1:
            raise ValueError(f"a shard needs room: samples_per_shard {samples_per_shard}, bytes_per_shard {bytes_per_shard}")
        self.folder, self.prefix = Path(folder), prefix
        self.samples_per_shard, self.bytes_per_shard = samples_per_shard, bytes_per_shard
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / DATASET).exists():
            raise DataError(f"{self.folder} already holds a finished data set")
        if (self.folder / INDEX).exists() and not resume:
            raise DataError(f"{self.folder} holds an unfinished data set: resume it or remove it")
        self.shards = self._whole_shards() if resume else []
        self.keys = {key for shard in self.shards for key in shard.keys}
        self._shard: ShardIndex | None = None

    @property
    def samples_done(self) -> int:
        """Samples written so far, those found by `resume` included."""
        return len(self.keys)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
        elif self._shard is not None:
            self._file.close()
            self._temporary.unlink()
            self._shard = None

    def write(self, sample: Sample) -> None:
        """Append a sample; its key must be new to the whole set."""
        record = record_of(sample)
        if sample.key in self.keys:
            raise DataError("the key is already in this data set", key=sample.key)
        packed = pack_sample(sample, record)
        if self._shard is not None and self._is_full(len(packed)):
            self._finish_shard()
        if self._shard is None:
            self._start_shard()
        self._file.write(packed)
        self._digest.update(packed)
        self._shard.add(sample.key, packed, record)
        self.keys.add(sample.key)

    def close(self) -> None:
        """Finish the last shard and the set."""
        if self._shard is not None:
            self._finish_shard()
        index = b"".join(shard.line() for shard in self.shards)
        write_whole(self.folder / INDEX, index)
        write_whole(self.folder / DATASET, dataset_json(self.shards, index))

    def _is_full(self, more_bytes: int) -> bool:
        return len(self._shard.keys) >= self.samples_per_shard or self._shard.offsets[-1] + more_bytes > self.bytes_per_shard

    def _start_shard(self) -> None:
        self._shard = ShardIndex(f"{self.prefix}-{len(self.shards):06d}.tar")
        self._temporary = self.folder / (self._shard.name + ".tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - open over many calls of `write`
        self._digest = hashlib.sha256()

    def _finish_shard(self) -> None:
        shard, self._shard = self._shard, None
        with self._file as file:
            file.write(END_OF_ARCHIVE)
            file.flush()
            os.fsync(file.fileno())
        self._digest.update(END_OF_ARCHIVE)
        shard.sha256 = self._digest.hexdigest()
        shard.num_bytes = shard.offsets[-1] + len(END_OF_ARCHIVE)
        write_whole(self.folder / (shard.name + ".idx"), shard.energon_offsets())
        publish(self._temporary, self.folder / shard.name)
        self.shards.append(shard)
        with open(self.folder / INDEX, "ab") as index:
            index.write(shard.line())
            index.flush()
            os.fsync(index.fileno())

    def _whole_shards(self) -> list[ShardIndex]:
        """Shards of an interrupted run. A torn last line belongs to a shard that will be written again."""
        path = self.folder / INDEX
        if not path.exists():
            return []
        whole, _, torn = path.read_bytes().rpartition(b"\n")
        shards = [ShardIndex.from_line(line) for line in whole.splitlines()]
        if torn:
            write_whole(path, b"".join(shard.line() for shard in shards))
        for shard in shards:
            check_size(self.folder / shard.name, shard)
        return shards


def check_size(path: Path, shard: ShardIndex) -> None:
    """A shard that is missing or cut is refused, with the first sample that it lost."""
    if not path.exists():
        raise DataError("the shard is missing", shard=str(path), key=shard.keys[0], offset=0)
    num_bytes = path.stat().st_size
    if num_bytes != shard.num_bytes:
        lost = next((i for i, end in enumerate(shard.offsets[1:]) if end > num_bytes), None)
        place = {} if lost is None else {"key": shard.keys[lost], "offset": shard.offsets[lost]}
        raise DataError(f"the shard has {num_bytes} bytes, the index says {shard.num_bytes}", shard=str(path), **place)


class LocalFolder:
    """Shards that lie on a disk. `remote.RemoteFolder` has the same methods."""

    def __init__(self, path: str | Path):
        self.path, self.max_open = Path(path), MAX_OPEN_SHARDS

    def read(self, name: str) -> bytes:
        """A small file of the set."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            raise DataError(f"{self.path} is no finished data set: it has no {name}") from None

    def check(self, shard: ShardIndex) -> None:
        """Refuse a shard that cannot be whole."""
        check_size(self.path / shard.name, shard)

    def open(self, shard: ShardIndex) -> int:
        """A descriptor of the shard's bytes."""
        try:
            return os.open(self.path / shard.name, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"the shard cannot be opened: {error.strerror}", shard=shard.name) from None

    def __str__(self) -> str:
        return str(self.path)


class Dataset:
    """One or several folders of shards as one sequence of samples, read by index with `pread`; every byte that is read is checked.

    Safe to share with forked or spawned workers.
    """

    def __init__(self, folders: Sequence[LocalFolder], shards: Sequence[Sequence[ShardIndex]]):
        self.folders = list(folders)
        self.shards = [shard for group in shards for shard in group]
        self._folder_of = [folder for folder, group in zip(folders, shards, strict=True) for _ in group]
        self.source_shard_sizes = [np.array([len(shard.keys) for shard in group], np.int64) for group in shards]
        """Samples per shard, one array per folder."""
        self.shard_sizes = np.concatenate(self.source_shard_sizes)
        self.fingerprint = fingerprint_of(self.shards)
        self._home = np.repeat(np.arange(len(self.shards), dtype=np.int32), self.shard_sizes)
        self.keys = np.array([key for shard in self.shards for key in shard.keys], "S")
        self.offsets = _column(shard.offsets[:-1] for shard in self.shards)
        self.sizes = _column(np.diff(shard.offsets) for shard in self.shards)
        self.crc32 = _column(shard.crc32 for shard in self.shards)
        self.num_images = _column(shard.images for shard in self.shards)
        self.lengths = self.token_counts(ESTIMATE)
        """Estimated tokens of each sample; `token_counts` has exact ones where they were recorded."""
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._max_open = min(folder.max_open for folder in folders)
        self._check_keys()

    @classmethod
    def open(cls, folders: str | Path | Sequence[str | Path], **cache) -> "Dataset":
        """Open folders or URLs (`http://`, `s3://`, `pipe:`); `cache` (`cache_folder`, `cache_bytes`) is for URLs."""
        if isinstance(folders, (str, Path)):
            folders = [folders]
        places = [_folder(folder, **cache) for folder in folders]
        groups = []
        for place in places:
            dataset = place.read(DATASET)
            groups.append(read_index(place.read(INDEX), dataset, str(place)))
            for shard in groups[-1]:
                place.check(shard)
        if not any(groups):
            raise DataError(f"no samples in {', '.join(map(str, folders))}")
        return cls(places, groups)

    def __len__(self) -> int:
        return len(self._home)

    def token_counts(self, name: str) -> np.ndarray:
        """Length of each sample under `name`: "estimate", or a processor fingerprint that the samples record."""
        for shard in self.shards:
            if name not in shard.tokens:
                raise DataError(f"no token counts named {name!r}; there are {', '.join(shard.tokens)}", shard=shard.name)
        return _column(shard.tokens[name] for shard in self.shards)

    def origin(self, i: int) -> Origin:
        """Where sample `i` lies."""
        shard = self.shards[self._shard_of(i)]
        return Origin(shard.name, self.keys[i].decode(), int(self.offsets[i]))

    def find(self, key: str) -> int:
        """The index of a key."""
        found = np.flatnonzero(self.keys == key.encode())
        if not len(found):
            raise DataError(f"no sample has the key {key!r}")
        return int(found[0])

    def parts(self, i: int) -> list[memoryview]:
        """The checked member data of sample `i`, JSON first."""
        num_bytes = int(self.sizes[i])
        packed = os.pread(self._descriptor(self._shard_of(i)), num_bytes, int(self.offsets[i]))
        if len(packed) != num_bytes:
            raise DataError(f"the shard ends {num_bytes - len(packed)} bytes before the sample does").at(self.origin(i))
        if crc32_of(packed) != self.crc32[i]:
            raise DataError("the sample's bytes do not match its crc32").at(self.origin(i))
        return split_sample(packed)

    def read(self, i: int) -> Sample:
        """Sample `i`, or a `DataError` with shard, key and offset."""
        text, *images = self.parts(i)
        return decode(bytes(text), [bytes(image) for image in images], self.origin(i), check_images=False)

    def record(self, i: int) -> Record:
        """Sample `i` without its images, which are not read."""
        origin = self.origin(i)
        descriptor = self._descriptor(self._shard_of(i))
        head = os.pread(descriptor, min(1 << 15, int(self.sizes[i])), origin.offset)
        try:
            _, num_bytes, crc32 = parse_tar_header(head[:BLOCK])
        except DataError as error:
            raise error.at(origin) from None
        text = head[BLOCK : BLOCK + num_bytes]
        text += os.pread(descriptor, num_bytes - len(text), origin.offset + BLOCK + len(text))
        if crc32_of(text) != crc32:
            raise DataError("the record's bytes do not match their crc32").at(origin)
        return parse(text, origin)

    def __iter__(self) -> Iterator[Sample]:
        return (self.read(i) for i in range(len(self)))

    def __getstate__(self) -> Mapping:
        return {**self.__dict__, "_descriptors": OrderedDict()}

    def _shard_of(self, i: int) -> int:
        if not 0 <= i < len(self._home):
            raise IndexError(f"sample {i} of {len(self)}")
        return int(self._home[i])

    def _descriptor(self, shard: int) -> int:
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
            return self._descriptors[shard]
        self._descriptors[shard] = descriptor = self._folder_of[shard].open(self.shards[shard])
        if len(self._descriptors) > self._max_open:
            os.close(self._descriptors.popitem(last=False)[1])
        return descriptor

    def _check_keys(self) -> None:
        ordered = np.argsort(self.keys, kind="stable")
        twice = np.flatnonzero(self.keys[ordered[1:]] == self.keys[ordered[:-1]])
        if len(twice):
            first, second = self.origin(int(ordered[twice[0]])), self.origin(int(ordered[twice[0] + 1]))
            raise DataError(f"the key is also in shard {first.shard}").at(second)


def _folder(place: str | Path, **cache) -> LocalFolder:
    if "://" in str(place) or str(place).startswith("pipe:"):
        from laid_ds.data.remote import RemoteFolder

        return RemoteFolder(str(place), **cache)
    return LocalFolder(place)


def _column(parts) -> np.ndarray:
    return np.concatenate([np.asarray(part, np.int64) for part in parts])
