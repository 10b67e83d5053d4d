"""What a data set says of its shards: one line for each in `index.jsonl`, an energon offset table `shard-*.tar.idx` beside each, and
`dataset.json`, written last, which is also a wids index. `docs/data_format.md` states every field.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from laid_ds.data.record import DataError, Record, estimate_tokens
from laid_ds.data.tar import crc32_of

INDEX = "index.jsonl"
DATASET = "dataset.json"
ESTIMATE = "estimate"
SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.tar")


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


def check_size(path: Path, shard: ShardIndex) -> None:
    """A shard that is missing or cut is refused, with the first sample that it lost."""
    if not path.exists():
        raise DataError("the shard is missing", shard=str(path), key=shard.keys[0], offset=0)
    num_bytes = path.stat().st_size
    if num_bytes != shard.num_bytes:
        lost = next((i for i, end in enumerate(shard.offsets[1:]) if end > num_bytes), None)
        place = {} if lost is None else {"key": shard.keys[lost], "offset": shard.offsets[lost]}
        raise DataError(f"the shard has {num_bytes} bytes, the index says {shard.num_bytes}", shard=str(path), **place)
