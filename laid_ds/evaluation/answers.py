"""The file of answers: JSON lines, a header and then one object per answer, appended as it comes.

Rank 0 appends to the file itself and every other rank to a part beside it; the parts are taken in when the file is settled: at the start of
every command and after every model. Settled, it holds each answer once, in the order of the questions, whoever asked and in what order.
A process that is killed loses at most the answers of the batch in flight.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from laid_ds.disk import writing
from laid_ds.files import read_json_lines

Answer = dict[str, Any]
Header = dict[str, Any]
Append = Callable[[Iterable[Answer]], None]
HEADER = "laid_eval"
VERSION = 1


def answers_file(out: Path) -> Path:
    """Where the answers stand of the results file `out`."""
    return out.with_name(out.name.removesuffix(".json") + ".answers.jsonl")


def read_answers(path: Path) -> tuple[Header, list[Answer]]:
    """The header ({} where there is no file) and all answers, those of parts included. Raises ValueError for a file that is none of
    `laid eval`."""
    lines = read_json_lines(path)
    if lines and (not isinstance(lines[0], dict) or lines[0].get(HEADER) != VERSION):
        raise ValueError(f"{path} does not hold answers of `laid eval`; give another --out or move it elsewhere")
    header, found = (lines[0], lines[1:]) if lines else ({}, [])
    for part in _parts(path):
        found += read_json_lines(part)
    return header, found


def settle(path: Path, header: Header, answers: Iterable[Answer], order: Callable[[Answer], Any]) -> list[Answer]:
    """Write header and answers anew, each once and only those of windows whose questions are all answered, and remove the parts. The old
    file stands until the new one is whole. Raises DiskError."""
    once = {identity(answer): answer for answer in answers}
    number = Counter(identity(answer)[:-1] for answer in once.values())
    kept = sorted((answer for name, answer in once.items() if number[name[:-1]] == answer["questions"]), key=order)
    partial = path.with_name(path.name + ".partial")
    with writing(path.parent, path.name):
        partial.write_text("".join(map(_line, [{HEADER: VERSION} | header, *kept])), encoding="utf-8")
        os.replace(partial, path)
    for part in _parts(path):
        part.unlink()
    return kept


def identity(answer: Answer) -> tuple[Any, ...]:
    """What no two answers of a file share; without its last element, what the questions of a window share."""
    return *(answer[name] for name in ("model", "task", "key", "window_size", "needle_at")), answer["question_index"]


@contextmanager
def appending(path: Path, rank: int) -> Iterator[Append]:
    """Inside the block, appends answers to this rank's file: those of one call in one write. Raises DiskError."""
    place = path if rank == 0 else _part(path, rank)
    with writing(path.parent, place.name), open(place, "ab", buffering=0) as file:

        def append(answers: Iterable[Answer]) -> None:
            data = "".join(map(_line, answers)).encode()
            while data:
                data = data[file.write(data) :]

        yield append


def differences(ours: Any, theirs: Any, place: str = "") -> list[str]:
    """Names, with dots, of the fields in which two trees differ."""
    if not (isinstance(ours, Mapping) and isinstance(theirs, Mapping)):
        return [] if ours == theirs else [place]
    return [
        name
        for key in dict.fromkeys((*ours, *theirs))
        for name in differences(ours.get(key), theirs.get(key), f"{place}.{key}" if place else str(key))
    ]


def _part(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.name}.rank-{rank:04d}")


def _parts(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}.rank-*"))


def _line(tree: dict[str, Any]) -> str:
    return json.dumps(tree, ensure_ascii=False, allow_nan=False) + "\n"
