"""Scores from answers: both rules side by side, by size and depth, intervals over haystacks; the paper's average gain on its own table."""

from __future__ import annotations

import json

import numpy as np
import pytest

from laid_ds.evaluation.scores import read_answers, summarise_scores, tenth
from laid_ds.evaluation.window import LONG, SHORT, average_gain
from laid_ds.report.write import write_report

SIZES = (1, 5, 10, 20, 50, 100, 150)
TABLE_1 = {
    "7B base": (80.22, 68.45, 62.19, 57.21, 54.73, 51.08, 47.43),
    "7B YaRN": (80.03, 63.78, 62.09, 55.96, 56.26, 47.96, 42.36),
    "7B SFT": (97.78, 92.92, 85.80, 84.73, 63.10, 52.28, 43.08),
    "7B LAid": (92.83, 83.26, 80.46, 74.09, 67.04, 63.37, 60.17),
    "3B base": (85.91, 65.70, 62.09, 52.16, 50.22, 47.80, 41.67),
    "3B LAid": (96.83, 83.34, 74.29, 63.27, 58.2, 53.91, 50.23),
}
PRINTED = {"7B LAid": (24.1, 24.5), "3B LAid": (20.1, 16.4), "7B YaRN": (-2.4, -4.7), "7B SFT": (35.9, 3.6)}
"""Average gains in percent, short and long, as the paper prints them."""


def test_the_paper_s_gains_follow_from_its_table_but_for_one_cell():
    table = {name: dict(zip(SIZES, values, strict=True)) for name, values in TABLE_1.items()}
    differing = {}
    for name, printed in PRINTED.items():
        base = table[f"{name[:2]} base"]
        for part, sizes, value in zip(("short", "long"), (SHORT, LONG), printed, strict=True):
            found = 100 * average_gain(table[name], base, sizes)
            if abs(found - value) > 0.1:  # the table is rounded
                differing[name, part] = (value, round(found, 1))
    assert differing == {("7B SFT", "long"): (3.6, 2.8)}


def test_a_gain_over_nothing_is_none():
    assert average_gain({1: 0.5}, {1: 0.0}, [1]) is None
    assert average_gain({1: 0.5}, {1: 0.5}, [1, 2]) is None


def answer(model, key, said, size=4, depth=0.0, index=0, expected="yes", **more):
    known = {"model": model, "task": "vhs", "benchmark": "vhs", "key": key, "cluster": key, "question_index": index, "size": size}
    known |= {"depth": depth, "question": "?", "shown": [], "expected": [expected], "choices": ["yes", "no"], "said": said, "meta": {}}
    return known | more


def test_official_and_strict_stand_side_by_side_by_size_and_depth():
    said = [("Yes, there is.", 4, 0.05), ("yes", 4, 1.0), ("no", 8, 0.3), ("Yes", 8, None)]
    answers = [answer("m", f"k{i}", text, size, depth) for i, (text, size, depth) in enumerate(said)]
    worth = summarise_scores(answers, "m")["vhs"]["m"]
    assert (worth["official"]["mean"], worth["strict"]["mean"]) == (0.75, 0.5)
    assert worth["by_size"] == {"4": {"answers": 2, "official": 1.0, "strict": 0.5}, "8": {"answers": 2, "official": 0.5, "strict": 0.5}}
    assert {depth: part["official"] for depth, part in worth["by_depth"].items()} == {"0.0": 1.0, "0.3": 0.0, "0.9": 1.0}
    assert [tenth(depth / 10) for depth in range(11)] == [depth / 10 for depth in range(10)] + [0.9]


def test_intervals_are_over_haystacks_not_over_questions():
    """Ten questions that stand and fall together are one draw: the interval is as wide as without them."""
    hits = np.random.default_rng(0).random(40) < 0.5
    once = [answer("m", f"k{i:02}", "yes" if hit else "no") for i, hit in enumerate(hits)]
    often = [one | {"question_index": number} for one in once for number in range(10)]
    alone, together = (summarise_scores(answers, "m")["vhs"]["m"]["official"] for answers in (once, often))
    assert together == pytest.approx(alone)
    apart = [one | {"cluster": f"{one['key']}-{one['question_index']}"} for one in often]
    narrow = summarise_scores(apart, "m")["vhs"]["m"]["official"]
    assert narrow["high"] - narrow["low"] < (alone["high"] - alone["low"]) / 2
    assert summarise_scores(once[:1], "m")["vhs"]["m"]["official"]["low"] is None


def curves(model, shares, keys=40):
    """A model's answers at each size: right on so large a share of the haystacks."""
    return [answer(model, f"k{i:02}", "yes" if i < share * keys else "no", size) for size, share in shares.items() for i in range(keys)]


def test_windows_ratios_and_gains_follow_from_the_answers(tmp_path):
    base, ours = curves("base", {1: 1.0, 4: 0.6, 16: 0.5}), curves("laid", {1: 1.0, 4: 0.9, 16: 0.5})
    found = summarise_scores([*base, *ours], "base")["vhs"]
    curve = found["laid"]["curve"]["strict"]
    assert curve["threshold"] == pytest.approx(0.8)
    assert curve["window"]["images"] == pytest.approx(np.exp(np.log(4) + 0.25 * np.log(4)))
    assert curve["against_baseline"]["times"] == pytest.approx(curve["window"]["images"] / 2)
    assert found["base"]["curve"]["strict"]["against_baseline"] == {
        "times": 1.0,
        "at_least": False,
        "at_most": False,
        "low": 1.0,
        "high": 1.0,
    }
    assert curve["average_gain"] == {"short": None, "long": None}


@pytest.mark.parametrize(
    "base, ours, reason",
    [
        ({1: 0.5, 4: 0.5}, {1: 1.0, 4: 1.0}, "the baseline is at 0.50 with 1 images, not above chance"),
        ({1: 0.0, 4: 0.0}, {1: 1.0, 4: 1.0}, "the baseline is at 0.00 with 1 images, not above chance"),
        ({4: 1.0}, {4: 1.0}, "only one number of images was asked"),
        ({1: 1.0, 4: 1.0}, {1: 1.0, 8: 1.0}, "it was asked about other haystacks than the baseline base"),
    ],
)
def test_a_number_that_does_not_exist_is_said_in_words(tmp_path, base, ours, reason):
    lines = [*curves("base", base), *curves("laid", ours)]
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{"laid_eval": 1}, *lines]))
    summary = write_report(tmp_path, "base")
    text = json.dumps(summary.as_json(), allow_nan=False)
    assert reason in text
    assert "vhs: laid" in summary.as_text()
    assert "Scores by rule" in summary.path.read_text()


def test_answers_are_those_of_all_ranks_each_once(tmp_path):
    one, other = answer("m", "a", "yes"), answer("m", "b", "no")
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{"laid_eval": 1}, one]))
    (tmp_path / "e.jsonl.rank-0001").write_text("".join(json.dumps(line) + "\n" for line in [one, other]))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert read_answers(tmp_path) == [one, other]
    (tmp_path / "e.jsonl").write_text('{"laid_eval": 1}\n{"model": "m"}\n')
    with pytest.raises(ValueError, match=r"e.jsonl, line 2: an answer without task, benchmark, key"):
        read_answers(tmp_path)
