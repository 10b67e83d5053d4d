"""Entries of other people's files: a JSON list, such a list as `{"data": [...]}`, or JSON lines; plain or gzip. All of it is untrusted."""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TextIO

from data_tools.formats.fields import check_fields
from laid_ds.data.record import DataError

CHUNK = 1 << 20
MAX_ENTRY_CHARACTERS = 256 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
WRAPPER = "data"
SPACE = re.compile(r"[ \t\r\n]*")


def visible(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder, by name, without those that systems leave beside others: `._NAME`, `.DS_Store`, `.nfs...`."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def entries(path: Path, *, keep_going: bool = False) -> Iterator[Any]:
    """The entries of a file, one at a time: lists and lines can be larger than memory (a wrapped list is read as a whole).

    Raises DataError with file, line or entry, and what is there. With `keep_going` a bad line is yielded as its error and the next follows.
    """
    try:
        with _open(path) as file:
            start = _first_byte(file, path)
            if start == b"[":
                yield from _list_entries(io.TextIOWrapper(file, encoding="utf-8-sig"), path)
            elif start == b"{" and (wrapped := _wrapped_list(file, path)) is not None:
                yield from wrapped
            else:
                file.seek(0)
                yield from _line_entries(file, path, keep_going)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged or cut off (gzip): {error}") from None


def read_json(path: Path) -> Any:
    """A JSON file."""
    try:
        return _loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    except DataError as error:
        raise DataError(f"{path}: {error.reason}") from None


def _open(path: Path) -> BinaryIO:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if packed else open(path, "rb")


def _first_byte(file: BinaryIO, path: Path) -> bytes:
    """The first byte that is no space, behind a mark; the file is at its start again."""
    head = file.read(len(BYTE_ORDER_MARK))
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path} begins with a UTF-16 byte order mark ({head[:2].hex()}); save it as UTF-8")
    byte = head.removeprefix(BYTE_ORDER_MARK).lstrip()[:1]
    while not byte and (more := file.read(CHUNK)):
        byte = more.lstrip()[:1]
    file.seek(0)
    return byte


def _line_entries(file: BinaryIO, path: Path, keep_going: bool) -> Iterator[Any]:
    for number, line in enumerate(file, 1):
        line = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
        if not line.strip():
            continue
        try:
            entry = _loads(_decoded(line))
        except DataError as error:
            entry = DataError(f"{path}, line {number}: {error.reason}")
            if not keep_going:
                raise entry from None
        yield entry


def _decoded(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"it is not UTF-8: {error.reason} at byte {error.start}") from None


def _wrapped_list(file: BinaryIO, path: Path) -> list | None:
    """The list of `{"data": [...]}`, on one line or on several, or None for a file of lines."""
    line = next(line for line in file if line.removeprefix(BYTE_ORDER_MARK).strip()).removeprefix(BYTE_ORDER_MARK)
    try:
        value = _loads(_decoded(line))
        more = next((line for line in file if line.strip()), None)
    except DataError:
        value, more = _whole(line + file.read()), None
    if more is not None or not isinstance(value, dict) or not isinstance(value.get(WRAPPER), list):
        return None
    try:
        check_fields(value, {WRAPPER})
    except DataError as error:
        raise DataError(f"{path}, beside its list {WRAPPER!r}: {error.reason}") from None
    return value[WRAPPER]


def _whole(text: bytes) -> Any:
    """One value over several lines, None where it is not."""
    try:
        return _loads(_decoded(text))
    except DataError:
        return None


def _list_entries(file: TextIO, path: Path) -> Iterator[Any]:
    text, number = "", 0
    while "[" not in text:  # only space stands before it
        text = _read(file, CHUNK, path, number)
    place = text.index("[") + 1
    while True:
        place = _behind_space(text, place)
        if text.startswith("]", place):
            if rest := (text[place + 1 :] + _read(file, CHUNK, path, number)).strip():
                raise DataError(f"{path}: after the end of the list there is {rest[:40]!r}")
            return
        try:
            entry, end = DECODER.raw_decode(text, place)
            end = _behind_space(text, end)
            if end == len(text):
                raise ValueError("the file is cut off: the list does not end")
        except DataError as error:
            raise DataError(f"{path}, entry {number}: {error.reason}") from None
        except (ValueError, RecursionError) as error:
            more = _read(file, max(CHUNK, len(text) - place), path, number)
            if not more or len(text) - place > MAX_ENTRY_CHARACTERS or isinstance(error, RecursionError):
                raise DataError(f"{path}, entry {number}: {_reason(error, text, place)}") from None
            text, place = text[place:] + more, 0
            continue
        if text[end] not in ",]":
            raise DataError(f"{path}, entry {number}: a comma or the end of the list must follow, not {text[end : end + 40]!r}")
        yield entry
        number += 1
        place = end + 1 if text[end] == "," else end


def _behind_space(text: str, place: int) -> int:
    return SPACE.match(text, place).end()


def _read(file: TextIO, characters: int, path: Path, number: int) -> str:
    try:
        return file.read(characters)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, entry {number} or soon after it, is not UTF-8: {error.reason}") from None


def _loads(text: str) -> Any:
    """One JSON value. Raises DataError with what is there."""
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_object)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(_reason(error, text)) from None


def _reason(error: Exception, text: str, start: int = 0) -> str:
    """What is wrong with a value that begins at `start`, and what stands there."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    if text.startswith("\ufeff"):
        return "a byte order mark stands inside the file"
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated"):
        return f"{error.msg}: the text is cut off after {text.rstrip()[-40:]!r}"
    return f"{error.msg} at its character {error.pos - start}: {text[error.pos : error.pos + 40]!r}"


def _no_constant(name: str) -> NoReturn:
    raise DataError(f"{name} is not a JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise DataError(f"field {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_object)
