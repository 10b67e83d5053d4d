"""Windows of a sample: every needle is inside, answers stay true, everything follows from the seed."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import windows_in_front
from data_samples import make_sample, picture, write_dataset

from data_tools.synth import haystacks
from laid_ds.data.batch import IGNORED, Prepare
from laid_ds.data.dataset import Dataset
from laid_ds.data.haystack import describe_windows, draw_window, fewest_images, most_needed, why_whole
from laid_ds.data.images import Pixels
from laid_ds.data.record import DataError, Sample, Turn
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


def test_windows_of_images_in_front_are_those_of_the_first_rule(sample):
    """Bit for bit, random draws included: also with a system turn, and with questions of several needles."""
    rng = random.Random(0)
    told = replace(sample, turns=(Turn("system", ("Be brief.",)), *sample.turns))
    needy = [replace(turn, needles=tuple(rng.sample(range(20), 3))) if turn.needles else turn for turn in sample.turns]
    for one in (sample, told, replace(sample, turns=tuple(needy)), replace(sample, haystack=True)):
        for draw in range(150):
            images, questions = rng.randint(fewest_images(one), 25), rng.choice([1, 2, 5, None])
            assert draw_window(one, images, questions, (0, draw)) == windows_in_front.draw_window(one, images, questions, (0, draw))


PICTURES = tuple(picture(i) for i in range(5))


def asked(*segments, answer="green", needles=(), images=5, **facts) -> Sample:
    """One question about the first images."""
    turns = (Turn("user", segments, needles), Turn("assistant", (answer,)))
    return Sample("asked", turns, PICTURES[:images], **facts)


WHOLE = {
    "no needles": asked(0, 1, 2, "What colour?", images=3),
    "no question": Sample("document", (Turn("assistant", ("one", 0, "two", 1)),), PICTURES[:2]),
    "no answer at the end": Sample("ends", (*asked(0, 1, "What?", needles=(0,), images=2).turns, Turn("user", ("and?",))), PICTURES[:2]),
    "two answers": Sample("twice", (*asked(0, 1, "What?", needles=(0,), images=2).turns, Turn("assistant", ("or",))), PICTURES[:2]),
    "one question without needles": Sample(
        "half", (*asked(0, 1, "What?", needles=(0,), images=2).turns, *asked("Who?", images=0).turns), PICTURES[:2]
    ),
    "an image in an answer": replace(
        asked(0, 1, "Draw.", answer="so", needles=(0,), images=3), turns=(Turn("user", (0, 1, "Draw."), (0,)), Turn("assistant", ("so", 2)))
    ),
    "an answer that is only read": Sample(
        "read", (Turn("user", (0, 1, "What?"), (0,)), Turn("assistant", ("a dot",), supervised=False)), PICTURES[:2]
    ),
    "an image shown twice": asked(0, 1, "What is in ", 0, "?", needles=(0,), images=2),
    "images in two questions": Sample(
        "talk", (*asked(0, "this?", needles=(0,)).turns, *asked(1, "and this?", needles=(1,)).turns), PICTURES[:2], haystack=True
    ),
    "images in a system turn without needles": Sample(
        "told", (Turn("system", (0, 1, 2, "Be brief.")), Turn("user", ("What colour?",)), Turn("assistant", ("red",))), PICTURES[:3]
    ),
    "a system turn in between": Sample(
        "told", (Turn("user", (0, 1, "What?"), (0,)), Turn("system", ("Be brief.",)), Turn("assistant", ("red",))), PICTURES[:2]
    ),
}
BY_PLACE = (
    "Image-1: ",
    "What colour is Image-2?",
    "In picture 3, what is it?",
    "the second image",
    "What is in the last picture?",
    "Which image is first, image A?",
    "Image two shows what?",
    "the 3rd photo",
    "How do the first two images differ?",
    "What is in the second of the images?",
    "the picture after the dog",
    "What is the position of the image with the dog?",
    "What is different in the left image?",
    "frame #12",
    "Figure 3",
    "<image_2>",
)


@pytest.mark.parametrize("sample", WHOLE.values(), ids=WHOLE.keys())
def test_what_is_no_haystack_stays_whole(sample):
    assert why_whole(sample)
    assert all(draw_window(sample, 1 + draw % 4, 1, (0, draw)) == sample for draw in range(20))
    assert fewest_images(sample) == most_needed(sample) == len(sample.images)


@pytest.mark.parametrize("words", BY_PLACE)
def test_a_text_that_names_an_image_by_its_place_stays_whole_with_needles(words):
    assert "by its place" in why_whole(asked(0, 1, 2, words, needles=(1,), images=3))
    assert why_whole(asked(0, 1, 2, words, needles=(1,), images=3, haystack=True)) is None


@pytest.mark.parametrize(
    "question, answer, choices",
    [("Which one?", "the second", ()), ("Which?", "b", ("first", "second")), ("Which image is red?", "2", ()), ("Which one?", "B", ())],
)
def test_an_answer_that_is_a_place_stays_whole(question, answer, choices):
    turns = (Turn("user", (0, 1, question), (0,), choices), Turn("assistant", (answer,)))
    assert "by its place" in why_whole(Sample("place", turns, PICTURES[:2]))


@pytest.mark.parametrize(
    "words",
    [
        "What colour is the other shape in the image with the gray rectangle?",
        "For all images with the truck, do any of them contain a dog?",
        "How many images show 2 dogs?",
        "You are given a set of images. What is the second shape in the image with the dog?",
        "Is the arrow in the picture of the road left of the tree?",
    ],
)
def test_questions_of_haystacks_name_no_place(words):
    assert why_whole(asked(0, 1, 2, words, answer="2", needles=(1,), images=3)) is None


def shown(window):
    """The words of the first question, and the pictures between them as numbers."""
    return [PICTURES.index(window.images[s]) if isinstance(s, int) else s for s in window.turns[0].segments]


def test_pictures_to_choose_from_stay_with_their_letters():
    sample = asked(
        "Text ", 0, " more ", 1, " end ", 2, ". Which?\nA. ", 3, "\nB. ", 4, answer="B", needles=(1,), haystack=True, fixed=(3, 4)
    )
    seen = set()
    for draw in range(200):
        size = 1 + draw % 5
        window = draw_window(sample, size, 1, (0, draw))
        assert len(window.images) == max(size, 3)
        found = shown(window)
        assert found[-4:] == [". Which?\nA. ", 3, "\nB. ", 4]
        assert [PICTURES.index(window.images[image]) for image in (*window.fixed, *window.turns[0].needles)] == [3, 4, 1]
        assert [part for part in found if isinstance(part, str)] == [s for s in sample.turns[0].segments if isinstance(s, str)]
        seen.add(tuple(part for part in found[:-4] if isinstance(part, int)))
    assert seen == {(1,), (0, 1), (1, 0), (1, 2), (2, 1), *((a, b, 3 - a - b) for a in range(3) for b in range(3) if a != b)}


def test_images_change_places_across_words_only_where_the_record_says_so():
    """Needles say which images may go, not that the words around an image speak of none."""
    sample = asked("A cat: ", 0, ". A dog: ", 1, ". A cow: ", 2, ". Which of the animals is the largest?", needles=(1, 2), images=3)
    windows = [shown(draw_window(sample, 2 + draw % 2, 1, (0, draw))) for draw in range(40)]
    assert {tuple(part for part in window if isinstance(part, int)) for window in windows} == {(0, 1, 2), (1, 2)}
    listed = asked("These:\n", 0, "\n", 1, "\n", 2, "\nWhich animal is the largest?", needles=(1, 2), images=3)
    moved = {tuple(part for part in shown(draw_window(listed, 3, 1, (0, draw))) if isinstance(part, int)) for draw in range(80)}
    assert len(moved) == 6


def test_questions_that_hold_images_are_asked_in_their_order():
    first, second = asked("See ", 0, " and ", 1, ": what?").turns, asked("Which of these: ", 2, "?").turns
    sample = Sample("talk", (*first, *asked("Who?").turns, *second), PICTURES[:3], haystack=True, fixed=(2,))
    for draw in range(30):
        texts = [turn.text for turn in draw_window(sample, 2, 1 + draw % 3, (0, draw)).turns if turn.role == "user"]
        assert texts in (["See  and : what?", "Which of these: ?"], ["See  and : what?", "Who?", "Which of these: ?"])
        assert draw % 3 != 0 or len(texts) == 2


def test_a_conversation_about_the_same_images_keeps_its_questions_and_their_order():
    """Needles of a whole row (relevant_images) say nothing of its questions one by one: a later one may lean on an earlier one."""
    turns = (*asked(0, 1, 2, "Which animal is there?", needles=(1,)).turns, *asked("What colour is it?", needles=(1,)).turns)
    for draw in range(20):
        window = draw_window(Sample("talk", turns, PICTURES[:3]), 2, 1, (draw,))
        assert [turn.text for turn in window.turns] == [turn.text for turn in turns]
        assert (len(window.images), window.images[window.turns[2].needles[0]]) == (2, PICTURES[1])
    said = Sample("talk", turns, PICTURES[:3], haystack=True)
    assert {draw_window(said, 2, 1, (draw,)).turns[0].text for draw in range(20)} == {turns[0].text, turns[2].text}


def test_a_window_is_never_too_small_for_its_question():
    sample = asked(0, 1, 2, 3, 4, "Do all with a truck show a dog?", needles=(1, 3))
    assert len(draw_window(sample, 1, 1, (0,)).images) == fewest_images(sample) == 2
    mixed = replace(sample, turns=(*sample.turns, Turn("user", ("And the bus?",), (0,)), Turn("assistant", ("yes",))))
    assert (fewest_images(mixed), most_needed(mixed)) == (1, 2)
    assert {draw_window(mixed, 1, 1, (draw,)).turns[0].text for draw in range(20)} == {"And the bus?"}


def test_images_of_a_system_turn_may_go_by_the_record_s_word():
    told = (Turn("system", (0, 1, 2, "Be brief.")), Turn("user", ("Red?",)), Turn("assistant", ("no",)))
    sample = Sample("told", told, PICTURES[:3], haystack=True)
    windows = [draw_window(sample, 2, 1, (draw,)) for draw in range(30)]
    assert {window.turns for window in windows} == {(replace(told[0], segments=(0, 1, "Be brief.")), *told[1:])}
    assert {window.images for window in windows} == {(PICTURES[a], PICTURES[b]) for a in range(3) for b in range(3) if a != b}


@pytest.fixture
def mixed(tmp_path):
    write_dataset(tmp_path / "haystacks", [make_sample(i, 6) for i in range(5)])
    plain = [replace(asked(0, 1, 2, "What colour?", images=3), key=f"plain-{i}") for i in range(5)]
    return plain, Dataset.open([tmp_path / "haystacks"])


def test_a_run_says_how_much_of_each_source_allows_windows(mixed, tmp_path):
    plain, haystack = mixed
    assert describe_windows(haystack, (1, 4)) == []
    write_dataset(tmp_path / "both", [*(make_sample(i, 6) for i in range(10, 12)), *plain])
    both = Dataset.open([tmp_path / "haystacks", tmp_path / "both"])
    (said,) = describe_windows(both, (1, 4))
    assert said.startswith(f"{tmp_path / 'both'}: 2 of 7 samples looked at allow windows of 1 to 4 images; 5 stay as they are")
    assert "5 stay as they are, plain-0 among them: it records no needles for a question" in said
    with pytest.raises(ValueError, match=r"both: 2 of 7 .*leave out data.tokens_per_pack or data.images"):
        describe_windows(both, (1, 4), packed=True)
    (said,) = describe_windows(both, (3, 4), packed=True)  # a window of 3 images is the whole sample
    assert said.endswith("2 of 7 samples looked at allow windows of 3 to 4 images; 5 are shorter anyway")


def test_a_source_without_haystacks_is_refused_with_a_sample_and_its_reason(mixed, tmp_path):
    write_dataset(tmp_path / "plain", mixed[0])
    with pytest.raises(ValueError, match=r"plain: 0 of 5 .*plain-0 among them: it records no needles .*build the shards with --haystack"):
        describe_windows(Dataset.open([tmp_path / "haystacks", tmp_path / "plain"]), (1, 2))


def test_a_pack_refuses_a_window_larger_than_it_was_planned_for(mixed):
    prepare = Prepare(lambda sample: None, 0, image_range=lambda step: (1, 2), packs=True)
    with pytest.raises(DataError, match=r"planned for a window of \d images, and the sample gives 3: it records no needles.*key plain-0"):
        prepare([[(0, mixed[0][0])]])
