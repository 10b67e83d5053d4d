"""Windows over seeds and paired ratios, against what they are where that is known by other means."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from laid_ds.evaluation.window import ratio, window
from laid_ds.study.results import answers_of
from laid_ds.study.statistics import DRAWS, Windows, mean_window, times, windows
from tests.study.study_world import made_up

THRESHOLDS = dict.fromkeys((1, 2, 3), 0.65)


def test_with_one_seed_it_is_the_window_and_the_paired_ratio_of_an_evaluation():
    ours, theirs = made_up("laid", 1, 40), made_up("kl+sft", 1, 12)
    found, one = mean_window(windows([ours], THRESHOLDS)), window(answers_of(ours), 0.65, DRAWS)
    assert (found.value, found.low, found.high) == pytest.approx((one.images, one.low, one.high), rel=1e-3)
    found, one = (
        times(*(windows([line], THRESHOLDS) for line in (ours, theirs))),
        ratio(answers_of(ours), answers_of(theirs), 0.65, DRAWS),
    )
    assert (found.value, found.low, found.high) == pytest.approx((one.times, one.low, one.high), rel=0.01)


def test_without_spread_over_haystacks_it_is_students_interval_of_the_seeds():
    """Every haystack alike. The quantile of two degrees of freedom has a closed form."""
    lines = [made_up("laid", seed, 1, haystacks=5) for seed in (1, 2, 3)]
    for line, falls in zip(lines, (1, 2, 3), strict=True):
        line["right"] = {n: [3 if i <= falls else 0] * 5 for i, n in enumerate(line["right"])}
    found = mean_window(windows(lines, THRESHOLDS))
    ends = [window(answers_of(line), 0.65, 10).images for line in lines]
    quantile = 0.95 / math.sqrt(2 * 0.975 * 0.025)
    error = quantile * statistics.stdev(map(math.log, ends)) / math.sqrt(3)
    mean = statistics.geometric_mean(ends)
    assert found.value == pytest.approx(mean)
    assert (found.low, found.high) == pytest.approx((mean * math.exp(-error), mean * math.exp(error)), rel=1e-6)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("over_haystacks", [0.0, 0.1, 1.0])
def test_of_many_studies_nearly_95_in_100_hold_the_truth(seeds, over_haystacks):
    """Windows around 20 that differ by seed (0.3 in the logarithm) and by haystack."""
    draw = np.random.default_rng(seeds)
    held = 0
    for _ in range(400):
        found = np.log(20) + draw.normal(0, 0.3, seeds) + draw.normal(0, over_haystacks)
        drawn = np.exp(found[:, None] + draw.normal(0, over_haystacks, 200)[None])
        none = np.zeros(seeds, bool)
        known = mean_window(Windows(tuple(range(seeds)), np.exp(found), none, drawn, np.zeros_like(drawn, bool)))
        held += known.low < 20 < known.high
    assert held > 0.92 * 400, "too narrow"
    assert held < 400 or seeds == 2, "too wide to say anything"


def test_an_arm_against_itself_is_1_whatever_is_drawn():
    one = windows([made_up("laid", seed, 4 * seed) for seed in (1, 2, 3)], THRESHOLDS)
    found = times(one, one)
    assert (found.value, found.low, found.high) == (1, 1, 1)


def test_a_ratio_is_paired_by_seed():
    """Seeds differ by a factor of 9 and the arms by one of 2 in each: the interval is that of 2, not that of 9."""
    ours = windows([made_up("laid", seed, 4.0 * 3**seed, haystacks=300) for seed in (1, 2, 3)], THRESHOLDS)
    theirs = windows([made_up("kl+sft", seed, 2.0 * 3**seed, haystacks=300) for seed in (3, 1, 2)], THRESHOLDS)
    assert ours.seeds == (1, 2, 3)
    assert theirs.seeds == (3, 1, 2)
    found = times(ours, theirs)
    assert 1.3 < found.low < 2 < found.high < 3.2
    assert found.seeds == 3


def test_windows_that_go_on_beyond_what_was_asked_are_bounds():
    all_seen, short = made_up("laid", 1, 1e9), made_up("kl+sft", 1, 10)
    beyond, ends = windows([all_seen], THRESHOLDS), windows([short], THRESHOLDS)
    assert str(mean_window(beyond)) == ">= 256.0 [256.0, no bound]"
    farther, nearer = times(beyond, ends), times(ends, beyond)
    assert (farther.bound, farther.high, nearer.bound, nearer.low) == (">= ", None, "<= ", None)
    assert farther.leaves_out_1
    assert nearer.leaves_out_1
    assert times(beyond, beyond) is None
    assert times(ends, windows([made_up("sft", 2, 10)], THRESHOLDS)) is None


def test_a_window_that_ends_before_the_least_size_counts_as_that_size():
    blind = windows([made_up("laid", 1, 1e-3)], THRESHOLDS)
    assert mean_window(blind).value == 1


def test_which_questions_of_a_haystack_were_right_decides_nothing():
    line = made_up("laid", 1, 12, of={"1": 3, "4": 3, "16": 3, "64": 3, "256": [3] * 20})
    answers = answers_of(line)
    turned = {size: [row[::-1] for row in rows] for size, rows in answers.items()}
    assert {size: [sum(row) for row in rows] for size, rows in answers.items()} == line["right"]
    assert str(window(answers, 0.65)) == str(window(turned, 0.65))
