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

from laid_ds.evaluation.rules import Answer, score
from laid_ds.evaluation.window import LONG, SHORT, average_gain, curve, ratio, relative_threshold, window
from laid_ds.files import read_json_lines

RULES = ("official", "strict")
HEADER = "laid_eval"
NEEDED = ("model", "task", "benchmark", "key", "cluster", "question_index", "size", "depth", "expected", "said", "meta")
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
            if HEADER in line:
                continue
            if missing := [name for name in NEEDED if name not in line]:
                raise ValueError(f"{path}, line {number}: an answer without {', '.join(missing)}")
            name = tuple(line[part] for part in ("model", "task", "key", "size", "depth", "question_index"))
            found[name] = line
    return list(found.values())


def _begins_as_answers(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.readline(4096)
    return f'"{HEADER}"'.encode() in first or (b'"question_index"' in first and b'"benchmark"' in first)


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
    tasks: dict[str, dict[str, list[Scored]]] = defaultdict(lambda: defaultdict(list))
    for one in scored(answers):
        tasks[one.answer["task"]][one.answer["model"]].append(one)
    return {
        task: {model: _worth(found) | {"curve": _curves(found, models.get(baseline), baseline)} for model, found in models.items()}
        for task, models in tasks.items()
    }


def _worth(found: Sequence[Scored]) -> dict[str, Any]:
    clusters = {one.answer["cluster"] for one in found}
    facts = {"benchmark": found[0].answer["benchmark"], "answers": len(found), "clusters": len(clusters)}
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
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for one in found:
        sums[one.answer["cluster"]][0] += getattr(one, rule)
        sums[one.answer["cluster"]][1] += 1
    hits, asked = np.array(list(sums.values())).T
    mean, number = float(hits.sum() / asked.sum()), len(hits)
    if number < 2:
        return {"mean": mean, "low": None, "high": None}
    picks = np.random.default_rng(seed).integers(number, size=(DRAWS, number))
    low, high = np.percentile(hits[picks].sum(1) / asked[picks].sum(1), [2.5, 97.5])
    return {"mean": mean, "low": float(low), "high": float(high)}


def _curves(found: Sequence[Scored], base: Sequence[Scored] | None, baseline: str) -> dict[str, Any]:
    reason = _why_no_curve(found, base, baseline)
    return {"why_not": reason} if reason else {rule: _curve(found, base, rule) for rule in RULES}


def _why_no_curve(found: Sequence[Scored], base: Sequence[Scored] | None, baseline: str) -> str | None:
    """Why there is neither a window nor a ratio, as a sentence; None where there is."""
    if len({one.answer["size"] for one in found}) < 2:
        return "only one number of images was asked"
    if base is None:
        return f"the baseline {baseline} has not answered this task"
    if _chance(base) is None:
        return "questions do not all offer the same number of choices, so that there is no level of chance"
    ours, theirs = (_clusters_by_size(group) for group in (found, base))
    if ours != theirs:
        return f"it was asked about other haystacks than the baseline {baseline}"
    if len(set(map(frozenset, ours.values()))) > 1:
        return "not every haystack was asked at every number of images"
    return None


def _clusters_by_size(found: Sequence[Scored]) -> dict[int, set[str]]:
    sizes: dict[int, set[str]] = defaultdict(set)
    for one in found:
        sizes[one.answer["size"]].add(one.answer["cluster"])
    return dict(sizes)


def _chance(found: Sequence[Scored]) -> float | None:
    numbers = {len(one.answer.get("choices") or ()) for one in found}
    return 1 / numbers.pop() if len(numbers) == 1 and min(numbers) > 1 else None


def _curve(found: Sequence[Scored], base: Sequence[Scored], rule: str) -> dict[str, Any]:
    """Window, ratio and average gain; "why_not" where the baseline knows no more than chance and no threshold follows from its skill."""
    ours, theirs, chance = _rows(found, rule), _rows(base, rule), _chance(base)
    points, reference = curve(ours), curve(theirs)
    first = min(reference)
    gains = {name: average_gain(points, reference, sizes) for name, sizes in (("short", SHORT), ("long", LONG))}
    if reference[first] <= chance:
        reason = f"the baseline is at {reference[first]:.2f} with {first} images, not above chance ({chance:.2f})"
        return {"why_not": reason, "average_gain": gains}
    threshold = relative_threshold(reference[first], chance)
    facts = {"threshold": threshold, "window": asdict(window(ours, threshold)), "against_baseline": asdict(ratio(ours, theirs, threshold))}
    return facts | {"average_gain": gains}


def _rows(found: Sequence[Scored], rule: str) -> Mapping[str, list[list[float]]]:
    """Size -> for each cluster, in the order of their names, what its answers are worth."""
    sizes: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in found:
        sizes[one.answer["size"]][one.answer["cluster"]].append(getattr(one, rule))
    return {str(size): [clusters[name] for name in sorted(clusters)] for size, clusters in sorted(sizes.items())}


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


def _told(found: Mapping[str, float | None]) -> str:
    interval = "no interval" if found["low"] is None else f"{found['low']:.3f}, {found['high']:.3f}"
    return f"{found['mean']:.3f} [{interval}]"
