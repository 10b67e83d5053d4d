"""docs/study.md from the committed lines alone: tables, and figures beside it as PNG and CSV."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from laid_ds.disk import writing
from laid_ds.report.figures import WIDE, PlainLog, Shelf, shortened
from laid_ds.report.palette import MUTED, Style, styles
from laid_ds.study.file import Study
from laid_ds.study.format import format_section
from laid_ds.study.jobs import Line, chosen
from laid_ds.study.results import TERMS, read_lines, threshold_of
from laid_ds.study.statistics import DRAWS, Estimate, Windows, mean_window, times, windows

INTRODUCTION = f"""# The study

Written by `laid study recipes/study/*.toml --report docs/study.md` from the lines beside the studies (`recipes/study/*.jsonl`); do not edit
it by hand (`pytest tests/study/test_study_page.py` compares it with what the command makes). What was learned is in [log.md](log.md),
what to choose in [choosing.md](choosing.md).

    laid study recipes/study/made.toml --world WORLD --dry-run     # what would run, and how long it takes
    laid study recipes/study/made.toml --world WORLD               # the same command goes on where it stopped
    make study-small                                               # a small form of it, with its world, in minutes

WORLD is a folder with the models and shards that the study names; how it is called is the world's name in the lines. Every arm is
trained, exported and asked by the project's own commands, in float32, for equal steps, in one process of one thread; its seed decides
the order of samples and windows, and may name the student that it starts from. Test haystacks are asked once, of finished arms; values
that a study sweeps are chosen by other seeds and other haystacks, each arm's in the same way; "(not swept)" is an arm that took the first
value instead. **What has no line was not run (yet)**: a study is
finished when every arm has all of its seeds.

Ctrl-C, SIGTERM or kill -9: the same command goes on, each run from its newest checkpoint, and nothing of it stays behind. What an arm's
commands said is in `runs/study/STUDY/WORLD/arms/.../log.txt`, with its `run.json`, `metrics.jsonl` and answers; checkpoints and exported
models are removed when its line is written (`keep`). When an arm fails, the others are run all the same, and the status is 1.

**Windows**: the largest size up to which accuracy stays above chance + 0.6 of what the student before knows above chance at the least
size, interpolated on the logarithm of the size; the threshold is not drawn anew. Over seeds: the geometric mean. **Intervals**: 95 %,
Student's t of the mean over seeds, together with a bootstrap of {DRAWS:,} draws over haystacks, the same for every seed and arm (on
logarithms; laid_ds/study/statistics.py). Ratios are paired by seed and haystack; in bold where the interval of several seeds leaves out 1.
"x another": an arm that the study names for it (`against`).
Two seeds are little evidence, and their intervals say so; with one seed it holds the haystacks alone, and says nothing of other seeds.
">=": a window that goes on beyond the largest size that was asked, and counts as that size; an end of an interval that such windows leave
open has no bound.
"""

Group = tuple[str, str | None]


@dataclass(frozen=True)
class Part:
    """One study in one world."""

    study: Study
    name: str
    world: str
    lines: Sequence[Line]

    @property
    def test(self) -> list[Line]:
        return [line for line in self.lines if line["role"] == "test"]

    def groups(self) -> dict[Group, list[Line]]:
        """(arm, teacher) -> its lines by seed, in the order of the study."""
        found: dict[Group, list[Line]] = {}
        for arm in self.study.arms:
            for line in self.test:
                if line["arm"] == arm:
                    found.setdefault((arm, line["teacher"]), []).append(line)
        return found

    def thresholds(self) -> dict[int, float]:
        """Seed -> the accuracy that counts as seen; without the seeds whose student before knows no more than chance."""
        before = {line["seed"]: line for line in self.test if line["arm"] == self.study.before}
        found = {seed: threshold_of({int(n): a for n, a in line["accuracy"].items()}, line["chance"]) for seed, line in before.items()}
        return {seed: threshold for seed, threshold in found.items() if threshold is not None}

    def label(self, group: Group) -> str:
        arm, teacher = group
        return arm if teacher is None or len(self.study.teachers) < 2 else f"{arm}, {teacher}"


def write_page(studies: Sequence[tuple[Study, Path, Path]], page: Path) -> dict[str, Any]:
    """Write PAGE.md, and its figures into a folder beside it that is called as the page. studies: each with its file and its lines'.

    Raises ValueError for two studies of one name, for lines of an arm that the study does not have, and for lines of one world that were
    asked different haystacks.
    """
    names = [path.stem for _, path, _ in studies]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two studies are called {twice!r}, and lines and figures are kept by that name; give each once")
    parts = [part for study, path, lines in studies for part in _parts(study, path, lines)]
    folder = page.with_suffix("")
    with writing(page.parent, page.name):
        folder.mkdir(parents=True, exist_ok=True)
        shelf = Shelf(folder)
        text = "\n".join([INTRODUCTION, *(_section(part, shelf) for part in parts), format_section()])
        page.write_text(text)
    return {"page": str(page), "lines": sum(len(part.lines) for part in parts), "figures": shelf.names}


def _parts(study: Study, path: Path, lines_file: Path) -> list[Part]:
    lines = [line for line in read_lines(lines_file) if line["study"] == path.stem]
    unknown = [line["arm"] for line in lines if line["arm"] not in study.arms]
    if unknown:
        raise ValueError(f"{lines_file} holds lines of the arm {unknown[0]!r}, which {path} does not have; remove them, or name it there")
    parts = [Part(study, path.stem, world, [line for line in lines if line["world"] == world]) for world in _unique(lines, "world")]
    for part in parts:
        if len(_unique(part.test, "fingerprint")) > 1:
            raise ValueError(f"{lines_file}: arms of {part.world} were asked different test haystacks; run those of one set only")
    return parts


def _unique(lines: Sequence[Line], key: str) -> list[Any]:
    return list(dict.fromkeys(line[key] for line in lines))


def _section(part: Part, shelf: Shelf) -> str:
    groups, thresholds = part.groups(), part.thresholds()
    measured = {
        group: windows(known, thresholds) for group, lines in groups.items() if (known := [ln for ln in lines if ln["seed"] in thresholds])
    }
    looks = styles([part.label(group) for group in groups])
    blocks = [
        f"## {part.study.title}: {part.world}",
        " ".join(filter(None, [part.study.about, _setting(part)])),
        _arms(part, groups, measured),
        _accuracy_figure(part, groups, looks, shelf),
        "Windows of each seed:\n\n" + _by_seed(part, groups, measured),
        _losses(part, groups),
        _steps_figures(part, groups, looks, shelf),
        _sweep(part),
    ]
    return "\n\n".join(filter(None, blocks)) + "\n"


def _setting(part: Part) -> str:
    asked = next(line["asked"] for line in part.test)
    hours = sum(sum(line["cpu_seconds"].values()) for line in part.lines) / 3600
    versions = next((line["versions"] for line in part.test if "steps" in line), part.test[0]["versions"])
    seeds, fingerprint = sorted(_unique(part.test, "seed")), part.test[0]["fingerprint"][:12]
    return (
        f"{len(part.test)} lines of {len(_unique(part.test, 'arm'))} arms, seeds {_listed(seeds)}; {asked['haystacks']} test haystacks at"
        f" each size, {asked['questions']} questions each (fingerprint {fingerprint}); {hours:.1f} CPU hours in all;"
        f" {_listed(f'{name} {number}' for name, number in versions.items())}."
    )


def _listed(items: Iterable[Any]) -> str:
    return ", ".join(map(str, items))


def _arms(part: Part, groups: Mapping[Group, list[Line]], measured: Mapping[Group, Windows]) -> str:
    study = part.study
    sizes = sorted({int(size) for line in part.test for size in line["accuracy"]})
    head = ["arm", "what it is", "seeds", *(f"{size}" for size in sizes), f"window in {study.unit}", "x before", f"x {study.baseline}"]
    others = any(study.arms[arm].against for arm, _ in groups)
    head += ["x another"] if others else []
    rows = []
    for group, lines in groups.items():
        accuracy = [fmean(line["accuracy"][str(size)] for line in lines) for size in sizes]
        own = measured.get(group)
        window = "no window" if own is None else str(mean_window(own))
        against = [_against(own, _of(measured, name, group), group[0] == name) for name in (study.before, study.baseline)]
        if others:
            name = study.arms[group[0]].against
            ratio = _against(own, _of(measured, name, group), same=False) if name else ""
            against.append(f"{name}: {ratio}" if ratio else "")
        rows.append([part.label(group), study.arms[group[0]].about, len(lines), *(f"{share:.2f}" for share in accuracy), window, *against])
    return f"Accuracy by number of {study.unit}, a mean over seeds; windows and ratios with 95 % intervals.\n\n{_table(head, rows)}"


def _of(measured: Mapping[Group, Windows], arm: str, group: Group) -> Windows | None:
    """An arm with the teacher of another, else without one."""
    return measured.get((arm, group[1])) or next((found for (name, _), found in measured.items() if name == arm), None)


def _against(ours: Windows | None, theirs: Windows | None, same: bool) -> str:
    if same or ours is None or theirs is None:
        return "" if not same else "1"
    found = times(ours, theirs)
    return "both beyond what was asked" if found is None else _ratio(found)


def _ratio(found: Estimate) -> str:
    """In bold where the interval of several seeds leaves 1 out."""
    return f"**{found}**" if found.leaves_out_1 and found.seeds > 1 else str(found)


def _by_seed(part: Part, groups: Mapping[Group, list[Line]], measured: Mapping[Group, Windows]) -> str:
    seeds = sorted({line["seed"] for line in part.test})
    rows = []
    for group in groups:
        own = measured.get(group)
        told = dict(zip(own.seeds, zip(own.found, own.censored, strict=True), strict=True)) if own else {}
        rows.append([part.label(group), *(_one(*told[seed]) if seed in told else "" for seed in seeds)])
    return _table(["arm", *(f"seed {seed}" for seed in seeds)], rows)


def _one(size: float, censored: bool) -> str:
    return f"{'>= ' if censored else ''}{size:.1f}"


def _losses(part: Part, groups: Mapping[Group, list[Line]]) -> str:
    trained = {group: [line for line in lines if "losses" in line] for group, lines in groups.items()}
    rows = [
        [part.label(group), *(_mean_loss(lines, term) for term in (*TERMS, "gradient_norm")), _value(part, group, lines), _cpu(lines)]
        for group, lines in trained.items()
        if lines
    ]
    head = ["arm", *TERMS, "gradient norm", "swept value", "CPU s of a run"]
    said = (
        "Losses over the last 25 steps, means over seeds, on training windows. `align` is the relative error of queries plus that of keys"
        " (where the reduction is relative)."
    )
    return f"{said}\n\n{_table(head, rows)}" if rows else ""


def _mean_loss(lines: Sequence[Line], term: str) -> str:
    values = [line["losses"][term] for line in lines if term in line["losses"]]
    return f"{fmean(values):.3g}" if values else ""


def _value(part: Part, group: Group, lines: Sequence[Line]) -> str:
    """The swept value, and whether it was chosen by the sweep."""
    values = [value for value in _unique(lines, "value") if value is not None]
    unswept = "" if not values or chosen(part.study, part.lines, *group) is not None else " (not swept)"
    return f"{_listed(f'{value:g}' for value in values)}{unswept}"


def _cpu(lines: Sequence[Line]) -> str:
    return f"{fmean(sum(line['cpu_seconds'].values()) for line in lines):.0f}"


def _sweep(part: Part) -> str:
    if part.study.sweep is None or not (lines := [line for line in part.lines if line["role"] == "sweep"]):
        return ""
    values = part.study.sweep.values
    rows = []
    for arm, teacher in dict.fromkeys((line["arm"], line["teacher"]) for line in lines):
        those = {
            v: [fmean(ln["accuracy"].values()) for ln in lines if (ln["arm"], ln["teacher"], ln["value"]) == (arm, teacher, v)]
            for v in values
        }
        taken = chosen(part.study, lines, arm, teacher)
        rows.append(
            [
                part.label((arm, teacher)),
                *(f"{fmean(those[v]):.3f}" if those[v] else "" for v in values),
                "" if taken is None else f"{taken:g}",
            ]
        )
    swept, changed = _listed(f"`{key}`" for key in part.study.sweep.keys), _listed(f"`{word}`" for word in part.study.sweep.set)
    said = (
        f"The sweep of {swept}: mean accuracy over sizes, seeds {_listed(part.study.sweep.seeds)}, on other haystacks than those above"
        f"{f', with {changed}' if changed else ''}."
    )
    return f"{said}\n\n{_table(['arm', *(f'{value:g}' for value in values), 'taken'], rows)}"


def _table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))


def _accuracy_figure(part: Part, groups: Mapping[Group, list[Line]], looks: Mapping[str, Style], shelf: Shelf) -> str:
    sizes = sorted({int(size) for line in part.test for size in line["accuracy"]})
    curves = {
        part.label(g): [(size, fmean(line["accuracy"][str(size)] for line in lines)) for size in sizes] for g, lines in groups.items()
    }

    def paint(axes: Axes) -> None:
        _curves(axes, curves, looks)
        axes.axhline(part.test[0]["chance"], color=MUTED, lw=1, ls=":")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set(xlabel=f"{part.study.unit} in the haystack", ylabel="accuracy", ylim=(0, 1.04))

    caption = f"Accuracy against {part.study.unit}, means over seeds; dotted: chance."
    return _figure(part, "accuracy", caption, paint, curves, part.study.unit, "accuracy", shelf)


def _steps_figures(part: Part, groups: Mapping[Group, list[Line]], looks: Mapping[str, Style], shelf: Shelf) -> str:
    """Is the loss optimised at all, and does the held-out window follow?"""
    trained = {part.label(group): [line for line in lines if "steps" in line] for group, lines in groups.items()}
    found = []
    for term, said in (("align", "Alignment's loss"), ("match", "Matching's loss")):
        curves = {name: _over_seeds([ln["steps"] for ln in lines if term in ln["steps"]], term) for name, lines in trained.items()}
        curves = {name: points for name, points in curves.items() if points}
        if curves:
            paint = partial(_paint_steps, curves=curves, looks=looks, ylabel=term)
            found.append(_figure(part, term, f"{said} against steps, means over seeds.", paint, curves, "step", term, shelf))
    held = {
        name: _over_seeds([_as_columns(ln["held_out"]) for ln in lines if _has_windows(ln)], "window") for name, lines in trained.items()
    }
    held = {name: points for name, points in held.items() if points}
    if held:
        paint = partial(_paint_steps, curves=held, looks=looks, ylabel=f"window in {part.study.unit}")
        caption = "Held-out window in training against steps, means over seeds; one that goes on beyond what is asked counts as that size."
        found.append(_figure(part, "held_out", caption, paint, held, "step", "window", shelf))
    return "\n\n".join(found)


def _has_windows(line: Line) -> bool:
    return bool(line["held_out"]) and all(one["window"] is not None for one in line["held_out"])


def _as_columns(held_out: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    return {key: [one[key] for one in held_out] for key in ("step", "window")}


def _over_seeds(series: Sequence[Mapping[str, list[float]]], term: str) -> list[tuple[float, float]]:
    """Means at the steps of the first; those that were cut otherwise are left out."""
    alike = [one for one in series if one["step"] == series[0]["step"]]
    return [(step, fmean(one[term][i] for one in alike)) for i, step in enumerate(series[0]["step"])] if alike else []


def _paint_steps(axes: Axes, curves: Mapping[str, list[tuple[float, float]]], looks: Mapping[str, Style], ylabel: str) -> None:
    _curves(axes, curves, looks)
    axes.set_yscale("log")
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis(PlainLog())
    axes.set(xlabel="step", ylabel=ylabel)


def _curves(axes: Axes, curves: Mapping[str, list[tuple[float, float]]], looks: Mapping[str, Style]) -> None:
    for name, points in curves.items():
        style = looks[name]
        axes.plot(*zip(*points, strict=True), color=style.colour, ls=style.dash, marker=style.mark, ms=3.5, lw=1.6, label=shortened(name))
    axes.grid(axis="y")
    for columns in (3, 2, 1):
        legend = axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, handlelength=2.2, borderpad=0, columnspacing=1)
        if legend.get_window_extent().x1 <= axes.figure.bbox.x1:
            break
    _make_room(axes.figure, lines=-(-len(curves) // columns))


def _make_room(figure: Figure, lines: int) -> None:
    """Above the axes, for the legend; they keep their own height, however many arms there are."""
    width, height = WIDE
    legend = 0.055 * height * lines
    figure.set_size_inches(width, 0.85 * height + legend)
    figure.subplots_adjust(bottom=0.13 * height / figure.get_figheight(), top=1 - (0.03 * height + legend) / figure.get_figheight())


def _figure(
    part: Part,
    name: str,
    caption: str,
    paint: Callable[[Axes], None],
    curves: Mapping[str, list[tuple[float, float]]],
    x: str,
    y: str,
    shelf: Shelf,
) -> str:
    rows = [("arm", x, y), *((label, place, f"{value:.5g}") for label, points in curves.items() for place, value in points)]
    shelf.figure(f"{part.name}-{part.world}-{name}", caption, paint, rows, WIDE, (0.11, 0.13, 0.98, 0.96))
    written = shelf.names[-1]
    return f"![{caption}]({shelf.folder.name}/{written}.png)\n\n{caption} ([data]({shelf.folder.name}/{written}.csv))"
