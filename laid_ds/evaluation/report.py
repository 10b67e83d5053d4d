"""A table, a picture and one self-contained report.html, from results files alone: no model is loaded here."""

from __future__ import annotations

import base64
import html
import json
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

from laid_ds.evaluation.harness import read_samples
from laid_ds.evaluation.scores import as_lines, read_answers, summarise_kinds, summarise_scores, windows_as_lines
from laid_ds.evaluation.window import Ratio, Window, curve, notes_on, ratio, relative_threshold, window
from laid_ds.files import read_json, read_json_lines, read_text

COLOURS = ("#111111", "#9a9a9a", "#c98a1b", "#3b7dd8", "#c2185b", "#2e8b57", "#6a4fb3", "#8c564b")
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}"
    "td,th{padding:.25rem .8rem;border-bottom:1px solid #ddd;text-align:right}td:first-child,th:first-child{text-align:left}"
    "img{max-width:100%}code,pre{background:#f5f5f5;padding:.1rem .3rem}pre{padding:.8rem;overflow:auto}.note{color:#666}"
)
ASKED = ("fingerprint", "sizes", "haystacks", "questions", "choices", "dtype")
"""What must be the same for two models' answers to stand side by side."""


@dataclass(frozen=True)
class Row:
    name: str
    accuracy: dict[int, float]
    window: Window
    against_baseline: Ratio


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

    def as_json(self) -> dict[str, Any]:
        models = {row.name: asdict(row) for row in self.rows}
        numbers = {"baseline": self.baseline, "chance": self.chance, "threshold": self.threshold, "models": models}
        return numbers | {"left_out": self.left_out, "scores": self.scores, "benchmarks": self.benchmarks, "report": str(self.path)}

    def as_text(self) -> str:
        windows = [*self._windows(), ""] if self.rows else []
        return "\n".join([*windows, *(line for part in self.by_rule() for line in (*part, "")), f"report: {self.path}"])

    def by_rule(self) -> list[list[str]]:
        """Tables of what answers are worth."""
        return [part for part in (as_lines(self.scores), windows_as_lines(self.benchmarks, self.baseline)) if self.scores and part]

    def _windows(self) -> list[str]:
        sizes = self.setting["sizes"]
        names = max(len(row.name) for row in self.rows)
        head = f"{'':{names}}  {'  '.join(f'{size:>5}' for size in sizes)}   window in images [95 %]     against {self.baseline}"
        lines = [
            f"{row.name:{names}}  {'  '.join(f'{row.accuracy[size]:5.2f}' for size in sizes)}   {row.window!s:24}  {row.against_baseline}"
            for row in self.rows
        ]
        return [head, *lines, "", self.rule()]

    def rule(self) -> str:
        first = self.setting["sizes"][0]
        skill = "one-image skill" if first == 1 else f"skill at {first} images"
        left_out = "".join(f"; {note}" for note in notes_on(self.left_out))
        return (
            f"accuracy by number of images; window: largest number with accuracy >= {self.threshold:.3f} "
            f"(chance {self.chance:.3f} + 0.6 of {self.baseline}'s {skill}), {self.setting['haystacks']} haystacks of at most "
            f"{self.setting['questions']} questions at each size, intervals by bootstrap over haystacks{left_out}"
        )


def write_report(folder: str | Path, baseline: str) -> Summary:
    """Read the results files of a folder, the answers and the runs' metrics beside them; write folder/window.png and folder/report.html.

    Answers are those of `laid eval` and of lmms-eval (its --log_samples files). Raises ValueError when there are neither results nor
    answers, when results were made with different questions, and when the baseline is missing.
    """
    folder = Path(folder)
    answers = all_answers(folder)
    found = {path: results for path, results in results_files(folder, bool(answers)).items() if _has_a_curve(results)}
    summary, pictures, versions = Summary([], baseline, None, None, {}, folder / "report.html"), [], {}
    if found or not answers:
        results = join_results(found or results_files(folder))
        summary, versions = summarise(results, baseline, folder / "report.html"), results["versions"]
        draw_curves(summary, folder / "window.png")
        pictures.append(folder / "window.png")
    summary = replace(summary, scores=summarise_scores(answers, baseline), benchmarks=summarise_kinds(answers, baseline))
    runs = {path.parent.name: _metrics(path) for path in sorted(folder.glob("*/metrics.jsonl"))}
    runs = {name: lines for name, lines in runs.items() if lines}
    if runs:
        draw_training(runs, folder / "training.png")
        pictures.append(folder / "training.png")
    summary.path.write_text(_page(summary, pictures, versions))
    return summary


def all_answers(folder: Path) -> list[dict[str, Any]]:
    """The answers in a folder: those of `laid eval`, and those that lmms-eval logged."""
    return [*read_answers(folder), *read_samples(folder)] if folder.is_dir() else []


def _has_a_curve(results: dict[str, Any]) -> bool:
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


def summarise(results: dict[str, Any], baseline: str, path: Path) -> Summary:
    """Windows of all models of a results file against one threshold, set by the baseline's one-image skill."""
    answers = {name: model["answers"] for name, model in results["models"].items()}
    if baseline not in answers:
        raise ValueError(f"no model {baseline!r} in the results, which hold {sorted(answers)}; name one with --baseline")
    sizes, chance = results["setting"]["sizes"], 1 / results["setting"]["choices"]
    threshold = relative_threshold(curve(answers[baseline])[sizes[0]], chance)
    rows = [Row(name, curve(a), window(a, threshold), ratio(a, answers[baseline], threshold)) for name, a in answers.items()]
    return Summary(rows, baseline, chance, threshold, results["setting"], path, results.get("left_out", {}))


def draw_curves(summary: Summary, path: Path) -> None:
    """Accuracy against the number of images, one line per model, with each window marked on the threshold."""
    figure, axes = _figure(8, 4.2)
    for row, colour in zip(summary.rows, cycle(COLOURS), strict=False):
        sizes = list(row.accuracy)
        bound = "≥ " if row.window.censored else ""
        label = f"{row.name}: {bound}{row.window.images:.0f} images"
        axes.plot(sizes, row.accuracy.values(), marker="o", ms=4, lw=2, color=colour, label=label)
        if row.window.images and not row.window.censored:
            axes.plot([row.window.images], [summary.threshold], marker="D", ms=7, mfc="white", mec=colour, mew=2, zorder=5)
    axes.axhline(summary.threshold, color="#888888", lw=1, ls="--")
    axes.axhline(summary.chance, color="#bbbbbb", lw=1, ls=":")
    axes.text(min(sizes), summary.threshold, " threshold", va="bottom", color="#666666", size=9)
    axes.text(min(sizes), summary.chance, " chance", va="bottom", color="#888888", size=9)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set(xlabel="images in the haystack", ylabel="accuracy", ylim=(0, 1.04))
    axes.legend(title="window", frameon=False, loc="lower left", bbox_to_anchor=(0, 0.14))
    _save(figure, path)


def draw_training(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Each term of the loss over the steps, one panel a term, one line a run."""
    terms = [term for term in ("sft", "kl", "align", "match") if any(lines and term in lines[0] for lines in runs.values())]
    figure, panels = _figure(2.6 * len(terms) + 1.4, 2.6, len(terms))
    for term, axes in zip(terms, panels if len(terms) > 1 else [panels], strict=True):
        for (name, lines), colour in zip(runs.items(), cycle(COLOURS), strict=False):
            if lines and term in lines[0]:
                axes.plot([line["step"] for line in lines], [line[term] for line in lines], lw=1, color=colour, label=name)
        axes.set(title=term, xlabel="step", yscale="log")
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), frameon=False, loc="outside right upper", fontsize=8)
    _save(figure, path)


def _figure(width: float, height: float, panels: int = 1):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(width, height), dpi=140, layout="constrained")
    for one in axes if panels > 1 else [axes]:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", color="#eeeeee")
    return figure, axes


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)


def _metrics(path: Path) -> list[dict[str, Any]]:
    return read_json_lines(path)


def _page(summary: Summary, pictures: list[Path], versions: dict[str, str]) -> str:
    images = "".join(f'<p><img alt="{path.stem}" src="{_embedded(path)}"></p>' for path in pictures)
    tables = "".join(f"<pre>{html.escape(chr(10).join(part))}</pre>" for part in summary.by_rule())
    scores = f"<h2>Scores by rule</h2>{tables}" if tables else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>laid_ds report</title><style>{STYLE}</style>'
        f"<h1>How far does each model see?</h1>{images}{_table(summary) if summary.rows else ''}{scores}"
        f"<h2>Setting</h2><pre>{html.escape(json.dumps(summary.setting | {'versions': versions}, indent=1))}</pre></html>"
    )


def _table(summary: Summary) -> str:
    sizes = summary.setting["sizes"]
    head = "".join(f"<th>{size}</th>" for size in sizes)
    body = "".join(
        f"<tr><td>{html.escape(row.name)}</td>{''.join(f'<td>{row.accuracy[size]:.2f}</td>' for size in sizes)}"
        f"<td>{html.escape(str(row.window))}</td><td>{html.escape(str(row.against_baseline))}</td></tr>"
        for row in summary.rows
    )
    return (
        f"<table><tr><th>accuracy at</th>{head}<th>window [95 %]</th><th>against {html.escape(summary.baseline)}</th></tr>{body}</table>"
        f"<p class=note>{html.escape(summary.rule())}.</p>"
    )


def _embedded(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
