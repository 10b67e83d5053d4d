"""Before step 1: do both models understand the batches, and does the teacher know the answers?

Distillation from a teacher with the wrong weights, or from one that sees the images in the wrong places, looks like training all the same.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from laid_ds.config import Run
from laid_ds.data.batch import IGNORED, Batch
from laid_ds.kernels.attention_matching import Omega
from laid_ds.method.distill import Ask

BATCHES = 2
SURE_SHARE = 0.5  # of the nats of a guess over the vocabulary: what a teacher may need at most per token of an answer


class Seen(NamedTuple):
    """Means over the answer tokens of the batches looked at."""

    student_nats: float
    teacher_nats: float | None
    cut_mass: float | None
    """Probability that the teacher gives to ids beyond the tokenizer's, which is cut off."""

    def __str__(self) -> str:
        teacher = f"teacher {self.teacher_nats:.2f} (cut mass {self.cut_mass:.1e}), " if self.teacher_nats is not None else ""
        return f"first look, nats per answer token: {teacher}student {self.student_nats:.2f}"


@torch.no_grad()
def first_look(run: Run, student: Any, teacher: Any | None, batches: list[Batch], vocabulary: int) -> Seen:
    """Show the same batches to both engines on every rank. Collective; nothing is trained and no random number drawn.

    Raises ValueError when a model cannot take the batch (image tokens and image features that do not agree, among others), and when the
    teacher's answers are no better than guesses (`teacher.check_answers`).
    """
    rows = max(sum(int(batch.supervised.sum()) for batch in batches), 1)
    student.eval()
    own_nats = sum(student_nats(run, student, batch) for batch in batches) / rows
    student.train()
    if teacher is None:
        return Seen(own_nats, None, None)
    nats, cut = look_at_teacher(run, teacher, batches, vocabulary)
    return Seen(own_nats, nats, cut)


@torch.no_grad()
def look_at_teacher(run: Run, teacher: Any, batches: list[Batch], vocabulary: int) -> tuple[float, float]:
    """(nats per answer token, mass beyond the vocabulary) of these batches. Collective. Raises ValueError as `first_look`."""
    rows = max(sum(int(batch.supervised.sum()) for batch in batches), 1)
    nats, cut = (sum(column) / rows for column in zip(*(teacher_nats(run, teacher, batch, vocabulary) for batch in batches), strict=True))
    limit = SURE_SHARE * math.log(vocabulary)
    if run.teacher.check_answers and not nats <= limit:
        keys = [key for batch in batches for key in batch.keys]
        raise ValueError(
            f"the teacher {run.teacher.path} does not know the answers of {keys}: {nats:.2f} nats per token, a guess over the vocabulary "
            f"costs {math.log(vocabulary):.2f}; is it the right model and data? teacher.check_answers = false lets it teach all the same"
        )
    return nats, cut


def student_nats(run: Run, student: Any, batch: Batch) -> float:
    """What the answers of a batch cost the student: the sum of its cross-entropy. Raises ValueError when it cannot take the batch."""
    try:
        return student.module.group.add(student(batch, None, Ask({"sft": 1.0}, Omega()))[1]["sft"]).item()
    except ValueError as error:
        raise _misfit("student", run.student.path, batch, error) from None


def teacher_nats(run: Run, teacher: Any, batch: Batch, vocabulary: int) -> tuple[float, float]:
    """Sums over rows of the teacher's cross-entropy on the shared vocabulary and of its probability beyond it. Raises ValueError too."""
    group = teacher.module.group
    try:
        logits = teacher(batch.for_teacher, every_logit=True).logits.rows.float()
    except ValueError as error:
        raise _misfit("teacher", run.teacher.path, batch, error) from None
    labels = group.own(batch.for_teacher.labels, 1)
    nats = F.cross_entropy(logits[:, :vocabulary], labels[labels != IGNORED], reduction="sum")
    both = group.add(torch.stack([nats, logits.softmax(-1)[:, vocabulary:].sum()]))
    return both[0].item(), both[1].item()


def _misfit(who: str, path: Any, batch: Batch, error: ValueError) -> ValueError:
    return ValueError(f"the {who} {path} cannot take the batch of {list(batch.keys)}: {error}")
