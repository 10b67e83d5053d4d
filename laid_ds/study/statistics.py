"""What the lines of a study say: windows over seeds, and ratios of arms that are paired by seed and haystack. No model, no files.

Seeds and haystacks are crossed: every seed and arm is asked the same haystacks, and the interval of a ratio holds what is common to both
arms. An interval, on logarithms, has two parts, which add up as the sides of a right angle do: Student's t of the mean over seeds, and the
normal interval of a bootstrap over haystacks (the same draws for every seed and arm). A bootstrap over two to five seeds, in place of the
first, would be little more than their range, and leave 1 out far too often. One seed has the bootstrap alone, and says nothing of others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

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
    return _estimate(np.log(one.found), drawn, drawn, np.where(one.beyond, np.inf, drawn), ">= " if one.censored.any() else "")


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
    return _estimate(found, drawn, least, most, ">= " if at_least else "<= " if at_most else "")


def _estimate(found: np.ndarray, drawn: np.ndarray, least: np.ndarray, most: np.ndarray, bound: str) -> Estimate:
    """Of logarithms: found [seeds]; and of each draw what it is, and the least and the most that it may be [seeds, draws]."""
    mean = found.mean()
    ends = [np.percentile(a.mean(0), percent, method="closest_observation") for a, percent in ((least, 2.5), (most, 97.5))]
    if len(found) > 1:
        half = _half_width(found.var(ddof=1) / len(found), drawn.mean(0).var(ddof=1), len(found))
        ends = [end if np.isinf(end) else mean + side for end, side in zip(ends, (-half, half), strict=True)]
    low, high = (float(np.exp(end)) if np.isfinite(end) else None for end in ends)
    return Estimate(float(np.exp(mean)), low, high, bound, len(found))


def _half_width(over_seeds: float, over_haystacks: float, seeds: int) -> float:
    """Of a 95 % interval, from the two variances of the mean."""
    return float(np.hypot(student.ppf(0.975, seeds - 1) * np.sqrt(over_seeds), student.ppf(0.975, np.inf) * np.sqrt(over_haystacks)))
