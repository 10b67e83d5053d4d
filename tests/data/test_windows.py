"""Windows of a sample: every needle is inside, answers stay true, everything follows from the seed."""

from __future__ import annotations

import pytest

from data_tools.synth import haystacks
from laid_ds.data.batch import IGNORED, Prepare
from laid_ds.data.dataset import Dataset
from laid_ds.data.haystack import draw_window
from laid_ds.data.images import Pixels
from laid_ds.models.processor import Renderer, load_processor


@pytest.fixture(scope="module")
def sample():
    (made,) = haystacks("train", 1, 20, 5, ("colour",), seed=3, num_scenes=576)
    return made


@pytest.mark.parametrize("images", [1, 2, 5, 19, 20])
@pytest.mark.parametrize("questions", [1, 3, None])
def test_a_window_holds_its_needles_and_the_same_answers(sample, images, questions):
    truth = {turn.text: (sample.images[turn.needles[0]], answer.text) for turn, answer in pairs(sample)}
    window = draw_window(sample, images, questions, (0, 7))
    assert len(window.images) == images
    asked = pairs(window)
    assert len(asked) == min(images, questions or 5, 5)
    for turn, answer in asked:
        assert (window.images[turn.needles[0]], answer.text) == truth[turn.text]
    assert window.turns[0].segments[:images] == tuple(range(images))
    assert all(isinstance(segment, str) for turn in window.turns[1:] for segment in turn.segments)


def pairs(sample):
    return [(turn, sample.turns[i + 1]) for i, turn in enumerate(sample.turns) if turn.role == "user"]


def test_the_seed_decides_everything(sample):
    assert draw_window(sample, 6, 2, (1, 2)) == draw_window(sample, 6, 2, (1, 2))
    assert len({draw_window(sample, 6, 2, (1, i)).images for i in range(10)}) == 10


def test_needles_are_spread_over_the_window(sample):
    places = [draw_window(sample, 10, 1, (0, i)).turns[0].needles[0] for i in range(400)]
    assert all(15 < places.count(place) < 75 for place in range(10))


def test_a_window_larger_than_the_sample_is_the_whole_sample(sample):
    window = draw_window(sample, 50, None, (0,))
    assert sorted(window.images) == sorted(sample.images)


def test_rows_do_not_depend_on_their_neighbours(world):
    """Padding is on the right and labels are shifted within the row."""
    dataset, processor = Dataset.open(world.shards), load_processor(world.student)
    prepare = Prepare(Renderer(processor, Pixels()), processor.tokenizer.pad_token_id, image_range=lambda step: (1, 6), questions=2)
    items = [(i, dataset.read(i)) for i in range(5)]
    batch = prepare(items)
    assert batch.keys == tuple(sample.key for _, sample in items)
    counts = {"rows": 0, "tokens": 0, "samples": 0, "images": 0}
    for row, item in enumerate(items):
        alone = prepare([item])
        length = alone.labels.shape[1]
        assert batch.inputs["input_ids"][row, :length].equal(alone.inputs["input_ids"][0])
        assert batch.labels[row, :length].equal(alone.labels[0])
        assert (batch.labels[row, length:] == IGNORED).all()
        assert (batch.segments[row] >= 0).sum() == length
        supervised = alone.labels[0] != IGNORED
        assert alone.labels[0][supervised].equal(alone.inputs["input_ids"][0].roll(-1)[supervised])
        counts = {name: value + alone.counts()[name] for name, value in counts.items()}
    assert batch.counts() == counts | {"places": batch.labels.numel()}


def test_the_size_follows_the_step_and_the_position(world):
    dataset, processor = Dataset.open(world.shards), load_processor(world.student)
    ranges = {0: (1, 1), 1: (6, 6)}
    prepare = Prepare(Renderer(processor, Pixels()), 0, global_batch=4, image_range=ranges.get)
    for position in range(8):
        batch = prepare([(position, dataset.read(0))])
        assert batch.num_images == (1 if position < 4 else 6)
