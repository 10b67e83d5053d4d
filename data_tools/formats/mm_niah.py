"""MM-NIAH: read and write its lines, and score its answers.

A line holds `context` and `question` with <image> marks, `images_list`, `answer` (text, the number of a choice, or a list of counts) and
`meta` (depth, lengths, needles, choices). Lettered choices are appended to the question.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.formats.fields import Entry, check_fields, is_empty, take, take_strings
from data_tools.formats.marks import IMAGE_MARK, interleave
from data_tools.formats.visual_haystacks import write_images
from data_tools.image_root import ImageRoot
from data_tools.inputs import entries, visible
from laid_ds.data.record import DataError, Sample, Turn, record_of
from laid_ds.evaluation.mm_niah_rule import as_counts, is_exact, official

BY_LETTER = "\nAnswer with the option's letter from the given choices directly."
BY_PHRASE = "\nAnswer the question using a single word or phrase."
LENGTH_BINS = [1000, 2000, 4000, 8000, 12000, 16000, 24000, 32000, 40000, 48000, 64000]
DEPTHS = 5
TASKS = 6


def read_entry(entry: Entry, key: str, root: ImageRoot) -> Sample:
    """One line, with the benchmark's own prompt."""
    names, meta = take_strings(entry, "images_list"), take(entry, "meta", dict)
    check_fields(entry, (), others=True)
    context, question = take(entry, "context", str), take(entry, "question", str)
    marks = (context + question).count(IMAGE_MARK)
    if marks != len(names):
        raise DataError(f"{marks} {IMAGE_MARK} marks for {len(names)} images")
    choices, choice_images = take_strings(meta, "choices", []), take_strings(meta, "choices_image_path", [])
    if choices and choice_images:
        raise DataError("fields 'choices' and 'choices_image_path' are both given; one of them must go")
    letters = tuple(chr(ord("A") + number) for number in range(len(choices or choice_images)))
    offered = choices or [IMAGE_MARK] * len(choice_images)
    lines = "".join(f"\n{letter}. {choice}" for letter, choice in zip(letters, offered, strict=True))
    text = f"{context}\n{question}{lines}{BY_LETTER if letters else BY_PHRASE}"
    shown = names + ([] if choices else choice_images)
    (segments,) = interleave([text], len(shown))
    in_context, needle_names = names[: context.count(IMAGE_MARK)], take(meta, "needles", list, [])
    needles = needles_among(in_context, needle_names)
    in_text = bool(needle_names) and all(isinstance(needle, str) and needle in context for needle in needle_names)
    turns = (Turn("user", segments, needles, letters), Turn("assistant", (_answer_text(entry, letters),)))
    images, fixed = root.read_all(shown), tuple(range(len(in_context), len(shown)))
    facts = {"mm_niah": entry, "image_paths": shown}
    return Sample(key, turns, images, "MM-NIAH", meta=facts, haystack=bool(needles) or in_text, fixed=fixed)


def needles_among(names: list[str], needle_names: list[Any]) -> tuple[int, ...]:
    """The places of the needles among the images, if each needle is one of them: a needle that was drawn into an image is not known, and
    some needles alone would be an untruth."""
    known = all(needle in names for needle in needle_names)
    return tuple(index for index, name in enumerate(names) if name in needle_names) if known else ()


def _answer_text(entry: Entry, letters: tuple[str, ...]) -> str:
    answer = take(entry, "answer", (str, int, list))
    if isinstance(answer, int):
        if not 0 <= answer < len(letters):
            raise DataError(f"answer {answer} is the number of no choice")
        return letters[answer]
    return answer_text(answer, letters)


def answer_text(answer: str | list, letters: Sequence[str]) -> str:
    """The answer as it is learned; with letters to choose from it is one of them."""
    if is_empty(answer) or (isinstance(answer, str) and not answer.strip()):
        raise DataError(f"answer {answer!r} says nothing")
    if letters and answer not in letters:
        raise DataError(f"answer {str(answer)[:40]!r} is none of the choices {', '.join(letters)}")
    return answer if isinstance(answer, str) else json.dumps(answer)


def write_file(samples: Iterable[Sample], out: Path) -> dict[str, Any]:
    """`annotations.jsonl` and the images under `out/images`. An imported sample gives its own line back."""
    lines: list[Entry] = []
    left_out = 0
    for sample in samples:
        given_back = "mm_niah" in sample.meta
        if not given_back and not _pairs(sample):
            left_out += 1
            continue
        names = write_images(sample, out / "images", exact=given_back)
        lines += [sample.meta["mm_niah"]] if given_back else _entries_of(sample, names, len(lines))
    if not lines:
        raise DataError(f"none of the {left_out} samples asks a question that is answered")
    (out / "annotations.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return {"entries": len(lines), "samples_without_question": left_out}


def _pairs(sample: Sample) -> list[tuple[Turn, Turn]]:
    """Questions with their answers."""
    pairs = zip(sample.turns, sample.turns[1:], strict=False)
    return [(asked, said) for asked, said in pairs if (asked.role, said.role) == ("user", "assistant")]


def _entries_of(sample: Sample, names: list[str], first_id: int) -> Iterable[Entry]:
    """A line for each question; images stand in the context, in their order."""
    record = record_of(sample)
    for number, (question, answer) in enumerate(_pairs(sample)):
        depths = [needle / max(len(names) - 1, 1) for needle in question.needles]
        image_tokens = sum(-(-info.width // 28) * -(-info.height // 28) for info in record.images)
        text_tokens = len(question.text) // 4
        yield {
            "id": first_id + number,
            "images_list": names,
            "context": IMAGE_MARK * len(names),
            "question": question.text,
            "answer": question.choices.index(answer.text) if answer.text in question.choices else answer.text,
            "meta": {
                "placed_depth": depths[0] if len(depths) == 1 else depths,
                "context_length": image_tokens + text_tokens,
                "context_length_text": text_tokens,
                "context_length_image": image_tokens,
                "num_images": len(names),
                "needles": [names[needle] for needle in question.needles],
                "choices": list(question.choices) or None,
                "choices_image_path": None,
            },
        }


def score(folder: Path) -> dict[str, Any]:
    """Each file `{model}_{task}.jsonl` of one model: scores by context length as the benchmark bins them, and the strict share of exact
    answers."""
    files = visible(folder, "*.jsonl")
    if not files:
        raise DataError(f"{folder} holds no answers (*.jsonl)")
    models = {path.stem.rpartition("_")[0]: path for path in files}
    if len(models) > 1:
        raise DataError(f"{folder} holds answers of several models ({', '.join(map(repr, models))}); give each a folder of its own")
    tasks = {path.stem.rpartition("_")[2]: _score_file(path) for path in files}
    result: dict[str, Any] = {"benchmark": "mm-niah", "model": next(iter(models)), "lengths": LENGTH_BINS, "tasks": tasks}
    if len(tasks) == TASKS:
        result["overall"] = np.mean([task["official_by_length"] for task in tasks.values()], axis=0).round(6).tolist()
    return result


def _score_file(path: Path) -> dict[str, Any]:
    lines = list(entries(path))
    if not lines:
        raise DataError(f"{path} holds no answers")
    try:
        return score_lines(lines, "counting" in path.stem.rpartition("_")[2])
    except DataError as error:
        raise DataError(f"{path}, {error.reason}") from None


def score_lines(lines: list[Entry], counting: bool = False) -> dict[str, Any]:
    """Official: a mean over five depths (an empty depth counts as 0) for each length; lines below the first length are left out."""
    total, correct = np.zeros((2, len(LENGTH_BINS) + 1, DEPTHS))
    strict = 0
    for number, line in enumerate(lines):
        try:
            place = np.digitize(take(line, "context_length", (int, float)), LENGTH_BINS), int(min(_depth(line), 0.99) / 0.2)
            answer, response = take(line, "answer", (str, int, list)), take(line, "response", str)
            answer = as_counts(answer) if counting else answer
        except ValueError as error:
            raise DataError(f"answer {number}: {error}") from None
        total[place] += 1
        correct[place] += official(answer, response)
        strict += is_exact(answer, response)
    by_length = np.divide(correct, total, out=np.zeros_like(correct), where=total > 0)[1:].mean(1)
    return {"answers": len(lines), "official_by_length": by_length.round(6).tolist(), "strict_accuracy": strict / max(len(lines), 1)}


def _depth(line: Entry) -> float:
    """Where the needle is, or the mean over several."""
    depths = take(line, "placed_depth", (int, float, list))
    depths = depths if isinstance(depths, list) else [depths]
    if not depths or not all(isinstance(depth, (int, float)) and 0 <= depth <= 1 for depth in depths):
        raise DataError(f"placed_depth {str(depths)[:40]} is not in [0, 1]")
    return sum(depths) / len(depths)
