"""What a folder of lessons is refused for is told apart, and a recording that was refused before its first lesson blocks no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from laid_ds.data.lessons import HEAD, check_facts, file_name
from laid_ds.run.teach import CLAIM, _check_folder
from laid_ds.runtime import lock

GROWING = {"from": [1, 2], "until": 0.5, "steps": 100_000, "samples per step": 8, "of": "what stands behind " * 5}


@pytest.mark.parametrize(
    "there, here",
    [
        (GROWING, GROWING | {"samples per step": 16}),
        (GROWING, GROWING | {"of": GROWING["of"] + "it"}),
        (GROWING, None),
        ("a" * 500 + "b", "a" * 500 + "c"),
    ],
)
def test_two_values_that_differ_are_never_shown_alike(there, here):
    with pytest.raises(ValueError, match="are of another growth of windows: ") as refused:
        check_facts(Path("lessons"), {"growth of windows": there}, {"growth of windows": here})
    first, second = str(refused.value).split(" growth of windows: ")[1].split("; record")[0].split(", and this run has ")
    assert first != second
    assert max(len(first), len(second)) < 80


def test_a_claim_without_lessons_blocks_no_other(tmp_path):
    old, new = ({"facts": {"seed": seed}, "layout": {}, "micro_batch": 1} for seed in (1, 2))
    (tmp_path / CLAIM).write_text(json.dumps(old))
    for left in (HEAD, lock.FILE):
        (tmp_path / left).touch()
    assert _check_folder(tmp_path, new, Path("teacher")) == {}
    (tmp_path / file_name(0)).touch()
    with pytest.raises(ValueError, match="are of another seed: 1, and this run has 2"):
        _check_folder(tmp_path, new, Path("teacher"))
    (tmp_path / file_name(0)).unlink()
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match=r"holds no lessons \(mine.txt\)"):
        _check_folder(tmp_path, new, Path("teacher"))
