"""The rule of Visual Haystacks: the answer is among the words of the response, whatever else is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

ANSWERS = ("yes", "no")


def judge(answer: Mapping[str, Any], place: int) -> tuple[bool, bool]:
    """Official and strict score of an answer of `laid eval`."""
    (expected,) = answer["expected"]
    return is_right(expected, answer["said"]), is_exact(expected, answer["said"])


def is_right(expected: str, response: str) -> bool:
    """The official rule: the answer is a token of the response; one that holds both yes and no is always right."""
    return expected in words(response.lower())


def is_compliant(response: str) -> bool:
    """The official rule's second number: the response holds yes or no."""
    return not words(response.lower()).isdisjoint(ANSWERS)


def is_exact(expected: str, response: str) -> bool:
    """The strict rule: the response is the answer and nothing else."""
    return plain(response) == expected


def words(text: str) -> set[str]:
    """Tokens as the benchmark's tokenizer (nltk) gives them, where "yes" and "no" are concerned: sentences are split first, then
    punctuation is set apart; "yes/no" and "yes-no" stay single tokens, "cannot" holds no "no"."""
    found: set[str] = set()
    for sentence in _sentences(text):
        for pattern, apart in APART:
            sentence = pattern.sub(apart, sentence)
        found.update(sentence.split())
    return found


END = re.compile(r"[.!?](?=[)\";}\]*:@'({\[!?‘’“”«»]|\s+\S)")
CLOSERS = re.compile(r"\s*[\"')\]}‘’“”«»]+?(?:\s+|(?=--)|$)", re.MULTILINE)


def _sentences(text: str) -> list[str]:
    """A text cut where nltk's splitter cuts it, but for abbreviations: once in a word at most, after the last of its marks if any of them
    ends a sentence (".." does not); brackets and quotes that close stay with what they close."""
    ends = [end.end() for end in END.finditer(text)]
    found, start, breaks = [], 0, False
    for end, after in zip(ends, [*ends[1:], None], strict=False):
        breaks |= not text.endswith("..", 0, end)
        if after is not None and not re.search(r"\s", text[end:after]):
            continue
        closers = CLOSERS.match(text, end)
        stop = closers.end() if closers else end
        if breaks and stop > start:
            found.append(text[start:stop].strip())
            start = stop
        breaks = False
    return [*found, text[start:]]


APART = [
    (re.compile(pattern), apart)
    for pattern, apart in (
        (r"([«“‘„]|`+)", r" \1 "),
        (r"(^|[ (\[{<])(\"|'')", r"\1 \" "),
        (r"(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)", "' "),
        (r"([^.])(\.)([\])}>\"'»”’ ]*)\s*$", r"\1 \2 \3 "),
        (r"([:,])(\D|$)", r" \1 \2"),
        (r"(\.{2,}|[;@#$%&?!*]|[\u2012-\u2015])", r" \1 "),
        (r"([^'])' ", r"\1 ' "),
        (r"([][(){}<>]|--)", r" \1 "),
        (r"([»”’]|''|\")", r" \1 "),
        (r"\s+|$", " "),
        (r"([^' ])('[smd]|') ", r"\1 \2 "),
        (r"([^' ])('ll|'re|'ve|n't) ", r"\1 \2 "),
    )
]


def plain(response: str) -> str:
    """A response without case, surrounding space, quotes and final punctuation: what the strict rules compare."""
    return response.strip().strip("\"'`*").rstrip(".!").strip().lower()
