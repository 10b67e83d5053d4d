"""The two files of an evaluation, which stand or fall together: what was answered (answers.py), and the results that `laid report` reads.

Answers of one file are comparable: the same tasks, settings and models by name. Whatever differs is refused, with the name of the field.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from laid_ds.disk import writing
from laid_ds.evaluation.answers import Answer, answers_file, differences, read_answers, settle
from laid_ds.evaluation.rules import score
from laid_ds.evaluation.summary import read_results
from laid_ds.evaluation.tasks import FORCED, Item, Task, items_of

NOT_COMPARED = ("shards", "folder", "modified")  # where something lies, and since when, changes no answer
CARD = "README.md"


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Inside the block no other process on this file system that asks for it has `out` and its answers. Raises ValueError when one has,
    and when nothing can be written there."""
    path = out.with_name(f".{out.name}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise ValueError(f"the results cannot be written to {out}: {error.strerror}") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process: its workers, which may outlive it by seconds, hold none
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{out} is being written by another `laid eval`; wait for it, or give another --out") from None
        except OSError:  # a file system without locks
            pass
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def open_files(out: Path, setting: dict[str, Any], models: Mapping[str, dict[str, Any]], tasks: Sequence[Task], again: bool) -> None:
    """Bring both files to where asking starts: what they hold fits what is asked for, and all parts of the answers are taken in.

    models: name -> folder and how it is asked. again: forget what models that have changed since said. Raises ValueError for files that
    hold something else, naming the fields in which they differ, and for those that cannot be written.
    """
    path = answers_file(out)
    header, answers = read_answers(path)
    results = read_results(out) if out.exists() else {}
    for file, found in ((out, results), (path, header)):
        if found and (differing := differences(_compared(found["setting"]), _compared(setting))):
            raise ValueError(f"{file} was made with other {', '.join(differing)}; give another --out or remove the file")
    known = {**header.get("models", {}), **results.get("models", {})}
    facts = {name: _facts(model, known.get(name, {})) for name, model in models.items()}
    changed = {name: how for name, found in facts.items() if name in known and (how := _changed(found, known[name]))}
    if changed and not again:
        name, differing = next(iter(changed.items()))
        raise ValueError(
            f"{out} was made with another model {name!r} (other {', '.join(differing)}); give another --out, call it otherwise, or ask it"
            " anew with --again"
        )
    about = {"setting": setting, "versions": {name: version(name) for name in ("laid-ds", "torch", "transformers")}}
    header = about | {"models": {**header.get("models", {}), **facts}}
    settle(path, header, [answer for answer in answers if answer["model"] not in changed], order(header, tasks))
    kept = {name: model for name, model in results.get("models", {}).items() if name not in changed}
    left_out = {str(size): reason for task in tasks for size, reason in task.left_out.items()}
    write_results(out, about | {"models": kept, "left_out": left_out})


def add_model(out: Path, name: str, tasks: Sequence[Task], attention: dict[str, Any] | None) -> None:
    """Settle the answers, and write what those of a model are worth into the results."""
    header, answers = read_answers(answers_file(out))
    answers = settle(answers_file(out), header, answers, order(header, tasks))
    worth = {task.name: _worth(task, [a for a in answers if (a["model"], a["task"]) == (name, task.name)]) for task in tasks}
    found = header["models"][name] | (worth[tasks[0].name] if len(tasks) == 1 else {"tasks": worth})
    results = read_results(out)
    results["models"][name] = found | ({} if attention is None else {"attention": attention})
    write_results(out, results)


def scores_of(results: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(model, task, its scores) of all that a results file holds."""
    setting = results["setting"]
    tasks = {name: model.get("tasks") or {setting["task"]: model} for name, model in results["models"].items()}
    return [(name, task, worth["scores"]) for name, worths in tasks.items() for task, worth in worths.items()]


def unanswered(out: Path, name: str, tasks: Sequence[Task]) -> tuple[list[Item], list[Item]]:
    """(items that a model has answered, the others), each in their order."""
    _, answers = read_answers(answers_file(out))
    known = {_named_in(answer) for answer in answers if answer["model"] == name}
    done, pending = [], []
    for number, task in enumerate(tasks):
        for item in items_of(number, task):
            (done if _name(task.name, item) in known else pending).append(item)
    return done, pending


def order(header: Mapping[str, Any], tasks: Sequence[Task]) -> Callable[[Answer], tuple[int, ...]]:
    """The order of answers in a settled file: models, tasks, items, questions."""
    models = {name: number for number, name in enumerate(header["models"])}
    items: dict[tuple[Any, ...], tuple[int, int]] = {}
    for number, task in enumerate(tasks):
        items |= {_name(task.name, item): (number, place) for place, item in enumerate(items_of(number, task))}

    def place(answer: Answer) -> tuple[int, ...]:
        return models[answer["model"]], *items[_named_in(answer)], answer["question_index"]

    return place


def _name(task: str, item: Item) -> tuple[Any, ...]:
    """What names an item among those of all tasks: the same as of its answers."""
    return task, item.key, item.size, item.depth


def _named_in(answer: Answer) -> tuple[Any, ...]:
    return tuple(answer[name] for name in ("task", "key", "window_size", "needle_at"))


def _worth(task: Task, answers: Sequence[Answer]) -> dict[str, Any]:
    """ "answers": size -> for each window, 1 or 0 for each question (exactly right), and "scores" by the benchmark's rules."""
    windows: dict[str, dict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
    scores = [score(answer, place) for place, answer in enumerate(answers)]
    for answer, worth in zip(answers, scores, strict=True):
        hit = answer["right"] if task.mode == FORCED else int(worth["strict"] == 1)
        windows[str(answer["size"])][answer["key"], answer["needle_at"]].append(hit)
    means = {rule: sum(worth[rule] for worth in scores) / max(len(scores), 1) for rule in ("official", "strict")}
    return {
        "answers": {size: list(rows.values()) for size, rows in sorted(windows.items(), key=lambda entry: int(entry[0]))},
        "scores": {"answers": len(scores)} | means,
    }


def _compared(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    return {name: _compared(value) for name, value in tree.items() if name not in NOT_COMPARED}


def _changed(facts: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    return differences(_compared(facts), _compared({name: known.get(name) for name in facts}))


def _facts(model: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for a model's answers to be kept: its files, but for the card. Files that have not been touched since are not
    read again."""
    told = known.get("files")
    told = told if isinstance(told, Mapping) else {}
    files = {path for path in Path(model["folder"]).glob("*.*") if path.is_file() and path.name != CARD}
    return dict(model) | {"files": {path.name: _digest(path, told.get(path.name, {})) for path in sorted(files)}}


def _digest(path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    facts = {"bytes": path.stat().st_size, "modified": path.stat().st_mtime_ns}
    if facts.items() <= known.items():
        return dict(known)
    with path.open("rb") as file:
        return facts | {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_results(out: Path, results: dict[str, Any]) -> None:
    """Whole or not at all. Raises DiskError."""
    with writing(out.parent, out.name):
        _partial(out).write_text(json.dumps(results, allow_nan=False))
        os.replace(_partial(out), out)


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")
