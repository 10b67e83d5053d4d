"""Runs and evaluations in, one page out, with its pictures and their data beside it; the numbers of the first evaluation are returned."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from laid_ds.disk import writing
from laid_ds.evaluation.scores import summarise_kinds, summarise_scores
from laid_ds.evaluation.summary import Summary, summarise
from laid_ds.evaluation.window import notes_on
from laid_ds.report.accuracy import accuracy_part, findings
from laid_ds.report.attention import attention_part, training_attention
from laid_ds.report.figures import Shelf
from laid_ds.report.html_parts import section, table
from laid_ds.report.learned import learned_part
from laid_ds.report.page import page
from laid_ds.report.palette import styles
from laid_ds.report.recipe import commands_part, recipes_part
from laid_ds.report.samples import samples_part
from laid_ds.report.sources import Evaluation, Sources, read_sources
from laid_ds.report.training import told_in_short, training_part

PAGE, BESIDE = "report.html", "report"


def write_report(places: str | Path | Sequence[str | Path], baseline: str, out: Path | None = None) -> Summary:
    """Write out/report.html, and out/report/ with a PNG and a CSV for each figure; out: the first place unless given.

    places: folders of runs, of results of `laid eval` and logs of lmms-eval, or folders that hold such. A run may still be going on. No
    model is loaded. Raises ValueError where nothing is found, for what cannot be read, and where the baseline is missing.
    """
    places = [Path(place) for place in ([places] if isinstance(places, str | Path) else places)]
    out = out or places[0]
    sources = read_sources(places)
    shown = Path(out) / PAGE
    summaries = [_summary(evaluation, baseline, shown) for evaluation in sources.evaluations]
    with writing(out, PAGE):
        (out / BESIDE).mkdir(parents=True, exist_ok=True)
        _clear(out)
        report = ["laid", "report", *map(str, places), "--baseline", baseline, *(["--out", str(out)] if out != places[0] else [])]
        text = _page(sources, summaries, baseline, Shelf(out / BESIDE), report)
        partial = shown.with_name(PAGE + ".partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, shown)
    if not summaries:
        return Summary([], baseline, None, None, {}, shown)
    return replace(summaries[0], others=[str(evaluation.folder) for evaluation in sources.evaluations[1:]])


def _clear(out: Path) -> None:
    """Remove the pictures and data that the page before names, and no other file."""
    if (out / PAGE).is_file():
        for name in re.findall(rf"{BESIDE}/([\w.+-]+)\.png, \.csv", (out / PAGE).read_text(encoding="utf-8", errors="replace")):
            for suffix in ("png", "csv"):
                (out / BESIDE / f"{name}.{suffix}").unlink(missing_ok=True)


def _summary(evaluation: Evaluation, baseline: str, path: Path) -> Summary:
    summary = summarise(evaluation.results, baseline, path) if evaluation.has_curve else Summary([], baseline, None, None, {}, path)
    return replace(summary, scores=summarise_scores(evaluation.answers, baseline), benchmarks=summarise_kinds(evaluation.answers, baseline))


def _page(sources: Sources, summaries: Sequence[Summary], baseline: str, shelf: Shelf, report: Sequence[str]) -> str:
    of = styles(_names(sources, summaries, baseline))
    parts = []
    for number, (evaluation, summary) in enumerate(zip(sources.evaluations, summaries, strict=True), 1):
        name = "" if len(summaries) == 1 else f": {evaluation.folder}"
        models = evaluation.results.get("models", {})
        parts += [
            (f"accuracy-{number}", f"Accuracy and windows{name}", accuracy_part(evaluation, summary, shelf, of)),
            (f"attention-{number}", f"Attention{name}", attention_part(models, shelf, of)),
            (f"samples-{number}", f"Answers{name}", samples_part(evaluation.answers, _setting(evaluation), baseline, of)),
        ]
    training = training_part(sources.runs, shelf, of) + training_attention(sources.runs, shelf, of) + learned_part(sources.runs, shelf, of)
    parts.insert(1 if parts else 0, ("training", "Training: what it did and what it cost", training))
    parts.append(("trust", "Can it be trusted", _trust(sources, summaries)))
    parts.append(("recipe", "Recipe, versions and machine", recipes_part(sources.runs, of)))
    parts.append(("again", "The commands that make it again", commands_part(sources.runs, sources.evaluations, report)))
    parts = [part for part in parts if part[2]]
    lead = [sentence for summary in summaries for sentence in findings(summary)] or ["No evaluation with several sizes is here: no window."]
    lead += [told_in_short(run) for run in sources.runs]
    sections = [section(*part) for part in parts]
    return page("How far does each model see?", lead, sections, {anchor: title for anchor, title, _ in parts})


def _names(sources: Sources, summaries: Sequence[Summary], baseline: str) -> list[str]:
    """Models and runs, which are one where they have one name; the baseline first."""
    models = [name for evaluation in sources.evaluations for name in evaluation.results.get("models", {})]
    answering = [name for summary in summaries for task in summary.scores.values() for name in task]
    named = dict.fromkeys([*models, *answering, *(run.name for run in sources.runs)])
    return sorted(named, key=lambda name: name != baseline)


def _setting(evaluation: Evaluation) -> Mapping[str, Any]:
    return evaluation.results.get("setting", {})


def _trust(sources: Sources, summaries: Sequence[Summary]) -> str:
    """What a reader must know before believing a number."""
    rows: list[tuple[str, Any]] = []
    for evaluation, summary in zip(sources.evaluations, summaries, strict=True):
        setting = _setting(evaluation)
        asked = {name: setting[name] for name in ("haystacks", "questions", "sizes", "mode", "dtype", "fingerprint") if setting.get(name)}
        rows += [(f"{evaluation.folder}: {name}", value) for name, value in asked.items()]
        rows += [(f"{evaluation.folder}: versions", ", ".join(map(" ".join, _versions(evaluation))))] if _versions(evaluation) else []
        rows += [(f"{evaluation.folder}: left out", note) for note in notes_on(summary.left_out)]
    rows += [(f"run {run.name}", run.state) for run in sources.runs]
    rows += [(f"run {run.name}: seed", run.recipe["seed"]) for run in sources.runs if "seed" in run.recipe]
    rows.append(("intervals", "95 %, bootstrap over haystacks; they say nothing of other seeds of the training"))
    return table(("", "what stands behind the numbers"), rows)


def _versions(evaluation: Evaluation) -> list[tuple[str, str]]:
    return [(name, str(number)) for name, number in evaluation.results.get("versions", {}).items()]
