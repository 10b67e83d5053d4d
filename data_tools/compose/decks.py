"""Decks from which answers, needles and depths are dealt, so that each comes as often as any other."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from data_tools.compose.pool import Group

HAND = 512  # cards of a large deck


class Deck:
    """Deals its cards in random order, all of them before one comes again (of a large deck, HAND of them)."""

    def __init__(self, cards: Callable[[], Sequence], rng: random.Random):
        self.cards, self.rng, self.left = cards, rng, []

    def deal(self):
        if not self.left:
            cards = self.cards()
            self.left = [cards[i] for i in self.rng.sample(range(len(cards)), min(len(cards), HAND))]
        return self.left.pop()

    def put_back(self, card) -> None:
        """On top: it is the next."""
        self.left.append(card)


class Once:
    """Questions of the same choices, each dealt once."""

    def __init__(self, choices: tuple[str, ...], items: Iterable[tuple[Group, str]], deck: Callable[[], Deck], rng: random.Random):
        self.choices, self.deck, self.rng = choices, deck, rng
        self.left: dict[str, list[Group]] = defaultdict(list)
        for group, answer in items:
            self.left[answer].append(group)
        for groups in self.left.values():
            rng.shuffle(groups)
        self.is_even = len(choices) > 1 and set(self.left) == set(choices)

    def __len__(self) -> int:
        if self.is_even:  # balanced: over when one answer is
            return min(len(groups) for groups in self.left.values()) * len(self.choices)
        return sum(len(groups) for groups in self.left.values())

    def next_answer(self) -> str:
        if self.is_even:
            return self.choices[self.deck().deal()]
        return self.rng.choices(list(self.left), [len(groups) for groups in self.left.values()])[0]

    def pop(self, answer: str) -> Group:
        return self.left[answer].pop()

    def put_back(self, group: Group, answer: str) -> None:
        if self.is_even:
            self.deck().put_back(self.choices.index(answer))
        self.left[answer].insert(self.rng.randint(0, len(self.left[answer])), group)
