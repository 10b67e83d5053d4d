"""Recorded lessons: what a teacher showed of each sample, in files that are there whole or not at all, read by position (docs/teachers.md).

FOLDER/000000.lessons ... each hold the lessons of some micro-batches in a row of the stream: MAGIC, the number of lessons n, a table [n, 7]
of int64 (COLUMNS), the crc32 of all that, then the bytes of each lesson. index.table is all tables one below the other, with the number of
the file before each line; lessons.json, written last, says whose lessons these are and what each holds.

A lesson is the last hidden states of the answer rows [R, C] and, of each listed layer, the queries [heads, T or R, D], the keys
[heads, T, D] and the log-sum-exps [heads, T or R] (float32), one after the other. Letters: T tokens of a sample, R of them answer rows.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laid_ds.data import slabs
from laid_ds.data.batch import Batch, Heads, Recorded
from laid_ds.data.record import DataError
from laid_ds.disk import writing

MAGIC = b"lessons1"
COLUMNS = ("position", "offset", "bytes", "crc32", "tokens", "rows", "token_ids_crc32")
INDEX, MANIFEST, HEAD = "index.table", "lessons.json", "head.safetensors"
ENDING = ".lessons"
SHOWN = 60  # characters of a value that differs


@dataclass(frozen=True)
class Layer:
    """What lessons hold of a teacher's layer."""

    layer: int
    heads: tuple[int, ...]
    """The query heads."""
    group: int
    """Query heads of the layer to each of its key heads."""
    whole: bool
    """Whether these are all heads."""
    dim: int
    answers: bool
    """Whether of queries and log-sum-exps only the answer rows are held."""
    lse: bool

    @property
    def keys(self) -> list[int]:
        """The key heads that are held: those of the query heads."""
        return sorted({head // self.group for head in self.heads})

    def shapes(self, tokens: int, rows: int) -> list[tuple[int, ...]]:
        """Of queries, keys and, where they are held, log-sum-exps."""
        own = rows if self.answers else tokens
        held = [(len(self.heads), own, self.dim), (len(self.keys), tokens, self.dim)]
        return [*held, (len(self.heads), own)] if self.lse else held


@dataclass(frozen=True)
class Layout:
    """What each lesson of a folder holds."""

    dtype: str
    """Of all but the log-sum-exps."""
    hidden: int
    layers: tuple[Layer, ...]

    def parts(self, tokens: int, rows: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of a lesson, in order."""
        dtype = getattr(torch, self.dtype)
        held = [((rows, self.hidden), dtype)]
        for layer in self.layers:
            shapes = layer.shapes(tokens, rows)
            held += zip(shapes, (dtype, dtype, torch.float32), strict=False)
        return held

    def num_bytes(self, tokens: float, rows: float) -> float:
        """Of one lesson."""
        return sum(float(np.prod(shape)) * dtype.itemsize for shape, dtype in self.parts(tokens, rows))

    @classmethod
    def of_json(cls, tree: dict[str, Any]) -> Layout:
        layers = [
            Layer(**{name: tuple(value) if isinstance(value, list) else value for name, value in layer.items()}) for layer in tree["layers"]
        ]
        return cls(tree["dtype"], tree["hidden"], tuple(layers))


def places(batch: Batch) -> Iterator[tuple[int, slice]]:
    """Row and columns of each sample of a batch, in the order of its keys."""
    for n in range(len(batch.keys)):
        row, number = (0, n) if len(batch.segments) == 1 else (n, 0)
        columns = (batch.segments[row] == number).nonzero().flatten()
        yield row, slice(int(columns[0]), int(columns[-1]) + 1)


def token_ids_crc32(batch: Batch, row: int, columns: slice) -> int:
    return zlib.crc32(batch.inputs["input_ids"][row, columns].cpu().contiguous().numpy().tobytes())


def cut(layout: Layout, batch: Batch, hidden: Tensor, captured: dict[int, Any]) -> Iterator[tuple[int, int, int, bytes]]:
    """(tokens, rows, crc32 of the token ids, bytes) of the lesson of each sample of a micro-batch.

    hidden [all answer rows, C]; captured: layer -> what has query [B, H, T, D], key [B, K, T, D] and lse [B, H, T] or None.
    """
    taken = 0
    for row, columns in places(batch):
        mask = batch.supervised[row, columns]
        tokens, rows = len(mask), int(mask.sum())
        held = [hidden[taken : taken + rows]]
        taken += rows
        for layer in layout.layers:
            found = captured[layer.layer]
            query = found.query[row, list(layer.heads), columns]
            held += [query[:, mask] if layer.answers else query, found.key[row, layer.keys, columns]]
            if layer.lse:
                lse = found.lse[row, list(layer.heads), columns]
                held.append(lse[:, mask] if layer.answers else lse)
        expected = layout.parts(tokens, rows)
        assert [(tuple(part.shape), part.dtype) for part in held] == expected, "the teacher shows other sizes than were foreseen"
        content = b"".join(part.cpu().contiguous().view(torch.uint8).numpy().tobytes() for part in held if part.numel())
        yield tokens, rows, token_ids_crc32(batch, row, columns), content


def write_file(path: Path, lessons: Sequence[tuple[int, int, int, int, bytes]]) -> None:
    """Lessons as (position, tokens, rows, crc32 of the token ids, bytes). The file is there whole or not at all; raises DiskError."""
    first = len(MAGIC) + 8 + 8 * len(COLUMNS) * len(lessons) + 8
    lengths = [len(content) for *_, content in lessons]
    offsets = first + np.concatenate([[0], np.cumsum(lengths)[:-1]]) if lessons else []
    table = np.array(
        [
            [position, offset, len(content), zlib.crc32(content), tokens, rows, ids]
            for (position, tokens, rows, ids, content), offset in zip(lessons, offsets, strict=True)
        ],
        "<i8",
    )
    head = MAGIC + np.array([len(lessons)], "<i8").tobytes() + table.tobytes()
    parts = [head, np.array([zlib.crc32(head)], "<i8").tobytes(), *(content for *_, content in lessons)]
    replace_file(path, parts)


def replace_file(path: Path, parts: Sequence[bytes]) -> None:
    """Write a file so that it is there whole or not at all, whatever happens. Raises DiskError when the disk takes no more."""
    partial = path.with_name(f"{path.name}.{token_hex(4)}.partial")  # of no other process that writes the same
    try:
        with writing(path.parent, path.name, sum(map(len, parts))), partial.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # is gone by now where all went well


def file_name(number: int) -> str:
    return f"{number:06d}{ENDING}"


def read_table(path: Path) -> np.ndarray:
    """[n, 7] of a file. Raises ValueError for one that is not what was written: a wrong byte in its head, or another length."""
    data = path.read_bytes() if path.stat().st_size < 1 << 16 else _head_of(path)
    number = int.from_bytes(data[len(MAGIC) : len(MAGIC) + 8], "little")
    end = len(MAGIC) + 8 + 8 * len(COLUMNS) * number
    head, crc32 = data[:end], int.from_bytes(data[end : end + 8], "little")
    if not data.startswith(MAGIC) or len(head) != end or zlib.crc32(head) != crc32:
        raise ValueError(f"{path} is damaged (its head does not match its crc32): remove it, and `laid teach` records it again")
    table = np.frombuffer(head, "<i8", offset=len(MAGIC) + 8).reshape(number, len(COLUMNS))
    _check_length(path, end + 8 + int(table[:, COLUMNS.index("bytes")].sum()))
    return table


def _head_of(path: Path) -> bytes:
    with path.open("rb") as file:
        number = int.from_bytes(file.read(len(MAGIC) + 8)[len(MAGIC) :], "little")
        file.seek(0)
        return file.read(min(len(MAGIC) + 16 + 8 * len(COLUMNS) * number, path.stat().st_size))


def _check_length(path: Path, expected: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != expected:
        what = "is missing" if found is None else f"has {found} bytes instead of {expected}"
        raise ValueError(f"{path} {what}: remove it if it is there, and `laid teach` records it again")


def write_index(folder: Path, files: int, manifest: dict[str, Any]) -> None:
    """Index and manifest of a folder that holds all its files. Raises ValueError for a damaged one."""
    tables = [read_table(folder / file_name(number)) for number in range(files)]
    index = np.concatenate([np.insert(table, 0, number, 1) for number, table in enumerate(tables)]).tobytes()
    replace_file(folder / INDEX, [index])
    manifest = manifest | {"files": files, "lessons": sum(map(len, tables)), "index_crc32": zlib.crc32(index)}
    replace_file(folder / MANIFEST, [json.dumps(manifest, indent=1).encode()])


class Lessons:
    """A folder of lessons, read by position. Safe to share with forked workers; every byte that is read is checked."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        """Raises ValueError, one sentence, for files that are missing, cut, or not those that were indexed."""
        self.folder, self.manifest, self.layout = folder, manifest, Layout.of_json(manifest["layout"])
        data = (folder / INDEX).read_bytes() if (folder / INDEX).is_file() else b""
        if zlib.crc32(data) != manifest["index_crc32"]:
            raise ValueError(f"{folder / INDEX} is damaged or missing: `laid teach` with the same words writes it again from the files")
        index = np.frombuffer(data, "<i8").reshape(-1, 1 + len(COLUMNS))
        ends = index[:, 1 + COLUMNS.index("offset")] + index[:, 1 + COLUMNS.index("bytes")]
        for number in range(manifest["files"]):
            own = ends[index[:, 0] == number]
            _check_length(folder / file_name(number), int(own.max()) if len(own) else len(MAGIC) + 16)
        self.index = index[np.argsort(index[:, 1], kind="stable")]
        self.scales = {layer["layer"]: (layer["scale"], layer["window"]) for layer in manifest["layers"]}

    @property
    def num_bytes(self) -> int:
        return int(self.index[:, 1 + COLUMNS.index("bytes")].sum())

    def __call__(self, positions: Sequence[int], batch: Batch) -> Recorded:
        """The lessons of a batch's samples, laid out as the batch is: zeros at padding and at rows that are not held.

        Raises DataError for a lesson that is missing, damaged, or of other tokens."""
        rows_in_all, (num_rows, length) = int(batch.supervised.sum()), batch.segments.shape
        dtype = getattr(torch, self.layout.dtype)
        hidden = slabs.empty((rows_in_all, self.layout.hidden), dtype)
        heads = {}
        for layer in self.layout.layers:
            query, key = (slabs.empty((num_rows, len(own), length, layer.dim), dtype).zero_() for own in (layer.heads, layer.keys))
            lse = slabs.empty((num_rows, len(layer.heads), length), torch.float32).zero_() if layer.lse else None
            heads[layer.layer] = Heads(query, key, lse, *self.scales[layer.layer], *_named(layer))
        taken = 0
        for position, key, (row, columns) in zip(positions, batch.keys, places(batch), strict=True):
            mask = batch.supervised[row, columns]
            own, *parts = self._parts(position, key, len(mask), int(mask.sum()), token_ids_crc32(batch, row, columns))
            hidden[taken : taken + len(own)] = own
            taken += len(own)
            for layer in self.layout.layers:
                held, rows = heads[layer.layer], mask.nonzero().flatten() + columns.start if layer.answers else columns
                held.query[row, :, rows] = parts.pop(0)
                held.key[row, :, columns] = parts.pop(0)
                if held.lse is not None:
                    held.lse[row, :, rows] = parts.pop(0)
        return Recorded(hidden, heads)

    def _parts(self, position: int, key: str, tokens: int, rows: int, ids: int) -> list[Tensor]:
        at = int(np.searchsorted(self.index[:, 1], position))
        if at == len(self.index) or self.index[at, 1] != position:
            raise DataError(f"{self.folder} holds no lesson for position {position} (sample {key}): record more steps with `laid teach`")
        number, _, offset, num_bytes, crc32, *of_sample = self.index[at].tolist()
        path = self.folder / file_name(number)
        for what, there, here in zip(("tokens", "answer rows", "token ids (crc32)"), of_sample, (tokens, rows, ids), strict=True):
            if there != here:
                raise DataError(f"the lesson of sample {key} at position {position} in {path} is of other {what}: {there}, here {here}")
        descriptor = os.open(path, os.O_RDONLY)
        try:
            content = bytearray(num_bytes)
            read = os.preadv(descriptor, [content], offset)
        finally:
            os.close(descriptor)
        if read != num_bytes or zlib.crc32(content) != crc32:
            raise DataError(
                f"the lesson of sample {key} at position {position} in {path} does not match its crc32: remove the file, and `laid teach`"
                " records it again"
            )
        parts, first = [], 0
        for shape, dtype in self.layout.parts(tokens, rows):
            count = int(np.prod(shape))
            parts.append(torch.frombuffer(content, dtype=dtype, count=count, offset=first).view(shape) if count else torch.empty(shape))
            first += count * dtype.itemsize
        return parts


def _named(layer: Layer) -> tuple[tuple[int, ...] | None, list[int]]:
    return None if layer.whole else layer.heads, [layer.keys.index(head // layer.group) for head in layer.heads]


def read_manifest(folder: Path) -> dict[str, Any]:
    """lessons.json of a folder. Raises ValueError where the folder is not, or not yet, one of lessons."""
    path = folder / MANIFEST
    if not path.is_file():
        begun = any(folder.glob(f"*{ENDING}")) if folder.is_dir() else False
        state = "its recording has not come to its end: the same `laid teach` goes on" if begun else "record them with `laid teach`"
        raise ValueError(f"no lessons at {folder} (no {MANIFEST}); {state}")
    try:
        manifest = json.loads(path.read_bytes())
        Layout.of_json(manifest["layout"]), manifest["facts"], manifest["layers"], manifest["index_crc32"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: remove it, and `laid teach` with the same words writes it again") from None
    return manifest


def check_facts(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises ValueError, naming the first field that differs, for lessons of another run's teacher or samples."""
    for name in here:
        if there.get(name) != here[name]:
            theirs, ours = _apart(there.get(name), here[name])
            raise ValueError(
                f"the lessons in {folder} are of another {name}: {theirs}, and this run has {ours}; record its own with `laid teach`"
            )


def _apart(*values: Any) -> list[str]:
    """Two values as JSON; of long ones the part in which they differ."""
    texts = [json.dumps(value) for value in values]
    alike = next((i for i, (one, other) in enumerate(zip(*texts, strict=False)) if one != other), min(map(len, texts)))
    first = max(0, alike - SHOWN // 2) if max(map(len, texts)) > SHOWN else 0
    return [f"{'...' * (first > 0)}{text[first : first + SHOWN]}{'...' * (first + SHOWN < len(text))}" for text in texts]
