"""Data sets behind URLs: shards come whole into a bounded local cache and are used only after their checksum held.

`http://`, `https://`, `gs://` and what else `webdataset.gopen` knows, `s3://` through the aws command, and `pipe:COMMAND` where `{}` in the
command stands for the file's name. Use a window shuffle, so that few shards are needed at a time.
"""

import fcntl
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from laid_ds.data.index import ShardIndex
from laid_ds.data.record import DataError

log = logging.getLogger(__name__)

CHUNK = 1 << 20
MAX_INDEX_BYTES = 1 << 30
PAUSE_SECONDS = 0.5


class RemoteFolder:
    """A data set's folder at a URL. Several processes may share the cache; one shard comes in at a time."""

    max_open = 2
    """Descriptors per process: a file that left the cache takes up room until it is closed."""

    def __init__(self, url: str, *, cache_folder: str | Path | None = None, cache_bytes: int = 64 << 30, attempts: int = 3):
        self.url, self.cache_bytes, self.attempts = url, cache_bytes, attempts
        home = Path(cache_folder) if cache_folder else Path(tempfile.gettempdir()) / f"laid-data-{os.getuid()}"
        self.cache = home / hashlib.sha256(url.encode()).hexdigest()[:16]
        self.cache.mkdir(parents=True, exist_ok=True)

    def __str__(self) -> str:
        return self.url

    def read(self, name: str) -> bytes:
        """A small file of the set, always from its source."""
        with tempfile.TemporaryFile(dir=self.cache) as file:
            self._try(lambda: self._receive(name, file, MAX_INDEX_BYTES))
            file.seek(0)
            return file.read()

    def check(self, shard: ShardIndex) -> None:
        """Refuse a shard that could never be in the cache."""
        if shard.num_bytes > self.cache_bytes:
            raise DataError(f"a shard of {shard.num_bytes} bytes and a cache of {self.cache_bytes}", shard=shard.name)

    def open(self, shard: ShardIndex) -> int:
        """A descriptor of the shard's bytes, fetched if they are not in the cache."""
        path = self.cache / f"{shard.sha256[:16]}-{shard.name}"
        with self._lock():
            if not path.exists():
                self._make_room(shard.num_bytes)
                self._try(lambda: self._fetch(shard, path))
            os.utime(path)
            return os.open(path, os.O_RDONLY)

    def _fetch(self, shard: ShardIndex, path: Path) -> None:
        part = self.cache / "incoming.part"
        with open(part, "wb") as file:
            num_bytes, sha256 = self._receive(shard.name, file, shard.num_bytes)
        if num_bytes != shard.num_bytes or sha256 != shard.sha256:
            raise DataError(f"{self.url}: {num_bytes} of {shard.num_bytes} bytes came, or others than the index says", shard=shard.name)
        os.replace(part, path)

    def _receive(self, name: str, file, max_bytes: int) -> tuple[int, str]:
        """Write what the URL gives into the file; (bytes, sha256)."""
        from webdataset.gopen import gopen

        file.seek(0)
        file.truncate()
        digest, num_bytes = hashlib.sha256(), 0
        with gopen(self._url_of(name)) as source:
            while chunk := source.read(CHUNK):
                num_bytes += len(chunk)
                if num_bytes > max_bytes:
                    raise DataError(f"{self.url}: more than {max_bytes} bytes came", shard=name)
                digest.update(chunk)
                file.write(chunk)
        return num_bytes, digest.hexdigest()

    def _url_of(self, name: str) -> str:
        if self.url.startswith("pipe:"):
            return self.url.replace("{}", name)
        place = f"{self.url.rstrip('/')}/{name}"
        return f"pipe:aws s3 cp --quiet '{place}' -" if self.url.startswith("s3://") else place

    def _try(self, work) -> None:
        for attempt in range(1, self.attempts + 1):
            try:
                return work()
            except (OSError, DataError) as error:
                if attempt == self.attempts:
                    raise DataError(f"{self.url}: given up after {attempt} attempts: {error}") from error
                log.warning("%s: attempt %d failed: %s", self.url, attempt, error)
                time.sleep(PAUSE_SECONDS * attempt)

    def _make_room(self, num_bytes: int) -> None:
        """Remove the shards that were opened longest ago."""
        files = sorted(self.cache.glob("*.tar"), key=lambda path: path.stat().st_mtime)
        used = sum(path.stat().st_size for path in files)
        for path in files:
            if used + num_bytes <= self.cache_bytes:
                return
            used -= path.stat().st_size
            path.unlink()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with open(self.cache / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
