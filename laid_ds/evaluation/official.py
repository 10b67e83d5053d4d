"""Answers as the files that the benchmarks' own scorers take: a folder for each model, and in it what each benchmark names its files.

Visual Haystacks: MODEL/vhs/TASK/{N}_images/{number}.json, an entry with its result (with the needle at several places: one entry, a list of
responses). MM-NIAH: MODEL/mm-niah/{MODEL}_{TASK}.jsonl. MMLongBench: MODEL/mmlongbench/{TASK}.json, {"data": [...]}.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laid_ds.disk import writing
from laid_ds.evaluation.mmlongbench_rule import LED
from laid_ds.evaluation.rules import HAYSTACK, Answer

ENTRY = {"vhs": "vhs", "mm-niah": "mm_niah", "mmlongbench": "mmlongbench"}
SPLITS = ("val", "test")


def write_official(answers: Sequence[Answer], out: Path) -> dict[str, list[str]]:
    """Benchmark -> the files written for it. Answers to other data sets than benchmarks are left out.

    Raises ValueError when `out` is not empty, when no answer is a benchmark's, and for an answer without its entry.
    """
    asked = [answer for answer in answers if answer["benchmark"] != HAYSTACK]
    if not asked:
        raise ValueError("no answer is to a question of Visual Haystacks, MM-NIAH or MMLongBench; there is nothing that their scorers take")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give a new folder")
    groups: dict[tuple[str, str, str], list[Answer]] = defaultdict(list)
    for answer in asked:
        if ENTRY.get(answer["benchmark"]) not in answer["meta"]:
            raise ValueError(f"the answer of {answer['key']} does not hold its entry of the benchmark, which official files repeat")
        groups[answer["benchmark"], answer["model"], answer["task"]].append(answer)
    written: dict[str, list[str]] = defaultdict(list)
    for (benchmark, model, task), found in groups.items():
        for path, text in FILES[benchmark](found, model, task):
            place = out / model / benchmark / path
            place.parent.mkdir(parents=True, exist_ok=True)
            with writing(place.parent, place.name):
                place.write_text(text, encoding="utf-8")
            written[benchmark].append(str(place))
    return dict(written)


def _visual_haystacks(answers: Sequence[Answer], model: str, task: str) -> list[tuple[str, str]]:
    by_key: dict[tuple[int, str], list[Answer]] = defaultdict(list)
    for answer in answers:
        by_key[answer["size"], answer["key"]].append(answer)
    files, number = [], defaultdict(int)
    for (size, _), group in by_key.items():
        entry, said = group[0]["meta"]["vhs"], [answer["said"] for answer in group]
        told = {"response": said} if len(said) > 1 else {"result": {"image_paths": group[0]["shown"], "response": said[0], "log": ""}}
        folder = "oracle" if not entry.get("neg_image") else str(size)
        files.append((f"{task}/{folder}_images/{number[folder]:03d}.json", _json(entry | told)))
        number[folder] += 1
    return files


def _mm_niah(answers: Sequence[Answer], model: str, task: str) -> list[tuple[str, str]]:
    """The scorer reads model and task from the name: what follows the last "_" is the task, and it ends with val or test."""
    name = task.replace("_", "-")
    name = name if name.endswith(SPLITS) else f"{name}-{SPLITS[0]}"
    lines = []
    for answer in answers:
        entry = answer["meta"]["mm_niah"]
        line = {"question_id": entry.get("id"), "answer": entry["answer"], "response": answer["said"]}
        lines.append(line | {fact: entry["meta"].get(fact) for fact in ("context_length", "placed_depth")})
    return [(f"{model}_{name}.jsonl", "".join(_json(line) + "\n" for line in lines))]


def _mmlongbench(answers: Sequence[Answer], model: str, task: str) -> list[tuple[str, str]]:
    data = [answer["meta"]["mmlongbench"] | {"output": LED + answer["said"], "question": answer["question"]} for answer in answers]
    return [(f"{task}.json", _json({"data": data}))]


def _json(tree: Any) -> str:
    return json.dumps(tree, ensure_ascii=False, allow_nan=False)


FILES = {"vhs": _visual_haystacks, "mm-niah": _mm_niah, "mmlongbench": _mmlongbench}
