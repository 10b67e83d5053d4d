"""Two LAid steps of a tiny teacher and student in DeepSpeed's ZeRO-3 engines, against the same steps without any engine in float32."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from laid_ds.config import Run
from laid_ds.data.batch import Batch
from laid_ds.doctor.line import OK, WRONG, Line
from laid_ds.method import schedule
from laid_ds.method.align import Align, layer_pairs
from laid_ds.method.distill import Student, Teacher, train_step
from laid_ds.models.attention import Tap, attention_shape, gives_lse, listen
from laid_ds.models.load import load_model
from laid_ds.models.rope_gain import gain_shapes, responder
from laid_ds.models.tiny_pair import LAYERS, VOCABULARY, tiny_inputs, write_tiny_model
from laid_ds.runtime import engine

STEPS = 2
TERMS = ("sft", "kl", "align", "match", "gradient_norm")
ALLOWED = {"float32": 1e-3, "bfloat16": 0.05}  # of each term; bfloat16 rounds every weight of a tiny model to 2^-9 of itself
MECHANICS = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 1_000_000, "stage3_param_persistence_threshold": 0}}


def zero3_step(device: torch.device) -> Line:
    """On every rank together: the terms of the loss and the gradient's norm of two steps, so that the optimizer's step counts, too."""
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    with TemporaryDirectory() as folder:
        run = _run(Path(folder), dtype)
        return _compared(f"a LAid step under ZeRO-3, {dtype}", dtype, _sharded(run, device), _plain(run))


def _compared(check: str, dtype: str, found: list[dict[str, float]], wanted: list[dict[str, float]]) -> Line:
    shares = {
        f"{term} of step {step + 1}": abs(got[term] - want[term]) / max(abs(want[term]), 1e-6)
        for step, (got, want) in enumerate(zip(found, wanted, strict=True))
        for term in TERMS
    }
    worst = max(shares, key=lambda name: shares[name] if shares[name] == shares[name] else float("inf"))
    numbers = {"largest_difference": shares[worst]} | {f"{term}_of_last_step": found[-1][term] for term in TERMS}
    said = f"differs from plain float32 by at most {shares[worst]:.1e} ({worst}), {ALLOWED[dtype]:g} is allowed"
    if not shares[worst] <= ALLOWED[dtype]:
        return Line(check, WRONG, said, "look at the lines above first: attention and kernels are part of it", numbers)
    return Line(check, OK, said, "", numbers)


def _run(folder: Path, dtype: str) -> Run:
    mechanics = folder / "engine.json"
    mechanics.write_text(json.dumps(MECHANICS))
    for who in ("student", "teacher"):
        write_tiny_model(who, folder / who)
    student, teacher = ({"path": folder / who, "dtype": dtype, "deepspeed": mechanics} for who in ("student", "teacher"))
    rates = {"lr": 1e-3, "mixing_lr": 1e-3, "gain_lr": 1e-3}
    tree = {"name": "doctor", "output": folder, "steps": STEPS, "student": student, "teacher": teacher, "data": {"shards": ["none"]}}
    everything = {"losses": {"align": 1.0, "match": 1.0}, "match": {"omega": "frontier", "frontier_tokens": [4, 40], "width_tokens": 8}}
    return Run.model_validate(tree | {"optimizer": rates, "gain": {"enabled": True}} | everything)


def _modules(run: Run, dtype: str, device: torch.device, mechanics: Sequence[Any]) -> tuple[Student, Teacher, Align]:
    """Both models, loaded and connected as run/build.py does it, all layers compared; mechanics: of each engine, or None for no engine."""
    kind = getattr(torch, dtype)
    pupil, master = (load_model(model.path, dtype, how) for model, how in zip((run.student, run.teacher), mechanics, strict=True))
    pairs = layer_pairs("proportional", LAYERS, LAYERS)
    align = Align(run.align, pairs, attention_shape(pupil.config), attention_shape(master.config), gain_shapes(pupil), kind)
    lse = gives_lse(pupil.config, kind) if device.type == "cuda" or not torch.cuda.is_available() else False
    taps = Tap([s for s, _ in pairs], lse), Tap([t for _, t in pairs], lse)
    listen(pupil, taps[0], {layer: responder(align.gain, layer) for layer in range(LAYERS)})
    listen(master, taps[1])
    return Student(pupil, align, taps[0], run.losses, VOCABULARY), Teacher(master, taps[1], VOCABULARY, shows_logits=True), align


def _steps(run: Run, student: Any, teacher: Any, align: Align, device: torch.device, dtype: str) -> list[dict[str, float]]:
    inputs, labels = tiny_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].to(getattr(torch, dtype))
    batch = Batch(inputs, labels, torch.zeros_like(labels), tuple(map(str, range(len(labels)))), num_images=len(labels)).to(device)
    counted_by = {"kl": "rows", "sft": "rows"} | align.counted_by()
    records = []
    for step in range(STEPS):
        omega = schedule.omega(schedule.progress(step, run.steps), run.match)
        values = train_step(student, teacher, [batch], run.losses, omega, counted_by)
        records.append(values | {"gradient_norm": float(student.get_global_grad_norm())})
    return records


def _sharded(run: Run, device: torch.device) -> list[dict[str, float]]:
    dtype = run.student.dtype
    made = [engine.read_deepspeed(run.student.deepspeed, dtype, run, trains) for trains in (True, False)]
    student, teacher, align = _modules(run, dtype, device, made)
    return _steps(run, engine.training_engine(student, run, made[0]), engine.teacher_engine(teacher, made[1]), align, device, dtype)


def _plain(run: Run) -> list[dict[str, float]]:
    """On the CPU, in float32."""
    student, teacher, align = _modules(run, "float32", torch.device("cpu"), (None, None))
    return _steps(run, _Plain(student, run), teacher, align, torch.device("cpu"), "float32")


class _Plain:
    """The least that train_step needs of an engine."""

    def __init__(self, student: Student, run: Run) -> None:
        self.module, self.clip, self.norm = student.train(), run.optimizer.clip, 0.0
        self.optimizer = torch.optim.AdamW(engine.parameter_groups(student, run), betas=run.optimizer.betas)

    def __call__(self, *arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.module(*arguments)

    def backward(self, loss: Tensor, *, scale_wrt_gas: bool) -> None:
        loss.backward()

    def step(self) -> None:
        parameters: Sequence[Tensor] = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.clip))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def get_global_grad_norm(self) -> float:
        return self.norm
