"""What an answer is worth: its benchmark's own rule, quirks included, and beside it a strict one that no talk can please.

An answer is what `laid eval` keeps of one question: a dictionary of model, task, benchmark, key, cluster, question_index, size, depth,
question, shown, expected (texts, any of which is right), choices (texts, or None), said (the model's words), said_choice, meta. Rules read
`said`, `expected`, `choices`, `benchmark`, `task` and `meta`, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from laid_ds.evaluation.mm_niah_rule import judge as judge_mm_niah
from laid_ds.evaluation.mm_niah_rule import kept as kept_of_mm_niah
from laid_ds.evaluation.mmlongbench_rule import judge as judge_mmlongbench
from laid_ds.evaluation.mmlongbench_rule import kept as kept_of_mmlongbench
from laid_ds.evaluation.visual_haystacks_rule import judge as judge_visual_haystacks
from laid_ds.evaluation.visual_haystacks_rule import plain

Answer = Mapping[str, Any]
ENTRIES = {"vhs": "vhs", "mm_niah": "mm-niah", "mmlongbench": "mmlongbench"}
"""Where the meta of an imported sample holds its benchmark's own entry -> the benchmark."""
HAYSTACK = "haystack"
"""Every other data set: there is no benchmark, and both rules are ours."""


def benchmark_of(meta: Mapping[str, Any]) -> str:
    """The benchmark that a sample was imported from, by its meta: vhs, mm-niah, mmlongbench, or haystack for all others."""
    return next((benchmark for name, benchmark in ENTRIES.items() if name in meta), HAYSTACK)


def kept(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What of a sample's meta belongs into an answer: enough to score it and to write it as the official scorers take it, without the
    texts, which may be long."""
    if "vhs" in meta:
        return {name: meta[name] for name in ("vhs", "image_paths") if name in meta}
    if "mm_niah" in meta:
        return {"mm_niah": kept_of_mm_niah(meta["mm_niah"])}
    if "mmlongbench" in meta:
        return {"mmlongbench": kept_of_mmlongbench(meta["mmlongbench"])}
    return {}


def score(answer: Answer, place: int = 0) -> dict[str, float]:
    """{"official": 0 to 1, "strict": 0 to 1} of one answer.

    place: of the answer among those of its model and task, in the order of the benchmark's file (MMLongBench puts a default in the place
    of a missing yes or no, by turns). Raises ValueError for a benchmark without a rule, and for an answer that its rule cannot read.
    """
    rule = RULES.get(answer["benchmark"])
    if rule is None:
        raise ValueError(f"no rule for the benchmark {answer['benchmark']!r} of {answer['key']}; known are {', '.join(sorted(RULES))}")
    official, strict = rule(answer, place)
    return {"official": float(official), "strict": float(strict)}


def _haystack(answer: Answer, place: int) -> tuple[float, float]:
    """Ours: the words are those of a right answer but for case, quotes and a final stop; strictly, they are an answer letter by letter."""
    said = answer["said"].strip()
    return plain(said) in map(plain, answer["expected"]), said in [expected.strip() for expected in answer["expected"]]


RULES: dict[str, Callable[[Answer, int], tuple[float, float]]] = {
    "vhs": judge_visual_haystacks,
    "mm-niah": judge_mm_niah,
    "mmlongbench": judge_mmlongbench,
    HAYSTACK: _haystack,
}
