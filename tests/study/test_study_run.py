"""A study is run by the project's own commands; killed anywhere it goes on, and what has its line is never run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.study.study_world import write_study
from tests.support.processes import HANG_SECONDS, output_of, wait_until
from tests.support.world import ROOT

ARMS = ("--only", "kl+sft", "--seeds", "1", "--jobs", "2")


def study(folder: Path, world: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "laid_ds.cli", "study", folder / "tiny.toml", "--world", world, "--out", folder / "out", *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def lines(folder: Path) -> list[dict]:
    """Without what time and machine decide."""
    path = folder / "tiny.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{name: value for name, value in line.items() if name != "cpu_seconds"} for line in found]


def steps_done(folder: Path) -> int:
    metrics = list((folder / "out" / "arms" / "kl+sft-one-seed1").glob("*/run/metrics.jsonl"))
    return len(metrics[0].read_text().splitlines()) if metrics else 0


def files_below(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    """One arm and the student before, run without any interruption."""
    folder = tmp_path_factory.mktemp("finished")
    write_study(world, folder)
    process = study(folder, world.folder, *ARMS)
    said = output_of(process)
    assert process.returncode == 0, said
    return folder


def test_a_line_says_what_was_run_and_found(finished, world):
    before, taught = lines(finished)
    assert (before["arm"], taught["arm"], taught["teacher"], taught["seed"], taught["world"]) == (
        "before",
        "kl+sft",
        "one",
        1,
        world.folder.name,
    )
    assert taught["steps"]["step"] == [1, 2, 3, 4]
    assert taught["steps"].keys() == {"step", "sft", "kl"}
    for line in (before, taught):
        assert {size: len(rights) for size, rights in line["right"].items()} == {"1": 6, "2": 6, "4": 6}
        told = {
            size: sum(rights) / sum([line["of"][size]] * 6 if isinstance(line["of"][size], int) else line["of"][size])
            for size, rights in line["right"].items()
        }
        assert line["accuracy"] == pytest.approx(told, abs=1e-6)
    cpu = [json.loads(line)["cpu_seconds"] for line in (finished / "tiny.jsonl").read_text().splitlines()]
    assert [spent.keys() for spent in cpu] == [{"eval"}, {"train", "export", "eval"}]
    assert all(seconds > 0 for spent in cpu for seconds in spent.values())
    assert str(world.folder) not in (finished / "tiny.jsonl").read_text(), "no path of this machine"


def test_what_takes_room_is_let_go_and_the_rest_stays(finished):
    (arm,) = (finished / "out" / "arms" / "kl+sft-one-seed1").iterdir()
    assert not (arm / "run" / "checkpoints").exists()
    assert not (arm / "model").exists()
    assert (arm / "run" / "metrics.jsonl").is_file()
    assert (arm / "evaluation.answers.jsonl").is_file()


def test_what_has_its_line_is_never_run_again(finished, world):
    before = files_below(finished)
    process = study(finished, world.folder, *ARMS)
    said = output_of(process)
    assert process.returncode == 0, said
    assert "nothing to run: all 2 jobs are done" in said
    changed = {path for path, when in files_below(finished).items() if before.get(path) != when and path.suffix != ".lock"}
    assert not changed


def test_a_dry_run_lists_the_others_with_what_they_take(finished, world):
    process = study(finished, world.folder, "--seeds", "1", "--only", "kl+sft", "--only", "sft", "--dry-run", "--json")
    plan = json.loads(output_of(process).splitlines()[-1])
    assert [row["job"] for row in plan["jobs"]] == ["sft, seed 1"]
    assert plan["done"] == 2
    assert plan["cpu_seconds"] > 0, "by the arms that are trained and finished"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_interrupted_the_same_command_goes_on_to_the_same_lines(finished, world, tmp_path, number):
    write_study(world, tmp_path)
    process = study(tmp_path, world.folder, *ARMS)
    wait_until(lambda: steps_done(tmp_path) >= 2 or process.poll() is not None, "the second step")
    assert process.poll() is None, output_of(process)
    twice = refused([tmp_path / "tiny.toml", "--world", world.folder, "--out", tmp_path / "out", *ARMS])
    assert f"another `laid study` works in {tmp_path / 'out'}" in twice
    below = psutil.Process(process.pid).children(recursive=True)
    assert below
    os.kill(process.pid, number)
    output_of(process)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert not psutil.wait_procs(below, timeout=HANG_SECONDS)[1], "none of its processes stays"
    assert [line["arm"] for line in lines(tmp_path)] == ["before"]
    process = study(tmp_path, world.folder, *ARMS)
    said = output_of(process)
    assert process.returncode == 0, said
    assert lines(tmp_path) == lines(finished)


def refused(words: Sequence[object]) -> str:
    done = subprocess.run([sys.executable, "-m", "laid_ds.cli", "study", *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr.splitlines()[-1]


def test_what_cannot_be_run_is_one_sentence(world, tmp_path):
    path = write_study(world, tmp_path)
    assert refused([tmp_path / "none.toml", "--world", world.folder]) == f"laid: no study at {tmp_path / 'none.toml'}"
    assert "give one study and its --world" in refused([path])
    assert "is no folder" in refused([path, "--world", tmp_path / "nowhere"])
    assert "--seeds 'x': give whole numbers" in refused([path, "--world", world.folder, "--seeds", "x"])
    assert "--seeds '': give whole numbers" in refused([path, "--world", world.folder, "--seeds", ""])
    unknown = write_study(world, tmp_path, arms={"before": {"model": "{world}/student"}, "kl+sft": {"set": ["stepz=1", "losses.kl=0"]}})
    assert "unknown key 'stepz'" in refused([unknown, "--world", world.folder, "--dry-run"])
    write_study(world, tmp_path)
    absent = ["--results", tmp_path / "none.jsonl", "--report", tmp_path / "page.md"]
    assert f"--results {tmp_path / 'none.jsonl'} is no file; give the lines that the study wrote" in refused([path, *absent])
    assert not (tmp_path / "page.md").exists()
    assert "has no arm 'laid'; there are before, kl+sft, sft, align" in refused([path, "--world", world.folder, "--only", "laid"])


def test_studies_of_several_worlds_may_write_one_file_at_a_time(tmp_path):
    """Each line is read, put into its place and written, whole: none is lost, and the order is that of names."""
    code = """
import sys
from pathlib import Path
from laid_ds.study.results import add_line
from tests.study.study_world import made_up
for seed in range(20):
    add_line(Path(sys.argv[1]), made_up("sft", seed, 9, world=sys.argv[2]))
"""
    command = [sys.executable, "-c", code, tmp_path / "lines.jsonl"]
    both = [subprocess.Popen([*command, world], cwd=ROOT) for world in ("b", "a")]
    assert [process.wait() for process in both] == [0, 0]
    found = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [(line["world"], line["seed"]) for line in found] == [(world, seed) for world in "ab" for seed in range(20)]


def test_models_are_asked_as_they_are_and_with_longer_positions(world, tmp_path):
    model = {"model": "{world}/student"}
    arms = {"before": model, "kl+sft": {}, "yarn": model | {"yarn": 2.0}, "self-extend": model | {"self_extend": [2, 8]}}
    write_study(world, tmp_path, arms=arms)
    process = study(tmp_path, world.folder, "--seeds", "2", "--only", "yarn", "--only", "self-extend", "--jobs", "1")
    said = output_of(process)
    assert process.returncode == 0, said
    found = {line["arm"]: line for line in lines(tmp_path)}
    assert (found["yarn"]["yarn"], found["self-extend"]["self_extend"]) == (2.0, [2, 8])
    assert not any("steps" in line or "changes" in line for line in found.values())
    answers = [next((tmp_path / "out" / "arms" / f"{arm}-seed2").glob("*/evaluation.json")) for arm in found]
    asked = [json.loads(path.read_text())["models"][arm] for path, arm in zip(answers, found, strict=True)]
    assert sorted(str(model["self_extend"]) for model in asked) == ["None", "None", "[2, 8]"]
    assert sorted(Path(model["folder"]).name for model in asked) == ["model", "student", "student"]
    again = output_of(study(tmp_path, world.folder, "--seeds", "2", "--only", "yarn", "--only", "self-extend", "--jobs", "1"))
    assert "nothing to run: all 3 jobs are done" in again


def test_an_arm_that_fails_is_told_of_and_the_others_are_run(world, tmp_path):
    write_study(world, tmp_path, arms={"before": {"model": "{world}/student"}, "kl+sft": {"set": ["data.shards=['nowhere']"]}})
    process = study(tmp_path, world.folder, "--seeds", "1", "--jobs", "1")
    said = output_of(process)
    assert process.returncode == 1
    assert "kl+sft, seed 1, one: `laid train` left with 2 (laid: nowhere is no finished data set" in said
    assert [line["arm"] for line in lines(tmp_path)] == ["before"]
