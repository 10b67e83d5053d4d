"""Find what is wrong with a data set, make its index anew, and save what is whole."""

import hashlib
import itertools
import json
import mmap
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from data_tools.console import track
from data_tools.inputs import visible
from data_tools.processor_check import Check, check_with
from data_tools.scan import END_DAMAGED, Found, is_ours, scan
from laid_ds.data import images
from laid_ds.data.index import DATASET, INDEX, Row, ShardIndex, dataset_json, read_index
from laid_ds.data.record import DataError, Origin, decode, describe, parse
from laid_ds.data.tar import END_OF_ARCHIVE, split_sample
from laid_ds.data.writer import publish, write_whole
from laid_ds.disk import DiskError, writing

FOREIGN = "this project has not written the file, so it is left as it is; `laid-data build` makes shards of other people's data"

Item, Result = TypeVar("Item"), TypeVar("Result")


def verify(folder: Path, deep: bool, jobs: int, processor: Path | None = None) -> dict[str, Any]:
    """Every byte of every shard against the index; `deep` also reads each record and decodes each image, and has the processor of a model
    folder take each sample."""
    if processor and not deep:
        raise ValueError(f"--processor {processor} needs --deep, which reads the samples")
    check = check_with(processor) if processor else None
    problems: list[DataError] = []
    shards = _indexed_shards(folder, problems)
    if shards is None:
        names = _shard_names(folder)
        reports = _in_parallel(lambda name: _check_unindexed(folder / name), names, jobs, "verify")
    else:
        problems += _strangers(folder, shards)
        reports = _in_parallel(lambda shard: _check_shard(folder, shard, deep, check), shards, jobs, "verify")
    whole = 0
    for num_whole, found in reports:
        whole += num_whole
        problems += found
    return {
        "sound": not problems,
        "shards": len(reports),
        "whole_samples": whole,
        "problems": [_facts(problem) for problem in problems],
    }


def reindex(folder: Path, jobs: int) -> dict[str, Any]:
    """Make the index files from the shards alone. A damaged shard is refused; what others wrote is left alone and named."""
    names, foreign = _ours(folder, _indexed_shards(folder, []))
    _refuse_index_of_others(folder)
    scans = _in_parallel(lambda name: scan(folder / name), names, jobs, "index")
    for found in scans:
        if found.problems:
            raise found.problems[0]
    shards = _in_parallel(lambda pair: _index_shard(folder / pair[0], pair[1].whole), list(zip(names, scans, strict=True)), jobs, "hash")
    _refuse_repeated_keys(shards)
    for shard in shards:
        write_whole(folder / f"{shard.name}.idx", shard.energon_offsets())
    index = b"".join(shard.line() for shard in shards)
    (folder / DATASET).unlink(missing_ok=True)
    write_whole(folder / INDEX, index)
    write_whole(folder / DATASET, dataset_json(shards, index))
    return {"shards": len(shards), "samples": sum(map(len, shards)), **({"left_alone": foreign} if foreign else {})}


def repair(folder: Path, jobs: int) -> dict[str, Any]:
    """Keep every whole sample. A damaged shard is written anew without the others and stays beside it as `NAME.damaged`.

    What this project did not write is left alone and named.
    """
    known = _indexed_shards(folder, [])
    names, _ = _ours(folder, known)
    _refuse_index_of_others(folder)
    kept: set[str] = set()
    problems: list[DataError] = []
    for name in track(names, "repair"):
        keys, found = _repair_shard(folder, name)
        kept |= keys
        problems += found
    lost = [problem for problem in problems if problem.reason != END_DAMAGED] if known is None else _lost(known, kept, problems)
    if not kept:
        raise DataError(f"{folder} holds no whole sample; its shards are kept as *.damaged")
    return {**reindex(folder, jobs), "lost": [_facts(problem) for problem in lost]}


def _lost(known: Sequence[ShardIndex], kept: set[str], problems: Sequence[DataError]) -> list[DataError]:
    """Each indexed sample that was not kept, with the reason that the scan found at its place."""
    reasons = {(problem.shard, problem.offset): problem.reason for problem in problems if problem.reason != END_DAMAGED}
    gone = [lost for shard in known for lost in _all_lost(shard, "the sample is cut off or its shard is missing") if lost.key not in kept]
    return [
        DataError(reasons.get((lost.shard, lost.offset), lost.reason), shard=lost.shard, key=lost.key, offset=lost.offset) for lost in gone
    ]


def _indexed_shards(folder: Path, problems: list[DataError]) -> list[ShardIndex] | None:
    """The index, or None with the reason among the problems."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder")
    try:
        return read_index((folder / INDEX).read_bytes(), (folder / DATASET).read_bytes(), str(folder))
    except FileNotFoundError as error:
        problems.append(DataError(f"{Path(error.filename).name} is missing; `laid-data index` makes it from the shards"))
    except DataError as error:
        problems.append(error)
    return None


def _shard_names(folder: Path) -> list[str]:
    names = [path.name for path in visible(folder, "*.tar")]
    if not names:
        raise DataError(f"{folder} holds no shards")
    return names


def _ours(folder: Path, known: Sequence[ShardIndex] | None) -> tuple[list[str], list[str]]:
    """(shards that this project wrote, those of others). Raises DataError where there are only others'."""
    indexed = {shard.name for shard in known or ()}
    names = _shard_names(folder)
    ours = [name for name in names if is_ours(folder / name, name in indexed)]
    foreign = [name for name in names if name not in ours]
    if not ours:
        raise DataError(FOREIGN, shard=str(folder / foreign[0]))
    return ours, foreign


def _refuse_index_of_others(folder: Path) -> None:
    """A sound `dataset.json` without our version is somebody's own, and would be written over."""
    path = folder / DATASET
    try:
        fields = json.loads(path.read_bytes()) if path.is_file() else {"laid_version": 1}
    except ValueError:
        return  # damaged, or written over in part: made anew
    if not (isinstance(fields, dict) and "laid_version" in fields):
        raise DataError(f"{path} was not written by this project and is left as it is; move it, or the shards, to another folder")


def _strangers(folder: Path, shards: Sequence[ShardIndex]) -> Iterator[DataError]:
    """Files that a reader of the index would never see."""
    known = {shard.name for shard in shards}
    for path in sorted([*visible(folder, "*.tar"), *visible(folder, "*.tar.tmp")]):
        if path.name not in known:
            foreign = path.suffix == ".tar" and not is_ours(path, indexed=False)
            yield DataError(FOREIGN if foreign else "the shard is not in the index", shard=path.name)


def _check_shard(folder: Path, shard: ShardIndex, deep: bool, check: Check | None) -> tuple[int, list[DataError]]:
    """Whole samples of an indexed shard, and its problems."""
    path = folder / shard.name
    if not path.exists():
        return 0, _all_lost(shard, "the shard is missing")
    if not is_ours(path, indexed=True):
        return 0, _all_lost(shard, f"in the shard's place lies another file: {FOREIGN}")
    problems = _check_offsets_file(folder, shard)
    if path.stat().st_size == 0:
        return 0, [*_all_lost(shard, "the shard is empty"), *problems]
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if hashlib.sha256(data).hexdigest() == shard.sha256 and not deep:
            return len(shard), problems
        bad = list(_bad_samples(data, shard, deep, check))
        end = int(shard.offsets[-1])
        if data[end:] != END_OF_ARCHIVE:
            problems.append(DataError(END_DAMAGED, shard=shard.name, key=shard.origin(len(shard) - 1).key, offset=end))
    return len(shard) - len(bad), bad + problems


def _all_lost(shard: ShardIndex, reason: str) -> list[DataError]:
    return [DataError(reason).at(shard.origin(i)) for i in range(len(shard))]


def _bad_samples(data: mmap.mmap, shard: ShardIndex, deep: bool, check: Check | None) -> Iterator[DataError]:
    for i, (end, crc32) in enumerate(zip(shard.offsets[1:].tolist(), shard.crc32.tolist(), strict=True)):
        origin = shard.origin(i)
        packed = data[origin.offset : end]
        if len(packed) < end - origin.offset:
            yield DataError("the sample is cut off").at(origin)
        elif zlib.crc32(packed) != crc32:
            yield DataError("the sample's bytes do not match its crc32").at(origin)
        elif deep:
            yield from _bad_content(packed, origin, check)


def _bad_content(packed: bytes, origin: Origin, check: Check | None) -> Iterator[DataError]:
    """What is wrong with a sample whose bytes are those that were written."""
    try:
        text, *parts = split_sample(packed)
        sample = decode(bytes(text), [bytes(part) for part in parts], origin)
        for index, (image, info) in enumerate(zip(sample.images, parse(bytes(text)).images, strict=True)):
            images.check_decodable(image, f"image {index}")
            if describe(image) != info:
                raise DataError(f"image {index} is declared as {info}, but is {describe(image)}; build the set anew")
        if check:
            check(sample)
    except DataError as error:
        yield error.at(origin)


def _check_offsets_file(folder: Path, shard: ShardIndex) -> list[DataError]:
    path = folder / f"{shard.name}.idx"
    if path.exists() and path.read_bytes() == shard.energon_offsets():
        return []
    return [DataError(f"{path.name} is missing or does not match the index", shard=shard.name)]


def _check_unindexed(path: Path) -> tuple[int, list[DataError]]:
    if not is_ours(path, indexed=False):
        return 0, [DataError(FOREIGN, shard=path.name)]
    found = scan(path)
    return len(found.whole), found.problems


def _index_shard(path: Path, whole: Sequence[Found]) -> ShardIndex:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        rows = [Row.of(found.key, data[found.offset : found.offset + found.num_bytes], found.record) for found in whole]
        return ShardIndex.of(path.name, len(data), hashlib.sha256(data).hexdigest(), rows)


def _refuse_repeated_keys(shards: Iterable[ShardIndex]) -> None:
    home: dict[str, str] = {}
    for shard in shards:
        for origin in map(shard.origin, range(len(shard))):
            if origin.key in home:
                raise DataError(f"the key is also in shard {home[origin.key]}").at(origin)
            home[origin.key] = shard.name


def _repair_shard(folder: Path, name: str) -> tuple[set[str], list[DataError]]:
    """Keys that were kept, and what was wrong. A shard without problems is left alone."""
    path = folder / name
    found = scan(path)
    if found.problems:
        temporary = path.with_name(f"{path.name}.tmp")
        if found.whole:
            _copy_whole(path, found.whole, temporary)
        os.replace(path, _aside(path))
        if found.whole:
            publish(temporary, path)
    return {sample.key for sample in found.whole}, found.problems


def _aside(path: Path) -> Path:
    """NAME.damaged, or NAME.damaged.2, ... where an earlier repair has left one."""
    names = itertools.chain([f"{path.name}.damaged"], (f"{path.name}.damaged.{number}" for number in itertools.count(2)))
    return next(path.with_name(name) for name in names if not path.with_name(name).exists())


def _copy_whole(damaged: Path, whole: Sequence[Found], temporary: Path) -> None:
    """Raises DiskError when the disk takes no more; nothing is left of the copy then."""
    try:
        with writing(temporary.parent, temporary.name, sum(sample.num_bytes for sample in whole)):
            with open(damaged, "rb") as source, open(temporary, "wb") as file:
                for sample in whole:
                    source.seek(sample.offset)
                    file.write(source.read(sample.num_bytes))
                file.write(END_OF_ARCHIVE)
                file.flush()
                os.fsync(file.fileno())
    except DiskError:
        temporary.unlink(missing_ok=True)
        raise


def _facts(problem: DataError) -> dict[str, Any]:
    return {"shard": problem.shard, "key": problem.key, "offset": problem.offset, "reason": problem.reason}


def _in_parallel(work: Callable[[Item], Result], items: Sequence[Item], jobs: int, label: str) -> list[Result]:
    """In threads: hashing, decoding and reading leave the interpreter's lock."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(track(pool.map(work, items), label, total=len(items)))
