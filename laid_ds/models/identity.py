"""What tells one model folder from another: by content, not by name or place."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laid_ds.models.folder import WEIGHTS, weight_files
from laid_ds.terminal import working

PIECE = 1 << 24  # bytes that are read at a time
OF_PROCESSOR = ("preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
OF_PROCESSOR += ("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.json", "chat_template.jinja")

Marks = dict[str, dict[str, Any]]
"""File of a model -> its "bytes" and "modified_ns", and, where it was read, the "sha256" of its whole content."""


def model_marks(path: Path, known: Sequence[Marks] = ()) -> Marks:
    """Of config, weights, their index, and code of its own. Nothing is read: a file whose size and time stand in `known` is taken to be
    the one that was read then, and others have no "sha256" yet. Raises ValueError for a folder without weights."""
    chosen = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    files = {path / "config.json", *weight_files(path), *path.glob("*.py"), *([chosen] if chosen else [])}
    return {str(file.relative_to(path)): _mark(path, file, known) for file in sorted(files)}


def _mark(path: Path, file: Path, known: Sequence[Marks]) -> dict[str, Any]:
    found = file.stat()
    mark = {"bytes": found.st_size, "modified_ns": found.st_mtime_ns}
    before = (marks.get(str(file.relative_to(path)), {}) for marks in known)
    return next((dict(each) for each in before if mark.items() <= each.items()), mark)


def read_whole(path: Path, marks: Marks) -> Marks:
    """The same with every "sha256": files that have none are read, all of them, and told of meanwhile."""
    unread = {name: mark for name, mark in marks.items() if "sha256" not in mark}
    total, done = sum(mark["bytes"] for mark in unread.values()), 0
    digests = {}
    with working(f"reading all of {path}, MB", total // 10**6, active=bool(unread)) as advance:
        for name in unread:
            digest = hashlib.sha256()
            with (path / name).open("rb") as file:
                while piece := file.read(PIECE):
                    digest.update(piece)
                    advance((done + len(piece)) // 10**6 - done // 10**6)
                    done += len(piece)
            digests[name] = {"sha256": digest.hexdigest()}
    return {name: mark | digests.get(name, {}) for name, mark in marks.items()}


def difference(there: Marks, here: Marks) -> str | None:
    """Which file is another one than it was `there`, as a clause; None where none is. Files that are not read are told apart by size."""
    for name in sorted(there.keys() | here.keys()):
        if name not in there or name not in here:
            return f"{name} {'is not there any more' if name in there else 'was not there then'}"
        was, now = there[name], here[name]
        if was["bytes"] != now["bytes"]:
            return f"{name} has {now['bytes']:,} bytes, and had {was['bytes']:,}"
        if was["sha256"] != now.get("sha256", was["sha256"]):
            return f"{name} has another content (sha256 {now['sha256'][:12]}, then {was['sha256'][:12]})"
    return None


def processor_identity(path: Path) -> str:
    """sha256 of the files that decide what a sample becomes."""
    digest = hashlib.sha256()
    for name in OF_PROCESSOR:
        if (path / name).is_file():
            digest.update(f"{name} {(path / name).stat().st_size}".encode() + (path / name).read_bytes())
    return digest.hexdigest()
