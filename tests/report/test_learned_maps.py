"""Mixtures and gains on the page are those of the run's folder; where there are none, it is said."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from laid_ds.report.learned import read_learned
from laid_ds.report.write import write_report
from tests.report.report_world import write_run
from tests.report.test_sentences import words_of

SIZES = {"layers": 3, "heads": 5, "teacher_heads": 7, "planes": 4}


def rows_of(path):
    with path.open(newline="") as file:
        head, *rows = csv.reader(file)
    return head, rows


def test_every_weight_and_gain_is_in_the_data_beside_the_picture(tmp_path):
    write_run(tmp_path / "run", 20, learned=SIZES)
    page = words_of(write_report(tmp_path / "run", "student").path)
    kept = json.loads((tmp_path / "run" / "learned.json").read_text())
    for kind, columns in (("mixing", 7), ("gain", 4)):
        head, rows = rows_of(tmp_path / "run" / "report" / f"learned-{kind}-run.csv")
        assert head[:3] == ["student layer", "teacher layers", "student head"]
        found = {(row[0], int(row[2]), int(row[3])): float(row[4]) for row in rows}
        assert len(found) == len(rows) == 3 * 5 * columns
        assert all(value == kept[kind][layer][head][column] for (layer, head, column), value in found.items())
        assert {(row[0], row[1]) for row in rows} == {("0", "1"), ("1", "3"), ("2", "5")}
    _, rows = rows_of(tmp_path / "run" / "report" / "learned-gain-by-layer-run.csv")
    assert [float(row[2]) for row in rows] == pytest.approx(np.concatenate([np.mean(kept["gain"][layer], 0) for layer in "012"]))
    on_one = sum(max(row) >= 0.5 for layer in kept["mixing"].values() for row in layer)
    gains = [value for layer in kept["gain"].values() for row in layer for value in row]
    told = " ".join(page[page.index("What was learned beside the weights") :].split())
    assert f"run 20 15 {on_one} 60 {min(gains):.3f} {max(gains):.3f}" in told
    assert "run, after step 20: mixture, layers 0 to 1, 1 to 3, 2 to 5" in page


def test_one_gain_for_all_heads_separate_mixtures_and_free_weights_have_maps(tmp_path):
    write_run(tmp_path / "run", 20, learned=SIZES)
    kept = json.loads((tmp_path / "run" / "learned.json").read_text())
    kept |= {"key_mixing": {"1": [[-2.0, 3.0], [0.5, 0.0]]}, "gain": {"0": [[0.5, 1.0, 2.0]], "1": [[1.0, 1.0]]}}
    (tmp_path / "run" / "learned.json").write_text(json.dumps(kept))
    write_report(tmp_path / "run", "student")
    pictures = {path.stem for path in (tmp_path / "run" / "report").glob("learned-*.png")}
    assert pictures == {f"learned-{kind}-run" for kind in ("mixing", "key-mixing", "gain", "gain-by-layer")}
    _, rows = rows_of(tmp_path / "run" / "report" / "learned-gain-run.csv")
    assert [(row[0], row[2], row[3], float(row[4])) for row in rows][-1] == ("1", "0", "1", 1.0), "a layer may have fewer planes"


@pytest.mark.parametrize(
    "spoiled",
    [{}, {"step": 3}, {"mixing": {"0": [[0.5], [0.2, 0.1]]}}, {"gain": {"x": [[1.0]]}}, {"gain": {"0": []}}, {"pairs": [[1]]}, {"gain": 7}],
)
def test_a_run_of_another_version_has_none_and_the_page_says_so(tmp_path, spoiled):
    write_run(tmp_path / "run", 20, learned=SIZES)
    whole = json.loads((tmp_path / "run" / "learned.json").read_text())
    assert read_learned(whole) is not None
    if spoiled:
        (tmp_path / "run" / "learned.json").write_text(json.dumps(spoiled if spoiled == {"step": 3} else whole | spoiled))
    else:
        (tmp_path / "run" / "learned.json").unlink()
    page = words_of(write_report(tmp_path / "run", "student").path)
    assert "Mixture and gains of run are not in the run's folder (learned.json)".replace("'", "&#x27;") in page
    assert not list((tmp_path / "run" / "report").glob("learned-*"))


def test_a_run_without_a_teacher_has_neither_and_nothing_is_missing(tmp_path):
    write_run(tmp_path / "run", 20, teacher=None, losses={"align": 0.0, "match": 0.0, "kl": 0.0})
    assert "learned beside the weights" not in words_of(write_report(tmp_path / "run", "student").path)
