"""Entries of other people's files: of a JSON list or of JSON lines. All of it is untrusted."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from laid_ds.data.record import DataError

CHUNK = 1 << 20
MAX_ENTRY_CHARACTERS = 256 << 20


def visible(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder, by name, without those that systems leave beside others: `._NAME`, `.DS_Store`, `.nfs...`."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def entries(path: Path) -> Iterator[Any]:
    """The entries of a JSON list or a JSON-lines file, one at a time: such lists can be larger than memory."""
    with open(path, encoding="utf-8-sig") as file:
        try:
            start = file.read(1)
            while start.isspace():
                start = file.read(1)
            file.seek(0)
            yield from _list_entries(file, path) if start == "[" else _line_entries(file, path)
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None


def read_json(path: Path) -> Any:
    """A JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {error}") from None


def _line_entries(file, path: Path) -> Iterator[Any]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: {error}") from None


def _list_entries(file, path: Path) -> Iterator[Any]:
    decoder, text, number = json.JSONDecoder(), file.read(CHUNK).lstrip()[1:], 0
    while True:
        text = text.lstrip()
        if text.startswith("]"):
            if (text[1:] + file.read(CHUNK)).strip():
                raise DataError(f"{path}: there is more after the end of the list")
            return
        try:
            entry, end = decoder.raw_decode(text)
            after = text[end:].lstrip()
            if not after:
                raise ValueError("the list does not end")
        except (ValueError, RecursionError) as error:
            more = file.read(max(CHUNK, len(text)))
            if not more or len(text) > MAX_ENTRY_CHARACTERS or isinstance(error, RecursionError):
                raise DataError(f"{path}, entry {number}: {error}") from None
            text += more
            continue
        if not after.startswith((",", "]")):
            raise DataError(f"{path}, entry {number}: a comma or the end of the list must follow")
        yield entry
        number += 1
        text = after.removeprefix(",")
