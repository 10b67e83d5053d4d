"""Floating-point operations of a run, and what ranks that share a sequence send each other.

Ranks that share micro-batches share their work evenly: rows of the decoder, scores of attention, and images where the family can.
"""

from __future__ import annotations

from collections.abc import Sequence

from laid_ds.method.align import compared_heads
from laid_ds.models.sizes import Sizes
from laid_ds.plan.memory import slice_of
from laid_ds.plan.pair import BYTES, Pair, compared, moves, reads_lessons


def step_flops(pair: Pair, tokens: int) -> float:
    """Of one optimizer step on each GPU, recomputation included; each micro-batch has so many tokens, its rows the same length."""
    rows, ranks = pair.run.data.micro_batch, pair.run.sequence_parallel
    return pair.run.optimizer.accumulation * batch_flops(pair, [tokens / rows] * rows) / ranks


def batch_flops(pair: Pair, lengths: Sequence[float], taught: Sequence[float] | None = None) -> float:
    """Of one micro-batch, of all ranks that share it: the tokens of each of its rows or, of a pack, of each of its samples, which do not
    see each other; taught: of those that the teacher reads, where these are others."""
    passes = 4 if pair.run.student.gradient_checkpointing else 3
    ranks = pair.run.sequence_parallel
    learning = sum(_learning_flops(pair, length, passes, ranks) for length in lengths)
    return learning + sum(_teaching_flops(pair, length, ranks) for length in taught or lengths)


def model_flops(pair: Pair, samples: float, tokens: float, taught: float | None = None) -> float:
    """Of one optimizer step over all ranks as MFU counts them, without recomputation; all samples are taken to have the mean length.
    taught: tokens that the teacher reads, where these are others."""
    return samples * (_learning_flops(pair, tokens / samples, 3) + _teaching_flops(pair, (taught or tokens) / samples))


def sent_bytes(pair: Pair, tokens: int) -> dict[str, int]:
    """What one rank sends (and receives) in each decoder layer for a micro-batch of so many tokens, by model: the keys and values of its
    slice go to the n - 1 others, forward, once more where a layer is computed again, and their gradients come back."""
    run, student, teacher = pair.run, pair.student, pair.teacher
    times = {"student": 3 if run.student.gradient_checkpointing else 2, "teacher": 1}
    models = {"student": (student, run.student)} | ({"teacher": (teacher, run.teacher)} if teacher and not reads_lessons(run) else {})

    def once(model: Sizes, dtype: str) -> int:
        _, keys, size = model.heads
        return 2 * keys * size * slice_of(run, tokens) * (run.sequence_parallel - 1) * BYTES[dtype]

    return {who: times[who] * once(sizes, model.dtype) for who, (sizes, model) in models.items()}


def _learning_flops(pair: Pair, tokens: float, passes: int, ranks: int = 1) -> float:
    """Of one row of the student: products forward, twice that backward (3 passes), once more for a recomputation (4); on so many ranks that
    share it, each of which encodes its images where a family cannot share them out."""
    seen = passes if moves(pair.run, vision=True) else 1
    student = passes * _forward_flops(pair.student, tokens) + seen * _vision_flops(pair.student, tokens, ranks)
    return student + _matching_flops(pair, tokens)


def _teaching_flops(pair: Pair, tokens: float, ranks: int = 1) -> float:
    """Of one row of the teacher, which is only read."""
    live = pair.teacher is not None and not reads_lessons(pair.run)
    return _forward_flops(pair.teacher, tokens) + _vision_flops(pair.teacher, tokens, ranks) if live else 0


def _forward_flops(model: Sizes, tokens: float) -> float:
    """Products of decoder and head, and attention's: scores, and their products with the values."""
    scores = sum(number * 4 * kind.heads * kind.head_dim * kind.scores(tokens) for kind, number in model.attention.items())
    return model.flops_per_token * tokens + scores


def _vision_flops(model: Sizes, tokens: float, ranks: int) -> float:
    """As if all tokens were images."""
    return 2 * model.images * tokens * model.patches_per_token * (1 if model.shares_images else ranks)


def _matching_flops(pair: Pair, tokens: float) -> float:
    """Scores of both models and their mixture, forward and twice backward; of chosen heads theirs alone. How many rows answer is not known
    here: with match.rows_from = "answers" it is less."""
    run = pair.run
    if pair.teacher is None or run.losses.match == 0:
        return 0
    (heads, _, size), (teacher_heads, _, teacher_size) = pair.student.heads, pair.teacher.heads
    rows = min(tokens, run.match.rows or tokens)
    per_score = 0
    for couples in compared_heads(run.align.heads, compared(pair), heads, teacher_heads):
        if couples is not None:
            per_score += len(couples) * (size + teacher_size)
        elif run.keeps_one_hot:
            per_score += heads * size + min(heads, teacher_heads) * teacher_size
        else:
            per_score += heads * size + teacher_heads * teacher_size + heads * teacher_heads
    return 3 * 2 * per_score * rows * tokens / 2
