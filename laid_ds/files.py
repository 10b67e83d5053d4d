"""Files that people write or hand on: TOML, JSON, JSON lines. What is wrong in one is said with its name, line and what stands there."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

SHOWN_CHARACTERS = 80
SHIPPED = ("ds_configs", "recipes")  # folders beside laid_ds, in a checkout as where it is installed


def own_or_shipped(path: Path) -> Path:
    """A file as the user names it; else, if none is there and it is one that comes with this package (`ds_configs/NAME`, `recipes/NAME`),
    that one."""
    path = Path(home_expanded(str(path)))
    shipped = Path(__file__).resolve().parents[1] / path
    return shipped if not path.exists() and path.parts[:1] and path.parts[0] in SHIPPED and shipped.is_file() else path


def home_expanded(name: str) -> str:
    """A path or URL with `~` at its start as the home folder. Raises ValueError where there is no such user."""
    try:
        return str(Path(name).expanduser()) if name.startswith("~") else name
    except RuntimeError:
        raise ValueError(f"{name}: there is no such home folder; write the whole path") from None


def read_toml(path: Path) -> dict[str, Any]:
    """Raises ValueError, one sentence with the line, for what is no TOML."""
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", str(error))
        line = int(place[1]) if place and place[1] else len(_lines(text))
        reason = str(error)[: place.start()] if place else str(error)
        raise ValueError(f"{path} is not valid TOML, {_at(text, line)} ({_small(reason)})") from None


def read_json(path: Path, plain: bool = False) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, one sentence with the line, for what is none, and for a key that stands twice.

    plain: another library reads the file, too: it takes no byte order mark, and the last of two keys.
    """
    text = read_text(path, plain)
    try:
        tree = json.loads(text, object_pairs_hook=dict if plain else _once)
    except json.JSONDecodeError as error:
        cut = not text[error.pos :].strip() or error.msg.startswith("Unterminated string")
        reason = "the file ends too early" if cut else _small(error.msg)
        raise ValueError(f"{path} is not valid JSON, {_at(text, error.lineno)} ({reason})") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be read") from None
    except KeyError as error:
        raise ValueError(f"{path}, {_at(text, line_of(text, error.args[0], last=True))}: {error.args[0]!r} stands twice") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}, {_at(text, 1)}: an object in braces must stand there")
    return tree


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file to which a run appends; a last line that was cut when the run was killed is left out. None if the file is
    missing or empty.

    Raises ValueError, one sentence with the line, for another line that is no object.
    """
    lines = _lines(read_text(path)) if path.is_file() and path.stat().st_size else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line, object_pairs_hook=_once))
        except RecursionError:
            raise ValueError(f"{path}, line {number} is nested too deeply to be read") from None
        except (ValueError, KeyError):
            if number < len(lines):
                raise ValueError(f"{path} is not valid JSON, line {number}: {line[:SHOWN_CHARACTERS]!r}") from None
    return found


def read_text(path: Path, plain: bool = False) -> str:
    """A file of UTF-8, without its byte order mark. Raises ValueError, one sentence, for what cannot be read as that."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path}, line 1: the file begins as UTF-16; save it as UTF-8")
    if plain and data.startswith(b"\xef\xbb\xbf"):
        raise ValueError(f"{path}, line 1: the file begins with a byte order mark; save it as UTF-8 without one")
    if not data.strip():
        raise ValueError(f"{path} is empty")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8") from None


def line_of(text: str, key: str, last: bool = False) -> int:
    """The number of the line that names a key."""
    lines = [number for number, line in enumerate(_lines(text), 1) if f'"{key}"' in line]
    return (lines[-1] if last else lines[0]) if lines else 1


def _lines(text: str) -> list[str]:
    """As JSON and TOML count them: `str.splitlines` also ends a line at characters that may stand in any text (U+2028)."""
    return text.removesuffix("\n").split("\n")


def _at(text: str, line: int) -> str:
    lines = _lines(text)
    there = lines[line - 1].strip() if 0 < line <= len(lines) else ""
    return f"line {line}: {there[:SHOWN_CHARACTERS]!r}"


def _small(reason: str) -> str:
    return reason[:1].lower() + reason[1:]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in pairs:
        if key in tree:
            raise KeyError(key)
        tree[key] = value
    return tree
