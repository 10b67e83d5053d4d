"""Turn a file of entries and a folder of images into shards: in the file's order, in parallel, resumable, nothing lost silently."""

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from data_tools.console import track
from data_tools.formats import documents, folder, llava, mm_niah, mmlongbench, visual_haystacks
from data_tools.formats.fields import Entry, without
from data_tools.image_root import ImageRoot
from data_tools.inputs import entries
from data_tools.processor_check import check_with
from laid_ds.data.haystack import names_a_place, why_whole
from laid_ds.data.index import DATASET
from laid_ds.data.record import DataError, Sample, check_key, encode
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
DOCUMENTS = ("obelics", "mmc4")
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
    skip_bad: bool = False
    """Go on after a bad entry, which `rejected.jsonl` then names."""
    decode: bool = True
    """Decode every image to its last row, not only read its header."""
    shrink: bool = False
    """Scale down images beyond the limits, which are else refused."""
    keep_rest: bool = False
    """A document may lose images that cannot be read."""
    ignore: tuple[str, ...] = ()
    """Fields of an entry to leave out."""
    processor: Path | None = None
    """Model folder whose processor must be able to take every sample."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the format's reader."""
    haystack: bool = False
    """The user's word that every question stays true whichever images are left out or moved."""
    follow_links: bool = False
    """Links in the image folder may lead out of it; the user trusts whoever made them."""
    more_sources: tuple[Path, ...] = ()
    """Files of the same format that are read after `source`, into the same set."""

    def facts(self) -> bytes:
        """The build, and the contents of its source, as `build.json` holds them."""
        names = {"source": self.source.name, "images": self.images.name, "processor": self.processor and self.processor.name}
        more = [[path.name, _digest(path)] for path in self.more_sources]
        fields = {**self.__dict__, **names, "source_sha256": _digest(self.source), "more_sources": more}
        for name in ("haystack", "follow_links", "more_sources"):
            if not fields[name]:  # as builds without it were written
                del fields[name]
        return json.dumps(fields, indent=1).encode() + b"\n"


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build(plan: Build, out: Path, *, resume: bool, jobs: int) -> dict[str, Any]:
    """Write the data set."""
    _refuse_what_changes_nothing(plan)
    check_key(f"{plan.prefix}-{0:08d}")
    choices = {"decode": plan.decode, "shrink": plan.shrink, "keep_rest": plan.keep_rest, "follow_links": plan.follow_links}
    root = ImageRoot(plan.images, **choices)
    work = _make_reader(plan, partial(FORMATS[plan.format], **plan.options), root)
    facts = plan.facts()
    if resume and (out / DATASET).exists() and _same_build(out, facts):
        return {"folder": str(out), "already_complete": True}
    writer = ShardWriter(out, samples_per_shard=plan.samples_per_shard, bytes_per_shard=plan.bytes_per_shard, resume=resume)
    if not (resume and _same_build(out, facts)):
        write_whole(out / PLAN, facts)
    first = _entries_done(writer)
    rejected = _rejected_before(out, first)
    changes: Counter[str] = Counter()
    numbered = islice(_numbered(plan), first, None)
    with writer, ThreadPoolExecutor(jobs) as pool:
        for read in track(_ordered(pool, work, numbered, jobs * READ_AHEAD), f"build {out.name}"):
            if read.error:
                _reject(plan, out, read.number, read.error)
                rejected += 1
            else:
                writer.write(read.sample)
                changes += read.changes
        if not writer.samples_done:
            raise DataError(f"{', '.join(map(str, (plan.source, *plan.more_sources)))} holds no good entries ({rejected} rejected)")
    return {
        "folder": str(out),
        "shards": len(writer.shards),
        "samples": writer.samples_done,
        "rejected": rejected,
        **dict(sorted(changes.items())),
    }


def _refuse_what_changes_nothing(plan: Build) -> None:
    """An option that a format does not know is a misunderstanding."""
    if plan.keep_rest and plan.format not in DOCUMENTS:
        raise ValueError(f"--keep-rest is for documents ({', '.join(DOCUMENTS)}), not for {plan.format}")
    if plan.options and plan.format != "vhs":
        raise ValueError(f"--{next(iter(plan.options))} is for vhs, not for {plan.format}")
    if not 0 <= plan.options.get("depth", 0) <= 1:
        raise ValueError(f"--depth {plan.options['depth']}: give a place of the needle from 0 to 1")
    if plan.more_sources and plan.format != "vhs":
        raise ValueError(
            f"several files become one set for vhs, whose files are sizes of one task; import those of {plan.format} one by one"
        )
    files = (plan.source, *plan.more_sources)
    twice = next((path for path in files if files.count(path) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is given twice")


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


@dataclass(frozen=True)
class Read:
    """What became of an entry: a sample, with what was done to its images, or an error."""

    number: int
    sample: Sample | None = None
    changes: Counter[str] = field(default_factory=Counter)
    error: DataError | None = None


def _numbered(plan: Build) -> Iterator[tuple[int, str, Any]]:
    """(number, place for people, entry) of all files, one after the other."""
    files = (plan.source, *plan.more_sources)
    found = ((path.name, place, entry) for path in files for place, entry in enumerate(entries(path, keep_going=plan.skip_bad)))
    for number, (name, place, entry) in enumerate(found):
        yield number, f"{name}, entry {place}", entry


def _make_reader(plan: Build, reader: Reader, root: ImageRoot) -> Callable[[tuple[int, str, Any]], Read]:
    check = check_with(plan.processor) if plan.processor else None

    def read(numbered: tuple[int, str, Any]) -> Read:
        number, place, entry = numbered
        if isinstance(entry, DataError):
            return Read(number, error=entry)
        key, images = f"{plan.prefix}-{number:08d}", root.anew()
        try:
            sample = reader(without(entry, plan.ignore), key, images)
            sample = replace(sample, source=plan.source_name or sample.source, licence=plan.licence or sample.licence)
            if plan.haystack:
                sample = _as_haystack(sample)
            encode(sample)
            if check:
                check(sample)
        except DataError as error:
            return Read(number, error=DataError(f"{place}: {error.reason}", key=key))
        return Read(number, sample, images.changes)

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
    with open(out / REJECTED, "a", encoding="utf-8", errors="backslashreplace") as file:  # what was refused may be no UTF-8
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
