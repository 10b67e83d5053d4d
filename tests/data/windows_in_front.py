"""A frozen copy of the rule for samples whose images all stand before the first question: its draws must never change."""

import random
from dataclasses import replace

from laid_ds.data.record import Sample, Turn


def draw_window(sample: Sample, images: int, questions: int | None, seed: tuple[int, ...]) -> Sample:
    """A window of `images` images that asks at most `questions` questions."""
    total = len(sample.images)
    images = min(images, total)
    rng = random.Random(repr(seed))
    asked = _questions(sample, images, questions, rng)
    needed = {needle for turn in asked for needle in sample.turns[turn].needles}
    others = [image for image in range(total) if image not in needed]
    kept = [*needed, *rng.sample(others, images - len(needed))]
    rng.shuffle(kept)
    return _rebuilt(sample, asked, kept)


def _questions(sample: Sample, images: int, most: int | None, rng: random.Random) -> list[int]:
    """Turn numbers of the questions of a window, in a random order, whose needles fit into it together."""
    order = [number for number, turn in enumerate(sample.turns) if turn.role == "user"]
    rng.shuffle(order)
    chosen: list[int] = []
    needed: set[int] = set()
    for number in order[:most]:
        together = needed | set(sample.turns[number].needles)
        if len(together) <= images:
            chosen.append(number)
            needed = together
    return chosen


def _rebuilt(sample: Sample, asked: list[int], kept: list[int]) -> Sample:
    """The sample with the images `kept` in that order at its start, then the asked questions with their answers."""
    place = {old: new for new, old in enumerate(kept)}
    turns: list[Turn] = [turn for turn in sample.turns if turn.role == "system"]
    for number in asked:
        question, answer = sample.turns[number], sample.turns[number + 1]
        text = tuple(segment for segment in question.segments if not isinstance(segment, int))
        shown = tuple(range(len(kept))) if not any(turn.role == "user" for turn in turns) else ()
        turns += [replace(question, segments=shown + text, needles=tuple(place[needle] for needle in question.needles)), answer]
    return replace(sample, turns=tuple(turns), images=tuple(sample.images[image] for image in kept))
