"""Shards are written whole or not at all, and the same samples give the same bytes."""

import errno
import fcntl
import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import IO

from laid_ds.data.index import DATASET, INDEX, Row, ShardIndex, check_size, dataset_json
from laid_ds.data.record import DataError, Sample, record_of
from laid_ds.data.tar import BLOCK, END_OF_ARCHIVE, begins_as_ours, pack_sample
from laid_ds.disk import DiskError, writing

LOCK = ".writing"
"""In a folder that is being written."""


def write_whole(path: Path, data: bytes) -> None:
    """Put a file at its final name with all its bytes on disk, or not at all. Raises DiskError when the disk takes no more."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with writing(path.parent, path.name, len(data)):
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            publish(temporary, path)
    except DiskError:
        temporary.unlink(missing_ok=True)
        raise


def publish(temporary: Path, path: Path) -> None:
    """Rename, and make the rename itself durable."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _claim(folder: Path) -> IO[bytes]:
    """Lock a folder for this process until the file is closed, however the process ends; where the file system has no locks, for nobody.
    Raises DataError where another process writes there."""
    file = open(folder / LOCK, "ab")  # noqa: SIM115 - open for as long as the set is written
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise DataError(f"{folder} is being written by another process; wait for its end, or give another folder") from None
    return file


def _is_ours(path: Path) -> bool:
    with open(path, "rb") as file:
        return begins_as_ours(file.read(BLOCK))


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
        self._lock = _claim(self.folder)
        try:
            self.shards = self._begin(resume)
        except BaseException:
            self._let_go()
            raise
        self.keys = {key.decode() for shard in self.shards for key in shard.keys.tolist()}
        self._rows: list[Row] = []  # of the shard that is being written
        self._num_bytes = 0

    def _begin(self, resume: bool) -> list[ShardIndex]:
        """The shards that are there already."""
        if (self.folder / DATASET).exists():
            raise DataError(f"{self.folder} already holds a finished data set")
        if (self.folder / INDEX).exists() and not resume:
            raise DataError(f"{self.folder} holds an unfinished data set: resume it or remove it")
        shards = self._whole_shards() if resume else []
        self._refuse_files_in_the_way({shard.name for shard in shards}, resume)
        return shards

    @property
    def samples_done(self) -> int:
        """Samples written so far, those found by `resume` included."""
        return len(self.keys)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self.close()
            elif self._rows:
                with suppress(OSError):  # on a full disk, of bytes that are thrown away anyway
                    self._file.close()
                self._temporary.unlink(missing_ok=True)
                self._rows = []
        finally:
            self._let_go()

    def write(self, sample: Sample) -> None:
        """Append a sample; its key must be new to the whole set. Raises DiskError when the disk takes no more."""
        record = record_of(sample)
        if sample.key in self.keys:
            raise DataError("the key is already in this data set", key=sample.key)
        packed = pack_sample(sample, record)
        if self._rows and self._is_full(len(packed)):
            self._finish_shard()
        with writing(self.folder, f"sample {sample.key}", len(packed)):
            if not self._rows:
                self._start_shard()
            self._rows.append(Row.of(sample.key, packed, record))
            self._append(packed)
        self.keys.add(sample.key)

    def close(self) -> None:
        """Finish the last shard and the set."""
        if self._rows:
            self._finish_shard()
        index = b"".join(shard.line() for shard in self.shards)
        write_whole(self.folder / INDEX, index)
        write_whole(self.folder / DATASET, dataset_json(self.shards, index))
        self._let_go()

    def _let_go(self) -> None:
        if not self._lock.closed:
            (self.folder / LOCK).unlink(missing_ok=True)
            self._lock.close()

    def _is_full(self, more_bytes: int) -> bool:
        return len(self._rows) >= self.samples_per_shard or self._num_bytes + more_bytes > self.bytes_per_shard

    def _start_shard(self) -> None:
        self._name = f"{self.prefix}-{len(self.shards):06d}.tar"
        self._temporary = self.folder / (self._name + ".tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - open over many calls of `write`
        self._digest, self._num_bytes = hashlib.sha256(), 0

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._num_bytes += len(data)

    def _finish_shard(self) -> None:
        with writing(self.folder, self._name):
            self._write_end()
        self._rows = []

    def _write_end(self) -> None:
        with self._file as file:
            self._append(END_OF_ARCHIVE)
            file.flush()
            os.fsync(file.fileno())
        shard = ShardIndex.of(self._name, self._num_bytes, self._digest.hexdigest(), self._rows)
        write_whole(self.folder / (shard.name + ".idx"), shard.energon_offsets())
        publish(self._temporary, self.folder / shard.name)
        self.shards.append(shard)
        with open(self.folder / INDEX, "ab") as index:
            index.write(shard.line())
            index.flush()
            os.fsync(index.fileno())

    def _refuse_files_in_the_way(self, whole: set[str], resume: bool) -> None:
        """A shard that no index names is written over only where an interrupted run of this writer left it."""
        for path in sorted(self.folder.glob(f"{self.prefix}-??????.tar")):
            if path.name not in whole and not (resume and _is_ours(path)):
                raise DataError(f"{path} lies where a shard would be written; give a new folder")

    def _whole_shards(self) -> list[ShardIndex]:
        """Shards of an interrupted run. A torn last line belongs to a shard that will be written again."""
        path = self.folder / INDEX
        if not path.exists():
            return []
        whole, _, torn = path.read_bytes().rpartition(b"\n")
        try:
            shards = [ShardIndex.from_line(line) for line in whole.splitlines()]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path} is damaged or not written by this project ({error!r}); give a new folder") from None
        if torn:
            write_whole(path, b"".join(shard.line() for shard in shards))
        for shard in shards:
            check_size(self.folder / shard.name, shard)
        return shards
