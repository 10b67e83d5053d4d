"""MMLongBench: read its Visual Haystacks, MM-NIAH, DocVQA and visual RAG parts, and score their answers by its own rules, which differ from
the originals'."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_tools.formats.fields import Entry, check_fields, take, take_strings
from data_tools.formats.marks import IMAGE_MARK, interleave
from data_tools.formats.mm_niah import answer_text, needles_among
from data_tools.image_root import ImageRoot
from data_tools.inputs import entries, read_json, visible
from laid_ds.data.record import DataError, Sample, Turn
from laid_ds.evaluation.mmlongbench_rule import FORMS, RULES, accepted_answers, is_exact, official
from laid_ds.evaluation.visual_haystacks_rule import ANSWERS

FORM = " Write your answer in the following format:\nAnswer: [answer]\n\n{context}\n\nQuestion: {question}"
HAYSTACK = "You are given a set of images. Please answer the question in Yes or No based on the given images." + FORM
INTERLEAVED = "You are given interleaved text and images. Please answer the question based on the given text and images." + FORM
LETTERED = (
    "You are given interleaved text and images. Please answer the question with the option's letter (A, B, etc.) based on the given text "
    "and images." + FORM
)
DOCUMENT = (
    "You are given a document with text and images, and a question. Answer the question as concisely as you can, using a single phrase or "
    "sentence if possible. If the question cannot be answered based on the information in the article, write 'Not answerable.'" + FORM
)
PASSAGES = "Use the given documents to write a concise and short answer to the question about the entity shown in the image." + FORM
NAME_LETTERS = 15  # of a document's name stand in the prompt
MARKS = {
    "binary": ("vh_",),
    "sum": ("counting", "count"),
    "document": ("longdocurl", "mmlongdoc", "slidevqa"),
    "contains": ("infoseek", "viquae", "vrag"),
}
"""The rule of a results file -> what its name then holds."""


def read_entry(entry: Entry, key: str, root: ImageRoot) -> Sample:
    """A line of a `vh_*.jsonl` (ctxs are image paths), of a MM-NIAH file (ctxs are paragraphs), of a DocVQA file (page_list), or of a
    visual RAG file (ctxs are passages with titles, and one image)."""
    contexts = take(entry, "ctxs", list, [])
    check_fields(entry, (), others=True)
    if "page_list" in entry:
        return _read_document(entry, key, root)
    if "ctxs" not in entry:
        raise DataError("field 'ctxs' is missing, and so is 'page_list'; a line of MMLongBench has one of them")
    if contexts and all(isinstance(context, str) for context in contexts):
        return _read_haystack(entry, contexts, key, root)
    if "image" in entry and "image_list" not in entry:
        return _read_passages(entry, contexts, key, root)
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
    answer = answer_text(answer, letters)
    is_haystack = bool(needles) or entry.get("needle_image_list") == []  # said to have none: its needles are words
    sample = _sample(entry, key, root, text, names, needles, letters, answer)
    return replace(sample, haystack=is_haystack, fixed=tuple(range(in_context, len(names))))


def _read_document(entry: Entry, key: str, root: ImageRoot) -> Sample:
    """The pages in their order, each after the name of its document."""
    names, form = take_strings(entry, "page_list"), take(entry, "answer_format", str)
    if form not in FORMS:
        raise DataError(f"answer_format {form[:40]!r} is none of {', '.join(FORMS)}")
    context = "\n\n".join(f"Document {Path(name).parent.name:.{NAME_LETTERS}}: {IMAGE_MARK}" for name in names)
    document, asked = take(entry, "doc_name", str), take(entry, "question", str)
    question = f"Based on Document {document:.{NAME_LETTERS}}, answer the following question. {asked}"
    answer = take(entry, "answer", (str, int, float, list))
    text = DOCUMENT.format(context=context, question=question)
    return _sample(entry, key, root, text, names, (), (), answer if isinstance(answer, str) else json.dumps(answer))


def _read_passages(entry: Entry, contexts: list[Any], key: str, root: ImageRoot) -> Sample:
    """Passages about an entity, and a question with a picture of it. The first of the accepted answers is the sample's."""
    passages = [f"Document (Title: {take(one, 'title', str, '')}): {take(one, 'text', str)}" for one in contexts]
    accepted = accepted_answers(take(entry, "answer", (str, list)))
    if not accepted or not all(isinstance(one, str) for one in accepted):
        raise DataError(f"answer {str(entry['answer'])[:40]!r} holds no text that would be accepted")
    text = PASSAGES.format(context="\n\n".join(passages), question=IMAGE_MARK + take(entry, "question", str))
    return _sample(entry, key, root, text, [take(entry, "image", str)], (), (), accepted[0])


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
    results: dict[str, dict[str, float]] = {}
    for file in files:
        if file.stem in results:
            raise DataError(f"{path} holds {file.stem}.json and {file.stem}.jsonl; keep one of them")
        found = _results(file)
        rule = _rule_of(file, found)
        try:
            results[file.stem] = score_entries(found, rule)
        except DataError as error:
            raise DataError(f"{file}, {error.reason}") from None
    return {"benchmark": "mmlongbench", "results": results}


def _rule_of(path: Path, results: list[Entry]) -> str:
    """The one rule that all answers of a file name, or else its name."""
    first: dict[str, int] = {}
    for place, entry in enumerate(results):
        try:
            rule = take(entry, "rule", str, "")
        except DataError as error:
            raise DataError(f"{path}, answer {place}: {error.reason}") from None
        if rule and rule not in RULES:
            raise DataError(f"{path}, answer {place}: rule {rule[:40]!r} is none of {', '.join(RULES)}")
        first.setdefault(rule, place)
    if len(first) > 1:
        (one, place), (other, second), *_ = first.items()
        raise DataError(f"{path}: answer {place} names the rule {one!r} and answer {second} {other!r}; a file has one rule")
    return next(iter(first)) or rule_for(path.name)


def rule_for(name: str) -> str:
    """The benchmark's metric for a file, from its name."""
    for rule, marks in MARKS.items():
        if any(mark in name for mark in marks):
            return rule
    if "retrieval" in name or "reasoning" in name:
        return "letter" if "image" in name else "contains"
    known = ", ".join(mark for marks in MARKS.values() for mark in marks)
    raise DataError(f"{name}: no {known}, retrieval or reasoning in the name, so the rule is not known")


def score_entries(results: list[Entry], rule: str) -> dict[str, float]:
    """Official and strict accuracy side by side."""
    total = strict = 0.0
    for place, entry in enumerate(results):
        try:
            answer, output = take(entry, "answer", (str, int, list)), take(entry, "output", str)
            form = take(entry, "answer_format", str) if rule == "document" else None
            total += official(answer, output, rule, place=place, form=form)
        except ValueError as error:
            raise DataError(f"answer {place}: {error}") from None
        strict += is_exact(answer, output, rule)
    return {"answers": len(results), "official_accuracy": total / len(results), "strict_accuracy": strict / len(results)}


def _results(path: Path) -> list[Entry]:
    try:
        results = list(entries(path)) if path.suffix == ".jsonl" else take(read_json(path), "data", list)
    except DataError as error:
        raise DataError(error.reason if str(path) in error.reason else f"{path}: {error.reason}") from None
    if not results:
        raise DataError(f"{path} holds no answers")
    return results
