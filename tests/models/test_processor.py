"""Rendering equals the model's own processor; answers and nothing else are supervised; a sample without an image changes nothing."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from laid_ds.data.images import Pixels
from laid_ds.data.index import Dataset
from laid_ds.data.record import Sample, Turn
from laid_ds.models.processor import ANSWER, END, Renderer, check_same_tokenizer, load_processor, train_processor


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


def test_tensors_are_those_of_the_processor(processor, sample):
    rendered = Renderer(processor, Pixels())(sample)
    text = processor.apply_chat_template(messages(sample), tokenize=False)
    images = [Image.open(io.BytesIO(image)).convert("RGB") for image in sample.images]
    expected = processor(text=[text], images=images, return_tensors="pt")
    assert torch.equal(rendered.input_ids, expected["input_ids"][0])
    assert torch.equal(rendered.token_types, expected["mm_token_type_ids"][0])
    assert torch.equal(rendered.pixel_values, expected["pixel_values"])
    assert torch.equal(rendered.image_grid_thw, expected["image_grid_thw"])


def test_answers_and_their_end_marks_are_supervised(processor, sample):
    rendered = Renderer(processor, Pixels())(sample)
    said = processor.tokenizer.decode(rendered.input_ids[rendered.supervised])
    assert said == "".join(f"{turn.text}<|im_end|>" for turn in sample.turns if turn.role == "assistant")
    text = processor.tokenizer.decode(rendered.input_ids)
    assert ANSWER not in text
    assert END not in text


def test_the_image_cache_changes_nothing_and_stays_within_its_bytes(processor, sample):
    whole, small = Renderer(processor, Pixels()), Renderer(processor, Pixels(), cache_bytes=3 * 4 * 1536 * 4)
    for _ in range(3):
        a, b = whole(sample), small(sample)
        assert torch.equal(a.pixel_values, b.pixel_values)
    assert small._cached_bytes <= small.cache_bytes
    assert len(small._patches) == 3


def test_an_answer_that_is_part_of_the_question_is_supervised_only_as_answer(processor):
    turns = (Turn("user", ("red red red?",)), Turn("assistant", ("red",)))
    rendered = Renderer(processor, Pixels())(Sample("k", turns))
    assert processor.tokenizer.decode(rendered.input_ids[rendered.supervised]) == "red<|im_end|>"


def test_a_stand_in_image_after_the_last_token_changes_nothing(world, processor):
    turns = (Turn("user", ("what colour is the other shape?",)), Turn("assistant", ("red",)))
    rendered = Renderer(processor, Pixels())(Sample("k", turns))
    assert rendered.trailing == 3
    assert len(rendered.image_grid_thw) == 1
    model, length = world.load("student"), len(rendered.input_ids) - rendered.trailing
    ids, types = rendered.input_ids[None], rendered.token_types[None]
    with torch.no_grad():
        pictures = {"pixel_values": rendered.pixel_values, "image_grid_thw": rendered.image_grid_thw}
        shown = model.model(input_ids=ids, mm_token_type_ids=types, **pictures, use_cache=False)
        plain = model.model(input_ids=ids[:, :length], use_cache=False)
    torch.testing.assert_close(shown.last_hidden_state[:, :length], plain.last_hidden_state)


def test_an_unreadable_image_is_a_sentence(processor):
    turns = (Turn("user", (0, "what?")), Turn("assistant", ("red",)))
    with pytest.raises(ValueError, match="image"):
        Renderer(processor, Pixels())(Sample("k", turns, images=(b"oops",)))


def test_different_tokenizers_are_refused(processor, sample):
    other = train_processor([Sample("k", (Turn("user", ("entirely different words",)),), images=sample.images)], 270, 16, 2, 1)
    assert check_same_tokenizer(processor, processor) == len(processor.tokenizer)
    with pytest.raises(ValueError, match="the tokenizers differ in"):
        check_same_tokenizer(processor, other)


def test_a_folder_without_a_processor_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="holds no processor"):
        load_processor(tmp_path)
