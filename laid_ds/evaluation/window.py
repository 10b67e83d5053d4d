"""What "longer window" means (ours; the paper's "accuracy > 0.5" is chance for yes/no): numbers from saved answers, without a model.

A curve is accuracy at each size (number of images). The window is the largest size up to which accuracy stays at or above a threshold,
interpolated on the logarithm of the size; it is right-censored when the curve never falls below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

Answers = Mapping[str, Sequence[Sequence[int]]]
SHORT, LONG = (1, 5, 10, 20), (50, 100, 150)


@dataclass(frozen=True)
class Window:
    """A window in images with the interval of a bootstrap over haystacks."""

    images: float
    censored: bool
    """The curve never fell below the threshold: the window is at least `images`."""
    low: float
    high: float
    high_censored: bool
    """Nor did that of the draw which ends the interval: its end is at least `high`."""
    threshold: float

    def __str__(self) -> str:
        return f"{'>= ' if self.censored else ''}{self.images:.1f} {self.interval()}"

    def interval(self) -> str:
        return f"[{self.low:.1f}, {'>= ' if self.high_censored else ''}{self.high:.1f}]"


def curve(answers: Answers) -> dict[int, float]:
    """Accuracy at each size, over all questions."""
    return {int(size): float(np.mean([hit for haystack in rows for hit in haystack])) for size, rows in answers.items()}


def bands(answers: Answers, draws: int = 1000, seed: int = 0) -> dict[int, tuple[float, float]]:
    """The 95 % interval of the accuracy at each size, by the bootstrap over haystacks of `window`."""
    curves = bootstrap_curves(answers, draws, seed)
    ends = {size: np.percentile([points[size] for points in curves], [2.5, 97.5]) for size in curves[0]}
    return {size: (float(low), float(high)) for size, (low, high) in ends.items()}


def relative_threshold(accuracy_at_one: float, chance: float, share: float = 0.6) -> float:
    """chance + share x (the baseline's own one-image skill)."""
    return chance + share * (accuracy_at_one - chance)


def window_of(points: Mapping[int, float], threshold: float) -> tuple[float, bool]:
    """(images, censored): where a curve first falls below the threshold, interpolated on log size. 0 when it starts below."""
    sizes = sorted(points)
    if points[sizes[0]] < threshold:
        return 0.0, False
    for before, after in pairwise(sizes):
        if points[after] < threshold:
            share = (points[before] - threshold) / (points[before] - points[after])
            return math.exp(math.log(before) + share * (math.log(after) - math.log(before))), False
    return float(sizes[-1]), True


def window(answers: Answers, threshold: float, draws: int = 1000, seed: int = 0) -> Window:
    """The window with a 95 % bootstrap interval over haystacks (all questions of a haystack go together)."""
    images, censored = window_of(curve(answers), threshold)
    resampled = [window_of(points, threshold) for points in bootstrap_curves(answers, draws, seed)]
    low, high = np.percentile([found for found, _ in resampled], [2.5, 97.5])
    beyond = np.percentile([math.inf if endless else found for found, endless in resampled], 97.5, method="closest_observation")
    return Window(images, censored, float(low), float(high), bool(math.isinf(beyond)), threshold)


@dataclass(frozen=True)
class Ratio:
    """How many times one model's window is another's; where one of the two is censored a bound, where both are nothing is known."""

    times: float | None
    """None where the other is 0, and where both are censored."""
    at_least: bool
    """The first window is censored: the ratio is at least `times`."""
    at_most: bool
    """The other one is: the ratio is at most `times`."""
    low: float | None
    """None where censored windows in the bootstrap leave no bound; so `high`."""
    high: float | None

    def __str__(self) -> str:
        if self.at_least and self.at_most:
            return "no ratio: both reach beyond what was asked"
        if self.times is None:
            return "no ratio to a window of 0"
        return f"{'>= ' if self.at_least else '<= ' if self.at_most else ''}{self.times:.2f} x {self.interval()}"

    def interval(self) -> str:
        low, high = ("no bound" if bound is None else f"{bound:.2f}" for bound in (self.low, self.high))
        return f"[{low}, {high}]"


def ratio(answers: Answers, baseline: Answers, threshold: float, draws: int = 1000, seed: int = 0) -> Ratio:
    """Ratio of two windows on the same haystacks, with a paired bootstrap (the same haystacks are drawn for both).

    A draw with a censored window bounds its ratio on one side only, and counts as infinite on the other, unless both models answered alike.
    """
    (ours, at_least), (theirs, at_most) = (window_of(curve(a), threshold) for a in (answers, baseline))
    if at_least and at_most:
        return Ratio(None, True, True, None, None)
    pairs = zip(bootstrap_curves(answers, draws, seed), bootstrap_curves(baseline, draws, seed), strict=True)
    found = [(*window_of(a, threshold), *window_of(b, threshold)) for a, b in pairs]
    alike = answers == baseline
    least = [-math.inf if endless and not alike else _divide(a, b) for a, _, b, endless in found]
    most = [math.inf if endless and not alike else _divide(a, b) for a, endless, b, _ in found]
    low, high = (np.percentile(e, p, method="closest_observation") for e, p in ((least, 2.5), (most, 97.5)))  # which may be infinite
    return Ratio(_finite(_divide(ours, theirs)), at_least, at_most, _finite(low), _finite(high))


def notes_on(left_out: Mapping[Any, str]) -> list[str]:
    """A sentence for each reason why sizes were left out (size -> reason)."""
    reasons: dict[str, list[str]] = {}
    for size, reason in left_out.items():
        reasons.setdefault(reason, []).append(str(size))
    return [f"not measured at {', '.join(sizes)} images: {reason}" for reason, sizes in reasons.items()]


def average_gain(points: Mapping[int, float], baseline: Mapping[int, float], sizes: Sequence[int]) -> float | None:
    """Mean over sizes of the relative change of accuracy against a baseline (the paper's Table 1, with SHORT and LONG sizes). None where
    a size was not measured, or the baseline is never right there."""
    if not all(size in points and baseline.get(size) for size in sizes):
        return None
    return float(np.mean([points[size] / baseline[size] - 1 for size in sizes]))


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _divide(a: float, b: float) -> float:
    return a / b if b > 0 else math.inf


def bootstrap_curves(answers: Answers, draws: int, seed: int) -> list[dict[int, float]]:
    """Curves over resampled haystacks; the same seed draws the same haystacks for every model. A row is empty where its haystack was not
    asked at a size; a size at which none of a draw was asked is no point of its curve."""
    hits = {int(size): np.array([sum(row) for row in rows], float) for size, rows in answers.items()}
    asked = {int(size): np.array([len(row) for row in rows], float) for size, rows in answers.items()}
    number = len(next(iter(hits.values())))
    picks = np.random.default_rng(seed).integers(number, size=(draws, number))
    drawn = {size: (hits[size][picks].sum(1), asked[size][picks].sum(1)) for size in hits}
    return [{size: float(right[draw] / number[draw]) for size, (right, number) in drawn.items() if number[draw]} for draw in range(draws)]
