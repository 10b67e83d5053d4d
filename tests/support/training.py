"""Training in a test: what a rank returns of a few real steps, and the same steps written plainly for one process without DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch
import torch.nn.functional as F

from laid_ds.config import Run
from laid_ds.data.batch import Batch
from laid_ds.data.dataset import Dataset
from laid_ds.data.stream import Stream
from laid_ds.method import schedule
from laid_ds.method.align import layer_pairs, start_mixing
from laid_ds.method.distill import train_step
from laid_ds.models.attention import Tap, attention_layers, listen
from laid_ds.models.load import load_model
from laid_ds.models.processor import load_processor
from laid_ds.models.rope_gain import gain
from laid_ds.run.build import Training, build, build_renderer, build_stream
from laid_ds.run.loop import seed_everything
from laid_ds.runtime import engine

WATCHED = ("model.model.language_model.layers.1.self_attn.q_proj.weight", "model.lm_head.weight", "align.mixing.1", "align.gain.1")


def rank_steps(run: Run, steps: int, look: Callable[[Training], Any] = lambda training: None) -> dict[str, Any]:
    """Start this rank and do `steps` optimizer steps; returns records, watched weights, bytes of each model on this rank, and what `look`
    makes of the parts afterwards."""
    from deepspeed.utils import safe_get_full_fp32_param

    engine.start_processes()
    seed_everything(run.seed)
    training = build(run)
    batches, records = iter(training.stream), []
    for step in range(steps):
        engine.set_learning_rate(training.student, schedule.learning_rate_factor(step, run.steps, run.optimizer))
        omega = schedule.omega(schedule.progress(step, run.steps), run.match)
        micro = list(islice(batches, run.optimizer.accumulation))
        values = train_step(training.student, training.teacher, micro, run.losses, omega, training.counted_by)
        records.append(values | {"gradient_norm": float(training.student.get_global_grad_norm())})
    parameters = dict(training.student.module.named_parameters())
    weights = {name: safe_get_full_fp32_param(parameters[name]) for name in WATCHED if name in parameters}
    held = {"student": engine.sharded_bytes(training.student.module)}
    if training.teacher is not None and isinstance(training.teacher.module, torch.nn.Module):
        held["teacher"] = engine.sharded_bytes(training.teacher.module)
    return {"records": records, "weights": weights, "bytes": held, "looked": look(training)}


def plain_steps(run: Run, steps: int, global_batch: int) -> dict[str, Any]:
    """The same steps on whole models, one unpadded sample at a time, every loss written out densely."""
    student, teacher = load_model(run.student.path), load_model(run.teacher.path).requires_grad_(False)
    pairs = layer_pairs(run.align.pairs, 2, 2) if run.losses.listens else ()
    mixing = torch.nn.Parameter(start_mixing(2, 4, run.align))
    theta = torch.nn.ParameterList([torch.zeros(2, 8) for _ in attention_layers(student)])
    taps = Tap([s for s, _ in pairs]), Tap([t for _, t in pairs])
    listen(student, taps[0], {i: lambda q, i=i: q * torch.cat([gain(theta[i])] * 2, -1)[None, :, None] for i in range(2)})
    listen(teacher, taps[1])
    groups = [
        {"params": list(student.parameters()), "lr": run.optimizer.lr},
        {"params": [mixing], "lr": run.optimizer.mixing_lr},
        {"params": list(theta), "lr": run.optimizer.gain_lr},
    ]
    base = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, betas=run.optimizer.betas, weight_decay=0.0)
    one_by_one = run.model_copy(
        update={
            "data": run.data.model_copy(update={"micro_batch": 1}),
            "optimizer": run.optimizer.model_copy(update={"accumulation": global_batch}),
        }
    )
    stream = _samples(build_stream(one_by_one, Dataset.open(list(run.data.shards)), build_renderer(run, load_processor(run.student.path))))
    records = []
    for step in range(steps):
        sums, counts = dict.fromkeys(("sft", "kl", "align", "match"), 0.0), {"rows": 0, "tokens": 0, "samples": 0}
        omega = schedule.omega(schedule.progress(step, run.steps), run.match)
        for batch in chain.from_iterable(islice(stream, global_batch)):
            for name, value in dense_sums(
                student, teacher, taps, pairs, mixing, batch, omega, run.align.heads, run.match.rows_from
            ).items():
                sums[name] = sums[name] + value
            counts = {name: value + batch.counts()[name] for name, value in counts.items()}
        means = {
            "sft": sums["sft"] / counts["rows"],
            "kl": sums["kl"] / counts["rows"],
            "align": sums["align"] / counts["samples"],
            "match": sums["match"] / counts["rows" if run.match.rows_from == "answers" else "tokens"],
        }
        means = {name: mean for name, mean in means.items() if getattr(run.losses, name) > 0}
        loss = sum(getattr(run.losses, name) * mean for name, mean in means.items())
        optimizer.zero_grad()
        loss.backward()
        everything = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(everything, run.optimizer.clip)
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * schedule.learning_rate_factor(step, run.steps, run.optimizer)
        optimizer.step()
        records.append({name: mean.item() for name, mean in means.items()} | {"loss": loss.item(), "gradient_norm": float(norm)})
    named = {f"model.{name}": p for name, p in student.named_parameters()} | {"align.mixing.1": mixing, "align.gain.1": theta[1]}
    return {"records": records, "weights": {name: named[name].detach() for name in WATCHED}}


def _samples(stream: Stream) -> Iterator[list[Batch]]:
    """The samples of each micro-batch, each by itself; those of a pack come apart."""
    prepare = stream._reader.prepare
    alone = replace(prepare, packs=False)
    stream._reader.prepare = lambda items: [alone([pair]) for pack in items for pair in (pack if prepare.packs else [pack])]
    return iter(stream)


def dense_sums(student, teacher, taps, pairs, mixing, batch, omega, heads="all", rows_from="all") -> dict[str, torch.Tensor]:
    """The sums of all terms for one unpadded sample, with one mixture for all pairs, or with chosen heads for each."""
    rows, targets = batch.supervised[0], batch.labels[0][batch.supervised[0]]
    with taps[0].open() as ours:
        student_logits = student.lm_head(student.model(**batch.inputs, use_cache=False).last_hidden_state[0][rows])
    with taps[1].open() as theirs:
        read = batch.for_teacher
        teacher_logits = teacher.lm_head(teacher.model(**read.inputs, use_cache=False).last_hidden_state[0][read.supervised[0]])
    sums = {
        "sft": F.cross_entropy(student_logits, targets, reduction="sum"),
        "kl": (teacher_logits.softmax(-1) * (teacher_logits.log_softmax(-1) - student_logits.log_softmax(-1))).sum(),
        "align": torch.zeros(()),
        "match": torch.zeros(()),
    }
    for n, (s, t) in enumerate(pairs):
        own, weights = (slice(None), mixing.softmax(-1)) if heads == "all" else _one_hot(heads[n])
        for part in ("query", "key"):
            mine, shown = (getattr(heads_of, part)[0] for heads_of in (ours[s], theirs[t]))
            mine, shown = mine.repeat_interleave(2 // len(mine), 0)[own], shown.repeat_interleave(4 // len(shown), 0)
            target = torch.einsum("ij,jtd->itd", weights, shown)
            relative = (mine - target).square().sum((1, 2)) / target.detach().square().sum((1, 2))
            sums["align"] = sums["align"] + relative.mean() / len(pairs)
        q, p = _attention(ours[s], 2)[own], torch.einsum("ij,jmn->imn", weights, _attention(theirs[t], 4))
        visible = _visible(q.shape[-1], ours[s].window)
        p = p * visible / (p * visible).sum(-1, keepdim=True)
        weight = _omega(omega, visible)
        terms = torch.where(p > 0, p * (p.clamp_min(1e-30).log() - q.clamp_min(1e-30).log()), 0.0) - p + q
        by_row = (weight * terms).sum(2).mean(0)
        sums["match"] = sums["match"] + (by_row if rows_from == "all" else by_row[rows]).sum() / len(pairs)
    return sums


def _one_hot(couples) -> tuple[list[int], torch.Tensor]:
    """The student's heads that are compared, and for each a row that is 1 at its teacher head."""
    return [head for head, _ in couples], F.one_hot(torch.tensor([head for _, head in couples]), 4).float()


def _attention(heads, number: int) -> torch.Tensor:
    query, key = heads.query[0], heads.key[0].repeat_interleave(number // heads.key.shape[1], 0)
    scores = (query @ key.mT * heads.scale).masked_fill(~_visible(query.shape[1], heads.window), -torch.inf)
    return scores.softmax(-1)


def _delta(tokens: int) -> torch.Tensor:
    return torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]


def _visible(tokens: int, window: int | None) -> torch.Tensor:
    return (_delta(tokens) >= 0) & (_delta(tokens) < (window or tokens))


def _omega(omega, visible: torch.Tensor) -> torch.Tensor:
    delta = _delta(len(visible))
    weight = (1 + omega.gamma * torch.sigmoid((delta - omega.frontier) / omega.width)) * visible
    return weight / (weight.sum(-1, keepdim=True) / visible.sum(-1, keepdim=True))
