"""What a data set says of its shards: one line for each in `index.jsonl`, an energon offset table `shard-*.tar.idx` beside each, and
`dataset.json`, written last, which is also a wids index. `docs/data_format.md` states every field.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from laid_ds.data.record import DataError, Origin, Record, estimate_tokens
from laid_ds.data.tar import crc32_of

INDEX = "index.jsonl"
DATASET = "dataset.json"
ESTIMATE = "estimate"
SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.tar")


class Row(NamedTuple):
    """What the index says of one sample."""

    key: str
    num_bytes: int
    crc32: int
    """Over all bytes of the sample: headers, data, padding."""
    images: int
    tokens: Mapping[str, int]
    """Lengths that the sample records, and "estimate"."""

    @classmethod
    def of(cls, key: str, packed: bytes, record: Record) -> "Row":
        """The row of a sample as it was written."""
        counts = {**record.tokens, ESTIMATE: estimate_tokens(record.turns, record.images)}
        return cls(key, len(packed), crc32_of(packed), len(record.images), counts)


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """One line of `index.jsonl`: a shard and, in columns, its n samples."""

    name: str
    num_bytes: int
    sha256: str
    keys: np.ndarray
    """[n] ASCII bytes."""
    offsets: np.ndarray
    """[n + 1] int64: start of each sample and the end of the last."""
    crc32: np.ndarray
    """[n] uint32, over all bytes of a sample: headers, data, padding."""
    images: np.ndarray
    """[n] int32."""
    tokens: Mapping[str, np.ndarray]
    """[n] int64 lengths under each name that every sample of the shard has; "estimate" always."""

    @classmethod
    def of(cls, name: str, num_bytes: int, sha256: str, rows: Sequence[Row]) -> "ShardIndex":
        """The shard that holds these samples, one after the other from its beginning."""
        offsets = [0, *accumulate(row.num_bytes for row in rows)]
        known = [kind for kind in (rows[0].tokens if rows else (ESTIMATE,)) if all(kind in row.tokens for row in rows)]
        tokens = {kind: [row.tokens[kind] for row in rows] for kind in known}
        return cls._packed(
            name, num_bytes, sha256, [row.key for row in rows], offsets, [row.crc32 for row in rows], [row.images for row in rows], tokens
        )

    @classmethod
    def from_line(cls, line: bytes) -> "ShardIndex":
        """Inverse of `line`."""
        fields = json.loads(line)
        name = fields.pop("shard")
        if not SHARD_NAME.fullmatch(name):  # it becomes part of paths and of download commands
            raise DataError(f"{name[:80]!r} cannot be the name of a shard")
        return cls._packed(name, fields.pop("bytes"), **fields)

    @classmethod
    def _packed(cls, name, num_bytes, sha256, keys, offsets, crc32, images, tokens) -> "ShardIndex":
        """From columns that are lists."""
        return cls(
            name,
            num_bytes,
            sha256,
            np.array(keys, "S"),
            np.array(offsets, np.int64),
            np.array(crc32, np.uint32),
            np.array(images, np.int32),
            {kind: np.array(column, np.int64) for kind, column in tokens.items()},
        )

    def line(self) -> bytes:
        """The JSON line."""
        fields = {
            "shard": self.name,
            "bytes": self.num_bytes,
            "sha256": self.sha256,
            "keys": [key.decode() for key in self.keys.tolist()],
            "offsets": self.offsets.tolist(),
            "crc32": self.crc32.tolist(),
            "images": self.images.tolist(),
            "tokens": {kind: column.tolist() for kind, column in self.tokens.items()},
        }
        return json.dumps(fields, separators=(",", ":")).encode() + b"\n"

    def __len__(self) -> int:
        return len(self.keys)

    def origin(self, i: int) -> Origin:
        """Where the shard's sample i lies."""
        return Origin(self.name, self.keys[i].decode(), int(self.offsets[i]))

    def energon_offsets(self) -> bytes:
        """The `.tar.idx` that megatron-energon reads."""
        return self.offsets.astype("<u8").tobytes()


def fingerprint_of(shards: Sequence[ShardIndex]) -> str:
    """Identity of a data set: names, sizes, counts and contents of its shards, in order."""
    facts = [[shard.name, shard.num_bytes, len(shard), shard.sha256] for shard in shards]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def dataset_json(shards: Sequence[ShardIndex], index: bytes) -> bytes:
    """`dataset.json`, a function of the index alone: a reader that regenerates it finds any changed byte."""
    fields = {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "laid_version": 1,
        "samples": sum(len(shard) for shard in shards),
        "bytes": sum(shard.num_bytes for shard in shards),
        "fingerprint": fingerprint_of(shards),
        "index_sha256": hashlib.sha256(index).hexdigest(),
        "shardlist": [{"url": shard.name, "nsamples": len(shard), "filesize": shard.num_bytes, "sha256": shard.sha256} for shard in shards],
    }
    return json.dumps(fields, indent=1).encode() + b"\n"


def read_index(index: bytes, dataset: bytes, where: str) -> list[ShardIndex]:
    """The shards of a data set, after the check that both files are those that were written."""
    try:
        shards = [ShardIndex.from_line(line) for line in io.BytesIO(index)]  # not split at once: a million samples are 50 MB
        intact = dataset_json(shards, index) == dataset
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        intact = False
    if not intact:
        raise DataError(f"{where}: {INDEX} and {DATASET} do not agree; `laid-data index` makes them anew from the shards")
    return shards


def check_size(path: Path, shard: ShardIndex) -> None:
    """A shard that is missing or cut is refused, with the first sample that it lost."""
    try:
        num_bytes = os.stat(path).st_size
    except FileNotFoundError:
        raise DataError("the shard is missing", shard=str(path), key=shard.origin(0).key, offset=0) from None
    if num_bytes != shard.num_bytes:
        lost = shard.origin(kept) if (kept := int((shard.offsets[1:] <= num_bytes).sum())) < len(shard) else None
        place = {} if lost is None else {"key": lost.key, "offset": lost.offset}
        raise DataError(f"the shard has {num_bytes} bytes, the index says {shard.num_bytes}", shard=str(path), **place)
