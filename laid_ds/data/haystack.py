"""Windows of a haystack: fewer images (or, where it has none, texts) and questions, in a new order, as a pure function of a seed.

One shard set of long haystacks serves every window length: a draw keeps the images that its questions need (their needles) and fills up
with others of the same sample, as Visual Haystacks does for its sizes. A sample that is no haystack has one window: itself.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace
from itertools import dropwhile, pairwise
from typing import TypeVar

from laid_ds.data.dataset import Dataset
from laid_ds.data.record import DataError, Record, Sample, Turn, num_pieces

Windowed = TypeVar("Windowed", Sample, Record)

LOOKED_AT = 64  # samples of each source that are looked at before a run
IMAGE = r"(?:images?|pictures?|pics?|photos?|photographs?|figures?|frames?|slides?|pages?)"
ORDINAL = r"(?:first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|last|\d+(?:st|nd|rd|th))"
BESIDE = r"(?:next|previous|middle|left|right)"
NUMBER = r"(?:one|two|three|four|five|six|seven|eight|nine|ten)"
BY_PLACE = re.compile(
    rf"\b{IMAGE}[\s\-_#(]{{0,4}}(?:no\.?\s?|number\s)?(?:\d+|{NUMBER}\b)"  # Image-2, picture #3, frame no. 4, image two
    rf"|\b{IMAGE}\s+(?-i:[A-HJ-Z]\b)"  # Image B
    rf"|\b(?:{ORDINAL}|{BESIDE})(?:\s+(?:of|in|among)\s+(?:the|these|those))?(?:\s+\w+)?\s+{IMAGE}\b"
    rf"|\b{IMAGE}\s+(?:(?:right|directly|immediately|just)\s+)?(?:before|after|between|on the (?:left|right))\b"
    rf"|\b(?:index|position|order)\s+of\s+(?:the\s+)?(?:\w+\s+)?{IMAGE}\b|\b{IMAGE}\s+(?:number|index|position)\b",
    re.IGNORECASE,
)
A_PLACE = re.compile(rf"\W*(?:the\s+)?{ORDINAL}(?:\s+(?:one|{IMAGE}))?\W*", re.IGNORECASE)  # as an answer
A_LABEL = re.compile(r"\W*(?:\d+|[A-H])\W*")  # a place, as the answer to which image
WHICH = re.compile(rf"\b(?:which|what)\s+(?:of\s+(?:the|these)\s+)?(?:one|{IMAGE})\b|\bwhich\s*\?", re.IGNORECASE)


def why_whole(sample: Sample | Record) -> str | None:
    """Why the images of a sample may neither be left out nor moved, as the rest of a sentence about it; None for a haystack.

    A haystack says so itself: each of its questions records needles, or the record says `haystack`. Needles are no leave to break a text
    that names images by their place in the order.
    """
    spoken = list(dropwhile(lambda turn: turn.role == "system", sample.turns))
    questions, answers = spoken[::2], spoken[1::2]
    if not num_pieces(sample):
        return "has no images"
    if not answers or [turn.role for turn in spoken] != ["user", "assistant"] * len(answers):
        return "is not a row of questions, each with its answer"
    shown = [segment for turn in sample.turns for segment in turn.segments if isinstance(segment, int)]
    if len(shown) > len(sample.images):
        return "shows an image twice"
    if any(_images(turn) for turn in answers):
        return "shows an image in an answer"
    if not all(turn.supervised for turn in answers):
        return "has an answer that is only read, as what comes before another one"
    if sum(not set(_images(turn)) <= set(sample.fixed) for turn in sample.turns) > 1:
        return "shows its images in several turns"
    if sample.haystack:
        return None
    if not all(turn.needles for turn in questions):
        return "records no needles for a question, nor does it say that it is a haystack"
    return names_a_place(sample)


def _images(turn: Turn) -> list[int]:
    return [segment for segment in turn.segments if isinstance(segment, int)]


def names_a_place(sample: Sample | Record) -> str | None:
    """Which words of a sample name an image by its place in the order, as the rest of a sentence; as far as English words can tell."""
    for turn in sample.turns:
        if found := BY_PLACE.search(turn.text):
            return f"names an image by its place ({found[0]!r})"
    for question, answer in pairwise(sample.turns):
        for said in (answer.text, *question.choices) if question.role == "user" else ():
            if A_PLACE.fullmatch(said) or (A_LABEL.fullmatch(said) and WHICH.search(question.text)):
                return f"names an image by its place (the answer {said!r})"
    return None


def images_drawn(seed: int, position: int, bounds: tuple[int, int]) -> int:
    """How many images the window at a position of the stream has."""
    return random.Random(f"images {seed} {position}").randint(*bounds)


def fewest_images(sample: Sample | Record) -> int:
    """Images of the smallest window of a sample that asks one question at least: all of them where it stays whole."""
    if why_whole(sample) is not None:
        return num_pieces(sample)
    return max(1, min(len(needed) for needed in _needed(sample).values()))


def most_needed(sample: Sample | Record) -> int:
    """Images of the smallest window in which each question of a sample can be asked: all of them where it stays whole."""
    if why_whole(sample) is not None:
        return num_pieces(sample)
    return max(1, max(len(needed) for needed in _needed(sample).values()))


def _needed(sample: Sample | Record) -> dict[int, set[int]]:
    """Turn number of each question -> the images that a window must hold for it, those of questions that cannot be left out included."""
    needed = {number: {*turn.needles, *sample.fixed} for number, turn in enumerate(sample.turns) if turn.role == "user"}
    for number in _standing(sample):
        needed = {other: images | needed[number] for other, images in needed.items()}
    return needed


def _standing(sample: Sample | Record) -> list[int]:
    """Turn numbers of the questions that are always asked, and asked in order: those that hold images among their words, or fixed ones;
    and all where needles are those of the whole conversation, whose later questions may lean on earlier ones."""
    asked = [number for number, turn in enumerate(sample.turns) if turn.role == "user"]
    if not sample.haystack and len({sample.turns[number].needles for number in asked}) == 1:
        return asked
    return [] if _images_lead(sample) else [number for number in asked if _images(sample.turns[number])]


def _images_lead(sample: Sample | Record) -> bool:
    """Whether all images stand at the beginning of the first question, none of them fixed: then they belong to no question's words."""
    first = next(turn for turn in sample.turns if turn.role == "user")
    count = len(sample.images)
    return not sample.fixed and sorted(segment for segment in first.segments[:count] if isinstance(segment, int)) == list(range(count))


def draw_window(sample: Windowed, images: int, questions: int | None, seed: tuple[int, ...]) -> Windowed:
    """A window of `images` images that asks at most `questions` of the sample's questions (all when None).

    Which questions, which other images, and the order of all images follow from `seed` alone. Asks fewer questions when their needles
    would not fit. A sample with fewer images gives all it has, one whose questions all need more gives `fewest_images`, and one that is no
    haystack is given as it is.

    Images at the beginning of the first question lead the first question asked, and questions come in a random order, unless all need the
    same images by their needles alone: then they are one conversation. Otherwise questions and words keep their order, questions that hold
    images are always asked, and images change places with each other; where words stand between them, only if the record says `haystack`,
    since the words may speak of them.
    """
    if why_whole(sample) is not None:
        return sample
    total = num_pieces(sample)
    images = min(max(images, fewest_images(sample)), total)
    rng = random.Random(repr(seed))
    asked = _questions(sample, images, questions, rng)
    needed = {needle for turn in asked for needle in sample.turns[turn].needles if needle not in sample.fixed}
    others = [image for image in range(total) if image not in needed and image not in sample.fixed]
    kept = [*needed, *rng.sample(others, images - len(sample.fixed) - len(needed))]
    rng.shuffle(kept)
    return _led(sample, asked, kept) if _images_lead(sample) else _renumbered(sample, _in_place(sample, asked, kept))


def evidence(window: Windowed, distractors: int, seed: tuple[object, ...]) -> Windowed:
    """The same turns with only the images that the questions need, `fixed` ones, and `distractors` others drawn by `seed`, in their order.

    Raises DataError for a sample that may not lose images, or of which a question records no needles.
    """
    bare = [turn for turn in window.turns if turn.role == "user" and not turn.needles]
    whole = why_whole(window) or ("records no needles for a question" if bare else None)
    if whole is not None:
        raise DataError(f'teacher.sees = "needles" leaves out images, and of this sample none may be left out: it {whole}', key=window.key)
    needed = {*window.fixed, *(needle for turn in window.turns for needle in turn.needles)}
    others = [piece for piece in range(num_pieces(window)) if piece not in needed]
    kept = needed.union(random.Random(repr(seed)).sample(others, min(distractors, len(others))))
    if not window.images:
        return _led(window, [number for number, turn in enumerate(window.turns) if turn.role == "user"], sorted(kept))

    def with_kept(turn: Turn) -> Turn:
        return replace(turn, segments=tuple(s for s in turn.segments if isinstance(s, str) or s in kept) or ("",))

    return _renumbered(window, [with_kept(turn) for turn in window.turns])


def why_needle_stays(sample: Sample | Record) -> str | None:
    """Why its one needle cannot be put elsewhere without changing the question, as the rest of a sentence about a sample; None where it
    can."""
    asked = [turn for turn in sample.turns if turn.role == "user"]
    reason = why_whole(sample)
    if reason is None and (len(asked) != 1 or len(asked[0].needles) != 1):
        reason = f"has {len(asked)} questions with {sum(len(turn.needles) for turn in asked)} needles, not one with one"
    return reason if reason is not None or _images_lead(sample) else "shows images among its words"


def needle_at(sample: Sample, place: int) -> Sample:
    """The sample with its one needle as image number `place`, the other images in their order. Raises DataError where that would change
    the question."""
    if reason := why_needle_stays(sample):
        raise DataError(f"the needle cannot be moved: the sample {reason}", key=sample.key)
    number, question = next((number, turn) for number, turn in enumerate(sample.turns) if turn.role == "user")
    (needle,) = question.needles
    others = [piece for piece in range(num_pieces(sample)) if piece != needle]
    return _led(sample, [number], [*others[:place], needle, *others[place:]])


def _questions(sample: Sample | Record, images: int, most: int | None, rng: random.Random) -> list[int]:
    """Turn numbers of the questions of a window whose needles fit into it together: in a random order, or as they stand."""
    order = [number for number, turn in enumerate(sample.turns) if turn.role == "user"]
    rng.shuffle(order)
    needs, chosen = _needed(sample), _standing(sample)
    free = [number for number in order if number not in chosen]
    needed = set().union(*(needs[number] for number in chosen))
    for number in free[: None if most is None else max(most - len(chosen), 0)]:
        together = needed | needs[number]
        if len(together) <= images:
            chosen.append(number)
            needed = together
    if not chosen:
        chosen = [next(number for number in order if len(needs[number]) <= images)]
    return sorted(chosen) if _standing(sample) else chosen


def _led(sample: Windowed, asked: list[int], kept: list[int]) -> Windowed:
    """The images, or texts, `kept` in that order at the start, then the asked questions with their answers."""
    if sample.images:
        return _renumbered(sample, _leading(sample, asked, kept))
    texts = next(turn for turn in sample.turns if turn.role == "user").segments
    place = {old: new for new, old in enumerate(kept)}
    turns: list[Turn] = [turn for turn in sample.turns if turn.role == "system"]
    for first, number in enumerate(asked):
        question, answer = sample.turns[number], sample.turns[number + 1]
        lead = () if first else tuple(texts[text] for text in kept)
        words = "".join(texts[-1:] if question.segments is texts else question.segments)
        turns += [replace(question, segments=(*lead, words), needles=tuple(place[needle] for needle in question.needles)), answer]
    return replace(sample, turns=tuple(turns))


def _leading(sample: Sample | Record, asked: list[int], kept: list[int]) -> list[Turn]:
    """The images `kept` in that order at the start, then the asked questions with their answers."""
    turns: list[Turn] = [turn for turn in sample.turns if turn.role == "system"]
    for place, number in enumerate(asked):
        question, answer = sample.turns[number], sample.turns[number + 1]
        text = tuple(segment for segment in question.segments if isinstance(segment, str))
        turns += [replace(question, segments=(*kept, *text) if place == 0 else text), answer]
    return turns


def _in_place(sample: Sample | Record, asked: list[int], kept: list[int]) -> list[Turn]:
    """The turns with the images `kept`, in that order, in the places that remain."""
    if not (sample.haystack or _side_by_side(sample)):
        kept = sorted(kept, key=[image for turn in sample.turns for image in _images(turn)].index)
    places, fixed, chosen = iter(kept), set(sample.fixed), set(kept)

    def windowed(turn: Turn) -> Turn:
        segments = [segment for segment in turn.segments if isinstance(segment, str) or segment in fixed | chosen]
        moved = tuple(next(places) if segment in chosen else segment for segment in segments)
        return replace(turn, segments=moved or ("",))

    answered = {number + 1 for number in asked}
    return [windowed(turn) for number, turn in enumerate(sample.turns) if turn.role == "system" or number in answered.union(asked)]


def _side_by_side(sample: Sample | Record) -> bool:
    """Whether no words stand between the images that may move."""
    loose = [
        [place for place, segment in enumerate(turn.segments) if isinstance(segment, int) and segment not in sample.fixed]
        for turn in sample.turns
    ]
    between = [turn.segments[places[0] : places[-1]] for turn, places in zip(sample.turns, loose, strict=True) if places]
    return not any(isinstance(segment, str) and segment.strip() for segments in between for segment in segments)


def _renumbered(sample: Windowed, turns: list[Turn]) -> Windowed:
    """The sample with these turns and the images that they show, numbered in the order in which they come."""
    kept = [segment for turn in turns for segment in turn.segments if isinstance(segment, int)]
    place = {old: new for new, old in enumerate(kept)}

    def numbered(turn: Turn) -> Turn:
        segments = tuple(place[segment] if isinstance(segment, int) else segment for segment in turn.segments)
        return replace(turn, segments=segments, needles=tuple(place[needle] for needle in turn.needles))

    images, fixed = tuple(sample.images[image] for image in kept), tuple(place[image] for image in sample.fixed)
    return replace(sample, turns=tuple(numbered(turn) for turn in turns), images=images, fixed=fixed)


def describe_windows(dataset: Dataset, bounds: tuple[int, int], packed: bool = False) -> list[str]:
    """A sentence on each source of which not every sample allows windows of [least, most] images: how many of some samples, spread over
    it, do, and why others do not. Records alone are read.

    Raises ValueError for a source of which none does, and with `packed`, where packs are planned by the lengths of windows that nobody has
    drawn yet, for one of which any does not.
    """
    filled = [source for source, sizes in enumerate(dataset.source_shard_sizes) if sizes.sum()]
    found = [_describe_source(dataset, source, bounds, packed) for source in filled]
    return [sentence for sentence in found if sentence is not None]


def _describe_source(dataset: Dataset, source: int, bounds: tuple[int, int], packed: bool) -> str | None:
    least, most = bounds
    chosen = dataset.spread(source, LOOKED_AT)
    records = {dataset.keys[i].decode(): dataset.record(i) for i in chosen}
    found = {key: (why_whole(record), fewest_images(record)) for key, record in records.items()}
    small = [key for key, (whole, fewest) in found.items() if whole and fewest <= least]
    fitting = [key for key, (whole, fewest) in found.items() if not whole and fewest <= (least if packed else most)]
    others: dict[str, list[str]] = {}
    for key in found.keys() - set(fitting) - set(small):
        whole, _ = found[key]
        reason = whole.partition(" (")[0] if whole else "needs more images for any question"
        others.setdefault(reason, []).append(key)
    sentence = f"{dataset.folders[source]}: {len(fitting)} of {len(chosen)} samples looked at allow windows of {least} to {most} images"
    sentence += f"; {len(small)} are shorter anyway" if small else ""
    for reason, keys in sorted(others.items()):
        sentence += f"; {len(keys)} stay as they are, {min(keys)} among them: it {reason}"
    if not fitting + small:
        raise ValueError(
            f"{sentence}. Leave out data.images, or build the shards with --haystack if their questions stay true whichever images stay"
        )
    if packed and others:
        raise ValueError(f"{sentence}. Packs are planned by the lengths of windows: leave out data.tokens_per_pack or data.images")
    return sentence if len(fitting) < len(chosen) else None


def check_planned(window: Sample, sample: Sample, images: int) -> None:
    """Raises DataError when a window has more images than the `images` by which its pack was planned."""
    if num_pieces(window) > min(images, num_pieces(sample)):
        reason = why_whole(sample) or f"needs {num_pieces(window)} images for any question"
        raise DataError(
            f"its pack was planned for a window of {images} images, and the sample gives {num_pieces(window)}: it {reason}; leave out "
            "data.tokens_per_pack or data.images",
            key=sample.key,
        ).at(sample.origin)
