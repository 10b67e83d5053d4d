"""Which answers belong on one curve: benchmarks come as a file for each size or depth, so a curve goes through several tasks.

Of an answer: the kind of question, the haystack that it is about, wherever else the same one was asked, and its place on the axis.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

from laid_ds.evaluation.rules import HAYSTACK

LENGTHS = (1000, 2000, 4000, 8000, 12000, 16000, 24000, 32000, 40000, 48000, 64000)
"""MM-NIAH's bins of context, in its tokens, by their lower edges; it leaves out what is shorter."""
OF_SIZE = re.compile(r"(?:^|[-_])(?:K|dep)\d+(?![0-9A-Za-z])", re.IGNORECASE)
"""What MMLongBench's names of files say of length and depth."""

Answer = Mapping[str, Any]


def kind_of(answer: Answer) -> str:
    """The benchmark and its kind of question: Visual Haystacks by the number of needles (oracle files are the smallest size of each),
    MMLongBench by its task's name without length and depth, all others by their task."""
    entry = answer["meta"].get("vhs")
    if entry is not None:
        needles = len(entry["pos_image"])
        return f"vhs, {needles} needle{'s' if needles > 1 else ''}"
    name = OF_SIZE.sub("", answer["task"]) if answer["benchmark"] == "mmlongbench" else answer["task"]
    return name if answer["benchmark"] == HAYSTACK else f"{answer['benchmark']}, {name or answer['task']}"


def haystack_of(answer: Answer) -> tuple[str, ...]:
    """What all answers share that may err together: the question and its needles where the same ones are hidden among more and more
    images, else the sample."""
    entry = answer["meta"].get("vhs")
    if entry is not None:
        return entry["conversations"][0]["value"], *entry["pos_image"]
    if answer["meta"].get("mmlongbench", {}).get("rule") == "binary":  # its visual haystacks
        return (answer["question"],)
    return answer["task"], answer["cluster"]


def unit_of(answer: Answer) -> str:
    """Of `place_of`."""
    return "tokens" if answer["benchmark"] == "mm-niah" else answer.get("unit", "images")


def place_of(answer: Answer) -> int | None:
    """Where an answer stands on the axis of a curve: its number of images, or of MM-NIAH, whose samples have any number of them, the
    lower edge of its bin of context; None where that bin is left out, and where the entry does not tell."""
    if answer["benchmark"] != "mm-niah":
        return answer["size"]
    length = (answer["meta"].get("mm_niah") or {}).get("meta", {}).get("context_length")
    number = 0 if length is None else bisect_right(LENGTHS, length)
    return LENGTHS[number - 1] if number else None
