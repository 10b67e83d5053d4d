"""The results of a study: one line of JSON for each arm, teacher and seed, small enough to be committed. The page needs no more."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from laid_ds.disk import writing
from laid_ds.evaluation.window import curve, relative_threshold, window
from laid_ds.files import read_json, read_json_lines
from laid_ds.study.file import Study
from laid_ds.study.jobs import BEFORE, SWEEP, Job, Line, key_of, made_with, what_decides

TERMS = ("sft", "kl", "align", "match")
AT_THE_END = 25  # steps whose mean is told as a loss at the end
PARTS = 30  # of a run's steps, whose means are kept
KINDS = {"study": str, "world": str, "role": str, "arm": str, "teacher": str | None, "seed": int, "value": float | int | None}
KINDS |= dict.fromkeys(("asked", "accuracy", "right", "of", "cpu_seconds", "versions"), dict)  # of what stands in every line


def read_lines(path: Path) -> list[Line]:
    """Raises ValueError for a file that holds something else."""
    lines = read_json_lines(path)
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict) or not all(name in line and isinstance(line[name], kind) for name, kind in KINDS.items()):
            raise ValueError(f"{path}, line {number}: no result of `laid study` of this version")
    return lines


def of_world(lines: Sequence[Line], study: str, world: str) -> list[Line]:
    return [line for line in lines if (line["study"], line["world"]) == (study, world)]


def is_done(job: Job, lines: Sequence[Line]) -> bool:
    """Whether a job has its line. Raises ValueError for a line that was made otherwise."""
    line = next((line for line in lines if key_of(line) == job.key), None)
    if line is None:
        return False
    wanted = what_decides(made_with(job))
    found = what_decides({name: line.get(name) for name in made_with(job)})
    differing = [name for name in wanted if wanted[name] != found[name]]
    if differing:
        name = differing[0]
        was, now = _without_the_same(found[name], wanted[name])
        raise ValueError(
            f"{job.name}: its line was made with other {name} ({was}) than the study has now ({now}); give the arm another name, or"
            " remove the line to run it again"
        )
    return True


def _without_the_same(one: Any, other: Any) -> tuple[Any, Any]:
    """Of two lists what the other has not, unless that is nothing of either (another order, a word twice)."""
    if not isinstance(one, list) or not isinstance(other, list):
        return one, other
    alone = [word for word in one if word not in other], [word for word in other if word not in one]
    return alone if any(alone) else (one, other)


def line_of(job: Job, study: Study, name: str, world: str, lines: Sequence[Line]) -> Line:
    """What a finished job found. The window's threshold follows from the student before of the same seed (from this very job where it is
    that one); a sweep has none."""
    results = read_json(job.results)
    answers = results["models"][job.arm]["answers"]
    setting = results["setting"]
    right = {size: [sum(row) for row in rows] for size, rows in answers.items()}
    of = {size: [len(row) for row in rows] for size, rows in answers.items()}
    found = {
        "study": name,
        "world": world,
        "role": job.key[0],
        "arm": job.arm,
        "teacher": job.teacher,
        "seed": job.seed,
        "value": job.value,
    }
    found |= made_with(job) | {"chance": 1 / setting["choices"], "fingerprint": setting["fingerprint"]}
    found |= {"accuracy": {str(size): round(share, 6) for size, share in curve(answers).items()}, "right": right, "of": _short(of)}
    if job.role != SWEEP:
        first = curve(answers) if job.role == BEFORE else _before(study, job, lines)
        found["window"] = _window(answers, first, 1 / setting["choices"])
    if job.spec.model is None:
        found |= {"losses": _at_the_end(_metrics(job)), "steps": _over_steps(_metrics(job)), "held_out": _held_out(job)}
    versions = read_json(job.run / "run.json")["versions"] if job.spec.model is None else results["versions"]
    return found | {"cpu_seconds": _cpu_seconds(job), "versions": versions}


def answers_of(line: Line) -> dict[str, list[list[int]]]:
    """Size -> for each haystack 1 or 0 for each of its questions, as `laid_ds.evaluation.window` takes them: how many were right is kept,
    and which ones decides nothing there."""
    return {
        size: [[1] * right + [0] * (of - right) for right, of in zip(rights, _long(line["of"][size], len(rights)), strict=True)]
        for size, rights in line["right"].items()
    }


def _short(of: Mapping[str, list[int]]) -> dict[str, int | list[int]]:
    """One number where all haystacks were asked as much."""
    return {size: row[0] if len(set(row)) == 1 else row for size, row in of.items()}


def _long(of: int | list[int], number: int) -> list[int]:
    return [of] * number if isinstance(of, int) else of


def _before(study: Study, job: Job, lines: Sequence[Line]) -> dict[int, float]:
    line = next(line for line in lines if (line["role"], line["arm"], line["seed"]) == ("test", study.before, job.seed))
    return curve(answers_of(line))


def threshold_of(accuracy: Mapping[int, float], chance: float) -> float | None:
    """From the skill of the student before at the least size; None where that is not above chance."""
    skill = accuracy[min(accuracy)]
    return relative_threshold(skill, chance) if skill > chance else None


def _window(answers: Mapping[str, Any], before: Mapping[int, float], chance: float) -> dict[str, Any] | None:
    threshold = threshold_of(before, chance)
    if threshold is None:
        return None
    found = window(answers, threshold)
    numbers = {"size": found.images, "low": found.low, "high": found.high, "threshold": threshold}
    return {"censored": found.censored, "high_censored": found.high_censored} | {key: round(value, 4) for key, value in numbers.items()}


def _metrics(job: Job) -> list[dict[str, Any]]:
    return read_json_lines(job.run / "metrics.jsonl")


def _at_the_end(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    last = metrics[-AT_THE_END:]
    return {term: _round(fmean(step[term] for step in last)) for term in (*TERMS, "gradient_norm") if term in last[-1]}


def _over_steps(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Means over equal parts of the run: {"step": last step of each part, term: means}."""
    number = min(PARTS, len(metrics))
    ends = [len(metrics) * (part + 1) // number for part in range(number)]
    parts = [metrics[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    terms = [term for term in TERMS if term in metrics[-1]]
    return {"step": [part[-1]["step"] for part in parts]} | {
        term: [_round(fmean(s[term] for s in part)) for part in parts] for term in terms
    }


def _round(value: float) -> float:
    return float(f"{value:.5g}")


def _held_out(job: Job) -> list[dict[str, Any]]:
    """Windows in training, where the recipe has an [evaluation]."""
    found = read_json_lines(job.run / "evaluation.jsonl")
    return [{"step": line["step"], "window": line["window"] and round(line["window"], 3), "censored": line["censored"]} for line in found]


def note_cpu(job: Job, what: str, seconds: float) -> None:
    with (job.folder / "cpu.jsonl").open("a") as file:
        file.write(json.dumps({"what": what, "cpu_seconds": seconds}) + "\n")


def _cpu_seconds(job: Job) -> dict[str, float]:
    """What each command took, attempts that were killed left out (they told nobody)."""
    found: dict[str, float] = {}
    for line in read_json_lines(job.folder / "cpu.jsonl"):
        found[line["what"]] = round(found.get(line["what"], 0) + line["cpu_seconds"], 1)
    return found


def add_line(path: Path, line: Line) -> None:
    """Put a line in its place, whole or not at all: other studies may write the same file. The order is that of names, so that the file
    is the same whatever was finished first."""
    with _locked(path):
        lines = [*(known for known in read_lines(path) if _place(known) != _place(line)), line]
        partial = path.with_name(path.name + ".partial")
        with writing(path.parent, path.name):
            written = (json.dumps(one, allow_nan=False, separators=(",", ":")) for one in sorted(lines, key=_place))
            partial.write_text("".join(f"{one}\n" for one in written))
            os.replace(partial, path)


def _place(line: Line) -> tuple[str, ...]:
    return (line["study"], line["world"], *(f"{part:012g}" if isinstance(part, int | float) else str(part) for part in key_of(line)))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Until the end of the block no other process changes the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Until the end of the block this process alone works in the folder. Raises ValueError while another does."""
    with writing(out, "the study"):
        out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another `laid study` works in {out}; wait for it, or give another --out") from None
        yield
