"""Which heads did it: attention on the needle, by distance, and its entropy, per layer and head (`laid eval --attention`); what the
compared layers did in training (logging.attention_every_steps)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from laid_ds.evaluation.heads import FAR, NEAR, head_kinds, retrieving_heads
from laid_ds.report.figures import PlainLog, Shelf, heat_map, shortened
from laid_ds.report.html_parts import figures, fold, paragraph, table
from laid_ds.report.palette import Style
from laid_ds.report.sources import RunFolder

Layers = dict[int, dict[str, Any]]
MOST_NAMED = 12  # heads of a model that are named in the table
MAPS = {
    "marked_mass": ("needle", "attention on the needle", (0, 1)),
    "far_mass": ("far", "attention beyond half of the longest distance", (0, 1)),
    "entropy": ("entropy", "entropy, nats", (0, None)),
}


def attention_part(models: Mapping[str, Any], shelf: Shelf, styles: Mapping[str, Style]) -> str:
    """models: as in a results file. "" where none was asked with --attention."""
    looked = {name: sizes for name, model in models.items() if (sizes := _sizes(model))}
    if not looked:
        return ""
    largest = {name: (max(sizes), sizes[max(sizes)]) for name, sizes in looked.items()}
    lines = [_by_layer(largest, shelf, styles), _needle_by_distance(largest, shelf, styles), _by_distance(largest, shelf, styles)]
    maps = [_map(name, size, layers, kind, shelf) for name, (size, layers) in largest.items() for kind in MAPS if _has(layers, kind)]
    maps += [_distances(name, size, layers, shelf) for name, (size, layers) in largest.items()]
    how = (
        "A head retrieves when at least 0.1 of its attention, half of the best head's, and twice that of a head that looks everywhere"
        f" alike, is on the needle (ours; laid probe). It is local when at most {NEAR:g} of its attention lies beyond half of the longest"
        f" distance, and global from {FAR:g} on (ours); even attention has about a half there."
    )
    return _heads(looked, styles) + paragraph(how, "note") + figures(lines) + fold(f"Maps of layers and heads ({len(maps)})", figures(maps))


def _sizes(model: Any) -> dict[int, Layers]:
    """Size -> layer -> what was found; {} for what is not as `laid eval --attention` writes it."""
    found = model.get("attention") if isinstance(model, dict) else None
    if not isinstance(found, dict):
        return {}
    sizes = {}
    for size, layers in found.items():
        if size.isdigit() and isinstance(layers, dict):
            sizes[int(size)] = {int(layer): kept for layer, kept in layers.items() if layer.isdigit() and _is_whole(kept)}
    return {size: layers for size, layers in sizes.items() if layers}


def _is_whole(kept: Any) -> bool:
    return isinstance(kept, dict) and all(isinstance(kept.get(name), list) for name in ("entropy", "far_mass", "mass", "bins"))


def _has(layers: Layers, kind: str) -> bool:
    return all(kind in kept for kept in layers.values())


def _heads(looked: Mapping[str, dict[int, Layers]], styles: Mapping[str, Style]) -> str:
    rows = []
    for name, sizes in looked.items():
        for size, layers in sorted(sizes.items()):
            kinds = head_kinds({layer: kept["far_mass"] for layer, kept in layers.items()})
            entropy = np.mean([value for kept in layers.values() for value in kept["entropy"]])
            retrieve, which = _retrieving(layers)
            rows.append((name, size, sum(kinds.values()), retrieve, *kinds.values(), f"{entropy:.2f}", which))
    head = ("model", "images", "heads", "retrieve", "local", "between", "global", "mean entropy, nats", "which retrieve")
    return table(head, rows, styles)


def _retrieving(layers: Layers) -> tuple[int | None, str]:
    """How many heads retrieve, and which."""
    if not _has(layers, "marked_mass"):
        return None, "not measured"
    heads = _heads_that_retrieve(layers)
    named = ", ".join(f"layer {layer} head {head}: {mass:.2f}" for layer, head, mass in heads[:MOST_NAMED])
    more = f" and {len(heads) - MOST_NAMED} more" if len(heads) > MOST_NAMED else ""
    return len(heads), named + more or "none"


def _heads_that_retrieve(layers: Layers) -> list[tuple[int, int, float]]:
    flat = max(kept.get("flat_mass", 0.0) for kept in layers.values())
    return retrieving_heads({layer: kept["marked_mass"] for layer, kept in layers.items()}, flat)


def _by_layer(largest: Mapping[str, tuple[int, Layers]], shelf: Shelf, styles: Mapping[str, Style]) -> str:
    found = {
        name: [(layer / max(1, max(layers)), max(kept["marked_mass"])) for layer, kept in sorted(layers.items())]
        for name, (_, layers) in largest.items()
        if _has(layers, "marked_mass")
    }

    def paint(axes: Axes) -> None:
        for name, points in found.items():
            style = styles[name]
            axes.plot(
                *zip(*points, strict=True), color=style.colour, ls=style.dash, marker=style.mark, ms=3.5, lw=1.3, label=shortened(name)
            )
        axes.set(xlabel="depth in the decoder, 0 first to 1 last layer", ylabel="best head's mass on the needle", ylim=(0, 1.04))
        axes.grid(axis="y")
        axes.legend(fontsize=7.5)

    rows = [("model", "depth", "mass"), *((name, *point) for name, points in found.items() for point in points)]
    return shelf.figure("attention-layers", "which layers retrieve, at each model's most images", paint, rows)


def _needle_by_distance(largest: Mapping[str, tuple[int, Layers]], shelf: Shelf, styles: Mapping[str, Style]) -> str:
    """Mean of the heads that retrieve, where haystacks have their needle; "" where none does, or an older version looked."""
    found = {name: points for name, (_, layers) in largest.items() if (points := _needle_points(layers))}
    if not found:
        return ""

    def paint(axes: Axes) -> None:
        for name, points in found.items():
            style = styles[name]
            x, _, y = zip(*points, strict=True)
            axes.plot(
                [edge + 1 for edge in x], y, color=style.colour, ls=style.dash, marker=style.mark, ms=3.5, lw=1.3, label=shortened(name)
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(PlainLog(base=2))
        axes.set(xlabel="distance of the needle in tokens + 1", ylabel="mass on the needle, mean of heads that retrieve", ylim=(0, 1.04))
        axes.grid(axis="y")
        axes.legend(fontsize=7.5)

    rows = [("model", "from distance", "haystacks", "mass"), *((name, *point) for name, points in found.items() for point in points)]
    return shelf.figure("needle-by-distance", "from how far the needle is seen, at each model's most images", paint, rows)


def _needle_points(layers: Layers) -> list[tuple[int, int, float]]:
    """(lower edge of a bin of distances, haystacks with their needle there, mass), where there are any."""
    if not all(_has(layers, kind) for kind in ("marked_mass", "needle_mass", "needle_rows")):
        return []
    masses = [layers[layer]["needle_mass"][head] for layer, head, _ in _heads_that_retrieve(layers)]
    bins, rows = (next(iter(layers.values()))[name] for name in ("bins", "needle_rows"))
    there = [n for n, number in enumerate(rows) if number and masses]
    return [(bins[n], rows[n], float(np.mean([mass[n] for mass in masses]))) for n in there]


def _by_distance(largest: Mapping[str, tuple[int, Layers]], shelf: Shelf, styles: Mapping[str, Style]) -> str:
    found = {}
    for name, (_, layers) in largest.items():
        kept = list(layers.values())
        mass = np.mean([np.mean(one["mass"], axis=0) for one in kept if one["bins"] == kept[0]["bins"]], axis=0)
        found[name] = list(zip(kept[0]["bins"], map(float, mass), strict=False))

    def paint(axes: Axes) -> None:
        for name, points in found.items():
            x, y = zip(*points, strict=True)
            axes.step(
                [*(edge + 1 for edge in x), 2 * x[-1] + 2],
                [*y, y[-1]],
                where="post",
                color=styles[name].colour,
                ls=styles[name].dash,
                lw=1.3,
                label=shortened(name),
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(PlainLog(base=2))
        axes.set(xlabel="distance in tokens + 1", ylabel="mass in a bin, mean of all heads")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.legend(fontsize=7.5)

    rows = [("model", "from distance", "mass"), *((name, *point) for name, points in found.items() for point in points)]
    return shelf.figure(
        "attention-distance", "how far attention reaches, in log-spaced bins", paint, rows, margins=(0.19, 0.17, 0.97, 0.95)
    )


def _map(name: str, size: int, layers: Layers, kind: str, shelf: Shelf) -> str:
    heads = max(len(kept[kind]) for kept in layers.values())
    grid = np.full((len(layers), heads), np.nan)
    for row, (_, kept) in enumerate(sorted(layers.items())):
        grid[row, : len(kept[kind])] = kept[kind]
    file, label, limits = MAPS[kind]

    def paint(axes: Axes) -> None:
        heat_map(axes, grid, limits)
        every = max(1, len(layers) // 8)
        axes.set_yticks(range(0, len(layers), every), [str(layer) for layer in sorted(layers)][::every])
        axes.set(xlabel="head", ylabel="layer")
        axes.spines[:].set_visible(False)

    rows = [("layer", "head", label)]
    rows += [(layer, head, value) for layer, kept in sorted(layers.items()) for head, value in enumerate(kept[kind])]
    return shelf.figure(f"attention-{file}-{name}", f"{name}, {size} images: {label}", paint, rows, margins=(0.13, 0.17, 0.97, 0.96))


def _distances(name: str, size: int, layers: Layers, shelf: Shelf) -> str:
    """A row for each layer: the mean of its heads."""
    first = next(iter(layers.values()))["bins"]
    same = {layer: np.asarray(kept["mass"], float) for layer, kept in sorted(layers.items()) if kept["bins"] == first}
    means = np.stack([mass.mean(0) for mass in same.values()])

    def paint(axes: Axes) -> None:
        heat_map(axes, means)
        every = max(1, len(same) // 8)
        axes.set_yticks(range(0, len(same), every), [str(layer) for layer in same][::every])
        axes.set_xticks(range(0, len(first), 2), [f"{edge:,}" for edge in first[::2]])
        axes.tick_params(axis="x", labelrotation=45)
        axes.set(xlabel="distance in tokens, from", ylabel="layer")
        axes.spines[:].set_visible(False)

    rows = [("layer", "head", "from distance", "mass")]
    rows += [(layer, head, first[at], float(value)) for layer, mass in same.items() for (head, at), value in np.ndenumerate(mass)]
    caption = f"{name}, {size} images: attention by distance, mean of a layer's heads"
    return shelf.figure(f"attention-distance-{name}", caption, paint, rows, margins=(0.13, 0.24, 0.97, 0.96))


def training_attention(runs: Sequence[RunFolder], shelf: Shelf, styles: Mapping[str, Style]) -> str:
    """Entropy and far mass of the compared layers over the steps, student and teacher; "" where no run recorded them."""
    recorded = {run.name: lines for run in runs if (lines := [line for line in run.steps if _recorded(line)])}
    if not recorded:
        return ""
    charts = [_over_steps(recorded, kind, label, shelf, styles) for kind, (_, label, _) in MAPS.items() if kind != "marked_mass"]
    return "<h3>The compared layers in training</h3>" + figures(charts)


def _recorded(line: dict[str, Any]) -> bool:
    found = line.get("attention")
    return isinstance(found, dict) and all(isinstance(layers, dict) and all(map(_is_whole, layers.values())) for layers in found.values())


def _over_steps(recorded: Mapping[str, list[dict[str, Any]]], kind: str, label: str, shelf: Shelf, styles: Mapping[str, Style]) -> str:
    found = {
        (run, who): [
            (line["step"], float(np.mean([np.mean(kept[kind]) for kept in line["attention"][who].values()])))
            for line in lines
            if line["attention"].get(who)
        ]
        for run, lines in recorded.items()
        for who in ("student", "teacher")
    }

    def paint(axes: Axes) -> None:
        for (run, who), points in found.items():
            if points:
                style = "-" if who == "student" else ":"
                axes.plot(
                    *zip(*points, strict=True),
                    color=styles[run].colour,
                    ls=style,
                    lw=1.3,
                    marker=".",
                    ms=3,
                    label=f"{shortened(run)}, {who}",
                )
        axes.set(xlabel="step")
        axes.grid(axis="y")
        axes.legend(fontsize=7.5)

    rows = [("run", "model", "step", label), *((*name, *point) for name, points in found.items() for point in points)]
    return shelf.figure(f"training-attention-{kind}", f"{label}, mean of heads", paint, rows, margins=(0.19, 0.17, 0.97, 0.93))
