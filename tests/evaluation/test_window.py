"""Windows from answers: interpolation on the log, censoring, paired intervals, the paper's average gain recomputed from its own table."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest

from laid_ds.evaluation.window import curve, ratio, relative_threshold, window, window_of


def answers(accuracies, haystacks=200, questions=2, seed=0):
    """Saved answers whose accuracy at each size is close to the given one; a haystack is as hard for every model and size."""
    hardness = np.random.default_rng(seed).random((haystacks, questions))
    return {str(size): (hardness < accuracy).astype(int).tolist() for size, accuracy in accuracies.items()}


def test_interpolation_is_on_the_logarithm():
    assert window_of({1: 1.0, 4: 0.8, 16: 0.4}, 0.6) == (pytest.approx(8.0), False)
    assert window_of({1: 1.0, 2: 0.6, 4: 0.2}, 0.6) == (pytest.approx(2.0), False)


def test_the_first_fall_counts_and_a_start_below_is_nothing():
    images, _ = window_of({1: 1.0, 2: 0.5, 4: 1.0, 8: 1.0}, 0.75)
    assert images == pytest.approx(math.sqrt(2))
    assert window_of({1: 0.5, 2: 0.9}, 0.75) == (0.0, False)


def test_a_curve_that_never_falls_is_censored():
    assert window_of({1: 1.0, 64: 0.9}, 0.65) == (64.0, True)
    found = window(answers({1: 1.0, 64: 0.97}), 0.65)
    assert found.censored
    assert str(found).startswith(">= 64.0")


def test_the_interval_holds_the_window_and_shrinks_with_more_haystacks():
    points = {1: 1.0, 4: 0.9, 16: 0.5, 64: 0.2}
    widths = []
    for haystacks in (50, 800):
        found = window(answers(points, haystacks), 0.65)
        assert found.low < found.images < found.high
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 2


def test_ratio_is_paired():
    """On the same haystacks the ratio of a model to itself is 1 without any doubt, and to a worse one its interval excludes 1."""
    better, worse = answers({1: 1.0, 8: 0.9, 32: 0.5, 128: 0.2}), answers({1: 1.0, 8: 0.6, 32: 0.3, 128: 0.2})
    same = ratio(better, better, 0.65)
    assert (same.times, same.low, same.high) == (1.0, 1.0, 1.0)
    found = ratio(better, worse, 0.65)
    assert 1 < found.low < found.times < found.high


def test_a_ratio_to_a_window_that_goes_on_is_an_upper_bound_and_of_two_such_there_is_none():
    """Whatever the true windows beyond what was asked are, the ratio of the point estimates and of every draw keeps within what is said."""
    near, far = answers({1: 1.0, 8: 0.9, 32: 0.5, 128: 0.2}), answers({1: 1.0, 8: 1.0, 32: 0.99, 128: 0.95})
    less = ratio(near, far, 0.65)
    assert (less.at_least, less.at_most, less.low) == (False, True, None)
    assert less.times == pytest.approx(window(near, 0.65).images / 128)
    assert less.times < less.high < 1
    assert str(less).startswith(f"<= {less.times:.2f} x [no bound, ")
    more = ratio(far, near, 0.65)
    assert (more.at_least, more.at_most, more.high) == (True, False, None)
    assert 1 < more.low < more.times
    both = ratio(far, answers({1: 1.0, 8: 1.0, 32: 1.0, 128: 0.9}), 0.65)
    assert asdict(both) == {"times": None, "at_least": True, "at_most": True, "low": None, "high": None}
    assert str(both) == "no ratio: both reach beyond what was asked"


def test_an_interval_that_reaches_what_was_asked_has_no_upper_end():
    """Some draws never fall below the threshold though the curve does: how far they would go was not asked."""
    wide, base = answers({1: 1.0, 8: 0.9, 32: 0.66}, 60), answers({1: 1.0, 8: 0.5, 32: 0.2}, 60)
    found, narrow = window(wide, 0.65), window(answers({1: 1.0, 8: 0.9, 32: 0.2}, 60), 0.65)
    assert (found.censored, found.high_censored, found.high) == (False, True, 32.0)
    assert str(found).endswith(", >= 32.0]")
    assert not narrow.high_censored
    against = ratio(wide, base, 0.65)
    assert (against.at_least, against.high) == (False, None)
    assert ratio(base, wide, 0.65).low is None
    same = ratio(wide, dict(wide), 0.65)
    assert (same.times, same.low, same.high) == (1.0, 1.0, 1.0), "of itself it is known all the same"


def test_threshold_is_relative_to_one_image_skill():
    assert relative_threshold(1.0, 1 / 8) == pytest.approx(0.65)
    assert relative_threshold(0.5, 0.5) == 0.5


def test_curve_counts_questions_not_haystacks():
    assert curve({"2": [[1, 1, 1], [0]]}) == {2: 0.75}
