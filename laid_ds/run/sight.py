"""Before step 1: do the models see? The answers of some samples are asked for twice, beside their own images and beside those of others.

To a model that does not see, both are alike: what an answer gains by its own images is as likely positive as negative, whatever it costs.
A teacher of yes-or-no questions that never looks is at 0.69 nats, far below a guess over the vocabulary, and would teach to guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from laid_ds.config import Run
from laid_ds.data.batch import Batch, Prepare
from laid_ds.data.record import Sample
from laid_ds.data.stream import Stream
from laid_ds.run.first_look import student_nats, teacher_nats
from laid_ds.runtime import distributed

LEAST, MOST = 8, 32  # batches that are looked at before a model is judged, and until it is refused
SURE, LIKELY = 3.0, 2.0  # standard deviations
LITTLE, MUCH = 1.05, 2.0  # times as dear beside the images of others


@dataclass
class Costs:
    """Nats of the answers of each batch, beside their own images and beside those of other samples."""

    own: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)

    def sees(self) -> bool:
        """Whether answers are clearly cheaper beside their own images: `evidence` of 3 and a twentieth dearer beside others; or evidence
        of 2 and twice as dear. A trace of sight (a thousandth, in every batch) is evident and yet teaches guesses."""
        if len(self.own) < LEAST:
            return False
        found, own, others = evidence(self.own, self.others), sum(self.own), sum(self.others)
        return (found >= SURE and others >= LITTLE * own) or (found >= LIKELY and others >= MUCH * own)

    def __str__(self) -> str:
        own, others = (sum(costs) / len(costs) for costs in (self.own, self.others))
        return f"{own:.2f} and {others:.2f} (evidence {evidence(self.own, self.others):.1f})"


def evidence(own: Sequence[float], others: Sequence[float]) -> float:
    """The sum of the gains (others - own) in standard deviations of what it would be if each had a random sign.

    That is the distribution for a model that does not see, whatever its costs: by Hoeffding's inequality the value exceeds z with a
    probability of at most exp(-z^2 / 2), 1.1 % for 3. It is at most the square root of their number.
    """
    gains = [other - mine for mine, other in zip(own, others, strict=True)]
    spread = math.sqrt(sum(gain**2 for gain in gains))
    return sum(gains) / spread if spread else 0.0


def doubles(stream: Stream) -> Iterator[tuple[Batch, Batch]]:
    """Batches from where the stream stands, at most MOST, each with its double: the same turns with the images of the samples before them.

    Batches without an answer, without images, or with the same images as those before are left out. The stream does not move.
    """
    prepare: Prepare = stream.prepare
    before: list[Sample] = []
    for k in range(MOST + 1):
        samples, batch = stream.peek(k, lambda items: (windows := prepare.windows(items), prepare.batch(windows)))
        others = [_with_images(sample, before[i % len(before)]) for i, sample in enumerate(samples)] if before else samples
        if batch.supervised.any() and any(other.images != sample.images for other, sample in zip(others, samples, strict=True)):
            yield batch, prepare.batch(others)
        before = [sample for sample in samples if sample.images] or before


def _with_images(sample: Sample, other: Sample) -> Sample:
    """The sample's turns with as many images of another, which start again when there are too few."""
    return replace(sample, images=tuple(other.images[i % len(other.images)] for i in range(len(sample.images))))


@torch.no_grad()
def look_at_images(run: Run, student: Any | None, teacher: Any | None, pairs: Iterator[tuple[Batch, Batch]], vocabulary: int) -> list[str]:
    """What to say of whether the models see. Collective; every rank makes the same forward passes, and no random number is drawn.

    Raises ValueError for a teacher that does not see (`teacher.check_answers`); a student that does not is only told of.
    """
    ask: dict[str, Callable[[Batch], float]] = {}
    if student is not None:
        ask = {"student": lambda batch: student_nats(run, student, batch)}
    if teacher is not None and run.teacher.check_answers:
        ask = {"teacher": lambda batch: teacher_nats(run, teacher, batch, vocabulary)[0]} | ask
    costs = {who: Costs() for who in ask}
    judged, keys = costs[next(iter(ask))], set()
    if student is not None:
        student.eval()
    for own, others in pairs:
        keys |= set(own.keys)
        for who, cost in ask.items():
            costs[who].own.append(_agreed(cost(own)))
            costs[who].others.append(_agreed(cost(others)))
        if judged.sees() or ("teacher" not in ask and len(judged.own) == LEAST):
            break
    if student is not None:
        student.train()
    return _verdict(run, costs, len(keys))


def _agreed(value: float) -> float:
    """The mean over ranks, which is the same on all: they must stop looking together."""
    return distributed.add([value])[0] / distributed.world_size()


def _verdict(run: Run, costs: dict[str, Costs], num_samples: int) -> list[str]:
    number = len(next(iter(costs.values())).own)
    if num_samples < LEAST:
        return [f"whether the models see cannot be told: {num_samples} of the first samples have images that those before them lack"]
    if "teacher" in costs and not costs["teacher"].sees():
        raise ValueError(
            f"the teacher {run.teacher.path} does not see: the answers of {number} batches cost {costs['teacher']} nats beside their own"
            " images and beside those of other samples; is it the right model, with the weights of its vision tower?"
            " teacher.check_answers = false lets it teach all the same"
        )
    said = ", ".join(f"{who} {cost}" for who, cost in costs.items())
    lines = [f"nats of a batch's answers beside their own images and beside those of other samples, {number} batches: {said}"]
    if "student" in costs and not evidence(costs["student"].own, costs["student"].others) >= LIKELY:
        lines.append(f"warning: nothing shows that the student {run.student.path} sees the images")
    return lines
