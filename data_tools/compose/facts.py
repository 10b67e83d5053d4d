"""From rows to a pool: pictures are read once, what is known of them becomes labels, and rules say what a distractor must not be."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

from data_tools.compose.pool import (
    YES_NO,
    Group,
    Picture,
    Pool,
    Row,
    check_question,
    name_key,
    name_table,
    named_in,
    normal,
    with_question,
    words_of,
)
from data_tools.console import track
from laid_ds.data.haystack import names_a_place
from laid_ds.data.record import DataError, Sample, Turn, describe

Rule = Literal["class", "caption", "question"]
READ_AHEAD = 64


@dataclass(frozen=True)
class Rules:
    """What the user says of distractors and answers."""

    rule: Rule | None = None
    lead: str = ""
    """Words before a question that name a class which only its picture shows, at {class}."""
    answers: tuple[str, ...] = ()
    choices: int | None = None
    skip_bad: bool = False
    jobs: int = 1


@dataclass(frozen=True)
class Asked:
    """A question of a row as it will be asked."""

    text: str
    answer: str
    choices: tuple[str, ...]
    picture: int
    excludes: frozenset[str]
    place: str


def pool_of(rows: Iterable[Row | DataError], read: Callable[[Any], bytes], name_of: Callable[[Any], str], rules: Rules) -> Pool:
    """The pool of rows that hold their questions themselves. Raises DataError with the place of what is wrong."""
    if rules.rule is None and not rules.lead:
        raise ValueError(
            "say what tells the picture of a question from its distractors: --rule class (none of them shows the class asked about), "
            "--rule caption (no caption of theirs holds a word that question and caption share), --rule question (no other picture that "
            'is asked the same question), or --lead "For the image with the {class}: " (a class that no distractor shows is named first)'
        )
    if rules.lead and "{class}" not in rules.lead:
        raise ValueError(f"--lead {rules.lead!r} must say where the class stands: {{class}}")
    if rules.lead and rules.rule not in (None, "class"):
        raise ValueError(f"--lead names a class, so distractors are chosen by class; leave out --rule {rules.rule}")
    good = Sieve(rules.skip_bad)
    rows = good.keep(rows, with_question)
    pictures = read_pictures(rows, read, name_of, rules.jobs, good)
    rows = [row for row in rows if row.image in pictures]
    numbers = {image: number for number, image in enumerate(pictures)}
    known = _known(rows)
    left_out: Counter[str] = Counter()
    asked = _asked(rows, numbers, known, rules, good, left_out)
    said = _answers_that_say_much(asked, [known[image] for image in pictures], rules)
    found = [_labelled(picture, known[image], rules, said) for image, picture in pictures.items()]
    silent = sum(not picture.bears for picture in found)
    if silent:
        left_out["pictures that nothing is known of, never distractors"] = silent
    names = name_table(name for picture in found for name in picture.shows)
    groups = groups_of(asked, found, names, rules, left_out)
    return Pool(found, groups, lambda picture: read(picture.source), dict(+left_out), good.rejected)


class Sieve:
    """Lets good things through. What is refused stops everything, or with `skip_bad` is noted."""

    def __init__(self, skip_bad: bool):
        self.skip_bad = skip_bad
        self.rejected: list[dict[str, str]] = []

    def refuse(self, error: DataError) -> None:
        if not self.skip_bad:
            raise error
        self.rejected.append({"reason": error.reason})

    def keep(self, items: Iterable[Any], make: Callable[[Any], Any]) -> list[Any]:
        """What `make` makes of the items, without those that are errors or of which it makes one."""
        kept = []
        for item in items:
            try:
                if isinstance(item, DataError):
                    raise item
                kept.append(make(item))
            except DataError as error:
                self.refuse(error)
        return kept


def read_pictures(rows: Sequence[Row], read: Callable[[Any], bytes], name_of: Callable[[Any], str], jobs: int, good: Sieve) -> dict:
    """image -> Picture, in the order of the rows, each read once. Two names for one picture are refused."""
    first = {}
    for row in rows:
        first.setdefault(row.image, row.place)

    def look(image: Any) -> Picture | DataError:
        try:
            data = read(image)
            info = describe(data)
        except DataError as error:
            return DataError(f"{first[image]}: {error.reason}")
        digest, mark = hashlib.sha256(data).hexdigest(), (info.crc32, info.num_bytes)
        return Picture(name_of(image), image, digest, mark, frozenset(), frozenset())

    def unlike(picture: Picture | DataError) -> Picture:
        if isinstance(picture, DataError):
            raise picture
        if (other := by_digest.setdefault(picture.digest, picture.name)) != picture.name:
            place = first[picture.source]
            raise DataError(f"{place}: {picture.name!r} and {other!r} are the same picture, byte for byte; keep one of them")
        return picture

    by_digest: dict[str, str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        looked = track(_in_order(pool, look, list(first)), "read pictures", len(first))
        return {picture.source: picture for picture in good.keep(looked, unlike)}


def _in_order(pool: ThreadPoolExecutor, work: Callable, items: list) -> Iterable[Any]:
    """Results in the order of the items, a bounded number of them ahead: an interrupt need not wait for all."""
    for start in range(0, len(items), READ_AHEAD):
        yield from pool.map(work, items[start : start + READ_AHEAD])


@dataclass
class Known:
    """What all rows together say of a picture."""

    classes: set[str]
    words: set[str]
    asked: set[str]
    answers: set[str]
    listed: bool = False


def _known(rows: Iterable[Row]) -> dict[Any, Known]:
    known: dict[Any, Known] = defaultdict(lambda: Known(set(), set(), set(), set()))
    for row in rows:
        picture = known[row.image]
        picture.classes |= {normal(name) for name in (*row.shows, *row.about)}
        picture.listed |= row.listed
        picture.words |= {word for caption in row.captions for word in words_of(caption)}
        if row.question:
            picture.asked.add(normal(row.question))
            picture.answers |= {normal(row.answer)} - set(YES_NO)
    return known


def _answers_that_say_much(asked: Sequence[Asked], known: Sequence[Known], rules: Rules) -> set[str]:
    """Answers of which most pictures give one: that a needle alone gives its answer says nothing of the others."""
    offered = {one.choices for one in asked if one.choices} | ({rules.answers} if rules.answers else set())
    by_text: dict[str, set[str]] = defaultdict(set)
    for one in asked:
        by_text[one.text].add(one.answer)
    kinds = {frozenset(map(normal, answers)) for answers in (*offered, *by_text.values()) if len(answers) > 1}
    return {name for kind in kinds if 2 * sum(bool(kind & picture.answers) for picture in known) >= len(known) for name in kind}


def _labelled(picture: Picture, known: Known, rules: Rules, said: set[str]) -> Picture:
    bears = {f"class {name}" for name in known.classes} if rules.lead or rules.rule == "class" else set()
    bears |= {"listed"} if known.listed else set()
    if rules.rule == "caption":
        bears |= {f"word {word}" for word in known.words}
    if not rules.lead:
        bears |= {f"asked {text}" for text in known.asked}
    shows = known.classes | known.words | (known.answers & said)
    return replace(picture, bears=frozenset(bears), shows=frozenset(shows))


def _asked(rows: Sequence[Row], numbers: dict, known: dict[Any, Known], rules: Rules, good: Sieve, left_out: Counter[str]) -> list[Asked]:
    """The questions of all rows; with a lead, one for each class that may lead it."""
    classes = name_table({name for picture in known.values() for name in picture.classes})
    questions = [row for row in rows if row.question]
    if not questions:
        first = f" (the first: {rows[0].place})" if rows else ""
        raise DataError(f"none of the {len(rows)} rows{first} holds a question")
    said: dict[tuple, str] = {}

    def ask(row: Row) -> list[Asked]:
        check_question(row)
        if (before := said.setdefault((row.image, normal(row.question)), row.answer)) != row.answer:
            raise DataError(f"{row.place}: {row.question[:60]!r} is answered {row.answer[:40]!r} here and {before[:40]!r} elsewhere")
        made = [
            Asked(text, row.answer, row.choices, numbers[row.image], excludes, row.place)
            for text, excludes in _tellings(row, known[row.image], classes, rules)
        ]
        left_out["questions of pictures that show no class to lead them"] += not made
        turns = (Turn("user", (row.question,), (), row.choices), Turn("assistant", (row.answer,)))
        if reason := names_a_place(Sample("question", turns)):
            raise DataError(f"{row.place}: the question {reason}, and a haystack has another order")
        return made

    return [asked for several in good.keep(questions, ask) for asked in several]


def _tellings(row: Row, known: Known, classes: dict, rules: Rules) -> list[tuple[str, frozenset[str]]]:
    """(words, what they exclude) of a question, by the rule."""
    about = [normal(name) for name in row.about]
    if rules.lead:
        leads = about or sorted(known.classes)
        if not leads and not known.listed:
            raise DataError(f"{row.place}: --lead needs a class that the picture shows; give `shows` or `about`, or --instances")
        return [(rules.lead.replace("{class}", name) + row.question, frozenset({f"class {name}"})) for name in leads]
    same = f"asked {normal(row.question)}"
    if rules.rule == "class":
        named = named_in(row.question, classes)
        if about and not set(about) & set(named):
            raise DataError(f"{row.place}: the question does not name what it is about ({about[0]!r}); name it there, or use --lead")
        excluded = about or named
        if not excluded:
            raise DataError(f"{row.place}: --rule class needs the class that the question {row.question[:60]!r} is about; give `about`")
        if not set(excluded) & known.classes:
            raise DataError(f"{row.place}: the question is about {excluded[0]!r}, which the picture does not show by what is known of it")
        return [(row.question, frozenset({same, *(f"class {name}" for name in excluded)}))]
    if rules.rule == "caption":
        words = {word for name in about for word in name_key(name)} or words_of(row.question)
        shared = words & known.words
        if not shared:
            raise DataError(f"{row.place}: {row.question[:60]!r} shares no word with a caption of its picture; give `caption`, or `about`")
        return [(row.question, frozenset({same, *(f"word {word}" for word in shared)}))]
    return [(row.question, frozenset({same}))]


def groups_of(asked: Sequence[Asked], pictures: Sequence[Picture], names: dict, rules: Rules, left_out: Counter[str]) -> list[Group]:
    """The questions by their words, each with the answers to choose from: its row's, else --answers, else all that it has in the file."""
    by_words: dict[tuple, dict[str, dict[int, None]]] = defaultdict(lambda: defaultdict(dict))
    for one in asked:
        by_words[one.text, one.choices, one.excludes][one.answer][one.picture] = None
    groups = []
    for (text, given, excludes), needles in by_words.items():
        offered = given or rules.answers or (tuple(sorted(needles)) if len(needles) > 1 else ())
        if not given and rules.answers and not set(needles) <= set(rules.answers):
            left_out["questions answered by none of --answers"] += 1
            needles = {answer: found for answer, found in needles.items() if answer in rules.answers}
        if rules.choices and len(offered) != rules.choices:
            left_out[f"questions that do not offer {rules.choices} choices"] += 1
            continue
        if needles:
            groups.append(_group(text, offered, needles, excludes, pictures, names))
    if not groups:
        raise DataError(f"no question is left to ask; {', '.join(f'{reason}: {count}' for reason, count in left_out.items())}")
    return groups


def _group(
    text: str,
    choices: tuple[str, ...],
    needles: dict[str, dict[int, None]],
    excludes: frozenset[str],
    pictures: Sequence[Picture],
    names: dict,
) -> Group:
    excluded = {label.partition(" ")[2] for label in excludes}
    shown = any(normal(answer) in excluded for answer in needles)
    offered = {normal(choice) for choice in choices}
    is_yes_no = offered == set(YES_NO)
    watched = () if shown else tuple(name for name in (named_in(text, names) if is_yes_no else sorted(offered)) if name not in excluded)
    asks = is_yes_no and all(
        bool(pictures[number].shows.intersection(watched)) == (normal(answer) == "yes")
        for answer, numbers in needles.items()
        for number in numbers
    )
    found = {answer: list(numbers) for answer, numbers in needles.items()}
    return Group(text, choices, tuple(sorted(found)), found.__getitem__, excludes, watched, shown, asks, sum(map(len, found.values())))
