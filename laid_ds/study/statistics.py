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


@dataclass(frozen=True)
class Estimate:
    """A geometric mean over seeds with its 95 % interval."""

    value: float
    low: float
    high: float
    bound: str
    """">= ", "<= " where a window is censored, else ""."""
    seeds: int

    def __str__(self) -> str:
        digits = ".1f" if self.value >= 10 else ".2f"
        return f"{self.bound}{self.value:{digits}} [{self.low:{digits}}, {self.high:{digits}}]"


def windows(lines: Sequence[Line], thresholds: Mapping[int, float], draws: int = DRAWS) -> Windows:
    """Of one arm with one teacher, a line for each seed. thresholds: seed -> the accuracy that counts as seen."""
    found, censored, drawn = [], [], []
    for line in lines:
        answers = answers_of(line)
        least, threshold = min(map(int, answers)), thresholds[line["seed"]]
        size, beyond = window_of(curve(answers), threshold)
        found.append(max(size, least))
        censored.append(beyond)
        drawn.append([max(window_of(points, threshold)[0], least) for points in bootstrap_curves(answers, draws, seed=0)])
    return Windows(tuple(line["seed"] for line in lines), np.array(found), np.array(censored), np.array(drawn))


def mean_window(one: Windows) -> Estimate:
    """The geometric mean of an arm's windows."""
    return _estimate(np.log(one.found), np.log(one.drawn), ">= " if one.censored.any() else "")


def times(ours: Windows, theirs: Windows) -> Estimate | None:
    """How many times theirs our windows are, over the seeds that both have. None where they share none, and where windows of both go on
    beyond what was asked."""
    seeds = [seed for seed in ours.seeds if seed in theirs.seeds]
    mine, other = ([one.seeds.index(seed) for seed in seeds] for one in (ours, theirs))
    at_least, at_most = bool(ours.censored[mine].any()), bool(theirs.censored[other].any())
    if not seeds or (at_least and at_most):
        return None
    found, drawn = (np.log(a[mine]) - np.log(b[other]) for a, b in ((ours.found, theirs.found), (ours.drawn, theirs.drawn)))
    return _estimate(found, drawn, ">= " if at_least else "<= " if at_most else "")


def _estimate(found: np.ndarray, drawn: np.ndarray, bound: str) -> Estimate:
    """found [seeds] and drawn [seeds, draws] are logarithms."""
    picks = np.random.default_rng(1).integers(len(found), size=drawn.shape)
    low, high = np.percentile(np.take_along_axis(drawn, picks, 0).mean(0), [2.5, 97.5])
    return Estimate(*(float(np.exp(value)) for value in (found.mean(), low, high)), bound, len(found))
