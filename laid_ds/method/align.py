"""What the student learns beside its own weights, and how two models' attention is turned into loss sums.

`Align` owns the head mixture of each layer pair and the RoPE gains of the student's layers, so that they live in the student's engine,
are sharded and checkpointed with it, and never touch the stock model's parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from laid_ds.config import Align as Options
from laid_ds.kernels.attention_matching import Omega, attention_and_matching, attention_matching
from laid_ds.kernels.head_alignment import head_alignment
from laid_ds.kernels.visible import row_weights
from laid_ds.sequence import ALONE, SequenceGroup, Stretch

Couples = Sequence[tuple[int, int]]
"""(student head, teacher head)."""


class Heads(Protocol):
    """What one attention layer compared (models.attention.Captured is one)."""

    query: Tensor
    key: Tensor
    scale: float
    window: int | None
    lse: Tensor | None
    beside: Tensor | None
    """Of the student: the sum of its matching, where attention computes it (`Align.inside_attention`)."""
    heads: tuple[int, ...] | None
    """Of a recorded lesson: which heads of the layer these are, each with its own key; None: all."""


def layer_pairs(rule: str | Sequence[tuple[int, int]], student_layers: int, teacher_layers: int) -> tuple[tuple[int, int], ...]:
    """(student layer, teacher layer) pairs. "last": last to last (Paper). "proportional": student layer i listens to teacher layer
    round((i + 1) L_t / L_s) - 1 (ours). Raises ValueError for a layer that does not exist."""
    assert rule != "probed", "config.load puts what was probed in its place"
    if rule == "last":
        return ((student_layers - 1, teacher_layers - 1),)
    if rule == "proportional":
        return tuple((i, round((i + 1) * teacher_layers / student_layers) - 1) for i in range(student_layers))
    for student, teacher in rule:
        if not (0 <= student < student_layers and 0 <= teacher < teacher_layers):
            raise ValueError(
                f"align.pairs: [{student}, {teacher}] does not exist; the models have {student_layers} and {teacher_layers} decoder layers"
            )
    return tuple((student, teacher) for student, teacher in rule)


def compared_heads(
    heads: str | Sequence[Sequence[tuple[int, int]]],
    pairs: Sequence[tuple[int, int]],
    student_heads: int,
    teacher_heads: int,
    key: str = "heads",
) -> tuple[tuple[tuple[int, int], ...] | None, ...]:
    """For each layer pair the (student head, teacher head) couples to compare, or None for all heads mixed. key: of [align].

    Raises ValueError for a list that does not fit the pairs, for a head that does not exist, and for a student head named twice.
    """
    if isinstance(heads, str):
        assert heads != "probed", "config.load puts what was probed in its place"
        return (None,) * len(pairs)
    if len(heads) != len(pairs):
        raise ValueError(f"align.{key} has {len(heads)} lists for the {len(pairs)} layer pairs {list(map(list, pairs))}; give one for each")
    layers = [student for student, _ in pairs]
    if key == "start" and len(set(layers)) < len(layers):
        raise ValueError(
            f"align.start names couples, and align.pairs {list(map(list, pairs))} a student layer twice, which has one mixture"
        )
    for couples, pair in zip(heads, pairs, strict=True):
        students = [student for student, _ in couples]
        if not couples or len(set(students)) < len(students):
            raise ValueError(f"align.{key} of the layers {list(pair)} is {list(map(list, couples))}: name at least one head, none twice")
        for student, teacher in couples:
            if not (0 <= student < student_heads and 0 <= teacher < teacher_heads):
                raise ValueError(
                    f"align.{key}: [{student}, {teacher}] does not exist; the models have {student_heads} and {teacher_heads} heads"
                )
    return tuple(tuple((student, teacher) for student, teacher in couples) for couples in heads)


def chosen_heads(student_heads: int, teacher_heads: int, couples: Sequence[tuple[int, int]] = ()) -> Tensor:
    """[H_s] int64: the teacher head on which each student head starts: that of its couple, else at the same share of the heads."""
    chosen = torch.arange(student_heads) * teacher_heads // student_heads
    for student, teacher in couples:
        chosen[student] = teacher
    return chosen


def start_mixing(student_heads: int, teacher_heads: int, options: Options, couples: Sequence[tuple[int, int]] = ()) -> Tensor:
    """Mixing parameters [H_s, H_t] at the start.

    "uniform" is the mean of all teacher heads, else each student head stands on its `chosen_heads`. As softmax logits or, with weights =
    "free", as the weights themselves.
    """
    one_hot = torch.nn.functional.one_hot(chosen_heads(student_heads, teacher_heads, couples), teacher_heads).float()
    if options.weights == "free":
        return torch.full_like(one_hot, 1 / teacher_heads) if options.start == "uniform" else one_hot
    if options.start == "uniform":
        return torch.zeros_like(one_hot)
    return one_hot.log() if math.isinf(options.start_logit) else options.start_logit * one_hot


class Align(nn.Module):
    """Mixtures and gains as parameters; forward turns captured heads of both models into sums with counts."""

    def __init__(
        self,
        options: Options,
        pairs: Sequence[tuple[int, int]],
        student_shape: tuple[int, int, int],
        teacher_shape: tuple[int, int, int],
        gain_shapes: dict[int, tuple[int, int]],
        dtype: torch.dtype = torch.float32,
        keeps_one_hot: bool = False,
    ):
        """Shapes are (H, K, D) of each model; gain_shapes maps student layers to [H, P] (empty: no gains). keeps_one_hot: each student head
        listens to the teacher head on which it starts, and no mixture is a parameter (config.Run.keeps_one_hot)."""
        super().__init__()
        self.options, self.pairs, self.keeps_one_hot = options, tuple(pairs), keeps_one_hot
        (student_heads, student_keys, student_dim), (teacher_heads, teacher_keys, teacher_dim) = student_shape, teacher_shape
        self.heads = compared_heads(options.heads, self.pairs, student_heads, teacher_heads)
        starts = compared_heads(options.start, self.pairs, student_heads, teacher_heads, key="start")
        self.mixing, self.key_mixing, self.projections = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        self.teacher_heads = teacher_heads, teacher_keys
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}
        """Student layer -> the teacher head [H_s] of each of its heads, and the teacher key head [K_s] of each key head."""
        for (student, _), couples, start in zip(self.pairs, self.heads, starts, strict=True):
            own = start or ()
            of_keys = {s * student_keys // student_heads: t * teacher_keys // teacher_heads for s, t in reversed(own)}.items()
            if couples is None and keeps_one_hot:
                chosen = chosen_heads(student_heads, teacher_heads, own), chosen_heads(student_keys, teacher_keys, of_keys)
                self.kept[str(student)] = chosen
            elif couples is None:
                self.mixing[str(student)] = start_mixing(student_heads, teacher_heads, options, own).to(dtype)
                if options.mixing == "separate":
                    self.key_mixing[str(student)] = start_mixing(student_keys, teacher_keys, options, of_keys).to(dtype)
            if student_dim != teacher_dim:
                self.projections[str(student)] = torch.stack([torch.eye(teacher_dim, student_dim)] * 2).to(dtype)
        self.gain = nn.ParameterDict({str(layer): torch.zeros(shape, dtype=dtype) for layer, shape in gain_shapes.items()})

    def weights(self, layer: int, device: torch.device | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Mixing weights of a student layer: [H_s, H_t], or with separate mixing the pair for queries and keys. device: where those are
        wanted that are no parameters."""

        def of(parameter: Tensor) -> Tensor:
            return torch.softmax(parameter.float(), -1) if self.options.weights == "softmax" else parameter.float()

        if str(layer) in self.kept:
            chosen = zip(self.kept[str(layer)], self.teacher_heads, strict=True)
            heads, keys = (nn.functional.one_hot(of_ours.to(device), number).float() for of_ours, number in chosen)
            return (heads, keys) if self.options.mixing == "separate" else heads
        queries = of(self.mixing[str(layer)])
        return (queries, of(self.key_mixing[str(layer)])) if str(layer) in self.key_mixing else queries

    def forward(
        self,
        student: dict[int, Heads],
        teacher: dict[int, Heads],
        segments: Tensor,
        terms: Sequence[str],
        omega: Omega,
        rows: int | None = None,
        row_mask: Tensor | None = None,
        group: SequenceGroup = ALONE,
    ) -> dict[str, Tensor]:
        """Sums of the asked terms, each a mean over layer pairs and compared student heads; `counted_by` names what they are divided by.

        student, teacher: captured heads by layer; segments [B, S] int64, -1 = padding; row_mask [B, S] bool: the rows that matching counts.
        group: the ranks that share these rows; queries are then of this rank's tokens, and the sums of all ranks are to be added.
        "align": head-level alignment (Paper, Eq. 7). "match": distance-weighted attention matching (ours).
        """
        sums: dict[str, list[Tensor]] = {term: [] for term in terms}
        for (s, t), couples in zip(self.pairs, self.heads, strict=True):
            ours, theirs = (student[s], teacher[t]) if couples is None else _couples(student[s], teacher[t], couples)
            if "align" in sums:
                sums["align"].append(self._alignment(s, ours, theirs, couples, segments, group))
            if "match" in sums:
                sums["match"].append(self._matching(s, ours, theirs, couples, segments, omega, rows, row_mask, group))
        return {term: torch.stack(parts).mean() for term, parts in sums.items()}

    def inside_attention(
        self, teacher: dict[int, Heads], segments: Tensor, omega: Omega, report: Callable[[Tensor], None]
    ) -> dict[int, Callable[..., tuple[Tensor, Tensor, Tensor]]]:
        """Student layer -> attention that matches it in its backward pass (models.attention.Companion); its log-sum-exp must be asked for.

        In place of `forward`'s "match" over all rows for these layers, on a CPU, in float32. The sums' values are known after the backward
        pass: each layer's share of "match" is given to `report` then. Layers compared with several, or without a mixture, are left out.
        """
        layers = [student for student, _ in self.pairs]
        return {
            s: partial(self._attend_and_match, s, teacher[t], segments, omega, report)
            for (s, t), couples in zip(self.pairs, self.heads, strict=True)
            if couples is None and not self.keeps_one_hot and layers.count(s) == 1
        }

    def _attend_and_match(
        self,
        layer: int,
        teacher: Heads,
        segments: Tensor,
        omega: Omega,
        report: Callable[[Tensor], None],
        attend: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        first: Tensor,
        rows: Stretch,
    ) -> tuple[Tensor, Tensor, Tensor]:
        share = 1 / (query.shape[1] * len(self.pairs))
        return attention_and_matching(
            attend,
            query,
            key,
            value,
            teacher.query[:, :, rows.at],
            teacher.key[:, :, : rows.stop],
            self.mixing[str(layer)].float(),
            scale=scale,
            teacher_scale=teacher.scale,
            first=first,
            segments=segments[:, : rows.stop],
            omega=omega,
            teacher_window=teacher.window,
            teacher_lse=None if teacher.lse is None else teacher.lse[:, :, rows.at],
            report=lambda total: report(total * share),
        )

    def counted_by(self, rows_from: str = "all") -> dict[str, str]:
        """The count of a batch (data.batch.Batch.counts) that each term's sum is divided by; rows_from: the rows that matching compares."""
        return {
            "align": "tokens" if self.options.reduction == "mean" else "samples",
            "match": "rows" if rows_from == "answers" else "tokens",
        }

    def _alignment(
        self, layer: int, student: Heads, teacher: Heads, couples: Couples | None, segments: Tensor, group: SequenceGroup
    ) -> Tensor:
        total, _ = head_alignment(
            student.query,
            group.own(student.key, 2),
            teacher.query,
            group.own(teacher.key, 2),
            self.weights(layer, teacher.query.device) if couples is None else torch.eye(len(couples), device=student.query.device),
            reduction=self.options.reduction,
            segments=segments,
            projection=tuple(self.projections[str(layer)].float()) if str(layer) in self.projections else None,
            group=group,
        )
        return total / student.query.shape[1] if self.options.reduction == "relative" else total

    def _matching(
        self,
        layer: int,
        student: Heads,
        teacher: Heads,
        couples: Couples | None,
        segments: Tensor,
        omega: Omega,
        rows: int | None,
        row_mask: Tensor | None,
        group: SequenceGroup,
    ) -> Tensor:
        if student.beside is not None:
            return student.beside / student.query.shape[1]
        device, number = student.query.device, student.query.shape[1]
        if couples is None and not self.keeps_one_hot:
            logits, chosen = self.mixing[str(layer)].float(), None
        else:  # one teacher head for each student head: the kernels then compute no other, and no mixture
            logits = torch.zeros(number, teacher.query.shape[1], device=device)
            chosen = torch.arange(number) if couples is not None else self.kept[str(layer)][0]
            chosen = chosen[:, None].to(device)
        drawn = None if rows is None or group.size == 1 else _drawn(segments, row_mask, rows, group)
        total = 0.0
        for start, stop, at in group.stretches(segments.shape[1]):
            found, _ = attention_matching(
                student.query[:, :, at],
                student.key[:, :, :stop],
                teacher.query[:, :, at],
                teacher.key[:, :, :stop],
                logits,
                teacher_heads=chosen,
                student_scale=student.scale,
                teacher_scale=teacher.scale,
                student_window=student.window,
                teacher_window=teacher.window,
                student_lse=None if student.lse is None else student.lse[:, :, at],
                teacher_lse=None if teacher.lse is None else teacher.lse[:, :, at],
                omega=omega,
                segments=segments[:, :stop],
                rows=rows,
                row_mask=None if row_mask is None else row_mask[:, start:stop],
                row_weight=None if drawn is None else drawn[:, start:stop],
                query_offset=start,
            )
            total = total + found
        return total / number

    def mixture_entropy(self) -> float:
        """Mean entropy of the mixture's rows in nats: 0 is one teacher head per student head, ln H_t is the plain mean."""
        rows = torch.cat([torch.softmax(p.detach().float(), -1) for p in self.mixing.values()])
        return torch.special.entr(rows).sum(-1).mean().item()


def _drawn(segments: Tensor, row_mask: Tensor | None, rows: int, group: SequenceGroup) -> Tensor:
    """[B, S] float64 on the CPU: the weights of `rows` rows of each whole row, as one rank of the group drew them."""
    weight, _ = row_weights(*segments.shape, 0, segments, row_mask, rows)
    return group.add(weight * group.leads)


def _couples(student: Heads, teacher: Heads, couples: Sequence[tuple[int, int]]) -> tuple[Heads, Heads]:
    """Both sides with the chosen heads alone, head n of one beside head n of the other; each has its own copy of its keys."""
    return _chosen(student, [head for head, _ in couples]), _chosen(teacher, [head for _, head in couples])


def _chosen(side: Heads, heads: list[int]) -> Heads:
    if side.heads is not None:
        heads = [side.heads.index(head) for head in heads]
    group = side.query.shape[1] // side.key.shape[1]
    lse = None if side.lse is None else side.lse[:, heads]
    return replace(side, query=side.query[:, heads], key=side.key[:, [head // group for head in heads]], lse=lse)
