"""Curves through all tasks of one kind of question: windows, ratios and intervals against a reference in plain loops."""

from __future__ import annotations

import json
import math
import random
from collections import Counter

import numpy as np
import pytest

from laid_ds.evaluation.kinds import haystack_of, kind_of, place_of
from laid_ds.evaluation.scores import summarise_kinds
from laid_ds.report.write import write_report

SIZES = (1, 2, 3, 5, 10, 20)
QUESTIONS = 23


def vhs(model, task, number, question, size, said, expected="yes", needles=1, **more):
    entry = {"conversations": [{"value": question}, {"value": expected}], "pos_image": [f"{question}-{n}" for n in range(needles)]}
    entry["neg_image"] = [f"n{n}" for n in range(size - needles)]
    known = {"model": model, "task": task, "benchmark": "vhs", "key": f"sample-{number:08d}", "cluster": f"sample-{number:08d}"}
    known |= {"question_index": 0, "size": size, "depth": None, "question": question, "shown": [], "expected": [expected]}
    return known | {"choices": ["yes", "no"], "said": said, "meta": {"vhs": entry}} | more


def asked(model, skill, paired=True, one_task=False, seed=0):
    """Answers of a model that is right with a probability that falls with the size; talkative, so that the rules differ. A task for each
    size, with the same keys in each, or one for all. Paired: the same questions at each size; else a third of them at each."""
    rng, found = random.Random(seed), []
    for size in SIZES:
        for number in range(QUESTIONS):
            question = f"q{number}" if paired or number % 3 == 0 else f"q{number} of {size}"
            right = rng.random() < 0.5 + 0.5 * skill ** math.log2(size)
            said = rng.choice(["yes"] * 9 + ["Yes, there is."]) if right else "no"
            found.append(vhs(model, "vhs" if one_task else f"vhs{size}", number, question, size, said))
    rng.shuffle(found)
    return found


def tokens_hold_yes(said):
    return said.lower().replace(",", " ").replace(".", " ").split().count("yes") > 0


RULES = {"official": tokens_hold_yes, "strict": lambda said: said.lower() == "yes"}


def points(answers, rule, weights=None):
    right, number = Counter(), Counter()
    for answer in answers:
        times = 1 if weights is None else weights[answer["question"]]
        right[answer["size"]] += times * RULES[rule](answer["said"])
        number[answer["size"]] += times
    return {size: right[size] / number[size] for size in sorted(number) if number[size]}


def window(points, threshold):
    before = None
    for size, share in points.items():
        if share < threshold:
            return 0.0 if before is None else before * (size / before) ** ((points[before] - threshold) / (points[before] - share))
        before = size
    return float(before)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("one_task", [False, True])
@pytest.mark.parametrize("paired", [True, False])
def test_windows_and_ratios_go_through_all_sizes_clustered_by_haystack(paired, one_task, rule):
    base, ours = asked("base", 0.5, paired, one_task, seed=1), asked("laid", 0.95, paired, one_task, seed=2)
    ((kind, models),) = summarise_kinds([*base, *ours], "base").items()
    assert (kind, models["laid"]["tasks"]) == ("vhs, 1 needle", ["vhs"] if one_task else sorted(f"vhs{size}" for size in SIZES))
    questions = {answer["question"] for answer in base}
    assert models["laid"]["clusters"] == len(questions) == (QUESTIONS if paired else 8 + 15 * len(SIZES))
    curve, first = models["laid"]["curve"], points(base, rule)[1]
    assert curve["unit"] == "images"
    threshold = 0.5 + 0.6 * (first - 0.5)
    expected = [window(points(group, rule), threshold) for group in (ours, base)]
    assert curve[rule]["threshold"] == pytest.approx(threshold)
    assert curve[rule]["window"]["images"] == pytest.approx(expected[0])
    assert curve[rule]["against_baseline"]["times"] == pytest.approx(expected[0] / expected[1])
    rng, windows, least, most = random.Random(3), [], [], []
    for _ in range(1000):  # other draws than the report's: the bounds agree as far as a bootstrap's do
        weights = Counter(rng.choices(sorted(questions), k=len(questions)))
        mine, other = (window(points(group, rule, weights), threshold) for group in (ours, base))
        mine_at_most, other_at_most = (math.inf if found == SIZES[-1] else found for found in (mine, other))
        windows.append(mine)
        least.append(mine / other_at_most if other_at_most else math.inf)
        most.append(mine_at_most / other if other else math.inf)
    for bounds, lows, highs in ((curve[rule]["window"], windows, windows), (curve[rule]["against_baseline"], least, most)):
        for name, share, draws, endless in (("low", 2.5, lows, 0.0), ("high", 97.5, highs, math.inf)):
            near = np.percentile(draws, [max(share - 1.5, 0), min(share + 1.5, 100)], method="closest_observation")
            found = endless if bounds[name] is None else bounds[name]
            assert near[0] * 0.97 <= found <= near[1] * 1.03


def test_clusters_are_haystacks_and_not_keys():
    """The same keys in every task, other questions: what has the same key does not go together, what has the same question does."""
    same = [vhs("m", f"vhs{size}", number, f"q{number}", size, "yes") for size in (2, 5) for number in range(4)]
    other = [vhs("m", f"vhs{size}", number, f"q{number} of {size}", size, "yes") for size in (2, 5) for number in range(4)]
    assert [summarise_kinds(found, "m")["vhs, 1 needle"]["m"]["clusters"] for found in (same, other)] == [4, 8]


def test_kinds_are_told_apart_and_named():
    two = vhs("m", "any", 0, "q", 5, "yes", needles=2)
    niah = {"benchmark": "mm-niah", "task": "retrieval-image", "cluster": "k", "size": 7, "meta": {}}
    long = {"benchmark": "mmlongbench", "cluster": "k", "question": "Q", "size": 7, "meta": {"mmlongbench": {"rule": "binary"}}}
    names = ("vh_single_test_1000_K8_dep6", "vh_single_test_1000_K128_dep6", "K8", "bank8-x")
    kinds = [kind_of(long | {"task": name}) for name in names]
    assert [kind_of(two), kind_of(niah)] == ["vhs, 2 needles", "mm-niah, retrieval-image"]
    assert kinds == ["mmlongbench, vh_single_test_1000"] * 2 + ["mmlongbench, K8", "mmlongbench, bank8-x"]
    assert len({haystack_of(long | {"task": name}) for name in names}) == 1
    assert haystack_of(niah) == ("retrieval-image", "k")


@pytest.mark.parametrize("length, place", [(None, None), (999, None), (1000, 1000), (3999.5, 2000), (64000, 64000), (10**6, 64000)])
def test_mm_niah_stands_on_the_axis_of_its_contexts(length, place):
    meta = {} if length is None else {"context_length": length}
    assert place_of({"benchmark": "mm-niah", "size": 7, "meta": {"mm_niah": {"meta": meta}}}) == place


def niah(model, number, length, said):
    answer = vhs(model, "retrieval-image", number, "q", 3 + number % 5, said, expected="A", choices=["A", "B", "C", "D"])
    entry = {"id": number, "answer": 0, "meta": {"context_length": length, "placed_depth": 0.1}}
    return answer | {"benchmark": "mm-niah", "meta": {"mm_niah": entry}}


def test_mm_niah_has_a_window_in_tokens():
    """Right up to 4000 tokens; above, the baseline is right half of the time, and ours as if nothing had changed."""
    lengths = [900, 1500, 2500, 5000, 9000]
    base = [niah("base", 10 * i + n, length, "A" if length < 4000 or n % 2 else "B") for i, length in enumerate(lengths) for n in range(10)]
    ours = [niah("laid", 10 * i + n, length, "A") for i, length in enumerate(lengths) for n in range(10)]
    curve = summarise_kinds([*base, *ours], "base")["mm-niah, retrieval-image"]["laid"]["curve"]
    assert (curve["unit"], curve["strict"]["window"]["images"], curve["strict"]["window"]["censored"]) == ("tokens", 8000, True)
    assert curve["strict"]["threshold"] == pytest.approx(0.25 + 0.6 * 0.75)
    assert curve["strict"]["against_baseline"]["times"] == pytest.approx(8000 / (2000 * 2 ** (0.3 / 0.5)))


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda base, ours: (base, [one for one in ours if one["size"] == 5]), "only one number of images was asked"),
        (lambda base, ours: ([], ours), "the baseline base has not answered this task"),
        (lambda base, ours: (base, ours[:-1]), "it was asked about other haystacks than the baseline base"),
        (lambda base, ours: ([one | {"choices": None} for one in base], ours), "so that there is no level of chance"),
        (lambda base, ours: ([one | {"said": "no"} for one in base], ours), "the baseline is at 0.00 with 1 images, not above chance"),
    ],
)
def test_a_window_that_does_not_exist_is_said_in_words(tmp_path, change, reason):
    base, ours = change(asked("base", 0.5), asked("laid", 0.9))
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{"laid_eval": 1}, *base, *ours]))
    summary = write_report(tmp_path, "base")
    assert reason in json.dumps(summary.as_json()["benchmarks"]["vhs, 1 needle"]["laid"], allow_nan=False)
    assert any(line.startswith("vhs, 1 needle: laid: ") and reason in line for line in summary.as_text().splitlines())


def test_the_report_prints_a_window_for_each_kind_model_and_rule(tmp_path):
    lines = [*asked("base", 0.5), *asked("laid", 0.9)]
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{"laid_eval": 1}, *lines]))
    summary = write_report(tmp_path, "base")
    assert summary.as_text().count("vhs, 1 needle: laid: strict: window ") == 1
    assert "x [" in summary.as_text()
    assert "vhs, 1 needle: base: official: window " in summary.path.read_text()
