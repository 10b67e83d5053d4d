"""What a report is made of: the runs and the evaluations in some folders, read as they stand, a run that still goes on included."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from laid_ds.evaluation.harness import read_samples
from laid_ds.evaluation.scores import read_answers
from laid_ds.evaluation.summary import ASKED, has_a_curve, join_results, results_files
from laid_ds.files import read_json, read_json_lines

DATASET = "dataset.json"
COUNTED = ("loss", "sft", "kl", "align", "match", "lr", "gradient_norm", "mixture_entropy", "fill", "mfu")
COUNTED += ("tokens", "images", "seconds", "peak_bytes")  # of a step, on the page


@dataclass(frozen=True)
class RunFolder:
    """A run as its folder tells it."""

    name: str
    folder: Path
    record: dict[str, Any]
    """run.json; {} where there is none."""
    steps: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    held_out: list[dict[str, Any]]
    """The lines of the run's evaluation.jsonl."""
    learned: dict[str, Any]
    """learned.json; {} where there is none."""
    state: str
    """How far it is, as words."""

    @property
    def recipe(self) -> dict[str, Any]:
        return self.record.get("run", {})


@dataclass
class Evaluation:
    """Models that were asked the same, by one or several commands."""

    folder: Path
    results: dict[str, Any]
    """As a results file holds it; {} where there are answers alone."""
    answers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def has_curve(self) -> bool:
        return bool(self.results)


@dataclass(frozen=True)
class Sources:
    runs: list[RunFolder]
    evaluations: list[Evaluation]


def read_sources(places: list[Path]) -> Sources:
    """The runs and evaluations in folders and in the folders directly inside them. Raises ValueError for a folder that gives none or is
    given twice, and for a file that is damaged before its last line, or that another version wrote and this one cannot read."""
    for place in places:
        if not place.is_dir():
            raise ValueError(f"{place} is no folder; give the one that holds the results of `laid eval`, or a run")
    resolved = [place.resolve() for place in places]
    twice = next((place for i, place in enumerate(places) if resolved[i] in resolved[:i]), None)
    if twice is not None:
        raise ValueError(f"{twice} is given twice; give each folder once")
    folders = _unique(_with_inner(places))
    runs = {folder: run for folder in folders if (run := read_run(folder)) is not None}
    found = {folder: one for folder in folders if (one := read_evaluation(folder, with_logs=folder in places)) is not None}
    telling = {folder.resolve() for folder in (*runs, *found)}
    silent = next((place for place in places if telling.isdisjoint(inner.resolve() for inner in _with_inner([place]))), None)
    if silent is not None:
        raise ValueError(f"no results at {silent}, and no run; make them with `laid eval ... --out {silent / 'evaluation.json'}`")
    evaluations: list[Evaluation] = []
    for one in found.values():
        _add(evaluations, one)
    return Sources(_with_names(list(runs.values())), evaluations)


def read_run(folder: Path) -> RunFolder | None:
    """The run of a folder; None where there is none."""
    record = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    if not isinstance(record.get("run"), dict):
        record = {}
    steps = _steps(folder / "metrics.jsonl")
    if not steps and not record:
        return None
    held_out = _held_out(folder / "evaluation.jsonl")
    learned = read_json(folder / "learned.json") if (folder / "learned.json").is_file() else {}
    return RunFolder(folder.name, folder, record, steps, held_out, learned, _state(folder, record, steps))


def _steps(path: Path) -> list[dict[str, Any]]:
    """The steps of a run. Raises ValueError for one of which something is counted that is no number."""
    lines = [
        (number, line) for number, line in enumerate(read_json_lines(path), 1) if isinstance(line, dict) and _is(line.get("step"), int)
    ]
    for number, line in lines:
        wrong = next((name for name in COUNTED if not _is(line.get(name), float | int | None)), None)
        if wrong is not None:
            raise ValueError(f"{path}, line {number}: {wrong} is {line[wrong]!r}, where a number must stand")
    return [line for _, line in lines]


def _held_out(path: Path) -> list[dict[str, Any]]:
    """The measurements of a run in training. Raises ValueError for one that is not as a run writes it."""
    lines = [(number, line) for number, line in enumerate(read_json_lines(path), 1) if isinstance(line, dict) and "accuracy" in line]
    for number, line in lines:
        accuracy = line["accuracy"]
        shares = isinstance(accuracy, dict) and accuracy and all(n.isdecimal() and _is(share, float | int) for n, share in accuracy.items())
        if not (shares and _is(line.get("step"), int) and _is(line.get("threshold"), float | int | None)):
            raise ValueError(f"{path}, line {number}: not a measurement as a run writes it: step, accuracy by number of images, threshold")
    return [line for _, line in lines]


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _state(folder: Path, record: dict[str, Any], steps: list[dict[str, Any]]) -> str:
    planned, last = record.get("run", {}).get("steps"), steps[-1]["step"] if steps else 0
    of = f"{last:,} of {planned:,} steps" if isinstance(planned, int) else f"{last:,} steps"
    if (folder / "done.json").is_file():
        return f"finished, {of}"
    if (folder / "requeue.json").is_file():
        reason = read_json(folder / "requeue.json").get("reason", "no reason is recorded")
        return f"stopped and saved, {of} ({reason}); the same command goes on"
    return f"not finished, {of}: it goes on, or was killed"


def read_evaluation(folder: Path, with_logs: bool) -> Evaluation | None:
    """The evaluation in a folder; None where there is none. with_logs: answers that lmms-eval logged are looked for, too."""
    answers = [*read_answers(folder), *(read_samples(folder) if with_logs else [])]
    found = results_files(folder, may_be_none=True)
    curves = {path: results for path, results in found.items() if has_a_curve(results)}
    if not found and not answers:
        return None
    results = join_results(curves or found) if curves or not answers else {}
    return Evaluation(folder, results, answers)


def _add(evaluations: list[Evaluation], found: Evaluation) -> None:
    """Beside those that were asked the same; a model whose name another one has there is called by its folder, too."""
    for known in evaluations:
        if known.has_curve and found.has_curve and _asked(known) == _asked(found):
            names = {}
            for name, model in found.results["models"].items():
                same = known.results["models"].get(name, model) == model
                names[name] = name if same else f"{found.folder.name}/{name}"
                known.results["models"][names[name]] = model
            told = {(answer["model"], answer["task"], answer["key"]) for answer in known.answers}
            renamed = [answer | {"model": names.get(answer["model"], answer["model"])} for answer in found.answers]
            known.answers += [answer for answer in renamed if (answer["model"], answer["task"], answer["key"]) not in told]
            return
    evaluations.append(found)


def _asked(evaluation: Evaluation) -> list[Any]:
    return [evaluation.results["setting"].get(name) for name in ASKED]


def _with_inner(places: list[Path]) -> list[Path]:
    inner = [path for place in places for path in sorted(place.iterdir()) if path.is_dir() and not (path / DATASET).is_file()]
    return [*places, *inner]


def _unique(folders: list[Path]) -> list[Path]:
    return list({folder.resolve(): folder for folder in reversed(folders)}.values())[::-1]


def _with_names(runs: list[RunFolder]) -> list[RunFolder]:
    """Runs of one name get that of the folder above, too."""
    names = [run.name for run in runs]
    return [run if names.count(run.name) == 1 else replace(run, name=f"{run.folder.parent.name}/{run.name}") for run in runs]
