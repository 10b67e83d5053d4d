"""What comparing few heads on few rows saves: matching of one layer of a 7B student with a 32B teacher, as `Align` computes it in training.

python -m benchmarks.chosen_heads --tokens 2048 --json

Arms: a learned mixture of all heads, the same kept one-hot, and two chosen heads; each on all rows, and on those from which 64 tokens of
answers are predicted. On the CPU, one thread, float32, chunked kernels; added peaks hold the gradients of all queries and keys.
"""

from __future__ import annotations

import argparse
import math
from functools import partial

import torch

from benchmarks import measure
from laid_ds.config import Align as Options
from laid_ds.kernels.attention_matching import Omega
from laid_ds.method.align import Align
from laid_ds.models.attention import Captured

STUDENT, TEACHER = (28, 4, 128), (40, 8, 128)  # query heads, key heads, size: Qwen2.5-VL of 7B and 32B
ANSWERS = 64
ARMS = {
    "mixture": {},
    "one_hot": {"start_logit": math.inf},
    "two_heads": {"heads": (((9, 13), (10, 14)),)},
}


def inputs(arm: str, rows: str, tokens: int) -> tuple:
    """An Align, both sides of a layer, and the rows that count; the answers stand in groups of 4, evenly."""
    generator = torch.Generator().manual_seed(0)
    align = Align(Options(**ARMS[arm]), [(0, 0)], STUDENT, TEACHER, {}, keeps_one_hot=arm == "one_hot")

    def side(shape: tuple[int, int, int], learned: bool) -> Captured:
        heads, keys, size = shape
        query, key = (torch.randn(1, number, tokens, size, generator=generator).requires_grad_(learned) for number in (heads, keys))
        return Captured(query, key, size**-0.5, None)

    answering = torch.arange(tokens)[None] % (4 * tokens // ANSWERS) < 4
    return align, side(STUDENT, True), side(TEACHER, False), answering if rows == "answers" else None


def match(prepared: tuple) -> None:
    """Forward and backward."""
    align, student, teacher, mask = prepared
    segments = torch.zeros(1, student.query.shape[2], dtype=torch.long)
    align({0: student}, {0: teacher}, segments, ["match"], Omega(), row_mask=mask)["match"].backward()
    student.query.grad = student.key.grad = None


def compare(tokens: int, repeats: int) -> dict[str, float]:
    """CPU seconds and added peak megabytes of each arm, and what two heads on the answers' rows take of the whole."""
    figures: dict[str, float] = {}
    for arm in ARMS:
        for rows in ("all", "answers"):
            prepared = inputs(arm, rows, tokens)
            figures[f"cpu_seconds_{arm}_{rows}"] = measure.cpu_seconds(partial(match, prepared), repeats)
            del prepared
            figures[f"added_peak_mb_{arm}_{rows}"] = measure.added_peak_mb(inputs, match, arm, rows, tokens)
    few, whole = "two_heads_answers", "mixture_all"
    return figures | {
        "cpu_ratio_vs_whole": figures[f"cpu_seconds_{few}"] / figures[f"cpu_seconds_{whole}"],
        "memory_ratio_vs_whole": figures[f"added_peak_mb_{few}"] / figures[f"added_peak_mb_{whole}"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = compare(arguments.tokens, arguments.repeats)
    measure.append("chosen_heads", "cpu", f"tokens={arguments.tokens} answers={ANSWERS} 28 heads from 40", figures)
    measure.show(figures | {"tokens": arguments.tokens, "versions": measure.versions()}, arguments.json)


if __name__ == "__main__":
    main()
