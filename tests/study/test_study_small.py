"""`make study-small`, with its world, in a new folder: pictures to a page, about ten minutes on two cores (pytest -m study)."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests.support.world import ROOT

pytestmark = pytest.mark.study


def test_the_study_in_small_makes_its_world_runs_every_arm_and_writes_its_page(tmp_path):
    for name in (".venv", "recipes", "ds_configs"):  # what a clone has where `make install` ran
        (tmp_path / name).symlink_to(ROOT / name)
    command = ["make", "--file", ROOT / "Makefile", "--old-file", ".venv/bin/laid", "study-small"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "runs" / "study" / "small.jsonl").read_text().splitlines()]
    assert sorted({line["arm"] for line in lines}) == ["align", "before", "kl+sft", "sft"]
    assert len(lines) == 8
    assert all(line["accuracy"]["1"] >= 0.8 for line in lines), "one image is read"
    print((tmp_path / "runs" / "study" / "small.md").read_text())
