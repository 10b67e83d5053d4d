"""The recipes that come with the project: they load, their engines exist, what their comments say of sizes is so, and their dry run
says what is missing here: models and data."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from laid_ds import config
from laid_ds.method.align import layer_pairs
from laid_ds.models.family import trainable
from laid_ds.models.sizes import model_sizes, read_config
from laid_ds.plan.pair import Machine, read_pair
from laid_ds.plan.report import plan
from laid_ds.run.check import check
from laid_ds.runtime.engine import read_deepspeed

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
CONFIGS = ROOT / "recipes" / "configs"
STARTS = [path for path in RECIPES if not path.stem.startswith("demo")]
PUBLISHED = {
    "qwen2_5_vl_3b": 3_754_622_976,
    "qwen2_5_vl_7b": 8_292_166_656,
    "qwen2_5_vl_32b": 33_452_718_336,
    "qwen3_vl_2b": 2_127_532_032,
    "qwen3_vl_4b": 4_437_815_808,
    "qwen3_vl_8b": 8_767_123_696,
    "qwen3_vl_32b": 33_357_390_064,
    "internvl3_5_8b": 8_528_318_464,
}
"""Parameters in the files of weights on the hub, as public listings of them say. Of InternVL3.5-38B only 38.4B is published."""


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_its_engines_exist(path):
    run = config.load(path)
    for model, trains in ((run.student, True), (run.teacher, False)):
        if model is not None:
            read_deepspeed(model.deepspeed, model.dtype, run, trains)
    assert run.output.parts[0] == "runs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_a_config_makes_a_model_of_the_published_size_that_can_be_trained(path):
    found = read_config(path)
    trainable(found)
    total = model_sizes(found, "bfloat16").total()
    assert total == PUBLISHED[path.stem] if path.stem in PUBLISHED else round(total / 1e9, 1) == 38.4


@pytest.mark.parametrize("path", STARTS, ids=lambda path: path.stem)
def test_a_recipe_to_start_from_says_what_is_so(path):
    run, text = config.load(path), path.read_text()
    assert run.evaluation is not None
    assert run.evaluation.sizes[0] == 1
    assert run.evaluation.sizes[-1] > run.data.images[1]
    assert run.data.image_pixels is not None
    if path.stem.endswith("_paper"):
        return
    student, teacher = (CONFIGS / name for name in re.findall(r"recipes/configs/(\w+\.json)", text))
    pair = read_pair(run, student, teacher)
    (stated,) = re.findall(r"# Parameters \(`laid plan`\): ([\d,]+) and ([\d,]+)\.", text)
    assert stated == (f"{pair.student.total():,}", f"{pair.teacher.total():,}")
    ((own, other),) = layer_pairs(run.align.pairs, pair.student.layers, pair.teacher.layers)
    assert f"{own} of {pair.student.layers} and {other} of {pair.teacher.layers} are that guess" in text
    assert own < pair.student.layers - 2
    assert other < pair.teacher.layers - 2
    assert plan(pair, Machine(4, 80 << 30, 312e12, 0.35), 8192).fits
    assert (run.losses.sft, run.losses.kl, run.losses.align, run.losses.match) == (1, 1, 0, 0)


@pytest.mark.parametrize("path", STARTS, ids=lambda path: path.stem)
def test_a_dry_run_says_what_is_not_here(world, path):
    with pytest.raises(ValueError, match=r"^data/haystacks is no finished data set"):
        check(config.load(path))
    with pytest.raises(ValueError, match=r"^no model at models/\S+: it is no folder here"):
        check(config.load(path, [f'data.shards=["{world.shards}"]']))


@pytest.mark.parametrize("path", STARTS, ids=lambda path: path.stem)
def test_a_dry_run_passes_with_models_of_the_family_and_data(worlds, path, tmp_path):
    """Tiny ones, whose pictures are too small for the recipe's limits and whose layers are two."""
    world = worlds("internvl" if "internvl" in path.stem else "qwen3_vl" if "qwen3" in path.stem else "qwen2_5_vl")
    paths = [f"student.path={world.student}", f"teacher.path={world.teacher}", f'data.shards=["{world.shards}"]', f"output={tmp_path}/run"]
    sizes = ["data.images=[2, 4]", "data.image_pixels=none", "align.pairs=[[1, 1]]"]
    asked = [f"evaluation.shards={world.shards}", "evaluation.haystacks=8", "evaluation.sizes=[1, 2, 5]"]
    check(config.load(path, [*paths, *sizes, *asked]))
