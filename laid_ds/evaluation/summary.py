"""What the results files of a folder say, as numbers: a curve, a window and a ratio for each model. No model is loaded here."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from laid_ds.evaluation.harness import read_samples
from laid_ds.evaluation.scores import as_lines, read_answers, windows_as_lines
from laid_ds.evaluation.window import Ratio, Window, curve, notes_on, ratio, relative_threshold, window
from laid_ds.files import read_json, read_text

ASKED = ("fingerprint", "sizes", "haystacks", "questions", "choices", "dtype")
"""What must be the same for two models' answers to stand side by side."""


@dataclass(frozen=True)
class Row:
    name: str
    accuracy: dict[int, float]
    window: Window | None
    """None where the baseline knows no more than chance, so that no threshold follows from its skill."""
    against_baseline: Ratio | None

    def words(self) -> tuple[str, str]:
        """(window, ratio) for people: what does not exist is said in words."""
        return ("no window", "no ratio") if self.window is None else (str(self.window), str(self.against_baseline))


@dataclass(frozen=True)
class Summary:
    """What the report says, as numbers."""

    rows: list[Row]
    baseline: str
    chance: float | None
    threshold: float | None
    setting: dict[str, Any]
    path: Path
    left_out: dict[str, str] = field(default_factory=dict)
    """Sizes that were asked for and not measured, and why."""
    scores: dict[str, Any] = field(default_factory=dict)
    """What each model is worth on each task, by the official and a strict rule (scores.py)."""

    benchmarks: dict[str, Any] = field(default_factory=dict)
    """The same for each benchmark's kinds of question, over all tasks that ask it."""
    others: list[str] = field(default_factory=list)
    """Folders of further evaluations, which asked something else: their numbers are on the page alone."""

    @property
    def unit(self) -> str:
        """What sizes count."""
        return self.setting.get("unit", "images")

    def as_json(self) -> dict[str, Any]:
        models = {row.name: asdict(row) for row in self.rows}
        numbers = {"baseline": self.baseline, "chance": self.chance, "threshold": self.threshold, "models": models}
        numbers |= {"why_no_window": self.why_no_window()}
        return numbers | {
            "left_out": self.left_out,
            "scores": self.scores,
            "benchmarks": self.benchmarks,
            "others": self.others,
            "report": str(self.path),
        }

    def as_text(self) -> str:
        windows = [*self._windows(), ""] if self.rows else []
        others = [f"on the page alone, since it asked something else: {folder}" for folder in self.others]
        return "\n".join([*windows, *(line for part in self.by_rule() for line in (*part, "")), *others, f"report: {self.path}"])

    def by_rule(self) -> list[list[str]]:
        """Tables of what answers are worth."""
        return [part for part in (as_lines(self.scores), windows_as_lines(self.benchmarks, self.baseline)) if self.scores and part]

    def _windows(self) -> list[str]:
        sizes = self.setting["sizes"]
        names = max(len(row.name) for row in self.rows)
        head = f"{'':{names}}  {'  '.join(f'{size:>5}' for size in sizes)}   window in {self.unit} [95 %]     against {self.baseline}"
        lines = [
            f"{row.name:{names}}  {'  '.join(f'{row.accuracy[size]:5.2f}' for size in sizes)}   {window:24}  {times}"
            for row, (window, times) in zip(self.rows, self.words(), strict=True)
        ]
        return [head, *lines, "", self.rule()]

    def words(self) -> list[tuple[str, str]]:
        """(window, ratio) of each row for people."""
        return [row.words() for row in self.rows]

    def why_no_window(self) -> str | None:
        """Why no model has a window, as a sentence; None where they have."""
        if not self.rows or self.threshold is not None:
            return None
        first = self.setting["sizes"][0]
        at_first = next(row.accuracy[first] for row in self.rows if row.name == self.baseline)
        skill = f"{self.baseline} is at {at_first:.3f} with {self._pieces(first)}, not above chance ({self.chance:.3f})"
        return f"no window: {skill}, and a threshold follows from its skill; another --baseline may have some"

    def _pieces(self, number: int) -> str:
        return f"{number} {self.unit[:-1]}" if number == 1 else f"{number} {self.unit}"

    def rule(self) -> str:
        """How the numbers were found, as a sentence."""
        first = self.setting["sizes"][0]
        skill = f"one-{self.unit[:-1]} skill" if first == 1 else f"skill at {self._pieces(first)}"
        by = (
            f"window: largest number with accuracy >= {self.threshold:.3f} (chance {self.chance:.3f} + 0.6 of {self.baseline}'s {skill})"
            if (self.threshold is not None)
            else self.why_no_window()
        )
        left_out = "".join(f"; {note}" for note in notes_on(self.left_out))
        return (
            f"accuracy by number of {self.unit}; {by}, {self.setting['haystacks']} haystacks of at most "
            f"{self.setting['questions']} questions at each size, intervals by bootstrap over haystacks{left_out}"
        )


def all_answers(folder: Path) -> list[dict[str, Any]]:
    """The answers in a folder: those of `laid eval`, and those that lmms-eval logged."""
    return [*read_answers(folder), *read_samples(folder)] if folder.is_dir() else []


def has_a_curve(results: dict[str, Any]) -> bool:
    """Whether results are of one task, asked at several sizes, with a level of chance: the others have scores alone."""
    return bool(results["setting"].get("sizes") and results["setting"].get("choices"))


def results_files(folder: Path, may_be_none: bool = False) -> dict[Path, dict[str, Any]]:
    """The results files of a folder, whatever their names; other JSON files are none. Raises ValueError when there is none, unless there
    may be none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give the one that holds the results of `laid eval`")
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(read_text(path))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} cannot be read as JSON ({error}); if it holds results, make them again, else move it elsewhere"
            ) from None
        if is_results(content):
            _check_answers(path, content)
            found[path] = content
    if not found and not may_be_none:
        raise ValueError(f"no results at {folder}; make them with `laid eval ... --out {folder / 'evaluation.json'}`")
    return found


def join_results(found: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """The models of several results files as one. Raises ValueError when they cannot stand in one table."""
    (first, joined), *others = found.items()
    joined = joined | {"models": dict(joined["models"])}
    for path, results in others:
        differing = [name for name in ASKED if results["setting"].get(name) != joined["setting"].get(name)]
        if differing:
            raise ValueError(
                f"{path} was made with other {', '.join(differing)} than {first}; one table cannot hold both: move one elsewhere"
            )
        twice = [name for name, model in results["models"].items() if joined["models"].get(name, model) != model]
        if twice:
            raise ValueError(f"{path} and another results file beside it hold different answers of {', '.join(twice)}; move one elsewhere")
        joined["models"] |= results["models"]
    if not joined["models"]:
        raise ValueError(f"{first} holds no model's answers yet; let `laid eval` finish")
    return joined


def read_results(path: Path) -> dict[str, Any]:
    """A results file. Raises ValueError when it is none."""
    results = read_json(path)
    if not is_results(results):
        raise ValueError(f"{path} does not hold results of `laid eval`")
    return results


def is_results(content: Any) -> bool:
    """Whether the content of a JSON file is what `laid eval` writes."""
    return isinstance(content, dict) and all(isinstance(content.get(name), dict) for name in ("setting", "versions", "models"))


def _check_answers(path: Path, results: dict[str, Any]) -> None:
    """Raises ValueError for results that another version wrote and this one cannot read."""
    if not has_a_curve(results):
        return
    sizes, *numbers = (results["setting"].get(name) for name in ("sizes", "choices", "haystacks", "questions"))
    whole = isinstance(sizes, list) and all(isinstance(number, int) and number > 0 for number in (*sizes, *numbers))
    if not (whole and isinstance(results["setting"].get("unit", ""), str) and isinstance(results.get("left_out", {}), dict)):
        raise ValueError(f"{path}: the setting is not as this version of laid_ds writes it; ask again with `laid eval`")
    for name, model in results["models"].items():
        answers = model.get("answers") if isinstance(model, dict) else None
        rows = [answers.get(str(size)) for size in sizes] if isinstance(answers, dict) and len(answers) == len(sizes) else [None]
        if not all(map(_are_answers, rows)) or len(set(map(len, rows))) > 1:
            raise ValueError(f"{path}: the answers of {name} are not as this version of laid_ds writes them; ask it again with `laid eval`")


def _are_answers(row: Any) -> bool:
    """Whether these are 1 or 0 for each question of each haystack."""
    haystacks = isinstance(row, list) and row and all(isinstance(one, list) and one for one in row)
    return bool(haystacks) and all(hit in (0, 1) for one in row for hit in one)


def summarise(results: dict[str, Any], baseline: str, path: Path) -> Summary:
    """Windows of all models of a results file against one threshold, set by the baseline's one-image skill."""
    answers = {name: model["answers"] for name, model in results["models"].items()}
    if baseline not in answers:
        raise ValueError(f"no model {baseline!r} in the results, which hold {sorted(answers)}; name one with --baseline")
    sizes, chance = results["setting"]["sizes"], 1 / results["setting"]["choices"]
    skill = curve(answers[baseline])[sizes[0]]
    if skill > chance:
        threshold = relative_threshold(skill, chance)
        rows = [Row(name, curve(a), window(a, threshold), ratio(a, answers[baseline], threshold)) for name, a in answers.items()]
    else:
        threshold, rows = None, [Row(name, curve(a), None, None) for name, a in answers.items()]
    return Summary(rows, baseline, chance, threshold, results["setting"], path, results.get("left_out", {}))
