"""Turn a file of entries and a folder of images into shards: in the file's order, in parallel, resumable, nothing lost silently."""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from data_tools.console import track
from data_tools.formats import documents, folder, llava, mm_niah, mmlongbench, visual_haystacks
from data_tools.formats.fields import Entry
from data_tools.image_root import ImageRoot
from data_tools.inputs import entries
from laid_ds.data.haystack import names_a_place, why_whole
from laid_ds.data.images import check_decodable
from laid_ds.data.index import DATASET
from laid_ds.data.record import DataError, Sample, record_of
from laid_ds.data.writer import ShardWriter, write_whole

Reader = Callable[[Entry, str, ImageRoot], Sample]

FORMATS: dict[str, Reader] = {
    "llava": llava.read_entry,
    "sharegpt": llava.read_entry,
    "obelics": documents.obelics,
    "mmc4": documents.mmc4,
    "folder": folder.read_entry,
    "vhs": visual_haystacks.read_entry,
    "mm-niah": mm_niah.read_entry,
    "mmlongbench": mmlongbench.read_entry,
}
PLAN, REJECTED = "build.json", "rejected.jsonl"
READ_AHEAD = 4


@dataclass(frozen=True)
class Build:
    """What is built from what. Written beside the shards; a resumed build must be the same one."""

    format: str
    source: Path
    images: Path
    prefix: str
    licence: str = ""
    source_name: str = ""
    samples_per_shard: int = 256
    bytes_per_shard: int = 512 << 20
    decode: bool = False
    """Decode every image, not only read its header."""
    skip_bad: bool = False
    """Go on after a bad entry, which `rejected.jsonl` then names."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the format's reader."""
    haystack: bool = False
    """The user's word that every question stays true whichever images are left out or moved."""

    def facts(self) -> bytes:
        """The build, and the contents of its source, as `build.json` holds them."""
        with open(self.source, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        fields = {**self.__dict__, "source": self.source.name, "images": self.images.name, "source_sha256": digest}
        if not self.haystack:  # as builds without it were written
            del fields["haystack"]
        return json.dumps(fields, indent=1).encode() + b"\n"


def build(plan: Build, out: Path, *, resume: bool, jobs: int) -> dict[str, Any]:
    """Write the data set."""
    root = ImageRoot(plan.images)
    facts = plan.facts()
    if resume and (out / DATASET).exists() and _same_build(out, facts):
        return {"folder": str(out), "already_complete": True}
    writer = ShardWriter(out, samples_per_shard=plan.samples_per_shard, bytes_per_shard=plan.bytes_per_shard, resume=resume)
    if not (resume and _same_build(out, facts)):
        write_whole(out / PLAN, facts)
    first = _entries_done(writer)
    rejected = _rejected_before(out, first)
    work = _make_reader(plan, partial(FORMATS[plan.format], **plan.options), root)
    numbered = islice(enumerate(entries(plan.source)), first, None)
    with writer, ThreadPoolExecutor(jobs) as pool:
        for number, sample in track(_ordered(pool, work, numbered, jobs * READ_AHEAD), f"build {out.name}"):
            if isinstance(sample, DataError):
                _reject(plan, out, number, sample)
                rejected += 1
            else:
                writer.write(sample)
        if not writer.samples_done:
            raise DataError(f"{plan.source} holds no good entries ({rejected} rejected)")
    return {"folder": str(out), "shards": len(writer.shards), "samples": writer.samples_done, "rejected": rejected}


def _same_build(out: Path, facts: bytes) -> bool:
    path = out / PLAN
    if not path.exists():
        return False
    if path.read_bytes() != facts:
        raise DataError(f"{out} holds another build: its {PLAN} differs from what was asked for now")
    return True


def _entries_done(writer: ShardWriter) -> int:
    """How far the source was read: a key holds the number of its entry."""
    if not writer.shards:
        return 0
    return int(writer.shards[-1].keys[-1].decode().rpartition("-")[2]) + 1


def _make_reader(plan: Build, reader: Reader, root: ImageRoot) -> Callable[[tuple[int, Any]], tuple[int, Sample | DataError]]:
    def read(numbered: tuple[int, Any]) -> tuple[int, Sample | DataError]:
        number, entry = numbered
        key = f"{plan.prefix}-{number:08d}"
        try:
            sample = reader(entry, key, root)
            sample = replace(sample, source=plan.source_name or sample.source, licence=plan.licence or sample.licence)
            if plan.haystack:
                sample = _as_haystack(sample)
            record_of(sample)
            if plan.decode:
                for index, image in enumerate(sample.images):
                    check_decodable(image, f"image {index}")
        except DataError as error:
            return number, DataError(f"{plan.source.name}, entry {number}: {error.reason}", key=key)
        return number, sample

    return read


def _as_haystack(sample: Sample) -> Sample:
    """The sample with its record's word for it. Raises DataError where the sample itself speaks against that."""
    said = replace(sample, haystack=True)
    reason = (why_whole(said) or names_a_place(said)) if sample.images else None
    if reason:
        raise DataError(f"--haystack says that images may be left out and moved, and the sample {reason}; build it without --haystack")
    return said


def _ordered(pool: ThreadPoolExecutor, work: Callable, items: Iterable, ahead: int) -> Iterator[Any]:
    """Results in the order of the items, with at most `ahead` of them under way or waiting."""
    waiting: deque[Future] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _reject(plan: Build, out: Path, number: int, error: DataError) -> None:
    if not plan.skip_bad:
        raise error
    with open(out / REJECTED, "a", encoding="utf-8") as file:
        file.write(json.dumps({"entry": number, "reason": error.reason}, ensure_ascii=False) + "\n")


def _rejected_before(out: Path, first: int) -> int:
    """Rejections of an interrupted build that stay; those behind its last whole shard will be found again."""
    path = out / REJECTED
    if not path.exists():
        return 0
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in lines if json.loads(line)["entry"] < first]
    write_whole(path, "".join(kept).encode())
    return len(kept)
