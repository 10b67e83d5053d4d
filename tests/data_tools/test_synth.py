"""The haystack world: true answers, unique anchors, no shortcut, disjoint pictures, the same bytes from the same arguments."""

from __future__ import annotations

import collections
import random

import pytest
from typer.testing import CliRunner

from data_tools.cli import app
from data_tools.synth import COLOURS, KINDS, haystacks, pictures, scenes
from laid_ds.data.dataset import Dataset


@pytest.fixture(scope="module")
def colour_samples():
    return list(haystacks("test", 200, 48, 4, ("colour",), seed=5, num_scenes=576))


@pytest.fixture(scope="module")
def yes_no_samples():
    return list(haystacks("test", 200, 48, 4, ("yes-no",), seed=6, num_scenes=576))


def questions(samples):
    return [(sample, turn, sample.turns[i + 1].text) for sample in samples for i, turn in enumerate(sample.turns) if turn.role == "user"]


def accuracy_of(guess, samples):
    """Share of right answers of a baseline that is fitted on one half of the samples and asked about the other."""
    asked = questions(samples)
    half = len(asked) // 2
    table = collections.defaultdict(collections.Counter)
    for sample, turn, answer in asked[:half]:
        table[guess(sample, turn)][answer] += 1
    overall = collections.Counter(answer for _, _, answer in asked[:half])
    hits = [(table[guess(sample, turn)] or overall).most_common(1)[0][0] == answer for sample, turn, answer in asked[half:]]
    return sum(hits) / len(hits)


def test_the_question_alone_tells_nothing(colour_samples, yes_no_samples):
    assert accuracy_of(lambda sample, turn: turn.text, colour_samples) < 1 / 8 + 0.06
    assert accuracy_of(lambda sample, turn: turn.text, yes_no_samples) < 1 / 2 + 0.08


def scene_kinds(samples):
    """Image bytes -> (anchor, target)."""
    return {scene.image: (scene.anchor, scene.target) for seed in (5, 6) for row in scenes("test", 576, seed).values() for scene in row}


@pytest.fixture(scope="module")
def kinds(colour_samples):
    return scene_kinds(colour_samples)


def test_answers_are_true_and_anchors_unique(colour_samples, yes_no_samples, kinds):
    for sample, turn, answer in questions(colour_samples + yes_no_samples):
        anchor, target = kinds[sample.images[turn.needles[0]]]
        assert f"the image with the {' '.join(anchor)}" in turn.text
        shown = [kinds[image] for image in sample.images]
        assert sum(anchor in scene for scene in shown) == 1
        if answer in COLOURS:
            assert answer == target[0]
        else:
            assert (answer == "yes") == (f"is there a {' '.join(target)}?" in turn.text)
            assert any(f"is there a {' '.join(other)}?" in turn.text for _, other in shown)


def test_the_bag_of_images_tells_nothing(colour_samples, yes_no_samples, kinds):
    """Baselines that see all objects but not which stand together: the commonest target colour; the count of the asked object."""

    def commonest_colour(sample, turn):
        return collections.Counter(kinds[image][1][0] for image in sample.images).most_common(1)[0][0]

    def count_of_asked(sample, turn):
        return sum(f"is there a {' '.join(kinds[image][1])}?" in turn.text for image in sample.images)

    asked = questions(colour_samples)
    hits = sum(commonest_colour(sample, turn) == answer for sample, turn, answer in asked) / len(asked)
    assert hits < 1 / 8 + 0.06
    assert accuracy_of(count_of_asked, yes_no_samples) < 1 / 2 + 0.08


def test_answers_and_needle_places_are_balanced(colour_samples, yes_no_samples):
    answers = collections.Counter(answer for _, _, answer in questions(colour_samples))
    assert all(60 < answers[colour] < 145 for colour in COLOURS)
    assert 0.44 < sum(answer == "yes" for _, _, answer in questions(yes_no_samples)) / 800 < 0.56
    places = [turn.needles[0] for _, turn, _ in questions(colour_samples)]
    assert 0.44 < sum(place < 24 for place in places) / len(places) < 0.56


def test_train_and_test_pictures_are_disjoint_files_of_every_kind():
    train, test = pictures("train"), pictures("test")
    assert set(train) == set(test) == set(KINDS)
    assert all(len(paths) >= 20 for split in (train, test) for paths in split.values())
    files = [{path.read_bytes() for paths in split.values() for path in paths} for split in (train, test)]
    assert not files[0] & files[1]


def test_terse_questions_are_those_of_colour_and_words_are_the_caption_without_and():
    """The same scenes, needles and answers; only what is said differs."""
    by_name = {ask: list(haystacks("train", 5, 6, 3, (ask,), seed=7, num_scenes=576)) for ask in ("colour", "terse")}
    for colour, terse in zip(by_name["colour"], by_name["terse"], strict=True):
        assert colour.images == terse.images
        for long, short in zip(colour.turns, terse.turns, strict=True):
            assert (long.needles, long.choices) == (short.needles, short.choices)
            anchor = long.text.removeprefix("What colour is the other shape in the image with the ").removesuffix("?")
            assert short.text == (f"{anchor}:" if long.role == "user" else long.text)
    captions, words = (list(haystacks("train", 5, 1, 1, (ask,), seed=7, num_scenes=576)) for ask in ("caption", "words"))
    assert [sample.turns[1].text for sample in words] == [sample.turns[1].text.replace(" and ", " ") for sample in captions]
    with pytest.raises(ValueError, match="--ask words is for samples of one image, not 2"):
        next(haystacks("train", 1, 2, 1, ("words",), 0, 576))


def test_labels_of_pictures_hold_for_their_pixels():
    """The colour read from the questions is the colour in the picture."""
    import numpy as np
    from PIL import Image

    pure = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "black": (0, 0, 0)}
    rng = random.Random(0)
    for (colour, _), paths in pictures("test").items():
        if colour in pure:
            for path in rng.sample(paths, 5):
                pixels = np.asarray(Image.open(path).convert("RGB"), int).reshape(-1, 3)
                assert (np.abs(pixels - pure[colour]).sum(1) < 30).mean() > 0.002


def test_the_verb_writes_the_same_bytes_and_refuses_to_overwrite(tmp_path):
    arguments = ["--samples", "3", "--images", "4", "--questions", "2", "--scenes", "576", "--json"]
    for name in "ab":
        assert CliRunner().invoke(app, ["synth", "haystack", str(tmp_path / name), *arguments]).exit_code == 0
    assert Dataset.open(tmp_path / "a").fingerprint == Dataset.open(tmp_path / "b").fingerprint
    again = CliRunner().invoke(app, ["synth", "haystack", str(tmp_path / "a"), *arguments])
    assert again.exit_code != 0
    assert "exists" in str(again.exception)


@pytest.mark.parametrize(
    "questions, scenes, sentence", [(9, 240, "can ask 1 to 4 questions"), (4, 480, "every anchor needs a scene with every target, 576")]
)
def test_impossible_worlds_are_refused(questions, scenes, sentence):
    with pytest.raises(ValueError, match=sentence):
        next(haystacks("test", 1, 4, questions, ("colour",), 0, scenes))
