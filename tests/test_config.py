"""One run = one file: typed, unknown keys are errors, overrides by dotted name, golden resolved values of every recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from laid_ds import config
from laid_ds.method import schedule

ROOT = Path(__file__).resolve().parents[1]
MINIMAL = """
name = "tiny"
output = "out"
steps = 10
[student]
path = "s"
deepspeed = "z.json"
[teacher]
path = "t"
deepspeed = "z.json"
[data]
shards = ["d"]
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(MINIMAL)
    return path


def test_overrides_are_typed_and_dotted(recipe):
    words = ["optimizer.lr=2e-3", "data.images=[2, 8]", "student.path=/a b/c", "align.pairs=[[0, 1]]", "gain.enabled=true"]
    run = config.load(recipe, words)
    assert run.optimizer.lr == 2e-3
    assert run.data.images == (2, 8)
    assert run.student.path == Path("/a b/c")
    assert run.align.pairs == ((0, 1),)
    assert run.gain.enabled


def test_what_is_wrong_with_one_key_is_one_line(recipe):
    with pytest.raises(ValueError) as error:
        config.load(recipe, ["data.shuffle=some", "optimizer.lrr=1", "student.gradient_checkpointing=maybe"])
    assert len(str(error.value).splitlines()) == 3


def test_the_home_folder_may_be_written_short(recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = config.load(recipe, ["output=~/run", "student.path=~/m", 'data.shards=["~/d", "http://h/~d"]', "student.deepspeed=~/z.json"])
    assert (run.output, run.student.path, run.student.deepspeed) == (tmp_path / "run", tmp_path / "m", tmp_path / "z.json")
    assert run.data.shards == (f"{tmp_path}/d", "http://h/~d")


def test_a_file_of_the_users_comes_before_the_one_that_is_shipped(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["student.deepspeed=ds_configs/zero3_cpu.json"]
    assert config.load(recipe, words).student.deepspeed == ROOT / "ds_configs" / "zero3_cpu.json"
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "zero3_cpu.json").write_text("{}")
    assert config.load(recipe, words).student.deepspeed == Path("ds_configs/zero3_cpu.json")
    assert config.load(recipe, ["student.deepspeed=ds_configs/none.json"]).student.deepspeed == Path("ds_configs/none.json")
    assert config.load("recipes/demo.toml").name == "demo laid"


def test_the_ranks_of_a_run_are_groups_that_share_a_batch(recipe):
    assert config.load(recipe).groups(3) == 3
    run = config.load(recipe, ["sequence_parallel=4"])
    assert run.groups(8) == 2
    with pytest.raises(ValueError, match=r"^sequence_parallel = 4 does not divide the 6 ranks of this run: start a multiple of it, or set"):
        run.groups(6)
    with pytest.raises(ValueError, match=r"^sequence_parallel = 4 does not divide the 1 rank of"):
        run.groups(1)
    with pytest.raises(ValueError, match=r"sequence_parallel: Input should be greater than or equal to 1 \(value: 0\)"):
        config.load(recipe, ["sequence_parallel=0"])


def test_a_section_can_be_removed(recipe):
    run = config.load(recipe, ["teacher=none", "losses.align=0", "losses.match=0", "losses.kl=0"])
    assert run.teacher is None


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (["optimiser.lr=1"], "unknown key 'optimiser'"),
        (["optimizer.lrr=1"], "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'? docs/recipe.md has all keys"),
        (["lr=1"], "unknown key 'lr'; did you mean 'optimizer.lr'?"),
        (["optimizer.momentum=1"], "unknown key 'optimizer.momentum'; docs/recipe.md has all keys"),
        (["evaluaton=none"], "override 'evaluaton=none': unknown key 'evaluaton'; did you mean 'evaluation'?"),
        (["data.shuffle=some"], 'data.shuffle: give "full" or "none" or a whole number at least 1 (value: \'some\')'),
        (
            ["align.pairs=[[0, 1, 2]]"],
            'give "last" or "proportional" or "probed" or a list of at least 1, each [a whole number, a whole number] (value: [[0, 1, 2]])',
        ),
        (["student.path=~nobody-of-this-name/m"], "~nobody-of-this-name/m: there is no such home folder"),
        (["optimizer.lr=-1"], "optimizer.lr: Input should be greater than 0 (value: -1)"),
        (["steps=none"], "'steps' is missing"),
        (["data.images=[8, 2]"], "the first number must not exceed the second, got [8, 2]"),
        (["data.weights=[1.0, 2.0]"], "2 weights for 1 shard folders"),
        (["data.grow_from=4"], "grow_from=4 must lie inside images=None"),
        (["teacher=none"], "need a [teacher]"),
        (["teacher=none", "losses.align=0", "losses.match=0", "losses.kl=0", "losses.sft=0"], "every loss weight is 0"),
        (["align.weights=free", "losses.match=1"], "gives no distribution to match"),
        (["steps"], "override 'steps' is not of the form section.key=value"),
        (["steps.a=1"], "'steps' is a value, not a section"),
        *(
            ([f"{key}=true"], f"{key}: true and false are no numbers here; give one (value: True)")
            for key in (
                "steps",
                "seed",
                "optimizer.lr",
                "optimizer.warmup_steps",
                "data.workers",
                "losses.beta",
                "losses.kl",
                "match.alpha",
            )
        ),
        (["seed=-5"], "seed: Input should be greater than or equal to 0 (value: -5)"),
        (["seed=2147483648"], "seed: Input should be less than 2147483648 (value: 2147483648)"),
        (["optimizer.betas=[0.9, 1.0]"], "optimizer.betas: Input should be less than 1 (value: 1.0)"),
        (["optimizer.betas=[-1, 0.9]"], "optimizer.betas: Input should be greater than or equal to 0 (value: -1)"),
        (
            ["optimizer.betas=[0.9]"],
            "optimizer.betas: give [a number at least 0 and below 1, a number at least 0 and below 1] (value: [0.9])",
        ),
        (["student.lora.targets=[]"], "student.lora.targets: Tuple should have at least 1 item after validation, not 0 (value: [])"),
        (["data.shards=[]"], "data.shards: Tuple should have at least 1 item after validation, not 0 (value: [])"),
        (["evaluation.shards=e", "evaluation.sizes=[]"], "evaluation.sizes: Tuple should have at least 1 item after validation, not 0"),
        (["losses.align=1", "align.pairs=[]"], 'or "probed" or a list of at least 1, each [a whole number, a whole number] (value: [])'),
    ],
)
def test_wrong_values_are_one_sentence(recipe, overrides, sentence):
    with pytest.raises(ValueError) as error:
        config.load(recipe, overrides)
    assert sentence in str(error.value)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ValueError, match="no recipe at"):
        config.load(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("a = = 1")
    with pytest.raises(ValueError, match="is not valid TOML"):
        config.load(tmp_path / "broken.toml")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_names_its_engine_files(path):
    run = config.load(path)
    for model in (run.student, run.teacher):
        assert model is None or (ROOT / model.deepspeed).is_file()
    first, last = (schedule.learning_rate_factor(step, run.steps, run.optimizer) for step in (0, run.steps - 1))
    assert 0 < first <= 1
    assert 0 <= last <= 1


def test_schedules_are_pure_and_reach_their_ends(recipe):
    run = config.load(recipe, ["data.images=[1, 96]", "data.grow_from=2", "data.grow_until=0.5", "optimizer.warmup_steps=4"])
    assert schedule.image_range(0, 100, run.data) == (1, 2)
    assert schedule.image_range(50, 100, run.data) == schedule.image_range(99, 100, run.data) == (1, 96)
    tops = [schedule.image_range(step, 100, run.data)[1] for step in range(100)]
    assert tops == sorted(tops)
    assert [schedule.learning_rate_factor(step, 10**6, run.optimizer) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    start, end = schedule.omega(0.0, run.match), schedule.omega(1.0, run.match)
    assert (start.frontier, end.frontier) == run.match.frontier_tokens
    assert (start.alpha, end.alpha) == (0.0, run.match.alpha)
