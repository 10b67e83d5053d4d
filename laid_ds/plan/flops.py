"""Floating-point operations of a run and the time they take, at the speed that is assumed of the machine."""

from __future__ import annotations

from collections.abc import Sequence

from laid_ds.models.sizes import Sizes
from laid_ds.plan.pair import Pair, compared, moves, reads_lessons


def step_flops(pair: Pair, tokens: int) -> float:
    """Of one optimizer step on each GPU, recomputation included; each micro-batch has so many tokens, its rows the same length."""
    rows = pair.run.data.micro_batch
    return pair.run.optimizer.accumulation * batch_flops(pair, [tokens / rows] * rows)


def batch_flops(pair: Pair, lengths: Sequence[float]) -> float:
    """Of one micro-batch: the tokens of each of its rows or, of a pack, of each of its samples, which do not see each other."""
    passes = 4 if pair.run.student.gradient_checkpointing else 3
    return sum(_row_flops(pair, length, passes) for length in lengths)


def model_flops(pair: Pair, samples: float, tokens: float) -> float:
    """Of one optimizer step over all ranks as MFU counts them, without recomputation; all samples are taken to have the mean length."""
    return samples * _row_flops(pair, tokens / samples, 3)


def _row_flops(pair: Pair, tokens: float, passes: int) -> float:
    """Of one row: products forward, twice that backward (3 passes), once more for a recomputation (4)."""
    seen = passes if moves(pair.run, vision=True) else 1
    student = passes * _forward_flops(pair.student, tokens) + seen * _vision_flops(pair.student, tokens)
    live = pair.teacher is not None and not reads_lessons(pair.run)
    teacher = _forward_flops(pair.teacher, tokens) + _vision_flops(pair.teacher, tokens) if live else 0
    return student + teacher + _matching_flops(pair, tokens)


def _forward_flops(model: Sizes, tokens: float) -> float:
    """Products of decoder and head, and attention's: scores, and their products with the values."""
    scores = sum(number * 4 * kind.heads * kind.head_dim * kind.scores(tokens) for kind, number in model.attention.items())
    return model.flops_per_token * tokens + scores


def _vision_flops(model: Sizes, tokens: float) -> float:
    """As if all tokens were images."""
    return 2 * model.images * tokens * model.patches_per_token


def _matching_flops(pair: Pair, tokens: float) -> float:
    """Scores of both models and their mixture, forward and twice backward."""
    if pair.teacher is None or pair.run.losses.match == 0:
        return 0
    (heads, _, size), (teacher_heads, _, teacher_size) = pair.student.heads, pair.teacher.heads
    rows = min(tokens, pair.run.match.rows or tokens)
    per_score = heads * size + teacher_heads * teacher_size + heads * teacher_heads
    return 3 * 2 * per_score * rows * tokens / 2 * len(compared(pair))
