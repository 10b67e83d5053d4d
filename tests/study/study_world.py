"""A study of a few steps in a tests' world: two arms that are trained, the student before, and lines that were made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from tests.support.recipes import write_recipe

ASKED = {"shards": "{world}/shards", "sizes": [1, 2, 4], "haystacks": 6, "questions": 2}


def write_study(world: Any, folder: Path, **changes: Any) -> Path:
    """STUDY.toml and its base recipe in a folder; `changes` replace keys of its top, None removes one."""
    write_recipe(world.run(Path("unused")), folder / "base.toml")
    answers = ["losses.align=0", "losses.match=0", "gain.enabled=false"]
    tree = {
        "title": "Tiny",
        "recipe": "base.toml",
        "seeds": [1, 2],
        "teachers": {"one": "{world}/teacher"},
        "set": ["student.path={world}/student", "teacher.path={teacher}", 'data.shards=["{world}/shards"]'],
        "asked": ASKED,
        "arms": {
            "before": {"model": "{world}/student"},
            "kl+sft": {"set": answers},
            "sft": {"set": [*answers, "losses.kl=0"]},
            "align": {},
        },
    } | changes
    path = folder / "tiny.toml"
    path.write_text(tomli_w.dumps({key: value for key, value in tree.items() if value is not None}))
    return path


def made_up(arm: str, seed: int, ends: float, haystacks: int = 20, questions: int = 3, **values: Any) -> dict[str, Any]:
    """A line whose accuracy falls from 1 to 0 around the size `ends`, by haystack and question."""
    rng, sizes = np.random.default_rng([seed, len(arm)]), (1, 4, 16, 64, 256)
    right = {str(n): rng.binomial(questions, 1 / (1 + (n / ends) ** 2), haystacks).tolist() for n in sizes}
    accuracy = {n: sum(row) / (haystacks * questions) for n, row in right.items()}
    asked = {"shards": "{world}/shards", "sizes": list(sizes), "haystacks": haystacks, "questions": questions}
    return {
        "study": "tiny",
        "world": "w",
        "role": "test",
        "arm": arm,
        "teacher": None,
        "seed": seed,
        "value": None,
        "asked": asked,
        "chance": 0.125,
        "fingerprint": "f" * 64,
        "accuracy": accuracy,
        "right": right,
        "of": {str(n): questions for n in sizes},
        "cpu_seconds": {"eval": 36.0},
        "versions": {"torch": "2"},
    } | values
