"""What was learned beside the student's weights: which teacher heads each student head listens to, and how each rotary plane answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from laid_ds.report.figures import Shelf, heat_map, say_numbers
from laid_ds.report.html_parts import figures, paragraph, table
from laid_ds.report.palette import Style
from laid_ds.report.sources import RunFolder

Grids = dict[int, np.ndarray]
"""Student layer -> [rows, columns]."""
MOST_CELLS, MOST_COLUMNS = 80, 8  # of a map whose numbers are written in
MOST_TICKS = 12
ONE_HEAD = 0.5  # of a student head's weight on one teacher head: from there on it listens to that one
KINDS = {"mixing": "mixture", "key_mixing": "mixture of keys", "gain": "gain"}


@dataclass(frozen=True)
class Learned:
    step: int
    teacher_layers: dict[int, list[int]]
    """Student layer -> the teacher layers that it is compared with."""
    grids: dict[str, Grids]
    """"mixing" and "key_mixing" [student heads, teacher heads], "gain" [student heads, planes], or one row for all heads."""


def learned_part(runs: Sequence[RunFolder], shelf: Shelf, styles: Mapping[str, Style]) -> str:
    """ "" where no run has a teacher."""
    taught = [run for run in runs if run.recipe.get("teacher")]
    found = {run.name: learned for run in taught if (learned := read_learned(run.learned)) is not None}
    if not taught:
        return ""
    without = [run.name for run in taught if run.name not in found]
    words = []
    if without:
        why = "its first checkpoint is still to come, or an earlier version of laid_ds trained it, which did not keep them"
        words.append(paragraph(f"Mixture and gains of {', '.join(without)} are not in the run's folder (learned.json): {why}.", "note"))
    if found:
        note = (
            "The mixture says which teacher heads each student head listens to: a row is a student head, and bright is much. The gain is"
            " what a rotary plane of a student head's queries is multiplied with, 1 at the start; low planes turn fast, high ones slowly."
        )
        words = [_overview(found, styles), paragraph(note, "note"), *words]
    charts = [_map(name, learned, kind, shelf) for name, learned in found.items() for kind in KINDS if learned.grids[kind]]
    charts += [_by_plane(name, learned, shelf) for name, learned in found.items() if learned.grids["gain"]]
    return "<h3>What was learned beside the weights</h3>" + "".join(words) + figures(charts)


def read_learned(tree: Mapping[str, Any]) -> Learned | None:
    """learned.json of a run's folder (run/learned.py); None where it is not as this version writes it."""
    try:
        grids = {kind: {int(layer): _grid(rows) for layer, rows in tree[kind].items()} for kind in KINDS}
        layers: dict[int, list[int]] = {}
        for student, teacher in tree["pairs"]:
            layers.setdefault(int(student), []).append(int(teacher))
        return Learned(int(tree["step"]), layers, grids)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _grid(rows: Any) -> np.ndarray:
    grid = np.asarray(rows, float)
    if grid.ndim != 2 or not grid.size or not np.isfinite(grid).all():
        raise ValueError("no table of numbers")
    return grid


def _overview(found: Mapping[str, Learned], styles: Mapping[str, Style]) -> str:
    head = ("run", "after step", "student heads", f"of them with {ONE_HEAD:g} or more on one teacher head", "gains", "from", "to")
    rows = []
    for name, learned in found.items():
        mixed = [row for grid in learned.grids["mixing"].values() for row in grid]
        gains = np.concatenate([grid.ravel() for grid in learned.grids["gain"].values()]) if learned.grids["gain"] else None
        ends = (len(gains), f"{gains.min():.3f}", f"{gains.max():.3f}") if gains is not None else ("none", None, None)
        on_one = sum(bool(row.max() >= ONE_HEAD) for row in mixed)
        rows.append((name, learned.step, len(mixed) or "none mixed", on_one if mixed else None, *ends))
    return table(head, rows, styles)


def _map(name: str, learned: Learned, kind: str, shelf: Shelf) -> str:
    """Layers one above the other, the first at the bottom, each with a row for each of its heads."""
    grids = dict(sorted(learned.grids[kind].items()))
    width = max(grid.shape[1] for grid in grids.values())
    whole = np.concatenate([np.pad(grid, ((0, 0), (0, width - grid.shape[1])), constant_values=np.nan) for grid in grids.values()])
    firsts = np.cumsum([0, *(len(grid) for grid in grids.values())])[:-1]
    is_gain = kind == "gain"

    def paint(axes: Axes) -> None:
        heat_map(axes, whole, _around_one(whole) if is_gain else _shares(whole))
        if whole.size <= MOST_CELLS and width <= MOST_COLUMNS:
            say_numbers(axes, whole, ".3f" if is_gain else ".2f")
        if len(grids) > 1:
            every = -(-len(grids) // MOST_TICKS)
            middles = firsts + np.array([(len(grid) - 1) / 2 for grid in grids.values()])
            axes.set_yticks(middles[::every], [str(layer) for layer in grids][::every])
            for first in firsts[1:] if len(grids) <= MOST_TICKS else ():
                axes.axhline(first - 0.5, color="#ffffff", lw=0.6)
        axes.set(xlabel="rotary plane" if is_gain else "teacher head")
        axes.set_ylabel("layer, in each its heads" if len(grids) > 1 else f"head of layer {next(iter(grids))}")
        axes.spines[:].set_visible(False)

    what = "plane" if is_gain else "teacher head"
    rows = [("student layer", "teacher layers", "student head", what, "gain" if is_gain else "weight")]
    rows += [
        (layer, " ".join(map(str, learned.teacher_layers.get(layer, []))), head, column, float(value))
        for layer, grid in grids.items()
        for (head, column), value in np.ndenumerate(grid)
    ]
    caption = f"{name}, after step {learned.step:,}: {KINDS[kind]}{_compared(learned, kind)}"
    return shelf.figure(f"learned-{kind.replace('_', '-')}-{name}", caption, paint, rows, margins=(0.15, 0.17, 0.97, 0.96))


def _compared(learned: Learned, kind: str) -> str:
    if kind == "gain":
        return " of each layer, head and plane"
    pairs = [f"{student} to {teacher}" for student, teachers in sorted(learned.teacher_layers.items()) for teacher in teachers]
    return f", layers {', '.join(pairs)}" if len(pairs) <= 4 else f" of {len(pairs)} layer pairs"


def _around_one(grid: np.ndarray) -> tuple[float, float]:
    far = max(float(np.nanmax(np.abs(grid - 1))), 1e-3)
    return 1 - far, 1 + far


def _shares(grid: np.ndarray) -> tuple[float, float | None]:
    """Of a mixture; with align.weights = "free" its weights are any numbers."""
    return (0, 1) if np.nanmin(grid) >= 0 and np.nanmax(grid) <= 1 else (float(np.nanmin(grid)), None)


def _by_plane(name: str, learned: Learned, shelf: Shelf) -> str:
    """The mean over heads, a row for each layer."""
    grids = dict(sorted(learned.grids["gain"].items()))
    width = max(grid.shape[1] for grid in grids.values())
    means = np.stack([np.pad(grid.mean(0), (0, width - grid.shape[1]), constant_values=np.nan) for grid in grids.values()])

    def paint(axes: Axes) -> None:
        heat_map(axes, means, _around_one(means))
        every = -(-len(grids) // MOST_TICKS)
        axes.set_yticks(range(0, len(grids), every), [str(layer) for layer in grids][::every])
        axes.set(xlabel="rotary plane", ylabel="layer")
        axes.spines[:].set_visible(False)

    rows = [("layer", "plane", "mean gain")]
    rows += [(layer, plane, float(value)) for layer, row in zip(grids, means, strict=True) for plane, value in enumerate(row)]
    caption = f"{name}, after step {learned.step:,}: gain of each layer and plane, mean of heads"
    return shelf.figure(f"learned-gain-by-layer-{name}", caption, paint, rows, margins=(0.13, 0.17, 0.97, 0.96))
