"""What models are worth on each task, from their answers alone: both rules side by side, per size and needle depth, windows and ratios.

Intervals are 95 % of a bootstrap over clusters: all answers about one haystack go together. What does not exist is None, with a sentence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from laid_ds.evaluation.kinds import haystack_of, kind_of, place_of, unit_of
from laid_ds.evaluation.rules import HAYSTACK, Answer, score
from laid_ds.evaluation.window import LONG, SHORT, Ratio, Window, average_gain, curve, ratio, relative_threshold, window
from laid_ds.files import read_json_lines

RULES = ("official", "strict")
HEADER = "laid_eval"
NEEDED = ("model", "task", "benchmark", "key", "cluster", "question_index", "size", "depth", "expected", "said", "meta")
KINDS = {"model": str, "task": str, "benchmark": str, "key": str, "size": int, "depth": float | int | None, "expected": list, "said": str}
KINDS |= {"meta": dict, "question": str | None, "choices": list | None, "shown": list | None, "unit": str | None}
DRAWS = 1000


@dataclass(frozen=True)
class Scored:
    """An answer and what it is worth."""

    answer: Answer
    official: float
    strict: float


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """The answers of `laid eval` in a folder (*.jsonl beside its results, parts of ranks included), each once; [] where there is none.

    Raises ValueError for a file that begins as one of answers and holds something else.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.rank-*")]):
        if not _begins_as_answers(path):
            continue
        for number, line in enumerate(read_json_lines(path), 1):
            if not isinstance(line, dict):
                raise ValueError(f"{path}, line {number}: no object, where an answer must stand")
            if HEADER in line:
                continue
            check_answer(line, f"{path}, line {number}")
            name = tuple(line[part] for part in ("model", "task", "key", "size", "depth", "question_index"))
            found[name] = line
    return list(found.values())


def check_answer(answer: Mapping[str, Any], place: str) -> None:
    """Raises ValueError, naming the place, for an answer that lacks something or that another version or hand wrote."""
    if missing := [name for name in NEEDED if name not in answer]:
        raise ValueError(f"{place}: an answer without {', '.join(missing)}")
    wrong = [name for name, kind in KINDS.items() if not isinstance(answer.get(name), kind)]
    wrong += [
        name for name in ("expected", "choices") if name not in wrong and not all(isinstance(text, str) for text in answer.get(name) or ())
    ]
    if wrong:
        raise ValueError(f"{place}: {', '.join(wrong)} of an answer is not as this version of laid_ds writes it")


def _begins_as_answers(path: Path) -> bool:
    """A file of answers begins with its header; a rank's part has none. Logs of lmms-eval name the same fields inside others."""
    with path.open("rb") as file:
        first = file.readline(4096)
    is_part = ".jsonl.rank-" in path.name and b'"question_index"' in first and b'"benchmark"' in first
    return f'"{HEADER}"'.encode() in first or is_part


def scored(answers: Sequence[Answer]) -> list[Scored]:
    """What each answer is worth; those of one model and task must stand in the order of the benchmark's file."""
    places: dict[tuple[str, str], int] = defaultdict(int)
    found = []
    for answer in answers:
        name = answer["model"], answer["task"]
        found.append(Scored(answer, **score(answer, places[name])))
        places[name] += 1
    return found


def summarise_scores(answers: Sequence[Answer], baseline: str) -> dict[str, dict[str, Any]]:
    """Task -> model -> "answers", "clusters", and for each rule a mean with its interval, "by_size", "by_depth" (tenths, from 0 for the
    first images) and "curve": the window, its ratio to the baseline's, and the paper's average gain over it, or "why_not"."""
    return _summarise(scored(answers), baseline, lambda answer: answer["task"])


def summarise_kinds(answers: Sequence[Answer], baseline: str) -> dict[str, dict[str, Any]]:
    """The same for each benchmark's kinds of question (kinds.py), over all tasks that ask it; "tasks" names them. Haystacks of our own
    are left out: a task of them holds all sizes."""
    asked = [one for one in scored(answers) if one.answer["benchmark"] != HAYSTACK]
    return _summarise(asked, baseline, kind_of)


def _summarise(found: Sequence[Scored], baseline: str, name_of: Callable[[Answer], str]) -> dict[str, dict[str, Any]]:
    groups: dict[str, dict[str, list[Scored]]] = defaultdict(lambda: defaultdict(list))
    for one in found:
        groups[name_of(one.answer)][one.answer["model"]].append(one)
    return {
        name: {model: _worth(group) | {"curve": _curves(group, models.get(baseline), baseline)} for model, group in models.items()}
        for name, models in groups.items()
    }


def _worth(found: Sequence[Scored]) -> dict[str, Any]:
    clusters = {haystack_of(one.answer) for one in found}
    tasks = sorted({one.answer["task"] for one in found})
    facts = {"benchmark": found[0].answer["benchmark"], "tasks": tasks, "answers": len(found), "clusters": len(clusters)}
    depths = [one for one in found if one.answer["depth"] is not None]
    return (
        facts
        | {rule: _interval(found, rule) for rule in RULES}
        | {"by_size": _parts(found, lambda answer: answer["size"]), "by_depth": _parts(depths, lambda answer: tenth(answer["depth"]))}
    )


def tenth(depth: float) -> float:
    """The lower edge of the tenth of the images in which a needle lies; the last one holds 1."""
    return min(int(depth * 10 + 1e-9), 9) / 10


def _parts(found: Sequence[Scored], of: Callable[[Answer], Any]) -> dict[str, dict[str, float]]:
    parts: dict[Any, list[Scored]] = defaultdict(list)
    for one in found:
        parts[of(one.answer)].append(one)
    return {
        str(part): {"answers": len(group)} | {rule: float(np.mean([getattr(one, rule) for one in group])) for rule in RULES}
        for part, group in sorted(parts.items())
    }


def _interval(found: Sequence[Scored], rule: str, seed: int = 0) -> dict[str, float | None]:
    """The mean over answers, and the interval over clusters (None for a single one)."""
    sums: dict[Any, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for one in found:
        sums[haystack_of(one.answer)][0] += getattr(one, rule)
        sums[haystack_of(one.answer)][1] += 1
    hits, asked = np.array(list(sums.values())).T
    mean, number = float(hits.sum() / asked.sum()), len(hits)
    if number < 2:
        return {"mean": mean, "low": None, "high": None}
    picks = np.random.default_rng(seed).integers(number, size=(DRAWS, number))
    low, high = np.percentile(hits[picks].sum(1) / asked[picks].sum(1), [2.5, 97.5])
    return {"mean": mean, "low": float(low), "high": float(high)}


def _curves(found: Sequence[Scored], base: Sequence[Scored] | None, baseline: str) -> dict[str, Any]:
    ours, theirs = _placed(found), _placed(base or ())
    reason = _why_no_curve(ours, theirs, baseline)
    return {"why_not": reason} if reason else {"unit": unit_of(ours[0].answer)} | {rule: _curve(ours, theirs, rule) for rule in RULES}


def _placed(found: Sequence[Scored]) -> list[Scored]:
    return [one for one in found if place_of(one.answer) is not None]


def _why_no_curve(found: Sequence[Scored], base: Sequence[Scored], baseline: str) -> str | None:
    """Why there is neither a window nor a ratio, as a sentence; None where there is."""
    if len({place_of(one.answer) for one in found}) < 2:
        unit = unit_of(found[0].answer) if found else "tokens"
        return f"only one number of {unit} was asked" if found else "no answer tells the length of its context, from 1000 tokens on"
    if not base:
        return f"the baseline {baseline} has not answered this task"
    if _chance(base) is None:
        return "questions do not all offer the same number of choices, so that there is no level of chance"
    if _asked(found) != _asked(base):
        return f"it was asked about other haystacks than the baseline {baseline}"
    return None


def _asked(found: Sequence[Scored]) -> set[tuple[Any, ...]]:
    return {(place_of(one.answer), haystack_of(one.answer)) for one in found}


def _chance(found: Sequence[Scored]) -> float | None:
    numbers = {len(one.answer.get("choices") or ()) for one in found}
    return 1 / numbers.pop() if len(numbers) == 1 and min(numbers) > 1 else None


def _curve(found: Sequence[Scored], base: Sequence[Scored], rule: str) -> dict[str, Any]:
    """Window, ratio and average gain; "why_not" where the baseline knows no more than chance and no threshold follows from its skill."""
    ours, theirs, chance = _rows(found, rule), _rows(base, rule), _chance(base)
    points, reference = curve(ours), curve(theirs)
    first = min(reference)
    unit = unit_of(found[0].answer)
    gains = {name: average_gain(points, reference, sizes) for name, sizes in (("short", SHORT), ("long", LONG))}
    if reference[first] <= chance:
        reason = f"the baseline is at {reference[first]:.2f} with {first} {unit}, not above chance ({chance:.2f})"
        return {"why_not": reason, "average_gain": gains}
    threshold = relative_threshold(reference[first], chance)
    facts = {"threshold": threshold, "window": asdict(window(ours, threshold)), "against_baseline": asdict(ratio(ours, theirs, threshold))}
    return facts | {"average_gain": gains}


def _rows(found: Sequence[Scored], rule: str) -> Mapping[str, list[list[float]]]:
    """Place on the axis -> for each haystack of all places, in the order of their names, what its answers are worth: [] where it was not
    asked there."""
    places: dict[int, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in found:
        places[place_of(one.answer)][haystack_of(one.answer)].append(getattr(one, rule))
    names = sorted({name for haystacks in places.values() for name in haystacks})
    return {str(place): [haystacks.get(name, []) for name in names] for place, haystacks in sorted(places.items())}


def as_lines(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table for people: task and model, answers, both rules."""
    rows = [
        (f"{task}: {model}", str(worth["answers"]), *(_told(worth[rule]) for rule in RULES))
        for task, models in scores.items()
        for model, worth in models.items()
    ]
    head = ("", "answers", "official [95 %]", "strict [95 %]")
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]


def windows_as_lines(kinds: Mapping[str, Mapping[str, Any]], baseline: str) -> list[str]:
    """For people: of each kind of question and model the window by either rule and its ratio to the baseline's, or why there is none."""
    lines = []
    for kind, models in kinds.items():
        for model, worth in models.items():
            curve = worth["curve"]
            found = [_window_told(rule, curve[rule], curve["unit"], baseline) for rule in RULES] if "unit" in curve else [curve["why_not"]]
            lines += [f"{kind}: {model}: {one}" for one in found]
    return lines


def _window_told(rule: str, found: Mapping[str, Any], unit: str, baseline: str) -> str:
    if "why_not" in found:
        return f"{rule}: {found['why_not']}"
    return f"{rule}: window {Window(**found['window'])} {unit}, {Ratio(**found['against_baseline'])} against {baseline}"


def _told(found: Mapping[str, float | None]) -> str:
    interval = "no interval" if found["low"] is None else f"{found['low']:.3f}, {found['high']:.3f}"
    return f"{found['mean']:.3f} [{interval}]"
