"""What the dry run accepts, runs: each way in which samples, folders or a disk would stop a run later is one sentence before it starts."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from data_tools.synth import haystacks
from laid_ds import disk
from laid_ds.data.batch import Prepare
from laid_ds.data.dataset import Dataset
from laid_ds.data.record import DataError, Sample, Turn
from laid_ds.data.writer import ShardWriter
from laid_ds.models.load import open_model
from laid_ds.run import check as module
from laid_ds.run import metrics
from laid_ds.run.check import check, data_notes
from laid_ds.run.loop import train
from laid_ds.runtime import checkpoint, engine
from laid_ds.runtime.stop import StopRequest
from tests.support.processes import run_ranks

QUESTION, ANSWER = Turn("user", (0, "what?")), Turn("assistant", ("red",))


def image(size: tuple[int, int] = (32, 32), fmt: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(file, fmt)
    return file.getvalue()


def write(folder: Path, samples: list[Sample]) -> Path:
    with ShardWriter(folder) as writer:
        for sample in samples:
            writer.write(sample)
    return folder


def good(number: int, name: str = "good") -> list[Sample]:
    return [Sample(f"{name}{i}", (QUESTION, ANSWER), (image(),)) for i in range(number)]


def cut_jpeg() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((200, 200), 80).convert("RGB").save(file, "JPEG")
    return file.getvalue()[: len(file.getvalue()) // 2]


BAD = {
    "thin": (Sample("thin", (QUESTION, ANSWER), (image((1, 5000)),)), "absolute aspect ratio must be smaller than 200"),
    "cut": (Sample("cut", (QUESTION, ANSWER), (cut_jpeg(),)), "image cannot be decoded"),
    "mute": (Sample("mute", (QUESTION,), (image(),)), "the sample has no answer to learn from: it has no assistant turn"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("packed", [False, True])
def test_a_sample_that_would_stop_the_run_is_named_with_its_shard(world, tmp_path, name, packed):
    sample, sentence = BAD[name]
    shards = write(tmp_path / "shards", [*good(4), sample, *good(2, "more")])
    data = {"shards": [str(shards)], "images": None, "questions": None} | ({"micro_batch": 1, "tokens_per_pack": 200} if packed else {})
    with pytest.raises(DataError, match=rf"{sentence}.*\[shard shard-000000\.tar, key {name}, offset \d+\]"):
        check(world.run(tmp_path / "run", data=data))


def test_bad_samples_that_are_to_be_replaced_do_not_stop_a_run_unless_all_are(world, tmp_path):
    data = {"images": None, "questions": None, "on_bad": "replace"}
    some = write(tmp_path / "some", [*good(4), BAD["cut"][0]])
    check(world.run(tmp_path / "run", data=data | {"shards": [str(some)]}))
    every = write(tmp_path / "every", [Sample(f"cut{i}", (QUESTION, ANSWER), (cut_jpeg(),)) for i in range(3)])
    with pytest.raises(ValueError, match=r"all 3 samples of .*every that were looked at are bad, the first: image cannot be decoded"):
        check(world.run(tmp_path / "run", data=data | {"shards": [str(some), str(every)]}))


def test_every_source_is_looked_at(world, tmp_path):
    """A few bad samples at the end of the second of two folders."""
    folders = [write(tmp_path / "a", good(200, "a")), write(tmp_path / "b", [*good(5, "b"), BAD["mute"][0]])]
    with pytest.raises(DataError, match=r"\[shard shard-000000\.tar, key mute,"):
        check(world.run(tmp_path / "run", data={"shards": [str(folder) for folder in folders], "images": None, "questions": None}))


def test_windows_none_of_which_holds_an_answer_are_refused(world, tmp_path, monkeypatch):
    shards = write(tmp_path / "shards", good(6))
    run = world.run(tmp_path / "run", data={"shards": [str(shards)], "images": [1, 1], "questions": None})
    check(run)
    drawn = Prepare.windows
    monkeypatch.setattr(Prepare, "windows", lambda self, items: [replace(s, turns=s.turns[:1]) for s in drawn(self, items)])
    with pytest.raises(ValueError, match=r"none of the 6 windows of .*shards that were looked at holds an answer to learn from"):
        check(run)


def test_many_images_are_not_all_rendered(world, tmp_path, monkeypatch):
    shards = write(tmp_path / "shards", list(haystacks("train", 20, 6, 1, ("colour",), seed=0, num_scenes=576)))
    seen = []
    rendered = module._rendered
    monkeypatch.setattr(module, "_rendered", lambda *what: seen.append(rendered(*what)) or seen[-1])
    monkeypatch.setattr(module, "IMAGES", 30)
    check(world.run(tmp_path / "run", data={"shards": [str(shards)], "images": None, "questions": None}))
    assert sum(number for _, number in seen) == 30


class Damage(NamedTuple):
    who: str
    do: Callable[[Path], None]
    sentence: str


def change(name: str, **values) -> Callable[[Path], None]:
    """Write values into a JSON file of the folder; None removes one."""

    def do(folder: Path) -> None:
        tree = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))

    return do


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "layers.1.self_attn.q_proj" in name))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGES = {
    "no weights": Damage("student", lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded: it has no weights"),
    "cut weights": Damage("teacher", cut, r"model\.safetensors has \d+ bytes, its header says \d+"),
    "a weight less": Damage("teacher", without_a_weight, "do not fit the model's config: {'missing_keys'"),
    "quantised": Damage("teacher", change("config.json", quantization_config={"quant_method": "fp8"}), "quantised .config.json says fp8"),
    "code": Damage("student", change("config.json", auto_map={"AutoConfig": "c.C"}), r"wants code of its own to run \(auto_map in config"),
    "processor code": Damage("student", change("processor_config.json", auto_map={"AutoProcessor": "p.P"}), "auto_map in processor_config"),
    "adapter": Damage("student", lambda folder: (folder / "adapter_config.json").write_text("{}"), "an adapter lies beside the weights"),
    "no template": Damage("student", lambda folder: (folder / "chat_template.jinja").unlink(), "has no chat template: copy the model's"),
    "no images": Damage("student", lambda folder: (folder / "processor_config.json").unlink(), "does not say how images are processed"),
    "another image token": Damage("teacher", change("config.json", image_token_id=7), "finds its images at token 7"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_folder_that_would_stop_the_run_is_refused(world, tmp_path, name):
    damage = DAMAGES[name]
    folder = shutil.copytree(getattr(world, damage.who), tmp_path / "model")
    damage.do(folder)
    with pytest.raises(ValueError, match=damage.sentence) as refusal:
        check(world.run(tmp_path / "run", **{damage.who: {"path": folder}}))
    assert "\n" not in str(refusal.value)
    assert str(folder) in str(refusal.value)


def test_pictures_that_the_teacher_would_see_in_other_colours_are_refused(world, tmp_path):
    folder = shutil.copytree(world.teacher, tmp_path / "teacher")
    tree = json.loads((folder / "processor_config.json").read_text())
    tree["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    (folder / "processor_config.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"process images differently \(image_mean is .* and \(0.5, 0.5, 0.5\)\)"):
        check(world.run(tmp_path / "run", teacher={"path": folder}))


def test_a_teacher_that_is_shown_another_chat_template_than_its_own_is_told_of(world, tmp_path):
    """Both models read what the student's template writes: nothing is refused, and nothing goes without a word."""
    assert data_notes(world.run(tmp_path / "run")) == []
    folder = shutil.copytree(world.teacher, tmp_path / "teacher")
    run = world.run(tmp_path / "run", teacher={"path": folder})
    own = (folder / "chat_template.jinja").read_text()
    for template, said in (
        ("{# the same text #}" + own, []),
        (
            "Hello." + own,
            ["the teacher is shown .* template writes, '<|im_start|>user.*; its own would write 'Hello.<|im"],
        ),
        ("{{ raise_exception('not me') }}", ["the teacher's own chat template cannot be compared with the student's, .*not me"]),
    ):
        (folder / "chat_template.jinja").write_text(template)
        notes = data_notes(run)
        assert len(notes) == len(said)
        assert all(re.match(pattern.replace("|", r"\|"), note) for pattern, note in zip(said, notes, strict=True))
        check(run)


def test_what_is_held_out_and_trained_on_is_told_of(world, tmp_path):
    """By the sample, not by its key alone: those of other sets may be called the same."""
    held = {"shards": str(world.shards), "haystacks": 3, "sizes": [1, 2]}
    (note,) = data_notes(world.run(tmp_path / "run", evaluation=held))
    assert note.startswith(f"held out: 3 of the 3 haystacks of {world.shards} are among the training samples (")
    with ShardWriter(tmp_path / "test") as writer:
        for sample in haystacks("train", 3, 6, 3, ("colour",), seed=1, num_scenes=576):
            writer.write(replace(sample, key=sample.key.replace("train-1-", "train-0-")))
    assert set(Dataset.open(tmp_path / "test").keys) <= set(Dataset.open(world.shards).keys)
    assert data_notes(world.run(tmp_path / "run", evaluation=held | {"shards": str(tmp_path / "test")})) == []


def test_numbers_that_the_data_or_the_run_are_too_short_for_are_told_of(world, tmp_path):
    (note,) = data_notes(world.run(tmp_path / "run", data={"images": [100, 200]}))
    assert note == "data.images is [100, 200], and the samples looked at have 6 images at most: none gets a smaller window"
    assert data_notes(world.run(tmp_path / "run", data={"images": [6, 200]})) == []
    (note,) = data_notes(world.run(tmp_path / "run", optimizer={"warmup_steps": 4}))
    assert note.startswith("optimizer.warmup_steps is 4 of 4 steps: no rate gets where the recipe says")
    assert data_notes(world.run(tmp_path / "run", optimizer={"warmup_steps": 3})) == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed_is_refused(world, tmp_path, monkeypatch, name):
    monkeypatch.setattr(metrics, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=rf"^logging.{name} needs the extra: pip install 'laid-ds\[{name}\]'$"):
        check(world.run(tmp_path / "run", logging={name: True}))


def saved_bytes(run):
    engine.start_processes()
    train(run, StopRequest())
    return checkpoint.all_saved(run.output)[-1].num_bytes


def test_a_disk_without_room_for_the_next_checkpoints_is_refused(world, tmp_path, monkeypatch):
    """What is asked for is what a checkpoint takes, but for the files' frames, with everything trained and with factors beside it."""
    asked = []
    monkeypatch.setattr(disk, "_left", lambda place: asked[-1])
    student = open_model(world.student)
    lora = {"rank": 4, "targets": ["q_proj", "k_proj"]}
    frames = 40_000 + 1000 * sum(1 for _ in student.parameters())  # bytes: random states, names, places, shapes
    for name, changes in (("all", {}), ("frozen", {"freeze_vision": True, "freeze_embeddings": True}), ("lora", {"lora": lora})):
        run = world.run(tmp_path / name, student=changes)
        (taken,) = run_ranks(1, saved_bytes, run)
        shutil.rmtree(run.output)
        asked.append(2 * (taken - frames) - 1)
        with pytest.raises(
            ValueError, match=rf"^2 checkpoints of this run .* cannot be written to {run.output}: the disk .* has too little room"
        ):
            check(run)
        asked.append(2 * taken)
        check(run)


def test_a_run_that_goes_on_needs_room_for_one_checkpoint(world, tmp_path, monkeypatch):
    run, saved = world.run(tmp_path / "run"), checkpoint.Saved(tmp_path, 2, 1, 0, True)
    monkeypatch.setattr(disk, "_left", lambda place: 12 * 1000)
    for before, refused in (([], True), ([saved], False), ([saved] * 2, False)):
        monkeypatch.setattr(checkpoint, "all_saved", lambda output, before=before: before)
        if refused:
            with pytest.raises(ValueError, match=r"^2 checkpoints of this run \(0\.0 MB\) cannot be written to"):
                module.check_room(run, trained=1000, frozen=0)
        else:
            module.check_room(run, trained=1000, frozen=0)
