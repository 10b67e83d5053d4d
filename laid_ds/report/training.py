"""What training did and what it cost: every term over the steps, restarts where they happened, the held-out window, totals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from laid_ds.report.figures import PlainLog, Shelf, curve_points, shortened
from laid_ds.report.html_parts import figures, paragraph, table
from laid_ds.report.palette import MARKS, MUTED, Style
from laid_ds.report.sources import RunFolder

Line = dict[str, Any]
CURVES: dict[str, tuple[str, Callable[[Line], float | None], bool]] = {
    "loss": ("loss, all terms", lambda line: line.get("loss"), True),
    "sft": ("cross-entropy of the answers, nats", lambda line: line.get("sft"), True),
    "kl": ("KL to the teacher, nats", lambda line: line.get("kl"), True),
    "align": ("head alignment", lambda line: line.get("align"), True),
    "match": ("attention matching", lambda line: line.get("match"), True),
    "learning-rate": ("learning rate", lambda line: line.get("lr"), False),
    "gradient-norm": ("norm of the gradient", lambda line: line.get("gradient_norm"), True),
    "mixture-entropy": ("entropy of the mixture, nats", lambda line: line.get("mixture_entropy"), False),
    "tokens-per-second": ("tokens per second", lambda line: _per(line, "tokens"), False),
    "memory": ("most memory of rank 0, GiB", lambda line: line["peak_bytes"] / 2**30 if "peak_bytes" in line else None, False),
    "fill": ("fill of batches", lambda line: line.get("fill"), False),
    "mfu": ("MFU", lambda line: line.get("mfu"), False),
}
"""File name -> (what it shows, its value in a line of metrics.jsonl, whether the axis is logarithmic)."""


def training_part(runs: Sequence[RunFolder], shelf: Shelf, styles: Mapping[str, Style]) -> str:
    if not runs:
        return ""
    with_steps = [run for run in runs if run.steps]
    charts = [chart for name in CURVES if (chart := _chart(name, with_steps, shelf, styles)) is not None]
    held = [run for run in runs if run.held_out]
    seeing = [run for run in held if _with_window(run)]
    charts += [_windows(seeing, shelf, styles)] if seeing else []
    charts += [_held_out(run, shelf, styles[run.name]) for run in held]
    words = [paragraph(sentence, "note") for run in runs for sentence in _restarts(run)]
    blind = [run.name for run in held if run not in seeing]
    if blind:
        words.append(
            paragraph(
                f"No held-out window of {', '.join(blind)}: the first measurement, whose skill sets the threshold, was not above chance."
            )
        )
    return _totals(runs, styles) + "".join(words) + figures(charts)


def _per(line: Line, name: str) -> float | None:
    return line[name] / line["seconds"] if line.get("seconds") and name in line else None


def _totals(runs: Sequence[RunFolder], styles: Mapping[str, Style]) -> str:
    head = ("run", "state", "hours", "tokens", "images", "tokens/s", "most memory, GiB", "ranks")
    return table(head, [(run.name, run.state, *_sums(run)) for run in runs], styles)


def _sums(run: RunFolder) -> tuple[Any, ...]:
    seconds, tokens, images = (sum(line.get(name) or 0 for line in run.steps) for name in ("seconds", "tokens", "images"))
    peak = max((line.get("peak_bytes", 0) for line in run.steps), default=0)
    ranks = list(dict.fromkeys([run.record.get("world_size"), *(attempt.get("ranks") for attempt in attempts(run))]))
    shown = " then ".join(str(number) for number in ranks if number is not None)
    rate = int(tokens / seconds) if seconds else None
    return f"{seconds / 3600:.2f}", int(tokens), int(images), rate, f"{peak / 2**30:.2f}" if peak else None, shown


def attempts(run: RunFolder) -> list[dict[str, Any]]:
    """Each start of the run: after_step, ranks, since, device; [] for runs of versions that did not record it."""
    found = run.record.get("attempts", [])
    return [one for one in found if isinstance(one, dict) and isinstance(one.get("after_step"), int)] if isinstance(found, list) else []


def _restarts(run: RunFolder) -> list[str]:
    found = attempts(run)
    said = [
        f"{run.name} went on after step {one['after_step']:,} on {one.get('ranks')} ranks ({one.get('since')}, {one.get('device')})."
        for one in found[1:]
    ]
    prolonged = [
        f"{run.name} was prolonged after step {one['after_step']:,} from {one['from']:,} to {one['to']:,} steps." for one in _prolonged(run)
    ]
    return said + prolonged


def _prolonged(run: RunFolder) -> list[dict[str, Any]]:
    found = run.record.get("prolonged", [])
    named = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    return [one for one in named if all(isinstance(one.get(name), int) for name in ("after_step", "from", "to"))]


def _mark_restarts(axes: Axes, runs: Sequence[RunFolder], styles: Mapping[str, Style]) -> None:
    for run in runs:
        for one in attempts(run)[1:]:
            axes.axvline(one["after_step"], color=styles[run.name].colour, lw=0.9, ls=":")
            axes.text(
                one["after_step"], 1, f"{one.get('ranks')} ranks", transform=axes.get_xaxis_transform(), size=7, color=MUTED, va="bottom"
            )


def _chart(name: str, runs: Sequence[RunFolder], shelf: Shelf, styles: Mapping[str, Style]) -> str | None:
    label, value, logarithmic = CURVES[name]
    found = {}
    for run in runs:
        pairs = [(line["step"], y) for line in run.steps if (y := value(line)) is not None]
        if pairs:
            found[run.name] = curve_points(*zip(*pairs, strict=True))
    found = {run: points for run, points in found.items() if len(points[0])}
    if not found:
        return None

    def paint(axes: Axes) -> None:
        for run, (x, mean, low, high) in found.items():
            style = styles[run]
            axes.plot(x, mean, color=style.colour, ls=style.dash, lw=1.3, marker="." if len(x) == 1 else None, label=shortened(run))
            if high is not mean:
                axes.fill_between(x, low, high, color=style.colour, alpha=0.15, lw=0)
        if logarithmic and all(np.all(mean > 0) for _, mean, _, _ in found.values()):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(PlainLog())
            axes.yaxis.set_minor_formatter(PlainLog(minor_thresholds=(1.5, 0.4)))
        axes.set(xlabel="step")
        axes.grid(axis="y")
        axes.locator_params(axis="x", nbins=5)
        _mark_restarts(axes, runs, styles)
        if len(found) > 1:
            axes.legend(fontsize=7.5)

    rows = [("run", "step", "mean", "low", "high")]
    rows += [(run, *(float(value) for value in point)) for run, points in found.items() for point in zip(*points, strict=True)]
    return shelf.figure(f"training-{name}", label, paint, rows, margins=(0.19, 0.17, 0.97, 0.93))


def _with_window(run: RunFolder) -> list[dict[str, Any]]:
    """The measurements with a window: [] where the first one, whose skill sets the threshold, was not above chance. Chance follows from
    that threshold, which earlier versions wrote down all the same: threshold = chance + 0.6 (skill - chance)."""
    first = run.held_out[0]
    skill, threshold = next(iter(first["accuracy"].values())), first.get("threshold")
    if threshold is None or (threshold - 0.6 * skill) / 0.4 >= skill:
        return []
    return [line for line in run.held_out if isinstance(line.get("window"), int | float)]


def told_in_short(run: RunFolder) -> str:
    """The state of a run and how far its held-out window went, as sentences."""
    lines = _with_window(run) if run.held_out else []
    if len(lines) < 2:
        return f"{run.name}: {run.state}."
    said = [
        f"{'at least ' if one.get('censored') else ''}{one['window']:.1f} images after step {one['step']:,}"
        for one in (lines[0], lines[-1])
    ]
    return f"{run.name}: {run.state}. Its held-out window: {', '.join(said)}."


def _windows(runs: Sequence[RunFolder], shelf: Shelf, styles: Mapping[str, Style]) -> str:
    def paint(axes: Axes) -> None:
        for run in runs:
            style, lines = styles[run.name], _with_window(run)
            x, y = [line["step"] for line in lines], [line["window"] for line in lines]
            axes.plot(x, y, color=style.colour, ls=style.dash, lw=1.3, label=shortened(run.name))
            censored = [line for line in lines if line.get("censored")]
            axes.plot([line["step"] for line in censored], [line["window"] for line in censored], "^", ms=5, color=style.colour)
        axes.set(xlabel="step", ylabel="images")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.locator_params(axis="x", nbins=5)
        if len(runs) > 1:
            axes.legend(fontsize=7.5)

    rows = [("run", "step", "window", "censored", "threshold")]
    rows += [
        (run.name, line["step"], line["window"], line.get("censored"), line["threshold"]) for run in runs for line in _with_window(run)
    ]
    caption = "held-out window; a triangle is at least so far. The threshold follows from the run's own first measurement"
    return shelf.figure("held-out-window", caption, paint, rows)


def _held_out(run: RunFolder, shelf: Shelf, style: Style) -> str:
    """Accuracy over the steps, a line for each size: in the run's colour, weaker for more images."""
    sizes = sorted({int(size) for line in run.held_out for size in line["accuracy"]})

    def paint(axes: Axes) -> None:
        for number, size in enumerate(sizes):
            points = [(line["step"], line["accuracy"][str(size)]) for line in run.held_out if str(size) in line["accuracy"]]
            shade = 1 - 0.65 * number / max(1, len(sizes) - 1)
            axes.plot(
                *zip(*points, strict=True),
                color=style.colour,
                alpha=shade,
                lw=1.3,
                marker=MARKS[number % len(MARKS)],
                ms=3,
                label=str(size),
            )
        axes.set(xlabel="step", ylabel="accuracy", ylim=(0, 1.04))
        axes.grid(axis="y")
        axes.locator_params(axis="x", nbins=5)
        axes.legend(title="images", fontsize=7.5, title_fontsize=7.5, ncols=2 if len(sizes) > 4 else 1)

    rows = [("step", "images", "accuracy")]
    rows += [(line["step"], size, share) for line in run.held_out for size, share in line["accuracy"].items()]
    return shelf.figure(f"held-out-{run.name}", f"{run.name}: held-out accuracy by number of images", paint, rows)
