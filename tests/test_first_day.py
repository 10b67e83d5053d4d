"""A first day by docs/first_day.md alone: its commands as they stand there, in a new folder and an empty environment, for two families."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.world import ROOT

pytestmark = pytest.mark.first_day

PAGE = (ROOT / "docs" / "first_day.md").read_text()
COLOURS = ("black", "gray", "red", "green", "blue", "brown", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
PICTURES = 1500


def commands() -> list[str]:
    block = re.search(r"```sh\n(.*?)```", PAGE, re.DOTALL)[1]
    return block.strip().split("\n")


def own_pictures(folder: Path) -> None:
    """Real pictures of one shape each, and a question on the colour of each."""
    from easy_vqa import get_train_image_paths, get_train_questions

    said: dict[str, dict[int, str]] = {"shape": {}, "colour": {}}
    for _, answer, i in zip(*get_train_questions(), strict=True):
        for kind, words in (("shape", SHAPES), ("colour", COLOURS)):
            if answer in words:
                said[kind][i] = answer
    paths, rows = get_train_image_paths(), []
    (folder / "pictures").mkdir()
    for i in sorted(said["shape"].keys() & said["colour"].keys())[:PICTURES]:
        (folder / "pictures" / f"{i}.png").write_bytes(Path(paths[i]).read_bytes())
        shape = said["shape"][i]
        rows.append({"image": f"{i}.png", "question": f"What colour is the {shape}?", "answer": said["colour"][i], "shows": [shape]})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl"])
def test_twelve_commands_lead_from_own_pictures_to_a_report(tmp_path, family):
    own_pictures(tmp_path)
    for name in (".venv", "recipes"):  # what a clone has where `make install` ran
        (tmp_path / name).symlink_to(ROOT / name)
    assert len(commands()) <= 12
    first, *others = commands()
    assert first == "make install"
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for command in others:
        command = command.replace("qwen3_vl", family)
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        print(f"$ {command}\n{done.stdout[-1500:]}{done.stderr[-500:]}")
        assert done.returncode == 0, done.stderr
        assert "next:" in done.stdout, "each says what comes next"
    results = json.loads((tmp_path / "runs" / "first" / "evaluation.json").read_text())
    assert results["models"].keys() == {"student", "distilled", "teacher"}
    assert (tmp_path / "runs" / "first" / "report.html").is_file()
    assert (tmp_path / "models" / "distilled" / "README.md").is_file()
