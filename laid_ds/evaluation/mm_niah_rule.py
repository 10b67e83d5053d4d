"""The rules of MM-NIAH: letters are parsed, lists of counts are compared place by place, words are looked for in the response."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from laid_ds.evaluation.visual_haystacks_rule import plain

Expected = str | int | list
META = ("context_length", "placed_depth")


def kept(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What of a line is needed to score an answer and to write it for the official scorer."""
    meta = entry.get("meta") or {}
    return {"id": entry.get("id"), "answer": entry["answer"], "meta": {name: meta[name] for name in META if name in meta}}


def judge(answer: Mapping[str, Any], place: int) -> tuple[float, bool]:
    """Official and strict score of an answer of `laid eval`."""
    expected = expected_of(answer)
    return official(expected, answer["said"]), is_exact(expected, answer["said"])


def expected_of(answer: Mapping[str, Any]) -> Expected:
    """The benchmark's own answer: text, the number of a choice, or a list of counts. Raises ValueError for one that it does not have."""
    entry = answer["meta"].get("mm_niah")
    expected = entry["answer"] if entry else _from_text(answer)
    return as_counts(expected) if "counting" in answer["task"] else expected


def as_counts(expected: Expected) -> Expected:
    """The answer of a counting task, which may be a list written as text. Raises ValueError where it is none."""
    found = expected if isinstance(expected, list) else json_or_none(str(expected))
    if isinstance(found, bool) or not isinstance(found, (list, int)):
        raise ValueError(f"the answer {str(expected)[:40]!r} of a counting task is neither a list of counts nor a number")
    return found


def _from_text(answer: Mapping[str, Any]) -> Expected:
    (expected,), choices = answer["expected"], answer["choices"]
    return choices.index(expected) if choices else expected


def official(answer: Expected, response: str) -> float:
    """The benchmark's rule for one answer: 1, 0, or for a list the share of its places that are right."""
    response = response.strip(".")
    if isinstance(answer, int):
        return float(_number_of_choice(response) == answer)
    if isinstance(answer, list):
        return _share_of_list(answer, response)
    return float(re.search(rf"\b{re.escape(normalised(answer))}\b", normalised(response)) is not None)


def is_exact(answer: Expected, response: str) -> bool:
    """The strict rule: the response is the answer, or its letter, and nothing else."""
    if isinstance(answer, int):
        letter = plain(response)
        return len(letter) == 1 and ord(letter) - ord("a") == answer
    if isinstance(answer, list):
        return json_or_none(response) == answer
    return plain(response) == plain(answer)


def json_or_none(text: str) -> Any:
    """What a text says as JSON; None where it says nothing."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _number_of_choice(response: str) -> int | None:
    if response.isdecimal() and len(response) < 19:
        return int(response)
    text = response.lower().replace("the answer is", "").replace("*", "")
    text = text.split(".")[0].replace(",", "").strip() if "." in text else text.strip()
    for sentence, letter in (("the camera is moving left", "a"), ("the camera is moving right", "b")):
        if sentence in text:
            text = letter
            break
    return ord(text) - ord("a") if len(text) == 1 else None


def _share_of_list(answer: list, response: str) -> float:
    said = json_or_none(response.replace("json", "").replace("```", "").strip())
    if isinstance(said, dict) and all(isinstance(value, list) for value in said.values()):
        said = [item for value in said.values() for item in value]
    if not isinstance(said, list) or not answer:
        return 0.0
    return sum(one == other for one, other in zip(said, answer, strict=False)) / len(answer)


NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NUMBER_WORDS = {word: str(number) for number, word in enumerate(NUMBERS.split())}
NUMBER_WORDS |= {word: str(10 * number) for number, word in enumerate(TENS.split(), 2)}
CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll "
    "how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't "
    "she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's "
    "something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas "
    "wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll "
    "why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word for word in CONTRACTED.split() for place, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}
"""A contraction without one of its apostrophes -> with it; and one that the benchmark turns the other way round."""
PUNCTUATION = ';/[]"{}()=+\\_->@<`,?!'
PERIODS = 32
"""The benchmark drops so many periods and no more: it gives a flag where the count belongs."""


def normalised(text: str) -> str:
    """Lower case, digits for number words, no articles, apostrophes put back, punctuation dropped where it stands beside a space."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_thousands = re.search(r"\d,\d", text) is not None
    bare = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if beside_space or has_thousands else " ")
    bare = re.sub(r"\.(?!\d)", "", bare, count=PERIODS)
    found = [NUMBER_WORDS.get(word, word) for word in bare.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in found if word not in ("a", "an", "the"))
