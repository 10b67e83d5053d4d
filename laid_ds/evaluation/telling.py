"""How far asking is and how long it will take, on stderr: a bar in a terminal, else plain lines."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import Progress

from laid_ds.evaluation.tasks import Answer, Item, Task

SECONDS_PER_LINE = 30
Tick = Callable[[Sequence[Answer]], None]


@contextmanager
def telling(name: str, tasks: Sequence[Task], done: Sequence[Item], pending: Sequence[Item]) -> Iterator[Tick]:
    """Inside the block, call the yielded function with the answers to pending items, in their order. Time is shared out by images."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(name, tasks, done, pending)
        return
    with Progress(*Progress.get_default_columns(), console=console) as progress:
        bar = progress.add_task(name, total=sum(map(_weight, pending)))
        items = iter(pending)
        yield lambda answers: progress.advance(bar, sum(_weight(next(items)) for _ in range(_ended(answers))))


def _lines(name: str, tasks: Sequence[Task], done: Sequence[Item], pending: Sequence[Item]) -> Tick:
    """At the end of each group, and now and then before."""
    totals = Counter(item.group for item in (*done, *pending))
    counts = Counter(item.group for item in done)
    started = told = time.monotonic()
    items, work, left = iter(pending), 0, sum(map(_weight, pending))

    def tick(answers: Sequence[Answer]) -> None:
        nonlocal told, work, left
        for _ in range(_ended(answers)):
            item = next(items)
            counts[item.group] += 1
            work, left = work + _weight(item), left - _weight(item)
            if counts[item.group] == totals[item.group] or time.monotonic() - told >= SECONDS_PER_LINE:
                told = time.monotonic()
                rest = f", about {timedelta(seconds=round((told - started) * left / work))} left" if left else ""
                what = _what(tasks[item.task], item)
                print(f"{name}: {counts[item.group]} of {totals[item.group]} {what}{rest}", file=sys.stderr, flush=True)

    return tick


def _what(task: Task, item: Item) -> str:
    what = f"samples of {task.name}" if item.size is None else f"haystacks of {item.size} {task.unit}"
    return what if item.depth is None else f"{what}, needle at {item.depth:g}"


def _ended(answers: Sequence[Answer]) -> int:
    """How many items these answers complete."""
    return sum(answer["question_index"] + 1 == answer["questions"] for answer in answers)


def _weight(item: Item) -> int:
    return 1 + item.num_images
