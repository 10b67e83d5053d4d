"""One optimizer step: the teacher shows, the student listens, sums are divided once, nothing non-finite reaches the optimizer.

Student and teacher come in as callables (engines in a run, plain modules in a test); DeepSpeed is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from laid_ds.config import Losses, Match
from laid_ds.data.batch import IGNORED, Batch, Heads
from laid_ds.kernels.attention_matching import Omega
from laid_ds.method.align import Align
from laid_ds.method.losses import Shown, head_losses, inside, show
from laid_ds.models.attention import Captured, Tap, assert_differentiable, group_of, last_hidden_state, untouched
from laid_ds.models.lora import without_lora
from laid_ds.runtime import distributed
from laid_ds.sequence import ALONE, SequenceGroup

EVERY_ROW = Match()


class Lesson(NamedTuple):
    """What the teacher shows for one micro-batch (a tuple, since DeepSpeed looks for tensors in a module's output)."""

    heads: dict[int, Captured]
    logits: Shown | None
    """At the supervised rows, cut to the shared vocabulary, in the teacher's dtype."""


@dataclass(frozen=True)
class Ask:
    """What one forward pass is to compute, besides the batch."""

    factors: dict[str, float]
    """The terms of the loss, each with what its sum is multiplied with: weight / count over the whole optimizer step and all ranks."""
    omega: Omega


class Teacher(nn.Module):
    """A frozen model that shows its heads at the tapped layers and its logits at the supervised rows, cut to the shared vocabulary."""

    def __init__(self, model: nn.Module, tap: Tap, vocabulary: int, shows_logits: bool):
        super().__init__()
        self.model, self.tap, self.vocabulary, self.shows_logits = model.requires_grad_(False).eval(), tap, vocabulary, shows_logits

    @property
    def group(self) -> SequenceGroup:
        """The ranks that share each batch: each shows its own part."""
        return group_of(self.model)

    @torch.no_grad()
    def forward(self, batch: Batch, every_logit: bool = False) -> Lesson:
        """every_logit: show logits whatever the run asks for, and those beyond the shared vocabulary too."""
        return _lesson(self.model, self.tap, batch, self.vocabulary, self.shows_logits, every_logit)


class Recorder(Teacher):
    """A teacher that hands out the hidden states of the answer rows, and its head whole where asked: what recorded lessons hold."""

    @torch.no_grad()
    def forward(self, batch: Batch, every_logit: bool = False, with_head: bool = False) -> Lesson:
        """with_head: a copy of all of the head beside the rows."""
        if every_logit:
            return super().forward(batch, every_logit)
        with self.tap.open() as heads:
            hidden = last_hidden_state(self.model, **batch.inputs)
        rows = hidden[batch.supervised]
        return Lesson(heads, Shown(*inside(self.model.get_output_embeddings(), _copied, rows)) if with_head else Shown(rows))


def _copied(head: nn.Linear, rows: Tensor) -> tuple[Tensor, ...]:
    return rows, *(p.detach().clone() for p in (head.weight, head.bias) if p is not None)


class RecordedTeacher:
    """A teacher of which only the head is in memory: it shows what the data workers read of recorded lessons."""

    def __init__(self, head: Shown, device: torch.device, vocabulary: int, shows_logits: bool, group: SequenceGroup = ALONE):
        """head: its weight and bias, uncut; group: the ranks that share each batch."""
        self.parameters = [p.to(device) for p in (head.weight, head.bias) if p is not None]
        self.vocabulary, self.shows_logits, self.group = vocabulary, shows_logits, group
        self.module = self
        """As of an engine."""

    @torch.no_grad()
    def __call__(self, batch: Batch, every_logit: bool = False) -> Lesson:
        """As `Teacher.forward`, bit for bit."""
        assert batch.lesson is not None, "the batch came without its lessons"
        heads = {layer: _captured(held, self.group) for layer, held in batch.lesson.heads.items()}
        if not (self.shows_logits or every_logit):
            return Lesson(heads, None)
        rows, columns = batch.lesson.hidden[_own_answers(batch, self.group)], slice(None if every_logit else self.vocabulary)
        parameters = [p[columns] for p in self.parameters]
        if len(rows) > rows.shape[1] and not every_logit:
            return Lesson(heads, Shown(rows, *parameters))
        return Lesson(heads, Shown(nn.functional.linear(rows, *parameters)))


def _captured(held: Heads, group: SequenceGroup) -> Captured:
    """As the tap would have captured it; of chosen heads, each with its own copy of its keys."""
    key = held.key if held.heads is None else held.key[:, held.key_of]
    lse = None if held.lse is None else group.own(held.lse, 2)
    return Captured(group.own(held.query, 2), key, held.scale, held.window, lse=lse, heads=held.heads)


def _own_answers(batch: Batch, group: SequenceGroup) -> slice | Tensor:
    """Which of all answer rows of a batch are this rank's."""
    if group.size == 1:
        return slice(None)
    numbers = batch.supervised.flatten().cumsum(0).view_as(batch.labels) - 1
    return group.own(numbers, 1)[group.own(batch.supervised, 1)]


class OwnTeacher:
    """A student with LoRA as its own teacher: the model in its engine as it was before anything was learned. It holds no weights."""

    def __init__(self, student: TrainingEngine, tap: Tap, vocabulary: int, shows_logits: bool):
        self.student, self.tap, self.vocabulary, self.shows_logits = student, tap, vocabulary, shows_logits
        self.module, self.group = self, student.module.group
        """As of an engine."""

    @torch.no_grad()
    def __call__(self, batch: Batch, every_logit: bool = False) -> Lesson:
        """As `Teacher.forward`; no dropout, no factors, no gains."""
        model = self.student.module.model
        training = model.training
        model.eval()
        try:
            with without_lora(model), untouched(model, self.tap):
                return _lesson(model, self.tap, batch, self.vocabulary, self.shows_logits, every_logit)
        finally:
            model.train(training)


def _lesson(model: nn.Module, tap: Tap, batch: Batch, vocabulary: int, shows_logits: bool, every_logit: bool) -> Lesson:
    with tap.open() as heads:
        hidden = last_hidden_state(model, **batch.for_teacher.inputs)
    if not (shows_logits or every_logit):
        return Lesson(heads, None)
    head, rows = model.get_output_embeddings(), _answer_rows(hidden, batch, group_of(model))
    return Lesson(heads, Shown(head(rows)) if every_logit else show(head, rows, vocabulary))


def _answer_rows(hidden: Tensor, batch: Batch, group: SequenceGroup) -> Tensor:
    """[r, C] of the teacher's hidden states [B, t, C]: at the answer rows that are this rank's in what the student reads. Where the teacher
    reads something else, another rank of the group may have computed them."""
    read = batch.for_teacher
    own = hidden[group.own(read.supervised, 1)]
    if batch.taught is None or group.size == 1:
        return own
    every = own.new_zeros(int(read.supervised.sum()), own.shape[1])
    every[_own_answers(read, group)] = own
    return group.add(every)[_own_answers(batch, group)]


class Student(nn.Module):
    """The model in training beside its `Align`, in one module so that one engine shards and checkpoints both."""

    def __init__(self, model: nn.Module, align: Align | None, tap: Tap, losses: Losses, vocabulary: int, match: Match = EVERY_ROW):
        super().__init__()
        self.model, self.align, self.tap = model, align, tap
        self.losses, self.vocabulary, self.match = losses, vocabulary, match

    @property
    def group(self) -> SequenceGroup:
        """The ranks that share each batch."""
        return group_of(self.model)

    def forward(self, batch: Batch, lesson: Lesson | None, ask: Ask) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, sums of the asked terms) of this micro-batch; only the loss has a gradient, and it can be differentiated once. Of a batch
        that ranks share both are this rank's part.

        Where attention itself matches (`_matches_inside`), the sum "match" is whole only after the loss's backward pass, which adds to it.
        """
        matched = batch.labels.new_zeros((), dtype=torch.float32)
        inside = self.align.inside_attention(lesson.heads, batch.segments, ask.omega, matched.add_) if self._matches_inside(ask) else {}
        with self.tap.open(inside) as heads:
            hidden = last_hidden_state(self.model, **batch.inputs)
        assert_differentiable(heads)
        labels = self.group.own(batch.labels, 1)
        supervised = labels != IGNORED
        loss, sums = head_losses(
            hidden[supervised],
            self.model.get_output_embeddings(),
            labels[supervised],
            self.vocabulary,
            ask.factors,
            lesson.logits if lesson else None,
            self.losses,
        )
        compared = [term for term in ask.factors if term in ("align", "match")]
        if compared:
            rows = None if self.match.rows is None else self.match.rows * len(batch.keys) // len(batch.segments)
            row_mask = batch.supervised if self.match.rows_from == "answers" else None
            found = self.align(heads, lesson.heads, batch.segments, compared, ask.omega, rows, row_mask, self.group)
            loss = loss + sum(ask.factors[term] * total for term, total in found.items())
            sums |= {term: total.detach() for term, total in found.items()}
        if inside:
            sums["match"] = matched.add_(sums["match"])
        return loss, {term: sums[term] for term in ask.factors}

    def _matches_inside(self, ask: Ask) -> bool:
        """Whether attention's backward pass matches: on a CPU that saves a quarter of both, on a GPU attention has kernels of its own."""
        head = self.model.get_output_embeddings().weight
        return (
            "match" in ask.factors
            and self.match.rows is None
            and self.match.rows_from == "all"
            and self.tap.lse
            and torch.is_grad_enabled()
            and (head.device.type, head.dtype) == ("cpu", torch.float32)
        )


class TrainingEngine(Protocol):
    """What a step needs of DeepSpeed's engine: gradients are averaged over ranks, the optimizer moves at the accumulation boundary."""

    module: Student

    def __call__(self, batch: Batch, lesson: Lesson | None, ask: Ask) -> tuple[Tensor, dict[str, Tensor]]: ...
    def backward(self, loss: Tensor, *, scale_wrt_gas: bool) -> None: ...
    def step(self) -> None: ...


class NonFiniteLoss(RuntimeError):
    """A loss or a gradient was NaN or infinite; the optimizer has not moved."""


def train_step(
    student: TrainingEngine,
    teacher: Teacher | OwnTeacher | RecordedTeacher | None,
    batches: Sequence[Batch],
    losses: Losses,
    omega: Omega,
    counted_by: dict[str, str],
) -> dict[str, float]:
    """Run the micro-batches of one optimizer step and move the optimizer; returns the mean of each term, the loss and the counts.

    Counts run over all micro-batches and all ranks, so accumulation and world size change nothing. Raises NonFiniteLoss on every rank.
    """
    weights = {term: getattr(losses, term) for term in counted_by if getattr(losses, term) > 0}
    counts = _step_counts(batches, student.module.group)
    divisors = {term: max(counts[counted_by[term]], 1) for term in weights}  # a step without an answer has sums of 0 and no rows
    ask = Ask({term: weight / divisors[term] for term, weight in weights.items()}, omega)
    totals = dict.fromkeys(weights, 0.0)
    for batch in batches:
        loss, sums = student(batch, teacher(batch) if teacher is not None else None, ask)  # the shown logits go before the backward
        student.backward(loss * distributed.world_size(), scale_wrt_gas=False)  # the engine averages over ranks; these are sums
        _refuse_non_finite(sums, batch)  # before the optimizer moves
        student.step()
        totals = {term: totals[term] + sums[term].item() for term in totals}
    means = {term: total / divisors[term] for term, total in zip(totals, distributed.add(totals.values()), strict=True)}
    fill = counts["tokens"] / counts.pop("places")  # the share of what was computed that is no padding
    loss = sum(weights[term] * mean for term, mean in means.items())
    return means | {"loss": loss} | counts | {"fill": fill} | _longest(batches)


def _longest(batches: Sequence[Batch]) -> dict[str, int]:
    """Tokens and images of the longest samples of the step, over all ranks."""
    own = [batch.longest() for batch in batches]
    most = distributed.largest(max(longest[name] for longest in own) for name in own[0])
    return {name: int(number) for name, number in zip(own[0], most, strict=True)}


def _step_counts(batches: Sequence[Batch], group: SequenceGroup) -> dict[str, float]:
    """What `Batch.counts` counts, of the step, over all ranks; those that share a batch count it once."""
    per_batch = [batch.counts() for batch in batches]
    names = list(per_batch[0])
    totals = distributed.add(group.leads * sum(counts[name] for counts in per_batch) for name in names)
    return dict(zip(names, totals, strict=True))


def _refuse_non_finite(sums: dict[str, Tensor], batch: Batch) -> None:
    broken = sorted(term for term, value in sums.items() if not torch.isfinite(value))
    (ranks,) = distributed.add([float(bool(broken))])
    if ranks:
        place = f"{broken} of samples {list(batch.keys)}" if broken else "on another rank"
        raise NonFiniteLoss(f"the loss is not finite: {place}; the optimizer has not moved")
