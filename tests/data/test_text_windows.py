"""Windows of haystacks of text: as of images, every needle is inside, answers stay true, everything follows from the seed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laid_ds.data.haystack import draw_window, evidence, fewest_images, needle_at, why_needle_stays, why_whole
from laid_ds.data.record import DataError, Origin, Sample, Turn, decode, encode, num_pieces

ORIGIN = Origin("a.tar", "k", 0)


def facts(number: int, asked: list[int]) -> Sample:
    """Facts "key 3: value 3", of which some are asked."""
    turns: list[Turn] = []
    for needle in asked:
        lead = () if turns else tuple(f"key {i}: value {i}\n" for i in range(number))
        turns += [Turn("user", (*lead, f"key {needle}:"), needles=(needle,)), Turn("assistant", (f"value {needle}",))]
    return Sample("k", tuple(turns), haystack=True)


def check_true(window: Sample) -> list[str]:
    """Each question's needle is the fact that it asks about, and its answer is that fact's; what is asked."""
    shown, asked = window.turns[0].segments[:-1], []
    for question, answer in zip(window.turns[::2], window.turns[1::2], strict=True):
        words = question.segments[-1]
        (needle,) = question.needles
        assert shown[needle] == f"{words} {answer.text}\n"
        asked.append(words)
    assert all(len(turn.segments) == 1 for turn in window.turns[1:])
    return asked


@given(number=st.integers(1, 40), size=st.integers(1, 45), most=st.integers(1, 12) | st.none(), seed=st.integers(0, 99), data=st.data())
def test_a_window_holds_so_many_facts_its_needles_and_the_same_answers(number, size, most, seed, data):
    asked = data.draw(st.lists(st.integers(0, number - 1), min_size=1, max_size=8, unique=True))
    sample = facts(number, asked)
    window = draw_window(sample, size, most, (seed,))
    assert num_pieces(window) == min(size, number) == len(set(window.turns[0].segments[:-1]))
    questions = check_true(window)
    assert len(questions) == len(set(questions)) == min(len(asked), size, most or 99)
    assert set(questions) <= {f"key {needle}:" for needle in asked}
    assert draw_window(sample, size, most, (seed,)) == window
    assert decode(encode(window), [], ORIGIN).turns == window.turns, "a window is a record, too"
    again = draw_window(window, 1, 1, (seed,))
    assert num_pieces(again) == len(check_true(again)) == 1


def test_facts_come_in_any_order_and_needles_at_any_depth():
    sample = facts(10, [3])
    places = [draw_window(sample, 5, 1, (i,)).turns[0].needles[0] for i in range(500)]
    assert all(60 < places.count(place) < 140 for place in range(5))


def test_a_needle_is_moved_and_everything_else_keeps_its_order():
    sample = facts(6, [3])
    assert why_needle_stays(sample) is None
    for place in range(6):
        moved = needle_at(sample, place)
        assert moved.turns[0].needles == (place,)
        check_true(moved)
        others = [text for i, text in enumerate(moved.turns[0].segments[:-1]) if i != place]
        assert others == [text for i, text in enumerate(sample.turns[0].segments[:-1]) if i != 3]


@pytest.mark.parametrize("distractors", [0, 1, 4, 99])
def test_evidence_is_the_needles_and_so_many_other_facts(distractors):
    sample = facts(9, [7, 2, 5])
    shown = evidence(sample, distractors, (0,))
    assert check_true(shown) == check_true(sample)
    assert num_pieces(shown) == min(9, 3 + distractors)
    places = [sample.turns[0].segments.index(text) for text in shown.turns[0].segments[:-1]]
    assert places == sorted(places)


def test_text_without_needles_stays_as_it_is():
    plain = Sample("k", (Turn("user", ("one ", "two ", "which?")), Turn("assistant", ("one",))), haystack=True)
    assert num_pieces(plain) == 0
    assert why_whole(plain) == "has no images"
    assert draw_window(plain, 1, 1, (0,)) is plain


def test_a_question_that_needs_two_facts_takes_a_window_of_two():
    first = Turn("user", ("key 0: a\n", "key 1: b\n", "key 2: c\n", "both:"), needles=(0, 2))
    sample = Sample("k", (first, Turn("assistant", ("a c",))), haystack=True)
    assert fewest_images(sample) == 2
    assert set(draw_window(sample, 1, 1, (0,)).turns[0].segments) == {"key 0: a\n", "key 2: c\n", "both:"}


@pytest.mark.parametrize("needle", [3, -1, True])
def test_a_needle_that_is_no_text_of_the_first_question_is_refused(needle):
    sample = facts(3, [1])
    wrong = replace(sample, turns=(replace(sample.turns[0], needles=(needle,)), sample.turns[1]))
    with pytest.raises(DataError, match="3 texts before what it asks"):
        encode(wrong)
