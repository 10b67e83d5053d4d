"""Folders of shards as one sequence of samples, read by offset; every byte that is read is checked."""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from laid_ds.data.index import DATASET, ESTIMATE, INDEX, ShardIndex, check_size, fingerprint_of, read_index
from laid_ds.data.record import DataError, Origin, Record, Sample, decode, parse
from laid_ds.data.remote import RemoteFolder
from laid_ds.data.tar import BLOCK, crc32_of, parse_tar_header, split_sample

MAX_OPEN_SHARDS = 128


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
        self.source_shard_sizes = [np.array([len(shard) for shard in group], np.int64) for group in shards]
        """Samples per shard, one array per folder."""
        self.shard_sizes = np.concatenate(self.source_shard_sizes)
        self.fingerprint = fingerprint_of(self.shards)
        self._ends = np.cumsum(self.shard_sizes).tolist()
        self.keys = np.concatenate([shard.keys for shard in self.shards])
        """[N] ASCII bytes."""
        self.num_images = np.concatenate([shard.images for shard in self.shards], dtype=np.int64)
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
        return self._ends[-1]

    def token_counts(self, name: str) -> np.ndarray:
        """Length of each sample under `name`: "estimate", or a processor fingerprint that the samples record."""
        for shard in self.shards:
            if name not in shard.tokens:
                raise DataError(f"no token counts named {name!r}; there are {', '.join(shard.tokens)}", shard=shard.name)
        return np.concatenate([shard.tokens[name] for shard in self.shards])

    def origin(self, i: int) -> Origin:
        """Where sample `i` lies."""
        shard, place = self._locate(i)
        return self.shards[shard].origin(place)

    def find(self, key: str) -> int:
        """The index of a key."""
        found = np.flatnonzero(self.keys == key.encode())
        if not len(found):
            raise DataError(f"no sample has the key {key!r}")
        return int(found[0])

    def spread(self, source: int, number: int) -> list[int]:
        """At most `number` samples spread over a folder; of a URL, whose shards come whole, over the first shard alone."""
        first = sum(int(sizes.sum()) for sizes in self.source_shard_sizes[:source])
        sizes = self.source_shard_sizes[source]
        first_shard = int(sizes[sizes > 0][:1].sum())
        total = first_shard if isinstance(self.folders[source], RemoteFolder) else int(sizes.sum())
        return sorted({first + i * total // number for i in range(number)}) if total else []

    def parts(self, i: int) -> list[memoryview]:
        """The checked member data of sample `i`, JSON first."""
        shard, place = self._locate(i)
        start, end = self.shards[shard].offsets[place : place + 2].tolist()
        num_bytes = end - start
        packed = os.pread(self._descriptor(shard), num_bytes, start)
        if len(packed) != num_bytes:
            raise DataError(f"the shard ends {num_bytes - len(packed)} bytes before the sample does").at(self.origin(i))
        if crc32_of(packed) != self.shards[shard].crc32[place]:
            raise DataError("the sample's bytes do not match its crc32").at(self.origin(i))
        return split_sample(packed)

    def read(self, i: int) -> Sample:
        """Sample `i`, or a `DataError` with shard, key and offset."""
        text, *images = self.parts(i)
        return decode(bytes(text), [bytes(image) for image in images], self.origin(i), check_images=False)

    def record(self, i: int) -> Record:
        """Sample `i` without its images, which are not read."""
        origin = self.origin(i)
        descriptor = self._descriptor(self._locate(i)[0])
        head = os.pread(descriptor, 1 << 15, origin.offset)
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

    def _locate(self, i: int) -> tuple[int, int]:
        """The number of sample i's shard, and the sample's place in it."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        shard = bisect_right(self._ends, i)
        return shard, int(i) - self._ends[shard] + len(self.shards[shard])

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
        return RemoteFolder(str(place), **cache)
    return LocalFolder(place)
