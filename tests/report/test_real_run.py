"""The page of a real run: trained, exported, asked and reported by the commands, with what its attention and its mixture were."""

from __future__ import annotations

import json

from tests.laws.test_resume import whole_run
from tests.report.test_learned_maps import rows_of
from tests.report.test_sentences import run, words_of
from tests.support.processes import run_ranks

PARTS = ("needle", "far", "entropy", "distance")
MODELS = {"student": (2, 2), "laid": (2, 2), "teacher": (2, 4)}  # layers, heads


def test_before_after_and_teacher_are_shown_with_all_that_was_measured(world, tmp_path):
    place = tmp_path / "runs"
    recipe = world.run(place / "laid", steps=2, logging={"attention_every_steps": 1})
    run_ranks(1, whole_run, recipe)
    assert run("export", place / "laid", tmp_path / "laid") == 0
    folders = [f"student={world.student}", f"laid={tmp_path / 'laid'}", f"teacher={world.teacher}"]
    asked = ["--attention", "--sizes", "1,3", "--haystacks", 4, "--questions", 1, "--out", place / "e" / "evaluation.json"]
    assert run("eval", world.shards, *folders, *asked) == 0
    assert run("report", place) == 0
    beside, page = place / "report", words_of(place / "report.html")
    for model, (layers, heads) in MODELS.items():
        for part in PARTS:
            _, rows = rows_of(beside / f"attention-{part}-{model}.csv")
            assert {(int(row[0]), int(row[1])) for row in rows} == {(layer, n) for layer in range(layers) for n in range(heads)}
        found = json.loads((place / "e" / "evaluation.json").read_text())["models"][model]["attention"]["3"]
        by_head = {(layer, row): kept["mass"][row] for layer, kept in found.items() for row in range(heads)}
        assert all(abs(sum(mass) - 1) < 1e-4 for mass in by_head.values())
        assert {(row[0], int(row[1]), float(row[3])) for row in rows} == {(*at, mass) for at, each in by_head.items() for mass in each}
        shares = [share for kept in found.values() for share in kept["far_mass"]]
        kinds = sum(share <= 0.05 for share in shares), sum(0.05 < share < 0.25 for share in shares), sum(share >= 0.25 for share in shares)
        words = " ".join(page[page.index("which retrieve") :].split())
        assert f"{model} 3 {layers * heads} 0 {kinds[0]} {kinds[1]} {kinds[2]} " in words
    _, steps = rows_of(beside / "training-attention-entropy.csv")
    assert [(row[1], row[2]) for row in steps] == [("student", "1"), ("student", "2"), ("teacher", "1"), ("teacher", "2")]
    learned = json.loads((place / "laid" / "learned.json").read_text())
    for kind, layers, columns in (("mixing", ["1"], 4), ("gain", ["0", "1"], 8)):
        _, rows = rows_of(beside / f"learned-{kind}-laid.csv")
        kept = [value for layer in layers for row in learned[kind][layer] for value in row]
        assert [float(row[4]) for row in rows] == kept
        assert len(kept) == len(layers) * 2 * columns
    assert "The compared layers in training" in page
