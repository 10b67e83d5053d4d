"""What the verbs print: one JSON object or plain lines on stdout, progress on stderr if that is a terminal."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")


def show(result: Mapping[str, Any], as_json: bool) -> None:
    """Print a verb's result."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
        return
    for name, value in result.items():
        _show_field(name, value)


def _show_field(name: str, value: Any) -> None:
    if isinstance(value, Mapping):
        value = ", ".join(f"{key} {_number(item)}" for key, item in value.items())
    if isinstance(value, list) and value and not isinstance(value[0], (int, float)):
        print(f"{name}:")
        for item in value:
            print(f"  {_line(item)}")
        return
    print(f"{name.replace('_', ' ')}: {_number(value)}")


def _line(item: Any) -> str:
    return ", ".join(f"{key} {_number(value)}" for key, value in item.items()) if isinstance(item, Mapping) else str(item)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def track(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Pass the items on, with a progress bar where somebody can see it."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        yield from progress.track(items, total=total, description=label)
