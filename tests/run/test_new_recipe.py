"""A recipe that `laid new` writes loads, passes its dry run and trains; what cannot work is refused, and nothing is written."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from laid_ds import config
from laid_ds.cli import main
from laid_ds.data.dataset import Dataset
from laid_ds.data.record import Sample, Turn
from laid_ds.data.writer import ShardWriter
from laid_ds.plan.pair import Machine
from laid_ds.plan.report import Plan
from laid_ds.run import new_recipe
from laid_ds.run.check import check
from laid_ds.run.new_recipe import write_recipe
from laid_ds.runtime import engine
from laid_ds.runtime.stop import StopRequest
from tests.support.processes import run_ranks

GPUS = Machine(4, 80 << 30, 312e12, 0.35)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[2])  # where ds_configs/ lies


def written(world, path, machine=GPUS, **more):
    return write_recipe(path, world.student, world.teacher, [str(world.shards)], str(world.shards), path.parent / "run", machine, **more)


def two_steps(path):
    from laid_ds.run.loop import train

    engine.start_processes()
    run = config.load(path, ["steps=2", "evaluation=none", "teacher.check_answers=false"])  # it has learned nothing yet
    train(run, StopRequest())
    return sorted(file.name for file in run.output.iterdir())


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "llava"])
def test_a_new_recipe_loads_and_passes_its_dry_run_and_trains(worlds, tmp_path, family, capsys):
    world, path = worlds(family), tmp_path / "my.toml"
    arguments = ["--student", str(world.student), "--teacher", str(world.teacher), "--data", str(world.shards)]
    arguments += ["--test", str(world.shards), "--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as status:
        main(["new", str(path), *arguments])
    assert status.value.code == 0
    said = capsys.readouterr().out
    assert f"{path}: written, and its dry run passes" in said
    assert f"next: laid train {path}" in said
    run = config.load(path)
    assert run.data.images == (2, 6)
    assert run.losses.align == run.losses.match == 0
    assert run.evaluation.sizes == (1, 2, 5)
    assert run.data.image_pixels == {"qwen2_5_vl": (1024, 1024), "internvl": (1024, 1024), "llava": None}[family]
    check(run)
    with pytest.raises(SystemExit) as status:
        main(["train", str(path), "--dry-run"])
    assert status.value.code == 0
    assert json.loads(capsys.readouterr().out) == config.as_tree(run)
    if family == "internvl":
        (files,) = run_ranks(1, two_steps, path)
        assert {"done.json", "metrics.jsonl", "run.json"} <= set(files)


def test_every_line_of_a_new_recipe_is_a_key_or_a_reason_and_fits_a_window(world, tmp_path):
    written(world, tmp_path / "my.toml")
    for line in (tmp_path / "my.toml").read_text().splitlines():
        assert len(line) <= 140 or str(tmp_path.parent) in line  # but for names of the user's
        assert not line or line.startswith(("#", "[")) or " = " in line


def test_a_new_recipe_names_engines_of_no_machine(world, tmp_path, monkeypatch):
    """Written in a folder without ds_configs/, it is good in any other."""
    monkeypatch.chdir(tmp_path)
    written(world, tmp_path / "my.toml")
    said = (tmp_path / "my.toml").read_text()
    assert 'deepspeed = "ds_configs/zero3_student.json"' in said
    assert 'deepspeed = "ds_configs/zero3_teacher.json"' in said


def test_what_is_there_is_left_alone_and_what_cannot_work_is_not_written(worlds, world, tmp_path):
    there = tmp_path / "there.toml"
    there.write_text("mine")
    with pytest.raises(ValueError, match=r"there.toml exists; choose another name"):
        written(world, there)
    assert there.read_text() == "mine"
    with pytest.raises(ValueError, match="is no name of a recipe"):
        written(world, tmp_path / "recipe")
    other = shutil.copytree(world.teacher, tmp_path / "teacher")
    tree = json.loads((other / "tokenizer.json").read_text())
    token = next(token for token in tree["model"]["vocab"] if len(token) == 1)
    tree["model"]["vocab"]["\U0001f600"] = tree["model"]["vocab"].pop(token)
    (other / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="the tokenizers differ in"):
        write_recipe(tmp_path / "a.toml", world.student, other, [str(world.shards)], None, tmp_path / "run", GPUS)
    with pytest.raises(ValueError, match=r"no model at .*nowhere"):
        write_recipe(tmp_path / "a.toml", world.student, tmp_path / "nowhere", [str(world.shards)], None, tmp_path / "run", GPUS)
    with pytest.raises(ValueError, match="no finished data set"):
        write_recipe(tmp_path / "a.toml", world.student, world.teacher, [str(tmp_path)], None, tmp_path / "run", GPUS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["teacher", "there.toml"]


def test_an_output_that_holds_another_run_is_refused_and_what_comes_next_can_be_pasted(world, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("")
    with pytest.raises(ValueError, match="run is not empty and holds no run; give another output="):
        written(world, tmp_path / "my.toml")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (tmp_path / "run" / "mine").unlink()
    found = written(world, tmp_path / "my own.toml")
    steps = new_recipe.next_steps(tmp_path / "my own.toml", found.run)
    assert [shlex.split(step)[:2] for step in steps[1:]] == [["laid", "plan"], ["laid", "probe"], ["laid", "train"]]
    assert shlex.split(steps[-1]) == ["laid", "train", str(tmp_path / "my own.toml")]


def test_windows_shrink_until_they_fit_and_the_plan_chooses_the_engines(world, tmp_path, monkeypatch):
    """A machine as small as the world: what fits is known from the plan, and the recipe says it."""
    real, asked = new_recipe.propose, []

    def small(run, machine):
        found = real(run, machine)
        longest = run.data.images[1]
        asked.append(longest)
        fits = longest <= 3
        plan = Plan(**(vars(found.plan) | {"fits": fits, "tokens": 40 * longest, "tokens_that_fit": 130}))
        settings = {"student.gradient_checkpointing": "offload", "teacher.deepspeed": "ds_configs/zero3_teacher_offload.json"}
        return type(found)(settings, plan)

    monkeypatch.setattr(new_recipe, "propose", small)
    found = written(world, tmp_path / "my.toml")
    assert asked[0] == 6
    assert found.run.data.images == (2, 3)
    assert found.run.student.gradient_checkpointing == "offload"
    assert str(found.run.teacher.deepspeed) == "ds_configs/zero3_teacher_offload.json"
    assert found.run.data.micro_batch == 1
    assert found.run.optimizer.accumulation == 2
    monkeypatch.setattr(new_recipe, "propose", lambda run, machine: _never_fits(real(run, machine)))
    with pytest.raises(ValueError, match=r"tokens of one sample do not fit on 4 GPUs: use fewer"):
        written(world, tmp_path / "other.toml")


def _never_fits(found):
    return type(found)(found.settings, Plan(**(vars(found.plan) | {"fits": False, "tokens_that_fit": 1, "suggestion": "use fewer"})))


def test_samples_that_are_no_haystacks_get_no_windows(world, tmp_path):
    sample = Dataset.open(world.shards).read(0)
    turns = (Turn("user", (0, "Image 1 shows?")), Turn("assistant", ("red",)))
    with ShardWriter(tmp_path / "shards", samples_per_shard=4) as writer:
        for number in range(5):
            writer.write(Sample(f"k{number}", turns, images=(sample.images[number],)))
    found = write_recipe(tmp_path / "my.toml", world.student, world.teacher, [str(tmp_path / "shards")], None, tmp_path / "run", None)
    assert found.run.data.images is None
    assert found.run.evaluation is None
    assert "# [evaluation]" in (tmp_path / "my.toml").read_text()
