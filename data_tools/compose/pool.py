"""What haystacks are composed of: pictures with what is known of them, and questions that one picture answers. All of it is untrusted.

A picture *bears* labels, and a question *excludes* labels: those that no other picture of its haystack may bear. Every rule about
distractors is this one. Apart from that a picture *shows* names (classes, words of captions, its own answers), by which haystacks are made
even and shortcuts are looked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from laid_ds.data.record import DataError

YES_NO = ("yes", "no")
WORD = re.compile(r"[a-z0-9]+(?:['-][a-z0-9]+)*")
LONGEST_NAME = 4  # words of a class
LITTLE_WORDS = (
    "a about above all an and any are as at be been behind by can colour color could did do does down each for from had has have he her "
    "here his how i if image images in inside into is it its kind like many more much near next no not of off on one only or other out "
    "over photo picture she show shown shows side so some than that the their them then there these they this those to two type under up "
    "very was we were what when where which while who whose why will with without you your"
)
SAYS_LITTLE = frozenset(LITTLE_WORDS.split())


@dataclass(frozen=True)
class Row:
    """One line of somebody's file: a picture, what is known of it, and at most one question about it."""

    place: str
    """Where it stands, for sentences."""
    image: Any
    """As the pool's reader takes it; its name, or a key of the source."""
    question: str = ""
    answer: str = ""
    choices: tuple[str, ...] = ()
    about: tuple[str, ...] = ()
    """Classes, or words, that the question is about: what tells its picture from the others."""
    shows: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    listed: bool = False
    """All its classes are known, even if there are none."""


@dataclass(frozen=True)
class Picture:
    name: str
    source: Any
    digest: str
    """sha256 of its bytes: what makes it this picture, whatever its name."""
    mark: tuple[int, int]
    """crc32 and number of its bytes, as records of shards declare them."""
    bears: frozenset[str]
    shows: frozenset[str]
    stratum: str = ""
    """Pictures of one stratum are dealt to train and test in the same shares."""


@dataclass(frozen=True)
class Group:
    """One question, word for word, and the pictures that answer it."""

    text: str
    choices: tuple[str, ...]
    answers: tuple[str, ...]
    """Those that it has in this pool."""
    find: Callable[[str], Sequence[int]]
    """Numbers of the pictures that give an answer."""
    excludes: frozenset[str]
    watched: tuple[str, ...] = ()
    """Names whose number of pictures in a haystack must not tell the answer."""
    tells_what_is_shown: bool = False
    """The answer is what the haystack shows once: whoever sees all of its pictures knows it."""
    asks_whether_shown: bool = False
    """A yes-or-no question about the watched names: yes where the needle shows one of them."""
    weight: float = 1.0
    often: bool = False
    """Only to be asked where each of its choices is true of some picture."""

    @cached_property
    def excluded(self) -> frozenset[str]:
        """The names in the labels that it excludes."""
        return frozenset(label.partition(" ")[2] for label in self.excludes)


@dataclass
class Pool:
    pictures: list[Picture]
    groups: list[Group]
    read: Callable[[Picture], bytes]
    left_out: dict[str, int] = field(default_factory=dict)
    """Reason -> how many."""
    rejected: list[dict[str, str]] = field(default_factory=list)
    """What `--skip-bad` went on after: {"place", "reason"}."""
    listed: dict[str, int] = field(default_factory=dict)
    """Option that adds facts (--instances, --captions) -> of how many pictures its files say something."""


def normal(name: str) -> str:
    """A class, answer or question as it is compared."""
    return " ".join(name.casefold().split())


def words_of(text: str) -> frozenset[str]:
    """Words of a text that say something, singular as far as their ending tells."""
    return frozenset(singular(word) for word in WORD.findall(text.casefold()) if word not in SAYS_LITTLE)


def singular(word: str) -> str:
    """The word without the ending of an English plural; the same for both forms of most words."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ses", "xes", "ches", "shes")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us")) else word


def named_in(text: str, names: Mapping[tuple[str, ...], str]) -> list[str]:
    """Names (by `name_key`) that stand in a text, longest first: "hot dog" names no dog."""
    words = [singular(word) for word in WORD.findall(text.casefold())]
    found: dict[str, None] = {}
    place = 0
    while place < len(words):
        for length in range(min(LONGEST_NAME, len(words) - place), 0, -1):
            if name := names.get(tuple(words[place : place + length])):
                found[name] = None
                place += length - 1
                break
        place += 1
    return list(found)


def name_key(name: str) -> tuple[str, ...]:
    """How `named_in` looks a name up."""
    return tuple(singular(word) for word in WORD.findall(name.casefold()))


def name_table(names: Iterable[str]) -> dict[tuple[str, ...], str]:
    """The table for `named_in`."""
    return {name_key(name): name for name in sorted(names)}


def with_question(row: Row) -> Row:
    """The row. Raises DataError for an answer, or answers to choose from, that no question stands before."""
    if not row.question and (row.answer or row.choices):
        said = f"answer {row.answer[:40]!r}" if row.answer else f"choices {str(list(row.choices))[:80]}"
        raise DataError(f"{row.place}: {said} without a question; give the question, or leave it out")
    return row


def check_question(row: Row) -> None:
    """Raises DataError for a question that cannot stand in a haystack."""
    try:
        "".join((row.question, row.answer, *row.choices, *row.about)).encode()
    except UnicodeEncodeError:
        raise DataError(f"{row.place}: the question or its answers hold half a surrogate pair") from None
    if not row.answer.strip():
        raise DataError(f"{row.place}: the question {row.question[:60]!r} has no answer")
    if row.choices and row.answer not in row.choices:
        raise DataError(f"{row.place}: answer {row.answer[:40]!r} is none of the choices {str(list(row.choices))[:80]}")
    if len(set(row.choices)) != len(row.choices):
        raise DataError(f"{row.place}: choices {str(list(row.choices))[:80]} name one answer twice")
    if len(row.choices) == 1:
        raise DataError(f"{row.place}: choices {str(list(row.choices))[:80]} leave nothing to choose; give two or more, or none")
