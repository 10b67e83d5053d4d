"""Laws of scoring: the official rules as their benchmarks apply them, quirks included, and a strict rule that no talk can please."""

import contextlib
import json
from functools import partial

import pytest
from format_examples import changed
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.formats import mm_niah, mmlongbench, visual_haystacks
from laid_ds.data.record import DataError
from laid_ds.evaluation.visual_haystacks_rule import plain, words


@pytest.mark.parametrize(
    "response, said",
    [
        ("Yes.", {"yes"}),
        ("yes. there is a dog.", {"yes"}),
        ("No, there is not", {"no"}),
        ("cannot say", set()),
        ("yes/no", set()),
        ("**yes**", {"yes"}),
        ("yes-no", set()),
        ("(yes)", {"yes"}),
        ('"yes"', {"yes"}),
        ("there is no dog; yes!", {"yes", "no"}),
        ("Yesterday", set()),
        ("no: none", {"no"}),
        ("it's a yes?", {"yes"}),
        ("yes...", {"yes"}),
        ("'yes'", {"yes"}),
    ],
)
def test_words_of_a_response(response, said):
    assert words(response.lower()) & {"yes", "no"} == said


@given(
    parts=st.lists(
        st.sampled_from(["yes", "no", "maybe", ".", ",", "!", "?", " ", "'", '"', "(", ")", "-", "*", "/", ":", ";"]), max_size=8
    )
)
@settings(max_examples=300, deadline=None)
def test_words_agree_with_the_benchmarks_tokenizer(parts):
    nltk = pytest.importorskip("nltk", reason="nltk is not installed (the extra `dev`)")
    split, tokens = nltk.tokenize.PunktSentenceTokenizer(), nltk.tokenize.NLTKWordTokenizer()  # not trained: it knows no abbreviations
    text = "".join(parts)
    expected = {token for sentence in split.tokenize(text) for token in tokens.tokenize(sentence)}
    assert words(text) & {"yes", "no"} == expected & {"yes", "no"}


def result(answer, response):
    return {"conversations": [{"value": "?"}, {"value": answer}], "result": {"response": response}}


def test_haystack_scores_stand_side_by_side(tmp_path):
    entries = [result("yes", "Yes"), result("yes", "yes or no"), result("no", "cannot"), result("no", "No."), result("no", ["no", "yes"])]
    scores = visual_haystacks.score_entries(entries)
    assert scores == visual_haystacks.score_entries(entries)
    assert scores["entries"] == 5
    assert abs(scores["official_accuracy"] - 3.5 / 5) < 0.1
    assert scores["strict_accuracy"] == pytest.approx(2.5 / 5)
    assert scores["says_yes_and_no"] == pytest.approx(1 / 5)

    for count in (2, 10):
        (tmp_path / f"{count}_images").mkdir()
        for number, entry in enumerate(entries):
            (tmp_path / f"{count}_images" / f"{number:03d}.json").write_text(json.dumps(entry))
    assert list(visual_haystacks.score(tmp_path)["results"]) == ["2", "10"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no results"):
        visual_haystacks.score(tmp_path / "empty")


@pytest.mark.parametrize(
    "answer, response, official, strict",
    [
        (1, "B", 1, True),
        (1, "**B**. because", 1, False),
        (1, "The answer is B.", 1, False),
        (1, "1", 1, False),
        (1, "B or C", 0, False),
        (0, "none", 0, False),
        ([1, 2], "[1, 2]", 1, True),
        ([1, 2], "[1, 3]", 0.5, False),
        ([1, 2], '```json\n{"x": [1, 2]}```', 1, False),
        ([1, 2], "one and two", 0, False),
        ("three dogs", "There are 3 dogs.", 1, False),
        ("dont know", "I don't know!", 1, False),
        ("cat", "category", 0, False),
        ("the cat", "Cat", 1, False),
        ("Cat", "cat.", 1, True),
    ],
)
def test_mm_niah_rules(answer, response, official, strict):
    assert mm_niah.official(answer, response) == official
    assert mm_niah.is_exact(answer, response) is strict


def test_mm_niah_bins_lengths_and_depths():
    def line(length, depth, good):
        return {"context_length": length, "placed_depth": depth, "answer": "cat", "response": "cat" if good else "dog"}

    scores = mm_niah.score_lines([line(500, 0.1, True), line(1500, 0.1, True), line(1500, 0.5, False), line(70000, [1.0, 1.0], True)])
    assert scores["official_by_length"][0] == 0.2  # one good of five depths, of which three are empty
    assert scores["official_by_length"][-1] == 0.2
    assert scores["strict_accuracy"] == 0.75
    with pytest.raises(DataError, match="placed_depth"):
        mm_niah.score_lines([line(1500, "deep", True) | {"placed_depth": [2]}])


def test_mm_niah_files_are_tasks_and_six_of_them_an_overall(tmp_path):
    row = {"context_length": 1500, "placed_depth": 0.1, "answer": [1], "response": "[1]"}
    for number in range(6):
        (tmp_path / f"model_counting-{number}-val.jsonl").write_text(json.dumps(row) + "\n")
    report = mm_niah.score(tmp_path)
    assert report["overall"][0] == 0.2
    (tmp_path / "model_counting-0-val.jsonl").unlink()
    assert "overall" not in mm_niah.score(tmp_path)


def test_mmlongbench_rules():
    def scores(rule, *pairs):
        return mmlongbench.score_entries([{"answer": answer, "output": output} for answer, output in pairs], rule)

    assert scores("binary", ("yes", "No... I mean yes"), ("no", "no")) == {"answers": 2, "official_accuracy": 1, "strict_accuracy": 0.5}
    silent = [("no", "?"), ("yes", "?"), ("yes", "?"), ("no", "?"), ("no", "?")]
    assert scores("binary", *silent)["official_accuracy"] == 1  # the default cycles 0 1 1 0
    assert scores("letter", (1, "the answer is (B)"), (1, "A... no, B"), (1, "B"), (1, "b"))["official_accuracy"] == 0.75
    assert scores("contains", ("a red cat", "Answer: it is Red Cat!"), (["x", "dog"], "hot dog"))["official_accuracy"] == 1
    assert scores("sum", ([1, 2], "[2, 1]"), ([1, 2], "I count 1 and 2"), ([1, 2], "4"))["official_accuracy"] == pytest.approx(2 / 3)


def test_mmlongbench_files_name_their_rule(tmp_path):
    (tmp_path / "vh_single.jsonl").write_text('{"answer": "yes", "output": "yes"}\n')
    (tmp_path / "retrieval-image.json").write_text('{"data": [{"answer": 0, "output": "A"}]}')
    report = mmlongbench.score(tmp_path)
    assert {name: found["official_accuracy"] for name, found in report["results"].items()} == {"vh_single": 1, "retrieval-image": 1}
    with pytest.raises(DataError, match="the rule is not known"):
        mmlongbench.rule_for("other.jsonl")


ROW = '{"context_length": 1500, "placed_depth": 0.1, "answer": [1], "response": "[1]"}\n'
SAID = '{"answer": "yes", "output": "yes"}\n'
ASKED = '"conversations": [{"value": "?"}, {"value": "yes"}]'
BAD_FILES = {
    "two models": (mm_niah, {"a_text-val.jsonl": ROW, "b_text-val.jsonl": ROW}, "answers of several models ('a', 'b')"),
    "an empty task": (mm_niah, {"a_text-val.jsonl": ""}, "a_text-val.jsonl holds no answers"),
    "a row": (mm_niah, {"a_text-val.jsonl": ROW + "{}"}, "a_text-val.jsonl, answer 1: field 'context_length' is missing"),
    "counts": (mm_niah, {"a_counting-val.jsonl": ROW.replace("[1],", '"x",')}, "a_counting-val.jsonl, answer 0: "),
    "one task twice": (mmlongbench, {"vh_a.jsonl": SAID, "vh_a.json": '{"data": [' + SAID + "]}"}, "vh_a.json and vh_a.jsonl"),
    "no rule": (mmlongbench, {"x.jsonl": '{"rule": "bogus", ' + SAID[1:]}, "x.jsonl, answer 0: rule 'bogus' is none of binary"),
    "two rules": (
        mmlongbench,
        {"vh.jsonl": SAID + '{"rule": "sum", ' + SAID[1:]},
        "vh.jsonl: answer 0 names the rule '' and answer 1 'sum'; a file has one rule",
    ),
    "an answer": (mmlongbench, {"vh_.jsonl": SAID + "{}"}, "vh_.jsonl, answer 1: field 'answer' is missing"),
    "no data": (mmlongbench, {"vh.json": "{}"}, "vh.json: field 'data' is missing"),
    "no answers": (mmlongbench, {"vh.jsonl": ""}, "vh.jsonl holds no answers"),
    "a response": (visual_haystacks, {"0.json": "{" + ASKED + "}"}, "0.json: field 'result' is missing"),
    "a conversation": (visual_haystacks, {"0.json": "{}"}, "0.json: field 'conversations' is missing"),
}


@pytest.mark.parametrize("benchmark, files, sentence", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_no_file_of_results_is_dropped_and_a_bad_one_is_named(tmp_path, benchmark, files, sentence):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as refused:
        benchmark.score(tmp_path)
    assert sentence in str(refused.value)


@given(response=st.text(max_size=30), answer=st.integers(0, 3) | st.text(max_size=5) | st.lists(st.integers(0, 9), max_size=3))
@settings(max_examples=200, deadline=None)
def test_any_response_is_scored(response, answer):
    assert 0 <= mm_niah.official(answer, response) <= 1
    mm_niah.is_exact(answer, response)
    words(response)
    for rule in ("letter", "contains", "sum"):
        mmlongbench.score_entries([{"answer": answer, "output": response}], rule)


def test_the_plain_form():
    assert plain(' "Yes." ') == "yes"
    assert plain("**No**") == "no"


RESULTS = [
    (visual_haystacks.score_entries, {"conversations": [{"value": "?"}, {"value": "yes"}], "result": {"response": "no"}}),
    (visual_haystacks.score_entries, {"conversations": [{"value": "?"}, {"value": "yes"}], "response": ["no", "yes"]}),
    (mm_niah.score_lines, {"context_length": 1500, "placed_depth": [0.5], "answer": [1], "response": "[1]"}),
    (partial(mm_niah.score_lines, counting=True), {"context_length": 1500, "placed_depth": 1, "answer": "[1]", "response": "[1]"}),
    *((partial(mmlongbench.score_entries, rule=rule), {"answer": 1, "output": "B"}) for rule in ("binary", "sum", "letter", "contains")),
]


@pytest.mark.parametrize("score, result", RESULTS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_result_is_scored_or_refused(score, result, data):
    with contextlib.suppress(DataError):
        score([changed(result, data.draw)])
