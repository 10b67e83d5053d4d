"""Answers that lmms-eval logged (--log_samples) on tasks which `laid-data export lmms-eval` wrote, as answers of ours."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from laid_ds.evaluation.scores import check_answer
from laid_ds.files import read_json_lines

FACTS = "laid"
"""The field of a logged sample in which an exported task repeats what is known of its question."""


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The answers in a folder that is lmms-eval's --output_path, or holds it; of two runs of a model and task the later one's.

    A model is called as its folder of logs is. Files of other tasks are named on stderr and left out: they do not say what is a right
    answer. Raises ValueError for a file that is no JSON lines, and for a sample without a response.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in sorted({*folder.glob("*_samples_*.jsonl"), *folder.glob("*/*_samples_*.jsonl")}, key=lambda path: path.name):
        lines = read_json_lines(path)
        if not all(isinstance(line, dict) and isinstance(line.get(FACTS), dict) for line in lines):
            print(f"{path} is left out: its task was not written by `laid-data export lmms-eval`", file=sys.stderr)
            continue
        for number, line in enumerate(lines, 1):
            answer = line[FACTS] | {"model": path.parent.name, "said": _said(line, f"{path}, line {number}"), "said_choice": None}
            check_answer(answer, f"{path}, line {number}")
            found[answer["model"], answer["task"], answer["key"], answer["size"], answer["question_index"]] = answer
    return list(found.values())


def _said(line: dict[str, Any], place: str) -> str:
    said = line.get("filtered_resps", line.get("resps"))
    while isinstance(said, list) and said:
        said = said[0]
    if not isinstance(said, str):
        raise ValueError(f"{place}: a sample without a response (filtered_resps)")
    return said
