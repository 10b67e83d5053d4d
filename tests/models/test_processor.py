"""Rendering equals the model's own processor, for every family whose processor we make; answers and nothing else are supervised; a sample
without an image changes nothing."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import LlavaProcessor

from laid_ds.data.batch import collate
from laid_ds.data.dataset import Dataset
from laid_ds.data.images import Pixels
from laid_ds.data.record import Sample, Turn, record_of
from laid_ds.models.new_model import KINDS, train_processor
from laid_ds.models.processor import Renderer, check_same_tokenizer, load_processor, offline
from tests.support.world import tiny_config


@pytest.fixture(scope="module")
def processor(world):
    return load_processor(world.student)


@pytest.fixture(scope="module")
def sample(world):
    return Dataset.open(world.shards).read(0)


def messages(sample):
    return [
        {
            "role": turn.role,
            "content": [{"type": "image"} if isinstance(part, int) else {"type": "text", "text": part} for part in turn.segments],
        }
        for turn in sample.turns
    ]


def test_a_processor_is_made_for_several_families():
    assert {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "llava", "idefics3"} <= KINDS.keys()


@pytest.mark.parametrize("family", KINDS)
def test_tensors_are_those_of_the_processor(worlds, family, sample):
    processor = load_processor(worlds(family).student)
    text = processor.apply_chat_template(messages(sample), tokenize=False)
    images = [Image.open(io.BytesIO(image)).convert("RGB") for image in sample.images]
    expected = processor(text=[text], images=images, return_tensors="pt")
    found = collate([Renderer(processor, Pixels())(sample)], ["k"], 0).inputs
    assert found.keys() == expected.keys() - {"attention_mask"}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_images_of_many_tiles_are_those_of_the_processor(worlds, sample):
    """InternVL cuts a large image into tiles: one image then has many pixel tensors and many tokens."""
    processor = load_processor(worlds("internvl").student)
    processor.image_processor.max_patches = 4
    wide = io.BytesIO()
    Image.open(io.BytesIO(sample.images[0])).resize((96, 32)).save(wide, "PNG")
    sample = Sample("k", sample.turns, images=(wide.getvalue(), *sample.images[1:]))
    text = processor.apply_chat_template(messages(sample), tokenize=False)
    images = [Image.open(io.BytesIO(image)).convert("RGB") for image in sample.images]
    expected = processor(text=[text], images=images, return_tensors="pt")
    rendered = Renderer(processor, Pixels())(sample)
    found = collate([rendered], ["k"], 0).inputs
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert (rendered.shows == 0).sum() == 4  # three tiles and the whole
    assert (rendered.shows == 5).sum() > 0


@pytest.mark.parametrize("family", KINDS)
def test_tokens_are_counted_without_the_images(worlds, family, sample):
    renderer = Renderer(load_processor(worlds(family).student), Pixels())
    assert renderer.count(record_of(sample)) == len(renderer(sample).supervised)


def test_a_folder_s_processor_keeps_the_family_s_name(worlds):
    assert type(load_processor(worlds("llava").student)).__mro__[1] is LlavaProcessor
    assert type(load_processor(worlds("llava").student)).__name__ == "LlavaProcessor"


def test_answers_and_their_end_marks_are_supervised(processor, sample):
    rendered = Renderer(processor, Pixels())(sample)
    said = processor.tokenizer.decode(rendered.tokens["input_ids"][rendered.supervised])
    assert said == "".join(f"{turn.text}<|im_end|>" for turn in sample.turns if turn.role == "assistant")


def test_the_image_cache_changes_nothing_and_stays_within_its_bytes(processor, sample):
    whole, small = Renderer(processor, Pixels()), Renderer(processor, Pixels(), cache_bytes=3 * (4 * 1536 * 4 + 3 * 8))
    for _ in range(3):
        a, b = whole(sample), small(sample)
        assert all(torch.equal(x["pixel_values"], y["pixel_values"]) for x, y in zip(a.images, b.images, strict=True))
    assert small._cached_bytes <= small.cache_bytes
    assert len(small._pictures) == 3


def test_an_answer_that_is_part_of_the_question_is_supervised_only_as_answer(processor):
    turns = (Turn("user", ("red red red?",)), Turn("assistant", ("red",)))
    rendered = Renderer(processor, Pixels())(Sample("k", turns))
    assert processor.tokenizer.decode(rendered.tokens["input_ids"][rendered.supervised]) == "red<|im_end|>"


@pytest.mark.parametrize("family", KINDS)
def test_a_stand_in_image_after_the_last_token_changes_nothing(worlds, family):
    turns = (Turn("user", ("what colour is the other shape?",)), Turn("assistant", ("red",)))
    rendered = Renderer(load_processor(worlds(family).student), Pixels())(Sample("k", turns))
    assert 0 < rendered.trailing <= 4  # the image's tokens and its own marks
    assert len(rendered.images) == 1
    batch = collate([rendered], ["k"], 0)
    assert (batch.segments[0] == -1).sum() == rendered.trailing
    model, length = worlds(family).load("student"), len(rendered.shows) - rendered.trailing
    with torch.no_grad():
        shown = model.model(**batch.inputs, use_cache=False)
        plain = model.model(input_ids=batch.inputs["input_ids"][:, :length], use_cache=False)
    torch.testing.assert_close(shown.last_hidden_state[:, :length], plain.last_hidden_state)


def test_an_unreadable_image_is_a_sentence(processor):
    turns = (Turn("user", (0, "what?")), Turn("assistant", ("red",)))
    with pytest.raises(ValueError, match="image"):
        Renderer(processor, Pixels())(Sample("k", turns, images=(b"oops",)))


def test_different_tokenizers_are_refused(processor, sample):
    other = train_processor(
        [Sample("k", (Turn("user", ("entirely different words",)),), images=sample.images)], 270, tiny_config("student", "qwen2_5_vl"), 1
    )
    assert check_same_tokenizer(processor, processor) == len(processor.tokenizer)
    with pytest.raises(ValueError, match="the tokenizers differ in"):
        check_same_tokenizer(processor, other)


def test_a_folder_without_a_processor_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="holds no processor"):
        load_processor(tmp_path)


def test_a_folder_that_does_not_name_its_processor_gets_that_of_its_family(worlds, tmp_path):
    folder = shutil.copytree(worlds("internvl").student, tmp_path / "model")
    for name in ("processor_config.json", "tokenizer_config.json"):
        tree = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({key: value for key, value in tree.items() if key != "processor_class"}))
    assert type(load_processor(folder)).__name__ == "InternVLProcessor"
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no processor class of transformers"):
        load_processor(folder)


@pytest.mark.parametrize("name", [5, ["Qwen2_5_VLProcessor"], True])
def test_a_processor_class_that_is_no_name_is_a_sentence(worlds, tmp_path, name):
    folder = shutil.copytree(worlds("llava").student, tmp_path / "model")
    tree = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps(tree | {"processor_class": name}))
    with pytest.raises(ValueError, match=r"processor_config\.json: processor_class is .*; give the name of a class"):
        load_processor(folder)
    (folder / "processor_config.json").write_text(json.dumps(tree | {"processor_class": "pipeline"}))  # of transformers, and no class
    assert type(load_processor(folder)).__name__ == "LlavaProcessor"


def test_a_processor_that_needs_a_package_is_a_sentence(worlds, tmp_path, monkeypatch):
    folder = shutil.copytree(worlds("llava").student, tmp_path / "model")

    def missing(path):
        raise ImportError("Package `num2words` is required")

    monkeypatch.setattr(offline(LlavaProcessor), "from_pretrained", missing)
    with pytest.raises(ValueError, match=r"LlavaProcessor at .* needs a package that is not installed: .*`num2words`"):
        load_processor(folder)
