"""What the verbs print: one JSON object or plain lines on stdout, progress on stderr."""

from collections.abc import Mapping
from typing import Any

from laid_ds.terminal import print_json, track

__all__ = ["show", "track"]


def show(result: Mapping[str, Any], as_json: bool) -> None:
    """Print a verb's result."""
    if as_json:
        print_json(result)
        return
    for name, value in result.items():
        _show_field(name, value)


def _show_field(name: str, value: Any) -> None:
    if isinstance(value, list) and value and not isinstance(value[0], (int, float)):
        print(f"{name}:")
        for item in value:
            print(f"  {_line(item)}")
        return
    print(f"{name.replace('_', ' ')}: {_line(value)}")


def _line(value: Any) -> str:
    """A value as people read it: no braces, no brackets."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_line(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return " / ".join(map(_line, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
