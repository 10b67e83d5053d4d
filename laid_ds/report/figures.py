"""A figure three times: as SVG in the page, as PNG and as CSV beside it.

matplotlib, which is here already: its SVG keeps text as text and needs no script, so that a chart costs kilobytes, prints, and takes the
page's colours. Charts are as wide as a phone, and stand beside each other where there is room.
"""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation, MaxNLocator

from laid_ds.report.palette import GRID, INK, MUTED, PAPER, variables

WIDE, NARROW = (5.6, 3.9), (4.0, 2.8)  # inches
POINTS = 300  # of a curve; longer ones are drawn as means with their range
UNUSED = (r"matplotlib\.axis", "axes", "figure", "legend", "line2d", "patch", "text", "xtick", "ytick", r"\w+Collection", r"FillBetween\w+")
"""Begins of ids that matplotlib gives and nothing refers to: on a page of many figures they would stand many times."""
STYLE = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "figure.dpi": 72,
    "path.simplify": True,
    "text.parse_math": False,  # a model may be called $x$
}


@dataclass
class Shelf:
    """Where the pictures and data of a page go, and which there are."""

    folder: Path
    names: list[str] = field(default_factory=list)

    def figure(
        self,
        name: str,
        caption: str,
        paint: Callable[[Axes], None],
        rows: Sequence[Sequence[Any]],
        size: tuple[float, float] = NARROW,
        margins: tuple[float, float, float, float] = (0.15, 0.17, 0.97, 0.95),
    ) -> str:
        """Draw, write NAME.png and NAME.csv (the first of `rows` is its head), and return the HTML. margins: left, bottom, right, top."""
        name = _unused(re.sub(r"[^\w.+-]+", "_", name), self.names)
        self.names.append(name)
        left, bottom, right, top = margins
        with rc_context(STYLE | {"svg.hashsalt": name}):
            figure = Figure(figsize=size)
            figure.subplots_adjust(left=left, bottom=bottom, right=right, top=top)
            paint(figure.add_subplot())
            FigureCanvasAgg(figure)
            figure.savefig(self.folder / f"{name}.png", dpi=110, metadata={"Software": None})
            written = io.StringIO()
            figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        with (self.folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        where = f"{self.folder.name}/{name}"
        wide = " class=wide" if size[0] > NARROW[0] else ""
        return (
            f"<figure{wide}>{_inline(written.getvalue(), caption)}<figcaption>{html.escape(caption)} "
            f"<small>{html.escape(where)}.png, .csv</small></figcaption></figure>"
        )


class PlainLog(LogFormatterSciNotation):
    """Ticks of a logarithmic axis as plain numbers."""

    def __call__(self, x, pos=None):
        return f"{x:.4g}" if super().__call__(x, pos) else ""


def shortened(name: str, most: int = 36) -> str:
    """A name as a legend has room for it."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _unused(name: str, names: list[str]) -> str:
    number = 2
    found = name
    while found.lower() in (known.lower() for known in names):
        found, number = f"{name}-{number}", number + 1
    return found


def _inline(svg: str, caption: str) -> str:
    """The SVG as a part of the page: its colours are the page's, its font is the reader's."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>| xmlns(:xlink)?=\"[^\"]*\"", "", svg, flags=re.S)
    svg = re.sub(rf' id="(?:{"|".join(UNUSED)})_\w+"', "", svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    points = float(re.search(r' width="([\d.]+)pt"', svg)[1])
    svg = re.sub(r' height="[\d.]+pt"', "", svg, count=1)
    most = f"max-width:{(1.4 if points < 72 * WIDE[0] else 1.8) * points:.0f}px"
    svg = re.sub(r' width="[\d.]+pt"', f' style="{most}"', svg, count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(caption)}"', 1)
    for light, (variable, _, _) in variables().items():
        svg = svg.replace(light, f"var({variable})")
    return svg


def curve_points(steps: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, ...]:
    """(steps, means, lows, highs) of at most POINTS equal parts of a curve; values that are no numbers are left out. All of one length."""
    x, y = np.asarray(steps, float), np.asarray(values, float)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(x) <= POINTS:
        return x, y, y, y
    parts = np.array_split(np.arange(len(x)), POINTS)
    return tuple(np.array([of(values[part]) for part in parts]) for values, of in ((x, np.mean), (y, np.mean), (y, np.min), (y, np.max)))


def heat_map(axes: Axes, table: np.ndarray, limits: tuple[float | None, float | None] = (0, None)) -> None:
    """Cells as an image of one pixel each, with a bar of colours, for whose numbers there is room on the right; NaN cells stay empty."""
    axes.figure.subplots_adjust(right=0.89)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
    image = axes.imshow(table, aspect="auto", interpolation="none", cmap="viridis", origin="lower", vmin=limits[0], vmax=limits[1])
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.03)
    bar.outline.set_visible(False)


def say_numbers(axes: Axes, table: np.ndarray, digits: str = ".2f") -> None:
    """Write each number of a small heat map into its cell, dark on what is bright."""
    share = axes.images[0].norm
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value):
            axes.text(
                column, row, format(value, digits), ha="center", va="center", size=7.5, color="#000000" if share(value) > 0.6 else "#ffffff"
            )
