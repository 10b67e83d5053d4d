"""What the lines of a study say: windows over seeds, and ratios of arms that are paired by seed and haystack. No model, no files.

An interval is a bootstrap over both that vary: seeds are drawn with replacement, and haystacks are drawn with replacement, the same for
every seed and arm (all are asked the same). So seeds with haystacks are crossed, not nested, and the interval of a ratio holds what is
common to both arms. With few seeds it is rough (three give ten different draws); with one it holds the haystacks alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from laid_ds.evaluation.window import bootstrap_curves, curve, window_of
from laid_ds.study.jobs import Line
from laid_ds.study.results import answers_of

DRAWS = 2000


@dataclass(frozen=True)
class Windows:
    """An arm's windows, a row for each seed; one that ends before the least size that was asked counts as that size."""

    seeds: tuple[int, ...]
    found: np.ndarray
    """[seeds], as asked."""
    censored: np.ndarray
    """[seeds]: it goes on beyond what was asked."""
    drawn: np.ndarray
    """[seeds, draws], over haystacks drawn anew."""
    beyond: np.ndarray
    """[seeds, draws]: those that go on."""


@dataclass(frozen=True)
class Estimate:
    """A geometric mean over seeds with its 95 % interval, whose ends are None where windows that go on leave no bound."""

    value: float
    low: float | None
    high: float | None
    bound: str
    """">= ", "<= " where a window is censored, else ""."""
    seeds: int

    def __str__(self) -> str:
        digits = ".1f" if self.value >= 10 else ".2f"
        low, high = ("no bound" if end is None else f"{end:{digits}}" for end in (self.low, self.high))
        return f"{self.bound}{self.value:{digits}} [{low}, {high}]"

    @property
    def leaves_out_1(self) -> bool:
        return (self.low is not None and self.low > 1) or (self.high is not None and self.high < 1)


def windows(lines: Sequence[Line], thresholds: Mapping[int, float], draws: int = DRAWS) -> Windows:
    """Of one arm with one teacher, a line for each seed. thresholds: seed -> the accuracy that counts as seen."""
    found, drawn = [], []
    for line in lines:
        answers, threshold = answers_of(line), thresholds[line["seed"]]
        found.append(window_of(curve(answers), threshold))
        drawn.append([window_of(points, threshold) for points in bootstrap_curves(answers, draws, seed=0)])
    least = min(min(map(int, line["right"])) for line in lines)
    one, many = np.array(found), np.array(drawn)  # [seeds, 2] and [seeds, draws, 2]: size, and whether it goes on
    sizes = tuple(line["seed"] for line in lines), np.maximum(one[..., 0], least), one[..., 1] > 0
    return Windows(*sizes, np.maximum(many[..., 0], least), many[..., 1] > 0)


def mean_window(one: Windows) -> Estimate:
    """The geometric mean of an arm's windows."""
    drawn = np.log(one.drawn)
    return _estimate(np.log(one.found), drawn, np.where(one.beyond, np.inf, drawn), ">= " if one.censored.any() else "")


def times(ours: Windows, theirs: Windows) -> Estimate | None:
    """How many times theirs our windows are, over the seeds that both have. None where they share none, and where windows of both go on
    beyond what was asked. A draw with such a window bounds its ratio on one side only, as in `laid_ds.evaluation.window.ratio`."""
    seeds = [seed for seed in ours.seeds if seed in theirs.seeds]
    mine, other = ([one.seeds.index(seed) for seed in seeds] for one in (ours, theirs))
    at_least, at_most = bool(ours.censored[mine].any()), bool(theirs.censored[other].any())
    if not seeds or (at_least and at_most):
        return None
    found, drawn = (np.log(a[mine]) - np.log(b[other]) for a, b in ((ours.found, theirs.found), (ours.drawn, theirs.drawn)))
    least, most = np.where(theirs.beyond[other], -np.inf, drawn), np.where(ours.beyond[mine], np.inf, drawn)
    return _estimate(found, least, most, ">= " if at_least else "<= " if at_most else "")


def _estimate(found: np.ndarray, least: np.ndarray, most: np.ndarray, bound: str) -> Estimate:
    """Of logarithms: found [seeds], and for each draw the least and the most that it may be [seeds, draws]."""
    picks = np.random.default_rng(1).integers(len(found), size=least.shape)
    ends = (
        np.percentile(np.take_along_axis(drawn, picks, 0).mean(0), percent, method="closest_observation")
        for drawn, percent in ((least, 2.5), (most, 97.5))
    )
    low, high = (float(np.exp(end)) if np.isfinite(end) else None for end in ends)
    return Estimate(float(np.exp(found.mean())), low, high, bound, len(found))
