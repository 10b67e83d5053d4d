"""What the commands (laid, laid-data, laid-launch) have in common: errors, exit statuses, JSON, tables, progress and what comes next."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from threading import Event, Thread
from typing import Annotated, Any, NoReturn, TypeVar

import typer

SECONDS_PER_LINE = 30  # of progress, where no terminal shows a bar
HOME = re.compile(r"(-{0,2}[\w.-]+=)?~(?=/|$)")  # at the start of a word, or of the value of an option or override
UsageError: type[Exception] = typer.BadParameter.__base__  # of the click that this typer stands on

Item = TypeVar("Item")


def run_app(app: typer.Typer, name: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line and leave with its status: 0 done, 1 something was found, 2 the user's to mend, 130 Ctrl-C.

    What is the user's to mend is one sentence on stderr. An OSError without a file is ours, and keeps its traceback.
    """
    words = [expand_home(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    try:
        status = app(words, prog_name=name, standalone_mode=False, obj=words)  # the words: a command may start itself as ranks
    except UsageError as error:
        status = _usage(error, name)
    except ValueError as error:
        status = refuse(name, str(error))
    except OSError as error:
        if error.filename is None:  # no file of the user's
            raise
        status = refuse(name, f"{error.filename}: {error.strerror}")
    except (KeyboardInterrupt, typer.Abort):  # the second is what some releases of typer make of it
        status = 130
    sys.exit(status or 0)


def refuse(name: str, sentence: str) -> int:
    """Say what the user must mend; the status for it."""
    print(f"{name}: {sentence}", file=sys.stderr)
    return 2


def _usage(error: Any, name: str) -> int:
    """An option or command that does not exist, or lacks something; a group without a command shows its help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return 2
    sentence = error.format_message().rstrip(".").replace("Value error, ", "")  # pydantic's, by which typer checks choices
    command = error.ctx.command_path if error.ctx is not None else name
    return refuse(name, f"{sentence[:1].lower()}{sentence[1:]} (`{command} --help`)")


def expand_home(word: str) -> str:
    """A word of a command line with `~` as the home folder, as a shell writes it only at the start of a word."""
    found = None if any(mark.isspace() for mark in word) else HOME.match(word)
    return f"{found[1] or ''}{Path.home()}{word[found.end() :]}" if found else word


def show_version(context: typer.Context, asked: bool) -> None:
    if asked:
        print(f"{context.info_name} {version('laid-ds')}")
        raise typer.Exit()


def with_version(
    shown: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """What comes before a command's name: `app.callback()(with_version)`."""


def print_json(value: Any) -> None:
    """One line of JSON on stdout."""
    print(as_json(value))


def as_json(value: Any) -> str:
    """One line of JSON. A number that JSON has no word for (NaN, infinity) is null."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows for people, as wide as their longest cells; the columns are the keys of the first row. Plain text where no terminal is."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in rows[0]:
        numbers = all(isinstance(row[name], int | float) and not isinstance(row[name], bool) for row in rows)
        table.add_column(Text(name), justify="right" if numbers else "left", no_wrap=not sys.stdout.isatty())
    for row in rows:
        table.add_row(*(Text(cell(row[name])) for name in rows[0]))
    if sys.stdout.isatty():
        Console().print(table)
        return
    console = Console(width=10_000, color_system=None)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def print_facts(facts: Mapping[str, Any]) -> None:
    """Named values for people, one a line."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):<{width}}  {cell(value)}")


def cell(value: Any) -> str:
    """A value as people read it."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {cell(item)}" for name, item in value.items())
    return ", ".join(map(cell, value)) if isinstance(value, list | tuple) else str(value)


def next_step(*words: object) -> None:
    """One line with the command that usually comes next, to be pasted into a shell; words in capitals are for the user to choose."""
    print(f"next: {shlex.join(map(str, words))}", flush=True)


def say(text: str) -> None:
    """A line about what happens, at once, on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def working(label: str, total: int | None = None, active: bool = True) -> Iterator[Callable[[int], None]]:
    """Tell on stderr that something goes on inside the block: a bar in a terminal, else a plain line now and then.

    Gives the block a function to be told how many of `total` more are done. active: False says nothing (ranks but the first).
    """
    if not active:
        yield lambda more: None
        return
    with _bar(label, total) if sys.stderr.isatty() else _lines(label, total) as advance:
        yield advance


@contextmanager
def _bar(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    counted = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) if total is not None else (SpinnerColumn(), TimeElapsedColumn())
    columns = (TextColumn("{task.description}", markup=False), *counted)
    console, to_file = Console(stderr=True), not sys.stdout.isatty()  # what is printed meanwhile goes above the bar, or into its file
    with Progress(*columns, console=console, transient=total is None, redirect_stdout=not to_file) as progress:
        task = progress.add_task(label, total=total)
        yield lambda more: progress.advance(task, more)


@contextmanager
def _lines(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    started, done, ended = time.monotonic(), 0, Event()

    def advance(more: int) -> None:
        nonlocal done
        done += more

    def tell() -> None:
        while not ended.wait(SECONDS_PER_LINE):
            of = f"{done:,} of {total:,}" if total is not None else f"{done:,}" if done else "still at it"
            say(f"{label}: {of}, {time.monotonic() - started:.0f} s")

    teller = Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield advance
    finally:
        ended.set()
        teller.join()


def track(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Pass the items on and tell of them as `working` does."""
    total = len(items) if total is None and hasattr(items, "__len__") else total
    with working(label, total) as advance:
        for item in items:
            yield item
            advance(1)
