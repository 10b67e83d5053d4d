"""Did the window grow, and where: curves with bands, windows, ratios, scores by rule, accuracy by needle depth and size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from laid_ds.evaluation.scores import RULES, Scored, scored, tenth, windows_as_lines
from laid_ds.evaluation.summary import Summary
from laid_ds.evaluation.window import Ratio, Window, bands
from laid_ds.report.figures import WIDE, Shelf, heat_map, say_numbers, shortened
from laid_ds.report.html_parts import code, figures, fold, paragraph, table
from laid_ds.report.palette import MUTED, Style
from laid_ds.report.sources import Evaluation

LEGEND_CHARACTERS = 80  # that a line of the legend has room for
MOST_CELLS = 160  # of a heat map whose numbers are written in


def findings(summary: Summary) -> list[str]:
    """The answer first, a sentence for each model but the baseline."""
    if not summary.rows:
        return []
    if (why := summary.why_no_window()) is not None:
        return [f"{why[0].upper()}{why[1:]}."]
    base = next(row.window for row in summary.rows if row.name == summary.baseline)
    said = [f"{summary.baseline}, the baseline, sees {_far(base, summary.unit)}."]
    for row in summary.rows:
        if row.name != summary.baseline:
            said.append(f"{row.name} sees {_far(row.window, summary.unit)}: {_times(row.against_baseline, summary.baseline)}.")
    return said


def _far(window: Window, unit: str) -> str:
    if not window.images:
        return "not even the smallest windows above the threshold"
    if window.censored:
        return f"at least {window.images:.0f} {unit}, as many as were asked"
    return f"{window.images:.1f} {unit} {window.interval()}"


def _times(found: Ratio, baseline: str) -> str:
    if found.at_least and found.at_most:
        return f"whether that is farther than {baseline} more images would tell"
    if found.times is None:
        return f"no ratio to a window of 0, {baseline}'s"
    holds_one = (found.low is None or found.low <= 1) and (found.high is None or found.high >= 1)
    sure = ", and the interval holds 1: not sure" if holds_one else ""
    bound = "at least " if found.at_least else "at most " if found.at_most else ""
    return f"{bound}{found.times:.2f} times {baseline}'s window {found.interval()}{sure}"


def accuracy_part(evaluation: Evaluation, summary: Summary, shelf: Shelf, styles: Mapping[str, Style]) -> str:
    """The section of one evaluation."""
    parts = []
    if summary.rows:
        parts.append(figures([_curves(evaluation, summary, shelf, styles)]))
        parts += [_windows(summary, styles), paragraph(f"{summary.rule()}.", "note")]
    if summary.scores:
        parts += [_scores(summary, styles)]
    if summary.benchmarks:
        lines = windows_as_lines(summary.benchmarks, summary.baseline)
        parts += ["<h3>Each kind of question of a benchmark, through all its sizes</h3>", code("\n".join(lines))]
    maps = _depth_maps(scored(evaluation.answers), shelf)
    if maps:
        parts.append(fold(f"Accuracy by the needle's depth and the number of images ({len(maps)} maps)", figures(maps)))
    return "".join(parts)


def _curves(evaluation: Evaluation, summary: Summary, shelf: Shelf, styles: Mapping[str, Style]) -> str:
    interval = {row.name: bands(evaluation.results["models"][row.name]["answers"]) for row in summary.rows}
    sizes = sorted(summary.rows[0].accuracy)
    labels = {row.name: shortened(row.name) for row in summary.rows}
    columns = max(1, min(4, LEGEND_CHARACTERS // (max(map(len, labels.values())) + 8)))

    def paint(axes: Axes) -> None:
        for row in summary.rows:
            style, found = styles[row.name], interval[row.name]
            points = [row.accuracy[size] for size in sizes]
            axes.fill_between(sizes, *zip(*(found[size] for size in sizes), strict=True), color=style.colour, alpha=0.13, lw=0)
            axes.plot(sizes, points, color=style.colour, ls=style.dash, marker=style.mark, ms=4.5, lw=1.8, label=labels[row.name])
            if row.window and row.window.images and not row.window.censored:
                axes.plot([row.window.images], [summary.threshold], marker="|", ms=16, mec=style.colour, mew=2.4, zorder=5)
            elif row.window and row.window.censored:
                axes.annotate(
                    "", (sizes[-1] * 1.22, points[-1]), (sizes[-1], points[-1]), arrowprops={"arrowstyle": "->", "color": style.colour}
                )
        for level, name in ((summary.threshold, "threshold"), (summary.chance, "chance")):
            if level is not None:
                axes.axhline(level, color=MUTED, lw=1, ls="--" if name == "threshold" else ":")
                axes.text(sizes[0], level, name, va="bottom", color=MUTED, size=8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set(xlabel=f"{summary.unit} in the haystack", ylabel="accuracy", xlim=(sizes[0] / 1.1, sizes[-1] * 1.4), ylim=(0, 1.04))
        axes.grid(axis="y")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, handlelength=2.4, borderpad=0)

    rows = [("model", summary.unit, "accuracy", "low", "high")]
    rows += [(row.name, size, row.accuracy[size], *interval[row.name][size]) for row in summary.rows for size in sizes]
    legend_rows = -(-len(summary.rows) // columns)
    ends = "a tick on the threshold is a window's end, an arrow one that goes on beyond what was asked"
    caption = f"Accuracy against {summary.unit}, bands 95 %; {ends}."
    return shelf.figure("accuracy", caption, paint, rows, WIDE, (0.1, 0.14, 0.98, 0.96 - 0.055 * legend_rows))


def _windows(summary: Summary, styles: Mapping[str, Style]) -> str:
    sizes = sorted(summary.rows[0].accuracy)
    rows = [
        (row.name, *(f"{row.accuracy[size]:.2f}" for size in sizes), *words)
        for row, words in zip(summary.rows, summary.words(), strict=True)
    ]
    return table(("accuracy at", *map(str, sizes), f"window in {summary.unit} [95 %]", f"against {summary.baseline}"), rows, styles)


def _scores(summary: Summary, styles: Mapping[str, Style]) -> str:
    head = ("model", "task", "answers", "haystacks", "official [95 %]", "strict [95 %]", "window, official", "window, strict")
    rows = [
        (model, task, worth["answers"], worth["clusters"], *(_told(worth[rule]) for rule in RULES), *_by_rule(worth["curve"]))
        for task, models in summary.scores.items()
        for model, worth in models.items()
    ]
    return f"<h3>Scores by rule</h3>{table(head, rows, styles)}"


def _told(found: Mapping[str, float | None]) -> str:
    interval = "no interval" if found["low"] is None else f"{found['low']:.3f}, {found['high']:.3f}"
    return f"{found['mean']:.3f} [{interval}]"


def _by_rule(curve: Mapping[str, Any]) -> tuple[str, str]:
    """The window by either rule, or why there is none."""
    if "why_not" in curve:
        return (f"none: {curve['why_not']}",) * 2
    said = []
    for rule in RULES:
        one = curve[rule]
        if "why_not" in one:
            said.append(f"none: {one['why_not']}")
        else:
            said.append(f"{Window(**one['window'])} {curve['unit']}")
    return said[0], said[1]


def _depth_maps(answers: Sequence[Scored], shelf: Shelf) -> list[str]:
    groups: dict[tuple[str, str], list[Scored]] = defaultdict(list)
    for one in answers:
        if one.answer["depth"] is not None:
            groups[one.answer["task"], one.answer["model"]].append(one)
    return [_depth_map(task, model, found, shelf) for (task, model), found in groups.items()]


def _depth_map(task: str, model: str, found: Sequence[Scored], shelf: Shelf) -> str:
    sizes = sorted({one.answer["size"] for one in found})
    right, asked = np.zeros((2, 10, len(sizes)))
    for one in found:
        place = round(tenth(one.answer["depth"]) * 10), sizes.index(one.answer["size"])
        right[place] += one.official
        asked[place] += 1
    shares = np.divide(right, asked, out=np.full_like(right, np.nan), where=asked > 0)

    def paint(axes: Axes) -> None:
        heat_map(axes, shares, (0, 1))
        if shares.size <= MOST_CELLS:
            say_numbers(axes, shares)
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axes.set_yticks(range(0, 10, 3), [f"{tenth / 10:.1f}" for tenth in range(0, 10, 3)])
        axes.set(xlabel="images", ylabel="depth of the needle, from")
        axes.spines[:].set_visible(False)

    rows = [("depth", "images", "answers", "official")]
    rows += [(row / 10, sizes[j], int(asked[row, j]), right[row, j] / asked[row, j]) for row, j in np.argwhere(asked > 0)]
    caption = f"{model}, {task}: official score, depth from 0 (first image) to 1"
    return shelf.figure(f"depth-{task}-{model}", caption, paint, rows, margins=(0.13, 0.17, 0.97, 0.96))
