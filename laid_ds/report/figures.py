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

from laid_ds.report.palette import GRID, INK, MUTED, PAPER, variables

WIDE, NARROW = (7.2, 4.0), (4.0, 2.8)  # inches
POINTS = 300  # of a curve; longer ones are drawn as means with their range
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


def _unused(name: str, names: list[str]) -> str:
    number = 2
    found = name
    while found.lower() in (known.lower() for known in names):
        found, number = f"{name}-{number}", number + 1
    return found


def _inline(svg: str, caption: str) -> str:
    """The SVG as a part of the page: its colours are the page's, its font is the reader's."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(
        r' id="(?:figure|axes|patch|line2d|text|legend|matplotlib\.axis|xtick|ytick|PathCollection|FillBetween\w*|LineCollection|PolyCollection|QuadMesh)_\w+"',
        "",
        svg,
    )
    svg = re.sub(r"\n\s*", "\n", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    width, height = (float(re.search(rf' {side}="([\d.]+)pt"', svg)[1]) for side in ("width", "height"))
    svg = re.sub(r' width="[\d.]+pt"', f' style="max-width:{1.34 * width:.0f}px"', re.sub(r' height="[\d.]+pt"', "", svg, count=1), count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(caption)}"', 1)
    for light, (variable, _, _) in variables().items():
        svg = svg.replace(light, f"var({variable})")
    assert height > 0
    return svg


def curve_points(steps: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, ...]:
    """(steps, means, lows, highs) of at most POINTS equal parts of a curve; values that are no numbers are left out. All of one length."""
    x, y = np.asarray(steps, float), np.asarray(values, float)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(x) <= POINTS:
        return x, y, y, y
    parts = np.array_split(np.arange(len(x)), POINTS)
    return tuple(np.array([of(values[part]) for part in parts]) for values, of in ((x, np.mean), (y, np.mean), (y, np.min), (y, np.max)))


def heat_map(axes: Axes, table: np.ndarray, label: str, limits: tuple[float | None, float | None] = (0, None)) -> None:
    """Cells as an image of one pixel each, with a bar of colours; NaN cells stay empty."""
    image = axes.imshow(table, aspect="auto", interpolation="none", cmap="viridis", origin="lower", vmin=limits[0], vmax=limits[1])
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.03)
    bar.outline.set_visible(False)
    bar.set_label(label)


def say_numbers(axes: Axes, table: np.ndarray, digits: str = ".2f") -> None:
    """Write each number of a small heat map into its cell."""
    top = np.nanmax(table) if np.isfinite(table).any() else 1
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value):
            axes.text(
                column, row, format(value, digits), ha="center", va="center", size=7.5, color="#000000" if value > 0.6 * top else "#ffffff"
            )
