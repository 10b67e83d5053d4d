"""The window so far: a small held-out evaluation of the student in training, shared out over the ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from laid_ds.config import Evaluation
from laid_ds.data.dataset import Dataset
from laid_ds.evaluation.asking import ask
from laid_ds.evaluation.haystack import Haystacks, Survey, read_haystacks, survey
from laid_ds.evaluation.window import relative_threshold, window_of
from laid_ds.files import read_json_lines
from laid_ds.models.processor import Renderer
from laid_ds.runtime import checkpoint, distributed

FILE = "evaluation.jsonl"


def measure(engine: Any, renderer: Renderer, options: Evaluation) -> dict[int, float]:
    """Size -> accuracy of the model in training, over all ranks, for each size that the haystacks hold. Collective; no random number is
    drawn.

    Every rank makes the same number of forward passes, one row each, since ZeRO-3 gathers the model on all ranks or none: a rank that has
    run out of haystacks repeats its last one, uncounted. Ranks that share rows take theirs together.
    """
    samples, together = read_haystacks(Dataset.open(options.shards), options.haystacks), engine.module.group.size
    rank, ranks = distributed.rank() // together, distributed.world_size() // together
    sizes, turns = held_out(options).sizes, -(-len(samples) // ranks)
    for _ in samples:  # read all of them once on every rank: one that cannot be read stops all ranks alike, and none waits for another
        pass
    mine = [rank + ranks * turn for turn in range(turns)]
    own = Haystacks(samples.dataset, [min(i, len(samples) - 1) for i in mine])
    engine.eval()
    answers = ask(engine.module.model, renderer, own, sizes, options.questions, tokens_per_batch=1)
    engine.train()
    counted = sum(i < len(samples) for i in mine)
    return {size: _accuracy(answers[str(size)][:counted]) for size in sizes}


def _accuracy(answers: Sequence[Sequence[int]]) -> float:
    """Over the questions of all ranks."""
    right, asked = distributed.add([sum(map(sum, answers)), sum(map(len, answers))])
    return right / asked


def record(path: Path, step: int, accuracy: dict[int, float], chance: float, left_out: Mapping[int, str] | None = None) -> dict[str, Any]:
    """Append a measurement to the run's evaluation.jsonl, in place of any of this step or later; returns it.

    The threshold is that of the first measurement in the file: chance + 0.6 of the one-image skill (the first size's) at that time. Where
    that was not above chance there is neither a threshold nor a window: None.
    """
    earlier = [line for line in _lines(path) if line["step"] < step]
    at_first = next(iter(earlier[0]["accuracy"].values())) if earlier else accuracy[min(accuracy)]
    threshold = relative_threshold(at_first, chance) if at_first > chance else None
    images, censored = (None, None) if threshold is None else window_of(accuracy, threshold)
    found = {"step": step, "accuracy": {str(n): a for n, a in accuracy.items()}, "threshold": threshold, "chance": chance}
    found |= {"window": images, "censored": censored}
    found |= {"left_out": {str(n): reason for n, reason in left_out.items()}} if left_out else {}
    checkpoint.write_durably(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in [*earlier, found]))
    return found


def sentence(found: dict[str, Any]) -> str:
    """One line for people."""
    curve = "  ".join(f"{size}: {accuracy:.2f}" for size, accuracy in found["accuracy"].items())
    return f"held out after step {found['step']}: accuracy by images  {curve}  {window_words(found)}"


def window_words(found: dict[str, Any]) -> str:
    """The window of a measurement for people, or why it has none."""
    if found["threshold"] is None:
        return "no window (the first measurement was not above chance)"
    return f"window {'>= ' if found['censored'] else ''}{found['window']:.1f} images"


def _lines(path: Path) -> list[dict[str, Any]]:
    return read_json_lines(path)


def held_out(options: Evaluation) -> Survey:
    """What can be measured on the held-out shards. Raises ValueError when they are none, have too few samples, or can be asked nothing."""
    return survey(Dataset.open(options.shards), options.haystacks, options.sizes)
