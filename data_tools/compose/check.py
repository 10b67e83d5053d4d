"""What a model could answer without finding the needle: baselines that see less than they should, against chance.

Each is a naive Bayes classifier of pairs (question, answer on offer), fitted on one half of the haystacks and asked about the other, both
ways. It sees, of a haystack,

    question   the words of the question
    others     the question, and what is known of all pictures but the needle: how many show each choice, and each class that a yes-or-no
               question names; which classes and words occur
    bag        the same of all pictures, the needle among them, without a word which picture it is
    depth      the question, and the needle's place

Chance is one over the choices; for the bag, over those that it leaves open: what no image shows is no answer, and where none of them
shows a cat, or all do, no needle is needed. Where nothing is on offer (open answers), the answers of the other half are, and chance is the
share of the commonest.

The limits: a baseline knows of a picture what the source says of it, and not its pixels; it is a simple one; it sees haystacks as they are
written, and not the windows of fewer images that a run draws of them (down to one image, where the needle is all there is).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_tools.compose.draw import DEPTHS, Draft, Question
from data_tools.compose.pool import WORD, YES_NO, normal
from laid_ds.data.record import DataError

BASELINES = ("question", "others", "bag", "depth")
LEAK = 4.0  # standard errors above chance; a sound set is there once in 30,000 times
MOST_QUESTIONS = 4000
MOST_ANSWERS = 50  # of open questions
MANY_CHOICES = 20  # beyond which single classes and words are not looked at
OPEN_LEAK = 0.5  # of open answers, right without images

ADVICE = {
    "question": "ask each question of pictures with different answers, as many of each",
    "others": "the rule lets distractors show the answer, or keeps it from them; name in `about` all that they must not show",
    "bag": "how many pictures show each choice tells it; add pictures that show the rare ones, ask fewer questions or use more images",
    "depth": "needles must stand anywhere, whatever the answer",
}


@dataclass(frozen=True)
class Baseline:
    name: str
    questions: int
    accuracy: float
    chance: float
    error: float
    """Standard error of an accuracy at chance."""
    open: bool = False

    @property
    def errors_above_chance(self) -> float:
        return (self.accuracy - self.chance) / self.error if self.error else 0.0

    @property
    def leaks(self) -> bool:
        return self.errors_above_chance > LEAK and (not self.open or self.accuracy > OPEN_LEAK)

    def row(self) -> dict[str, Any]:
        """For people and JSON."""
        rounded = {name: round(getattr(self, name), 4) for name in ("accuracy", "chance", "error")}
        return {"baseline": self.name, "questions": self.questions, **rounded, "errors_above_chance": round(self.errors_above_chance, 2)}


@dataclass(frozen=True)
class Case:
    """A question as the baselines see it."""

    question: Question
    images: int
    bag: Counter[str]
    """How many pictures of the haystack show each name."""
    needle: frozenset[str]
    showing: int
    """How many of them show a name that the question watches."""
    fold: int

    @property
    def others(self) -> Counter[str]:
        return Counter({name: count - (name in self.needle) for name, count in self.bag.items() if count > (name in self.needle)})


Features = Callable[[Case, str], Iterator[str]]


def shortcuts(drafts: Sequence[Draft], names: Sequence[str] = BASELINES) -> list[Baseline]:
    """The baselines of these names for which the haystacks hold questions."""
    cases = _cases(drafts)
    several = [case for case in cases if case.images > 1]
    bound = [case for case in several if not case.question.tells_what_is_shown]
    asked: tuple[tuple[str, list[Case], Features, Callable[[Case], float]], ...] = (
        ("question", cases, _of_question, _chance),
        ("others", several, _of_others, _chance),
        ("bag", bound, _of_bag, _bag_chance),
        ("depth", several, _of_depth, _chance),
    )
    found = []
    for name, some, features, chance in asked:
        if name not in names:
            continue
        for kind in (False, True):
            chosen = [case for case in some if (not case.question.choices) == kind]
            if len({case.fold for case in chosen}) == 2:
                found.append(_baseline(name, chosen, features, chance, kind))
    return found


def refuse_leaks(found: Sequence[Baseline], what: str) -> None:
    """Raises DataError for a baseline that knows answers."""
    for baseline in found:
        if baseline.leaks:
            raise DataError(
                f"{what} leaks: {baseline.accuracy:.1%} of the answers follow from {_seen(baseline.name)} (chance {baseline.chance:.1%}, "
                f"{baseline.errors_above_chance:.1f} standard errors above it, {baseline.questions} questions); {ADVICE[baseline.name]}"
            )


def _seen(name: str) -> str:
    return {
        "question": "the question alone",
        "others": "the images without the needle",
        "bag": "the bag of all images, whichever is the needle",
        "depth": "the needle's place",
    }[name]


def _cases(drafts: Sequence[Draft]) -> list[Case]:
    step = max(1, sum(len(draft.questions) for draft in drafts) // MOST_QUESTIONS)
    chosen = drafts[::step]
    cases = []
    for number, draft in enumerate(chosen):
        bag = Counter(name for picture in draft.pictures for name in picture.shows)
        fold = int(2 * number >= len(chosen))
        for question in draft.questions:
            showing = sum(not picture.shows.isdisjoint(question.watched) for picture in draft.pictures)
            cases.append(Case(question, len(draft.pictures), bag, draft.pictures[question.needle].shows, showing, fold))
    return cases


def _chance(case: Case) -> float:
    return 1 / len(case.question.choices)


def _bag_chance(case: Case) -> float:
    """One over the answers that the bag of images does not rule out."""
    question = case.question
    if question.bag_chance is not None:
        return question.bag_chance
    if question.asks_whether_shown:
        return 1.0 if case.showing in (0, case.images) else 0.5
    shown = [choice for choice in question.choices if case.bag[normal(choice)]]
    return 1 / len(shown if question.watched and question.answer in shown else question.choices)


def _baseline(name: str, cases: Sequence[Case], features: Features, chance: Callable[[Case], float], is_open: bool) -> Baseline:
    hits = [hit for fold in (0, 1) for hit in _hits(cases, fold, features)]
    if is_open:
        counts = Counter(case.question.answer for case in cases)
        chances = [counts.most_common(1)[0][1] / len(cases)] * len(cases)
    else:
        chances = [chance(case) for case in cases]
    error = math.sqrt(sum(p * (1 - p) for p in chances)) / len(cases)
    label = f"{name}, open answers" if is_open else name
    return Baseline(name if not is_open else label, len(cases), sum(hits) / len(cases), sum(chances) / len(cases), error, is_open)


def _hits(cases: Sequence[Case], fold: int, features: Features) -> Iterator[float]:
    """For each case of a fold, the chance that a classifier fitted on the other one names its answer (ties are shared)."""
    fitted = [case for case in cases if case.fold != fold]
    common = [answer for answer, _ in Counter(case.question.answer for case in fitted).most_common(MOST_ANSWERS)]
    true, false = Counter(), Counter()
    for case in fitted:
        for answer in case.question.choices or common:
            (true if answer == case.question.answer else false).update(features(case, answer))
    num_true, num_false = true["any"] + 2, false["any"] + 2
    for case in cases:
        if case.fold != fold:
            continue
        scores = {}
        for answer in case.question.choices or common:
            found = features(case, answer)
            scores[answer] = sum(math.log((true[name] + 1) / num_true) - math.log((false[name] + 1) / num_false) for name in found)
        best = max(scores.values())
        ties = [answer for answer, score in scores.items() if score > best - 1e-9]
        yield (case.question.answer in ties) / len(ties)


def _of_question(case: Case, answer: str) -> Iterator[str]:
    yield "any"
    yield f"{answer}"
    yield f"{answer} to {case.question.text}"
    for word in set(WORD.findall(case.question.text.casefold())):
        yield f"{answer} by {word}"


def _of_depth(case: Case, answer: str) -> Iterator[str]:
    yield "any"
    yield f"{answer} at {case.question.needle * DEPTHS // case.images}"
    yield f"{answer} at image {case.question.needle}"


def _of_others(case: Case, answer: str) -> Iterator[str]:
    return _of_names(case, answer, case.others, case.showing - (not case.needle.isdisjoint(case.question.watched)))


def _of_bag(case: Case, answer: str) -> Iterator[str]:
    return _of_names(case, answer, case.bag, case.showing)


def _of_names(case: Case, answer: str, shown: Counter[str], showing: int) -> Iterator[str]:
    yield "any"
    choices = case.question.choices
    if {normal(choice) for choice in choices} == set(YES_NO):
        yield f"{answer} of {min(showing, 9)}"
        yield f"{answer} of {10 * showing // case.images} in 10"
        yield f"{answer} of all but {min(case.images - showing, 9)}"
    else:
        counts = [shown[normal(choice)] for choice in choices]
        own = shown[normal(answer)]
        yield f"shown {min(own, 9)}"
        if counts:
            yield f"shown {(own > min(counts)) + (own == max(counts)) - (max(counts) == min(counts))} of the choices"
    if len(choices) <= MANY_CHOICES:
        for name in shown:
            yield f"{answer} beside {name}"
