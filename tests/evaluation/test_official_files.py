"""Answers written for the official scorers give the scores that they were given here; what cannot be written is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_tools import benchmark_files
from laid_ds.evaluation.official import write_official
from laid_ds.evaluation.rules import kept, score

SAID = ("Yes, there is.", "no", "B", "[1, 2]", "The answer is B.", "a red cat", "3")
LINES = {
    "vhs": lambda i: {"vhs": {"conversations": [{"value": "?"}, {"value": ("yes", "no")[i % 2]}], "pos_image": ["a"], "neg_image": ["b"]}},
    "mm-niah": lambda i: {
        "mm_niah": {"id": i, "answer": [1, 1, [1, 3], "cat"][i % 4], "meta": {"context_length": 1500, "placed_depth": 0.1}}
    },
    "mmlongbench": lambda i: {"mmlongbench": {"ctxs": ["a", "b"], "question": "?", "answer": ("yes", "no")[i % 2]}},
}


def answers(benchmark, number=14, **more):
    found = []
    for i in range(number):
        meta = LINES[benchmark](i)
        told = {"model": "m", "task": "retrieval-image", "benchmark": benchmark, "key": f"k{i:02}", "cluster": f"k{i:02}", "question": "?"}
        told |= {"size": 2, "depth": 0.0, "question_index": 0, "shown": ["b", "a"], "choices": None, "meta": kept(meta)}
        found.append(told | {"said": SAID[i % len(SAID)], "expected": [("yes", "no")[i % 2]]} | more)
    return found


@pytest.mark.parametrize("benchmark", LINES)
def test_files_score_as_the_answers_do(tmp_path, benchmark):
    asked = answers(benchmark)
    (paths,) = write_official(asked, tmp_path / "out").values()
    worth = [score(answer, place) for place, answer in enumerate(asked)]
    folder = {"vhs": "vhs/retrieval-image", "mm-niah": "mm-niah", "mmlongbench": "mmlongbench"}[benchmark]
    found = benchmark_files.score(benchmark, tmp_path / "out" / "m" / folder, 0)
    strict = sum(one["strict"] for one in worth) / len(worth)
    official = sum(one["official"] for one in worth) / len(worth)
    if benchmark == "mm-niah":
        assert paths == [str(tmp_path / "out/m/mm-niah/m_retrieval-image-val.jsonl")]
        lines = [json.loads(line) for line in Path(paths[0]).read_text().splitlines()]
        assert set(lines[0]) == {"question_id", "answer", "response", "context_length", "placed_depth"}
        (task,) = found["tasks"].values()
        assert task["official_by_length"][0] == pytest.approx(official / 5, abs=1e-5)  # all lie in the first of five depths
        assert task["strict_accuracy"] == pytest.approx(strict)
        return
    (result,) = found["results"].values()
    assert result["strict_accuracy"] == pytest.approx(strict)
    if benchmark == "mmlongbench":
        assert result["official_accuracy"] == pytest.approx(official)
        assert json.loads(Path(paths[0]).read_text())["data"][0]["output"] == "Answer:Yes, there is."
    else:
        assert result["official_accuracy"] == pytest.approx(official, abs=0.1)  # a mean of resamples
        entry = json.loads(Path(paths[0]).read_text())
        assert entry["result"] == {"image_paths": ["b", "a"], "response": "Yes, there is.", "log": ""}
        assert entry["pos_image"] == ["a"]


def test_places_of_a_needle_are_one_entry_with_a_list_of_responses(tmp_path):
    asked = [one | {"depth": depth} for one in answers("vhs", 2) for depth in (0.0, 0.5)]
    write_official(asked, tmp_path / "out")
    files = sorted((tmp_path / "out" / "m" / "vhs" / "retrieval-image" / "2_images").iterdir())
    assert [path.name for path in files] == ["000.json", "001.json"]
    assert json.loads(files[0].read_text())["response"] == ["Yes, there is."] * 2


def test_what_cannot_be_written_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="no answer is to a question of Visual Haystacks"):
        write_official([one | {"benchmark": "haystack"} for one in answers("vhs")], tmp_path / "out")
    with pytest.raises(ValueError, match="the answer of k00 does not hold its entry of the benchmark"):
        write_official([one | {"meta": {}} for one in answers("vhs")], tmp_path / "out")
    write_official(answers("vhs"), tmp_path / "out")
    with pytest.raises(ValueError, match="out is not empty"):
        write_official(answers("vhs"), tmp_path / "out")
