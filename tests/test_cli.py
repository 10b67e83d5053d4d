"""What a person who makes a mistake sees: one sentence, a non-zero status, no traceback, nothing destroyed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace

import pytest

from laid_ds import cli, config
from laid_ds.data.dataset import Dataset
from laid_ds.data.record import Sample, Turn
from laid_ds.data.writer import ShardWriter
from laid_ds.run.build import build
from launch import cli as launch
from tests.models.family_models import tiny_model
from tests.support.processes import free_port
from tests.support.recipes import write_recipe


@pytest.fixture
def recipe(world, tmp_path):
    run = world.run(tmp_path / "run", data={"shards": [str(tmp_path / "shards")]})
    shutil.copytree(world.shards, tmp_path / "shards")
    return write_recipe(run, tmp_path / "recipe.toml")


def refused(capsys, *words) -> str:
    """The one sentence on stderr of a command that must fail with status 2."""
    with pytest.raises(SystemExit) as exit_status:
        cli.main([str(word) for word in words])
    assert exit_status.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("laid: ")
    assert "Traceback" not in said
    return said


def test_the_dry_run_prints_the_resolved_run_and_starts_nothing(recipe, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_status:
        cli.main(["train", str(recipe), "--dry-run"])
    assert exit_status.value.code == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 4
    assert not (tmp_path / "run").exists()


def test_ranks_that_cannot_share_batches_are_refused_before_anything_is_loaded(recipe, tmp_path, capsys):
    """By each way in: the dry run, the start on this machine, and a rank whatever started it."""
    sentence = "sequence_parallel = 2 does not divide the 3 ranks of this run: start a multiple of it, or set another sequence_parallel"
    for more in ([], ["--dry-run"]):
        assert refused(capsys, "train", recipe, "sequence_parallel=2", "--ranks", 3, *more) == f"laid: {sentence}"
    with pytest.raises(SystemExit) as exit_status:
        launch.main(["local", str(recipe), "sequence_parallel=2", "--ranks", "3"])
    assert (exit_status.value.code, capsys.readouterr().err.strip()) == (2, f"laid-launch: {sentence}")
    for words, status in ((["sequence_parallel=3", "--ranks", "3"], 0), (["sequence_parallel=3"], 0)):
        with pytest.raises(SystemExit) as exit_status:
            cli.main(["train", str(recipe), *words, "--dry-run"])
        assert exit_status.value.code == status
    capsys.readouterr()
    rank = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    words = [sys.executable, "-m", "laid_ds.train", str(recipe), "sequence_parallel=2"]
    found = subprocess.run(words, env=os.environ | rank | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True)
    assert found.returncode == 2
    assert [line for line in found.stderr.splitlines() if line.startswith("laid: sequence_parallel = 2 does not divide the 1 rank of")]
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_models_whose_rows_cannot_be_shared_are_refused_before_anything_is_loaded(recipe, tmp_path, capsys, who):
    tiny_model("gemma3", "gemma3_text").config.save_pretrained(tmp_path / "gemma")
    words = ["train", recipe, "sequence_parallel=2", f"{who}.path={tmp_path / 'gemma'}", "--dry-run"]
    sentence = "rows of gemma3 with gemma3_text cannot be shared by several ranks (sliceable is no in `laid models`): its mask is dense"
    assert sentence in refused(capsys, *words)
    assert sentence in refused(capsys, "plan", *words[1:-1])
    with pytest.raises(ValueError, match=r"^rows of gemma3 with gemma3_text cannot be shared"):
        build(config.load(recipe, words[2:-1]))


def test_a_student_with_dropout_in_its_attention_is_not_shared(recipe, world, tmp_path, capsys):
    student = shutil.copytree(world.student, tmp_path / "student")
    tree = json.loads((student / "config.json").read_text())
    tree["text_config"]["attention_dropout"] = 0.1
    (student / "config.json").write_text(json.dumps(tree))
    words = ["train", recipe, f"student.path={student}", "losses.match=0", "--dry-run"]
    assert "attention_dropout is 0.1, and attention over rows that ranks share has none" in refused(capsys, *words, "sequence_parallel=2")
    with pytest.raises(SystemExit) as exit_status:
        cli.main([str(word) for word in words])
    assert exit_status.value.code == 0


def test_the_dry_run_says_what_the_data_do_not_allow(recipe, tmp_path, capsys):
    haystack = Dataset.open(tmp_path / "shards").read(0)
    turns = tuple(replace(turn, needles=()) for turn in haystack.turns)
    with ShardWriter(tmp_path / "mixed") as writer:
        writer.write(haystack)
        writer.write(replace(haystack, key="whole", turns=turns))
    held_out = f'evaluation={{shards = "{tmp_path / "shards"}", sizes = [1, 6, 9], haystacks = 4}}'
    with pytest.raises(SystemExit) as exit_status:
        cli.main(["train", str(recipe), f'data.shards=["{tmp_path / "mixed"}"]', held_out, "--dry-run"])
    assert exit_status.value.code == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["steps"] == 4
    assert said.err.splitlines() == [
        f"{tmp_path / 'mixed'}: 1 of 2 samples looked at allow windows of 1 to 4 images; 1 stay as they are, whole among them: it records "
        "no needles for a question, nor does it say that it is a haystack",
        "held out: not measured at 9 images: 4 of 4 haystacks do not allow it (train-0-000000 has 6 images)",
        f"held out: 1 of the 4 haystacks of {tmp_path / 'shards'} are among the training samples (train-0-000000 is one): what is"
        " measured on them is learned by heart; hold out other ones",
    ]


def test_windows_of_what_is_no_haystack_are_refused_before_anything_starts(recipe, tmp_path, capsys):
    """A document, and a row whose questions record no needles: both stay whole, so that there is nothing to draw from."""
    pictures = Dataset.open(tmp_path / "shards").read(0).images[:5]
    told = Turn("user", (0, 1, 2, 3, 4, "What colour is Image-2?"))
    turns = {"row": (told, Turn("assistant", ("red",))), "document": (Turn("assistant", ("one", 0, 1, 2, 3, 4)),)}
    with ShardWriter(tmp_path / "plain") as writer:
        for key, said in turns.items():
            writer.write(Sample(key, said, pictures))
    said = refused(capsys, "train", recipe, f'data.shards=["{tmp_path / "plain"}"]')
    assert "plain: 0 of 2 samples looked at allow windows of 1 to 4 images" in said
    assert "document among them: it is not a row of questions" in said
    assert "row among them: it records no needles" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("data.images=none", "questions=2 is for windows: give images as well"),
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr'"),
        ("student.path=nowhere", "no model at nowhere"),
        ("student.deepspeed=nowhere.json", "no DeepSpeed config at nowhere.json"),
        ("align.pairs=[[0, 9]]", "align.pairs: [0, 9] does not exist"),
    ],
)
def test_wrong_values_are_refused_before_anything_starts(recipe, tmp_path, capsys, override, sentence):
    assert sentence in refused(capsys, "train", recipe, override)
    assert not (tmp_path / "run").exists()


def test_a_missing_recipe(tmp_path, capsys):
    assert "no recipe at" in refused(capsys, "train", tmp_path / "none.toml")


def test_missing_and_truncated_shards(recipe, tmp_path, capsys):
    shard = sorted((tmp_path / "shards").glob("*.tar"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-700])
    assert shard.name in refused(capsys, "train", recipe)
    shard.unlink()
    assert shard.name in refused(capsys, "train", recipe)
    shutil.rmtree(tmp_path / "shards")
    assert "shards" in refused(capsys, "train", recipe)


def test_engine_files_may_not_decide_what_the_recipe_decides(recipe, tmp_path, capsys):
    path = tmp_path / "engine.json"
    path.write_text('{"zero_optimization": {"stage": 3}, "gradient_clipping": 1.0}')
    said = refused(capsys, "train", recipe, f"student.deepspeed={path}")
    assert "'gradient_clipping', which belongs to the recipe (optimizer.clip)" in said


def test_a_finished_run_and_foreign_files_are_left_alone(recipe, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    assert "is not empty and holds no run" in refused(capsys, "train", recipe)
    (tmp_path / "run" / "done.json").write_text("{}")
    assert "holds a finished run" in refused(capsys, "train", recipe)
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"


def test_a_port_in_use_and_a_missing_launcher(recipe):
    def rank(**environment):
        command = [sys.executable, "-m", "laid_ds.train", str(recipe)]
        clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        return subprocess.run(command, env=clean | environment, capture_output=True, text=True)

    alone = rank()
    assert alone.returncode == 2
    assert "no launcher: RANK, WORLD_SIZE, LOCAL_RANK" in alone.stderr
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        clash = rank(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, DS_ACCELERATOR="cpu")
    assert clash.returncode == 2
    assert f"cannot meet at 127.0.0.1:{port}" in clash.stderr
    assert "Traceback" not in clash.stderr


def test_export_eval_and_report_without_their_input(tmp_path, capsys):
    assert "no run at" in refused(capsys, "export", tmp_path, tmp_path / "out")
    assert "no results at" in refused(capsys, "report", tmp_path)
    assert "NAME=FOLDER" in refused(capsys, "eval", tmp_path, "model", "--out", tmp_path / "e.json")
    assert "--sizes" in refused(capsys, "eval", tmp_path, "a=b", "--out", tmp_path / "e.json", "--sizes", "1,x")


def test_an_unfinished_run_takes_other_logging_but_no_other_training(recipe, tmp_path, capsys):
    resolved = json.loads(config.load(recipe).model_dump_json())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"run": resolved}))
    with pytest.raises(SystemExit) as exit_status:
        cli.main(["train", str(recipe), "logging.every_steps=7", "checkpoint.every_steps=3", "data.workers=2", "--dry-run"])
    assert exit_status.value.code == 0
    assert "it differs in optimizer.lr" in refused(capsys, "train", recipe, "optimizer.lr=0.1", "--dry-run")
