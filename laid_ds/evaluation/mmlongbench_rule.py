"""The rules of MMLongBench, which differ from those of the benchmarks that it took its questions from.

Rule by rule: binary (Visual Haystacks), contains (retrieval and reasoning over text, visual RAG), letter (retrieval and reasoning over
images), sum (counting), document (DocVQA). The harness puts "Answer:" before what a model says, and all but binary and document take the
better of the whole and of what follows the mark.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter
from collections.abc import Mapping
from typing import Any

from laid_ds.evaluation.mm_niah_rule import json_or_none
from laid_ds.evaluation.visual_haystacks_rule import plain

RULES = ("binary", "contains", "letter", "sum", "document")
FORMS = ("Integer", "Float", "String", "None", "List")
LED = "Answer:"
"""What the harness puts before each response."""
DEFAULT_CYCLE = (0, 1, 1, 0)
"""What the benchmark takes for a response without yes or no, in turn."""
LONG = ("ctxs", "image_list", "page_list", "page_text_list", "positive_ctxs", "context")


def kept(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A line without its texts and lists of images, and with the name of its rule, which follows from them."""
    return {name: value for name, value in entry.items() if name not in LONG} | {"rule": rule_of(entry)}


def rule_of(entry: Mapping[str, Any]) -> str:
    """The rule of a line, by its fields."""
    if "rule" in entry:
        return entry["rule"]
    contexts = entry.get("ctxs") or []
    if "answer_format" in entry or "page_list" in entry:
        return "document"
    if contexts and all(isinstance(context, str) for context in contexts):
        return "binary"
    if isinstance(entry.get("answer"), int):
        return "letter"
    counts = entry.get("answer")
    return "sum" if isinstance(counts, list) and all(isinstance(count, int) for count in counts) else "contains"


def judge(answer: Mapping[str, Any], place: int) -> tuple[float, bool]:
    """Official and strict score of an answer of `laid eval`. Raises ValueError where its meta does not hold its line."""
    entry = answer["meta"].get("mmlongbench")
    if entry is None:
        raise ValueError(f"the answer of {answer['key']} holds nothing of its MMLongBench line (meta.mmlongbench), which names its rule")
    expected, output, rule = entry["answer"], LED + answer["said"], rule_of(entry)
    score = official(expected, output, rule, place=place, form=entry.get("answer_format"))
    return score, is_exact(expected, output, rule)


def official(answer: Any, output: str, rule: str, *, place: int = 0, form: str | None = None) -> float:
    """The benchmark's rule for an output, which begins with "Answer:".

    place: of the output in its file, for `binary`; form: the line's answer_format, for `document`. Raises ValueError for an answer that
    the rule cannot read.
    """
    if rule == "binary":
        return float(binary_label(output, DEFAULT_CYCLE[place % len(DEFAULT_CYCLE)]) == binary_label(str(answer), -1))
    if rule == "document":
        return document_score(answer, after_answer_mark(output), form)
    return float(any(_judge(text, answer, rule) for text in (output, after_answer_mark(output))))


def is_exact(answer: Any, output: str, rule: str) -> bool:
    """The strict rule: after "Answer:", which models may repeat, stands the answer, or its letter, and nothing else."""
    said = output.strip().removeprefix(LED).strip().removeprefix(LED).strip()
    if rule == "letter":
        letter = plain(said)
        return len(letter) == 1 and ord(letter) - ord("a") == answer
    if rule == "sum" or (rule == "document" and isinstance(json_or_none(str(answer)), list)):
        return json_or_none(said) == (answer if rule == "sum" else json.loads(answer))
    return plain(said) in [plain(str(one)) for one in accepted_answers(answer)]


def _judge(text: str, answer: Any, rule: str) -> bool:
    if rule == "contains":
        return any(normal(one) in normal(text) for one in map(str, accepted_answers(answer)))
    if rule == "letter":
        return choice_number(text) == answer
    return isinstance(answer, list) and sum(counts(text)) == sum(counts(json.dumps(answer)))


def accepted_answers(answer: Any) -> list[Any]:
    """Every accepted answer: one, a list of them, or a list of lists."""
    groups = answer if isinstance(answer, list) else [answer]
    return [one for group in groups for one in (group if isinstance(group, list) else [group])]


def binary_label(text: str, default: int) -> int:
    """1 or 0 for the last yes or no in the text."""
    text = _without_articles(text)
    said = re.findall(r"\b(?:yes|no)\b", text)
    if said:
        return int(said[-1] == "yes")
    return int(text) if text.isdecimal() and len(text) < 19 else default


def choice_number(text: str) -> int:
    """The number of the letter after "answer is" or "Answer:", else of the last single capital A-J; -1 if there is none."""
    text = " ".join(text.split())
    for pattern in (r"answer is \(?([A-J])\)?", r"[aA]nswer:\s*([A-J])", r".*\b([A-J])\b"):
        if found := re.search(pattern, text):
            return ord(found[1]) - ord("A")
    return -1


def counts(text: str) -> list[int]:
    """The numbers of the last list in the text that is one of numbers, else of the last list of any kind, else all numbers in the text."""
    text = _without_articles(text)
    if (found := re.findall(r"\[[\d\s,]+\]", text)) and (said := json_or_none(found[-1])) is not None:
        return said
    if (found := re.findall(r"\[.*?\]", text, re.DOTALL)) and isinstance(said := json_or_none(found[-1]), list):
        return [number for number in map(_whole, said) if number is not None]
    return [int(number) for number in re.findall(r"\d+", text) if len(number) < 4300]


def _whole(item: Any) -> int | None:
    try:
        return int(item)
    except (ValueError, TypeError, OverflowError):
        return None


def after_answer_mark(text: str) -> str:
    """What follows the first "Answer:", or the whole text."""
    found = re.search(r"answer:(.*)", text, re.IGNORECASE | re.DOTALL)
    rest = (found[1] if found else text).strip()
    return re.sub("^answer:", "", rest, flags=re.IGNORECASE).strip()


def normal(text: str) -> str:
    """Lower case, no punctuation, no articles."""
    return _without_articles("".join(character for character in text if character not in string.punctuation))


def _without_articles(text: str) -> str:
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower()).split())


def document_score(answer: Any, said: str, form: str | None) -> float:
    """DocVQA, by the kind of the answer: 1 or 0 where a number of the response is it (a float within 1 %, or times or over 100), the F1 of
    words for text, the text itself for what has to be exact (pages, dates, addresses), the mean over the items of a list.

    Raises ValueError for a form that is none of FORMS, and for an answer that is not of its form.
    """
    if form == "Integer":
        wanted = _number(answer)
        if not wanted.is_integer():
            raise ValueError(f"the answer {str(answer)[:40]!r} is no Integer")
        return float(any(number == wanted for number in _numbers(clean(said))))
    if form == "Float":
        wanted = _number(answer)
        near = (wanted / 100, wanted, wanted * 100)
        return float(any(math.isclose(one, number, rel_tol=0.01) for one in near for number in _numbers(clean(said))))
    if form in ("String", "None"):
        return float(str(answer) in said) if _has_to_be_exact(str(answer)) else f1(said, str(answer))
    if form == "List":
        return _list_score(answer, said)
    raise ValueError(f"the answer_format {form!r} is none of {', '.join(FORMS)}")


def _list_score(answer: Any, said: str) -> float:
    """The texts of the list are one item together; numbers and what has to be exact are each their own."""
    items = answer if isinstance(answer, list) else json_or_none(str(answer))
    if not isinstance(items, list) or not items or any(isinstance(item, (list, dict)) for item in items):
        raise ValueError(f"the answer {str(answer)[:40]!r} is no List, as JSON, of one item or more")
    loose = [item for item in items if isinstance(item, str) and _form_of(item) == "String" and not _has_to_be_exact(item)]
    rest = [item for item in items if not (isinstance(item, str) and item in loose)]
    together = " ".join(loose).strip()
    parts = [together, *rest] if together else items
    return sum(document_score(part, said, _form_of(part)) for part in parts) / len(parts)


def _form_of(item: Any) -> str:
    if isinstance(item, (int, float)):
        return "Integer" if isinstance(item, int) else "Float"
    try:
        number = float(clean(str(item)))
        return "Integer" if number == int(number) and "%" not in item else "Float"
    except (ValueError, OverflowError):
        return "String"


def _number(answer: Any) -> float:
    try:
        return float(clean(str(answer)))
    except ValueError:
        raise ValueError(f"the answer {str(answer)[:40]!r} is no number") from None


UNITS = ("kg", "meters", "acres", "minutes", "miles", "mile", "feet", "million", "thousand", "billion", "mm", "m")


def clean(text: str) -> str:
    """Lower case, without commas, units at the end, quotes at the edges, and signs of money and percent."""
    text = text.lower().strip().replace(",", "")
    for unit in UNITS:
        text = re.sub(f"{unit}$", "", text).strip()
    text = re.sub(r"^['\"]|['\"]$", "", text).strip()
    for sign in "$£%":
        text = text.strip(sign).strip()
    return text


def _numbers(text: str) -> list[float]:
    found = [float(number) for number, _ in re.findall(r"(-?\d+(\.\d*)?|-?\.\d+)", text)]
    return [number for number in found if math.isfinite(number)]


EXACT = (
    r"https://",
    r".*\.(py|ipynb)$",
    r"^page",
    r"^\d+(-\d+|\s\d+)?$",
    r"(a\.m\.|p\.m\.)",
    r"^\d{4}[-/\s]\d{1,2}[-/\s]\d{1,2}$",
    r"^\d{1,2}[-/\s]\d{1,2}[-/\s]\d{2,4}$",
    r"^\d{4}[-/\s]\d{1,2}$",
    r"^[a-zA-Z0-9._%+-]+@[a-zA-Z0-9.-]+\.[a-zA-Z]{2,}$",
)


def _has_to_be_exact(text: str) -> bool:
    return any(re.search(pattern, text) for pattern in EXACT)


def f1(said: str, answer: str) -> float:
    """The F1 of the words of two texts, each word as often as it stands there."""
    ours, theirs = normal(said).split(), normal(answer).split()
    same = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs)) if same else 0.0
