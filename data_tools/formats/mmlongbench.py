"""MMLongBench: read its Visual Haystacks and MM-NIAH parts, and score their answers by its own rules, which differ from the originals'."""

import json
import re
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_tools.formats.fields import Entry, check_fields, take, take_strings
from data_tools.formats.marks import IMAGE_MARK, interleave
from data_tools.formats.mm_niah import is_exact, needles_among
from data_tools.formats.visual_haystacks import ANSWERS, plain
from data_tools.image_root import ImageRoot
from data_tools.inputs import entries, read_json, visible
from laid_ds.data.record import DataError, Sample, Turn

FORM = " Write your answer in the following format:\nAnswer: [answer]\n\n{context}\n\nQuestion: {question}"
HAYSTACK = "You are given a set of images. Please answer the question in Yes or No based on the given images." + FORM
INTERLEAVED = "You are given interleaved text and images. Please answer the question based on the given text and images." + FORM
LETTERED = (
    "You are given interleaved text and images. Please answer the question with the option's letter (A, B, etc.) based on the given text "
    "and images." + FORM
)
DEFAULT_CYCLE = (0, 1, 1, 0)
"""What the benchmark takes for a response without yes or no, in turn."""


def read_entry(entry: Entry, key: str, root: ImageRoot) -> Sample:
    """A line of a `vh_*.jsonl` (ctxs are image paths) or of a MM-NIAH file (ctxs are paragraphs)."""
    contexts = take(entry, "ctxs", list)
    check_fields(entry, (), others=True)
    if contexts and all(isinstance(context, str) for context in contexts):
        return _read_haystack(entry, contexts, key, root)
    return _read_interleaved(entry, contexts, key, root)


def _read_haystack(entry: Entry, names: list[str], key: str, root: ImageRoot) -> Sample:
    answer = take(entry, "answer", str).lower()
    if answer not in ANSWERS:
        raise DataError(f"answer {answer[:40]!r} is neither yes nor no")
    text = HAYSTACK.format(context="\n".join([IMAGE_MARK] * len(names)), question=take(entry, "question", str))
    needles = needles_among(names, take_strings(entry, "pos_image", []))
    return _sample(entry, key, root, text, names, needles, ANSWERS, answer)


def _read_interleaved(entry: Entry, contexts: list[Any], key: str, root: ImageRoot) -> Sample:
    context = "\n\n".join(take(paragraph, "text", str) for paragraph in contexts)
    names, question = take_strings(entry, "image_list", []), take(entry, "question", str)
    needle_names, offered = take_strings(entry, "needle_image_list", []), take_strings(entry, "choices_image", [])
    answer, in_context = take(entry, "answer", (str, int, list)), context.count(IMAGE_MARK)
    needles = needles_among(names[:in_context], needle_names)
    letters = tuple(chr(ord("A") + number) for number in range(len(offered)))
    if letters:
        question += "".join(f"\n{letter}. {IMAGE_MARK}" for letter in letters)
        names = names + offered
    elif question.count(IMAGE_MARK) == len(needle_names):
        names = names + needle_names
    if isinstance(answer, int):
        if not 0 <= answer < len(letters):
            raise DataError(f"answer {answer} is the number of no choice")
        answer = letters[answer]
    text = (LETTERED if letters else INTERLEAVED).format(context=context, question=question)
    answer = answer if isinstance(answer, str) else json.dumps(answer)
    is_haystack = bool(needles) or entry.get("needle_image_list") == []  # said to have none: its needles are words
    sample = _sample(entry, key, root, text, names, needles, letters, answer)
    return replace(sample, haystack=is_haystack, fixed=tuple(range(in_context, len(names))))


def _sample(
    entry: Entry, key: str, root: ImageRoot, text: str, names: list[str], needles: tuple[int, ...], choices: tuple[str, ...], answer: str
) -> Sample:
    if text.count(IMAGE_MARK) != len(names):
        raise DataError(f"{text.count(IMAGE_MARK)} {IMAGE_MARK} marks for {len(names)} images")
    (segments,) = interleave([text], len(names))
    turns = (Turn("user", segments, needles, choices), Turn("assistant", (answer,)))
    return Sample(key, turns, root.read_all(names), "MMLongBench", meta={"mmlongbench": entry, "image_paths": names})


def score(path: Path) -> dict[str, Any]:
    """Each results file: `{"data": [{output, answer}]}` or JSON lines of the same. The task is in the file's name."""
    files = sorted([*visible(path, "*.json"), *visible(path, "*.jsonl")]) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no results (*.json, *.jsonl)")
    return {"benchmark": "mmlongbench", "results": {file.stem: score_entries(_results(file), rule_for(file.name)) for file in files}}


def rule_for(name: str) -> str:
    """The benchmark's metric for a file, from its name."""
    if "vh_" in name:
        return "binary"
    if "counting" in name or "count" in name:
        return "sum"
    if "image" in name and ("retrieval" in name or "reasoning" in name):
        return "letter"
    if "retrieval" in name or "reasoning" in name:
        return "contains"
    raise DataError(f"{name}: no vh_, retrieval, counting or reasoning in the name, so the rule is not known")


def score_entries(results: list[Entry], rule: str) -> dict[str, float]:
    """Official and strict accuracy side by side."""
    official = strict = 0
    for number, entry in enumerate(results):
        answer, output = take(entry, "answer", (str, int, list)), take(entry, "output", str)
        if rule == "binary":
            official += binary_label(output, DEFAULT_CYCLE[number % 4]) == binary_label(str(answer), -1)
            strict += plain(output.removeprefix("Answer:")) == str(answer).lower()
        else:
            official += max(_judge(text, answer, rule) for text in (output, after_answer_mark(output)))
            strict += is_exact(answer, output.removeprefix("Answer:"))
    return {"answers": len(results), "official_accuracy": official / len(results), "strict_accuracy": strict / len(results)}


def _results(path: Path) -> list[Entry]:
    results = list(entries(path)) if path.suffix == ".jsonl" else take(read_json(path), "data", list)
    if not results:
        raise DataError(f"{path} holds no answers")
    return results


def _judge(text: str, answer: str | int | list, rule: str) -> bool:
    if rule == "contains":
        answers = answer if isinstance(answer, list) else [str(answer)]
        return any(_normal(str(one)) in _normal(text) for one in answers)
    if rule == "letter":
        return choice_number(text) == answer
    return isinstance(answer, list) and sum(counts(text)) == sum(counts(json.dumps(answer)))


def binary_label(text: str, default: int) -> int:
    """1 or 0 for the last yes or no in the text."""
    text = _without_articles(text)
    said = re.findall(r"\b(?:yes|no)\b", text)
    if said:
        return int(said[-1] == "yes")
    return int(text) if text.isdecimal() else default


def choice_number(text: str) -> int:
    """The number of the letter after "answer is" or "Answer:", else of the last single capital A-J; -1 if there is none."""
    text = " ".join(text.split())
    for pattern in (r"answer is \(?([A-J])\)?", r"[aA]nswer:\s*([A-J])", r".*\b([A-J])\b"):
        if found := re.search(pattern, text):
            return ord(found[1]) - ord("A")
    return -1


def counts(text: str) -> list[int]:
    """The numbers of the last list in the text, else all numbers in it."""
    lists = re.findall(r"\[[\d\s,]+\]", text) or re.findall(r"\[.*?\]", text, re.DOTALL)
    if lists:
        try:
            return [int(item) for item in json.loads(lists[-1]) if isinstance(item, (int, float)) or str(item).isdecimal()]
        except (ValueError, OverflowError):
            pass  # not a list after all
    return [int(number) for number in re.findall(r"\d{1,18}", text)]


def after_answer_mark(text: str) -> str:
    """What follows the first "Answer:", or the whole text."""
    found = re.search(r"answer:(.*)", text, re.IGNORECASE | re.DOTALL)
    rest = (found[1] if found else text).strip()
    return re.sub("^answer:", "", rest, flags=re.IGNORECASE).strip()


def _normal(text: str) -> str:
    return _without_articles("".join(character for character in text if character not in string.punctuation))


def _without_articles(text: str) -> str:
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower()).split())
