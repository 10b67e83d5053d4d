"""What `laid probe` wrote is what a recipe's "probed" means; a run keeps it, and refuses another, or that of other models."""

from __future__ import annotations

import json
import shutil

import pytest

from laid_ds import cli, config
from laid_ds.run.check import check
from laid_ds.run.folder import check_output
from laid_ds.run.loop import train
from laid_ds.runtime import engine
from laid_ds.runtime.stop import StopRequest
from tests.support.looking import looking
from tests.support.processes import run_ranks
from tests.support.recipes import write_recipe


@pytest.fixture(scope="module")
def probed(world, tmp_path_factory):
    """A pair whose heads are known, and its probe: layer 1 from layer 1, head 0 from head 2."""
    folder = tmp_path_factory.mktemp("probed")
    teacher, student = looking(world, "teacher", 1, 2, folder / "teacher"), looking(world, "student", 1, 0, folder / "student")
    words = ["probe", str(teacher), str(world.shards), "--student", str(student), "--images=3", "--haystacks=6"]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*words, "--out", str(folder / "probe.json")])
    assert stopped.value.code == 0
    return folder


@pytest.fixture
def recipe(world, probed, tmp_path):
    (tmp_path / "probe.json").write_bytes((probed / "probe.json").read_bytes())
    models = {who: {"path": probed / who} for who in ("teacher", "student")}
    kept = {"checkpoint": {"every_steps": 1}, "match": {"rows_from": "answers", "omega": "uniform"}}
    return write_recipe(
        world.run(tmp_path / "run", align={"probe": tmp_path / "probe.json"}, steps=1, **models, **kept), tmp_path / "r.toml"
    )


PROBED = ['align.pairs="probed"', 'align.heads="probed"']


def test_the_words_mean_the_layers_and_heads_of_the_file(recipe):
    align = config.load(recipe, PROBED).align
    assert (align.pairs, align.heads, align.start) == (((1, 1),), (((0, 2),),), "one_hot")
    assert config.probed_words(align) == "pairs = [[1, 1]], heads = [[[0, 2]]]"
    align = config.load(recipe, ["align.pairs=[[0, 1]]", 'align.start="probed"']).align
    assert (align.pairs, align.heads, align.start) == (((0, 1),), "all", (((1, 2),),)), "layer 0 of the student does not retrieve: by share"
    check(config.load(recipe, PROBED))


def whole_run(run):
    engine.start_processes()
    train(run, StopRequest().listen())


def test_a_run_needs_the_file_no_more_and_goes_on_with_none_that_says_otherwise(recipe, tmp_path):
    run = config.load(recipe, PROBED)
    run_ranks(1, whole_run, run)
    recorded = json.loads((run.output / "run.json").read_text())["run"]["align"]
    assert (recorded["pairs"], recorded["heads"], recorded["probe"]) == ([[1, 1]], [[[0, 2]]], str(tmp_path / "probe.json"))
    file, text = tmp_path / "probe.json", (tmp_path / "probe.json").read_text()
    file.rename(tmp_path / "moved.json")
    longer = config.load(recipe, [*PROBED, "steps=2"])
    assert longer.align == run.align
    assert config.load(recipe, [*PROBED, f"align.probe={tmp_path / 'moved.json'}"]).align.heads == run.align.heads
    check_output(config.load(recipe, [*PROBED, "steps=2", f"align.probe={tmp_path / 'moved.json'}"]))
    run_ranks(1, whole_run, longer)
    assert [json.loads(line)["step"] for line in (run.output / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    other = json.loads(text)
    other["student"]["mass"]["1"] = [0.0, 0.0]
    file.write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"holds another run \(it differs in align.heads\)"):
        check_output(config.load(recipe, [*PROBED, "steps=3"]))


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_probe_of_other_models_is_refused(recipe, probed, tmp_path, who):
    """One byte of the weights is another, and all sizes are as they were. A copy is the same model, whatever its times."""
    copy = shutil.copytree(probed / who, tmp_path / "copy", copy_function=shutil.copyfile)
    run = config.load(recipe, [*PROBED, f"{who}.path={copy}"])
    check(run)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(
        ValueError, match=f"probe.json is a probe of another {who} than {copy}: model.safetensors has another content .*; `la"
    ):
        check(run)


def test_ranks_refuse_it_too_by_sizes(recipe, tmp_path):
    tree = json.loads((tmp_path / "probe.json").read_text())
    tree["files"]["config.json"]["bytes"] += 1
    (tmp_path / "probe.json").write_text(json.dumps(tree))
    with pytest.raises(AssertionError, match=r"ValueError: .*probe.json is a probe of another teacher .*: config.json has"):
        run_ranks(1, whole_run, config.load(recipe, PROBED))


def blinded(tree):
    tree["mass"]["1"] = [0.05] * 4


def without_a_student(tree):
    del tree["student"]


def of_a_student_with_one_head(tree):
    tree["mass"]["1"][:3] = [0.4, 0.4, 0.4]
    tree["student"]["mass"] = {"0": [0.0], "1": [0.5]}
    tree["student"]["key_heads"] = {"0": 1, "1": 1}


def of_another_shape(tree):
    tree["mass"]["1"] = "much"


def without_a_layer(tree):
    del tree["student"]["key_heads"]["1"]


def of_nothing(tree):
    tree["mass"] = tree["key_heads"] = {}


def of_fewer_layers(tree):
    tree["layers"] = 1


@pytest.mark.parametrize(
    "change, sentence",
    [
        (blinded, "no head of"),
        (blinded, "head 0 of layer 1 with 0.050 has the most attention on the needle"),
        (without_a_student, "says nothing of a student: `laid probe"),
        (of_a_student_with_one_head, "3 heads of layer 1 of"),
        (of_a_student_with_one_head, "has 1 heads left for them"),
        (of_another_shape, "is not as `laid probe` writes it: mass: 1: Input should be a valid list"),
        (without_a_layer, "is not as `laid probe` writes it: key_heads must divide the heads of each layer"),
        (of_nothing, "is not as `laid probe` writes it: a layer or more must be looked at"),
        (of_fewer_layers, "is not as `laid probe` writes it: mass names layers beyond the 1 of the decoder"),
    ],
)
def test_what_a_probe_cannot_give_is_one_sentence(recipe, tmp_path, change, sentence):
    tree = json.loads((tmp_path / "probe.json").read_text())
    change(tree)
    (tmp_path / "probe.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError) as error:
        config.load(recipe, PROBED)
    assert sentence in str(error.value)
    assert str(error.value).startswith(f"{recipe}: align.probe: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (['align.heads="probed"'], 'align.heads is "probed", and align.pairs \'last\': give "probed" there, too, or a list'),
        ([*PROBED, "align.probe=none"], 'align.pairs is "probed": give align.probe, the file that `laid probe ... --out FILE` writes'),
        ([], 'and neither pairs, heads nor start is "probed": leave it out, or set them'),
        (
            [*PROBED, "align.probe=nowhere.json"],
            "no probe at nowhere.json: `laid probe TEACHER SHARDS --student STUDENT --out nowhere",
        ),
        ([*PROBED, "align.probe=pyproject.toml"], "is not valid JSON"),
        (['align.heads="probed"', "align.pairs=[[1, 0]]"], "no head of layer 0 of"),
        (['align.start="probed"', "align.pairs=[[7, 1]]"], "layer 7 of the student was not looked at"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(recipe, overrides, sentence):
    with pytest.raises(ValueError) as error:
        config.load(recipe, overrides)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
