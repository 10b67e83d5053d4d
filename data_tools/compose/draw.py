"""Haystacks drawn from a pool: which questions, which distractors, where each needle stands. A pure function of pool, side and seed.

Answers are dealt from decks, so that each is asked as often as any other of the same choices, whatever the question's words; a question of
which some answer on offer is never true is asked once at most. Distractors bear nothing that a question excludes. Names that could give an
answer away (the choices; a class that a yes-or-no question names) are shown by as many pictures of a haystack as the answer is blind to.
"""

from __future__ import annotations

import hashlib
import random
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from data_tools.compose.decks import Deck, Once
from data_tools.compose.pool import YES_NO, Group, Picture, Pool, normal
from laid_ds.data.record import DataError

PACKS = 8  # of answers, shuffled into one deck
DEPTHS = 10  # parts of a haystack among which needles are dealt
MOST_WATCHED = 60  # bits of a number
TRIES = 60  # of a haystack, and of a needle for a question, before it is said that there is none


Dealt = tuple[Group, str, int]
"""A question, its answer, and the number of its needle."""
Cells = list[tuple[np.ndarray, int]]


@dataclass(frozen=True)
class Question:
    """A question as it stands in a haystack."""

    text: str
    answer: str
    choices: tuple[str, ...]
    needle: int
    """Place among the haystack's images."""
    watched: tuple[str, ...] = ()
    tells_what_is_shown: bool = False
    asks_whether_shown: bool = False
    bag_chance: float | None = None
    """What the bag of all images leaves to chance, where its maker knows."""


@dataclass(frozen=True)
class Draft:
    """A haystack without its bytes."""

    key: str
    pictures: tuple[Picture, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Shape:
    """How many haystacks, of how many images and questions."""

    samples: int
    images: tuple[int, int]
    questions: int = 1


def sides(pictures: Sequence[Picture], test_share: float, seed: int) -> np.ndarray:
    """[pictures] bool: which belong to the test. The share holds in every stratum, rounded, and by content: names play no part."""
    strata: dict[str, list[int]] = defaultdict(list)
    for number in sorted(range(len(pictures)), key=lambda i: hashlib.sha256(f"{seed} {pictures[i].digest}".encode()).digest()):
        strata[pictures[number].stratum].append(number)
    test = np.zeros(len(pictures), bool)
    for numbers in strata.values():
        test[numbers[: round(test_share * len(numbers))]] = True
    return test


def draw(pool: Pool, members: np.ndarray, shape: Shape, seed: str, prefix: str) -> Iterator[Draft]:
    """The haystacks of one side (`members`: [pictures] bool). Raises DataError with what is lacking."""
    drawer = Drawer(pool, members, shape, random.Random(seed))
    for number in range(shape.samples):
        yield drawer.haystack(f"{prefix}-{number:08d}")


class NoRoom(Exception):
    """This haystack cannot be made so; another draw may be."""


class Drawer:
    """Draws haystacks; what it has dealt is its state."""

    def __init__(self, pool: Pool, members: np.ndarray, shape: Shape, rng: random.Random):
        self.pictures, self.members, self.shape, self.rng = pool.pictures, members, shape, rng
        self.bearing, self.showing = (_index(pool.pictures, of) for of in ("bears", "shows"))
        self.usable = members & np.array([bool(picture.bears) for picture in pool.pictures])
        self.needles: dict[tuple[int, str], Deck] = {}
        self.answers: dict[Any, Deck] = {}
        self.sharing = Counter(group.choices for group in pool.groups)
        self.depths = Deck(lambda: range(DEPTHS), rng)
        here = [(group, [answer for answer in group.answers if len(self._here(group, answer))]) for group in pool.groups]
        self.even = [group for group, answers in here if _is_even(group, answers)]
        self.often = {id(group) for group in self.even}
        self.ends = list(accumulate(group.weight for group in self.even))
        self.once = self._asked_once([(group, answers) for group, answers in here if answers and not _is_even(group, answers)])
        self.dealt = 0
        if not self.even and not self.once:
            self._refuse_one_sided(here)

    def _refuse_one_sided(self, here: Sequence[tuple[Group, list[str]]]) -> None:
        given: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for group, answers in here:
            given[group.choices].update(answers)
        for choices, answers in given.items():
            if missing := [choice for choice in choices if choice not in answers]:
                raise DataError(
                    f"no picture answers {missing[0]!r} to a question that offers {', '.join(choices)}, so answers cannot be balanced"
                )
        raise DataError("no question can be asked of this side's pictures; it has too few")

    def _here(self, group: Group, answer: str) -> np.ndarray:
        """Numbers of this side's pictures that give an answer."""
        found = np.asarray(group.find(answer), np.int64)
        return found[self.members[found]]

    def haystack(self, key: str) -> Draft:
        """The next one."""
        reason = ""
        for _ in range(TRIES):
            size, asked = self.rng.randint(*self.shape.images), []
            try:
                return self._try(key, size, asked)
            except NoRoom as error:
                reason = str(error)
                for group, answer, needle in reversed(asked):
                    self._put_back(group, answer, needle)
        raise DataError(f"after {self.dealt} questions no haystack of {size} images can be made: {reason}")

    def _try(self, key: str, size: int, asked: list[Dealt]) -> Draft:
        if self.shape.questions > size:
            raise DataError(f"{self.shape.questions} questions need as many needles; the haystack has {size} images")
        for _ in range(self.shape.questions):
            self._ask(asked)
        pictures = [needle for _, _, needle in asked] + self._distractors(asked, size)
        places = self._places(len(asked), size)
        order = [-1] * size
        for place, picture in zip(places, pictures, strict=True):
            order[place] = picture
        self.dealt += len(asked)
        questions = tuple(
            Question(group.text, answer, group.choices, place, group.watched, group.tells_what_is_shown, group.asks_whether_shown)
            for (group, answer, _), place in zip(asked, places, strict=False)
        )
        return Draft(key, tuple(self.pictures[number] for number in order), questions)

    def _ask(self, asked: list[Dealt]) -> None:
        """Append one more question that can stand beside those in `asked`: of as many choices, about another picture."""
        reason = "no question is left"
        for _ in range(TRIES):
            group, answer = self._next_question()
            if asked and not _of_one_kind(group, asked[0][0]):
                self._put_back_answer(group, answer)
                reason = f"no other question offers {len(asked[0][0].choices)} choices"
                continue
            needle = self._needle(group, answer, asked)
            if needle is not None:
                asked.append((group, answer, needle))
                return
            self._put_back_answer(group, answer)
            reason = f"no needle for {group.text[:60]!r} can stand beside the other questions"
        raise NoRoom(reason)

    def _next_question(self) -> tuple[Group, str]:
        left = sum(len(cards) for cards in self.once.values())
        even = self.ends[-1] if self.ends else 0
        if not left and not even:
            raise DataError(
                f"only {self.dealt} questions could be asked, and none of them may come twice: a question whose answer is always the same "
                "would be learned without its picture. Add questions, or lower --samples or --questions"
            )
        if self.rng.random() * (left + even) < left:
            return self._once()
        group = self.even[bisect(self.ends, self.rng.random() * even)]
        return group, self._deal_answer(group.choices)

    def _once(self) -> tuple[Group, str]:
        """A question that is asked once: its choices by how many are left, its answer from their deck if all of them are there."""
        kinds = list(self.once)
        cards = self.once[self.rng.choices(kinds, [len(self.once[kind]) for kind in kinds])[0]]
        answer = cards.next_answer()
        return cards.pop(answer), answer

    def _asked_once(self, groups: Sequence[tuple[Group, list[str]]]) -> dict[tuple[str, ...], Once]:
        """Choices -> their questions of one answer. Those are left out whose choices several questions share and some are never true."""
        items: dict[tuple[str, ...], list[tuple[Group, str]]] = defaultdict(list)
        for group, answers in groups:
            if not group.often:
                items[group.choices].append((group, self.rng.choice(answers)))
        once = {choices: Once(choices, found, partial(self._deck_of, choices), self.rng) for choices, found in items.items()}
        return {choices: cards for choices, cards in once.items() if cards.is_even or not choices or self.sharing[choices] == 1}

    def _deal_answer(self, choices: tuple[str, ...]) -> str:
        return choices[self._deck_of(choices).deal()]

    def _deck_of(self, choices: tuple[str, ...]) -> Deck:
        """Places among the choices. What one question alone offers shares a deck with its like: dealt a few times from a deck of its own,
        its later answers would follow from its earlier ones."""
        name = choices if self.sharing[choices] > 1 else len(choices)
        return self.answers.setdefault(name, Deck(lambda: [*range(len(choices))] * self._packs(len(choices)), self.rng))

    def _packs(self, cards: int) -> int:
        """Of one deck: several, so that one answer of a haystack says little of the next; fewer at the end, which comes out even."""
        left = self.shape.samples * self.shape.questions - self.dealt
        return min(PACKS, max(1, left // cards))

    def _put_back(self, group: Group, answer: str, needle: int) -> None:
        self._put_back_answer(group, answer)
        self.needles[id(group), answer].put_back(needle)

    def _put_back_answer(self, group: Group, answer: str) -> None:
        if id(group) in self.often:
            self._deck_of(group.choices).put_back(group.choices.index(answer))
        else:
            self.once[group.choices].put_back(group, answer)

    def _needle(self, group: Group, answer: str, asked: Sequence[Dealt]) -> int | None:
        """A picture that gives the answer and goes with the other needles."""
        deck = self.needles.setdefault((id(group), answer), Deck(lambda: self._here(group, answer).tolist(), self.rng))
        passed, chosen = [], None
        for _ in range(TRIES):
            number = deck.deal()
            if self._go_together(group, number, asked):
                chosen = number
                break
            passed.append(number)
        deck.left[:0] = passed
        return chosen

    def _go_together(self, group: Group, number: int, asked: Sequence[Dealt]) -> bool:
        """Whether each needle may be the other question's distractor."""
        picture = self.pictures[number]
        for other, _, needle in asked:
            there = self.pictures[needle]
            if needle == number or other.text == group.text or not picture.bears or not there.bears:
                return False
            if other.excluded & set(group.watched) or group.excluded & set(other.watched):  # then only one of the answers could be
                return False
            if picture.bears & other.excludes or there.bears & group.excludes:
                return False
        return True

    def _distractors(self, asked: Sequence[Dealt], size: int) -> list[int]:
        number = size - len(asked)
        if not number:
            return []
        legal = self.usable.copy()
        for group, _, needle in asked:
            legal[needle] = False
            for label in group.excludes:
                legal[self.bearing.get(label, [])] = False
        if (there := int(legal.sum())) < number:
            raise NoRoom(f"{asked[0][0].text[:60]!r} needs {number} distractors, and its rule leaves {there} pictures")
        cells = self._blind_cells(asked, legal, number) or [(np.flatnonzero(legal), number)]
        chosen = [picture for cell, count in cells for picture in self._sample(cell, count)]
        self.rng.shuffle(chosen)
        return chosen

    def _sample(self, cell: np.ndarray, count: int) -> list[int]:
        return [int(cell[i]) for i in self.rng.sample(range(len(cell)), count)] if count else []

    def _blind_cells(self, asked: Sequence[Dealt], legal: np.ndarray, number: int) -> Cells | None:
        """(pictures, how many of them): numbers of distractors that show each watched name, drawn without a look at the answers and as
        widely as can be, so that one more that the needle shows is not seen. None where the pool's pictures allow no choice."""
        watched = list(dict.fromkeys(name for group, _, _ in asked for name in group.watched))[:MOST_WATCHED]
        if not watched:
            return None
        shown = np.zeros(len(legal), np.int64)  # bit j: shows the name j
        for j, name in enumerate(watched):
            shown[self.showing.get(name, [])] |= 1 << j
        numbers = np.flatnonzero(legal)
        order = np.argsort(shown[numbers], kind="stable")
        codes, starts = np.unique(shown[numbers[order]], return_index=True)
        cells = dict(zip(codes.tolist(), np.split(numbers[order], starts[1:]), strict=True))
        if not _is_yes_no(asked[0][0]):
            return self._any_composition(cells, len(watched), number)
        bits = [[1 << watched.index(name) for name in group.watched if name in watched] for group, _, _ in asked]
        return self._any_numbers(cells, [some for some in bits if some], number)

    def _any_numbers(self, cells: dict[int, np.ndarray], names: Sequence[Sequence[int]], number: int) -> Cells | None:
        """One of the names (bits) of each question is shown by any number of distractors, each as likely; by fewer where the pool has too
        few such pictures."""
        for attempt in range(TRIES):
            most = number * (TRIES - attempt) // TRIES
            codes = [0] * number
            for bits in names:
                for place in self.rng.sample(range(number), self.rng.randint(0, most)):
                    codes[place] |= self.rng.choice(bits)
            wanted = Counter(codes)
            if all(len(cells.get(code, ())) >= count for code, count in wanted.items()):
                return [(cells[code], count) for code, count in sorted(wanted.items())]
        return None

    def _any_composition(self, cells: dict[int, np.ndarray], names: int, number: int) -> Cells | None:
        """Each distractor shows one name, in any numbers, each as likely; where many show none, these are one kind more."""
        kinds = [cells[1 << j] for j in range(names) if 1 << j in cells]
        if len(cells.get(0, ())) >= number:
            kinds.append(cells[0])
        most = [len(kind) for kind in kinds]
        return list(zip(kinds, self._composition(number, most), strict=True)) if kinds and sum(most) >= number else None

    def _composition(self, number: int, most: Sequence[int]) -> list[int]:
        """A number as the sum of one part for each bound: each sum is as likely as any other, as far as the bounds allow."""
        cuts = sorted(self.rng.sample(range(number + len(most) - 1), len(most) - 1))
        parts = [end - start - 1 for start, end in pairwise([-1, *cuts, number + len(most) - 1])]
        over = sum(max(part - bound, 0) for part, bound in zip(parts, most, strict=True))
        parts = [min(part, bound) for part, bound in zip(parts, most, strict=True)]
        while over:
            place = self.rng.choice([i for i, bound in enumerate(most) if parts[i] < bound])
            parts[place], over = parts[place] + 1, over - 1
        return parts

    def _places(self, needles: int, size: int) -> list[int]:
        """Places of the needles, dealt over the depths, then those of the others."""
        taken: dict[int, None] = {}
        for _ in range(needles):
            place = int((self.depths.deal() + self.rng.random()) / DEPTHS * size)
            while place in taken:
                place = (place + 1) % size
            taken[place] = None
        return [*taken, *(place for place in range(size) if place not in taken)]


def _index(pictures: Sequence[Picture], of: str) -> dict[str, np.ndarray]:
    """Label -> numbers of the pictures that bear, or show, it."""
    found: dict[str, list[int]] = defaultdict(list)
    for number, picture in enumerate(pictures):
        for label in sorted(getattr(picture, of)):
            found[label].append(number)
    return {label: np.array(numbers) for label, numbers in found.items()}


def _is_yes_no(group: Group) -> bool:
    return {normal(choice) for choice in group.choices} == set(YES_NO)


def _of_one_kind(group: Group, other: Group) -> bool:
    return len(group.choices) == len(other.choices) and _is_yes_no(group) == _is_yes_no(other)


def _is_even(group: Group, answers: Sequence[str]) -> bool:
    """Whether each answer on offer is true of some picture: then the question may come again and again."""
    return len(answers) > 1 and set(answers) == set(group.choices)
