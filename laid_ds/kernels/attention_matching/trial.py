"""A small matching problem that runs the same code as a given one: what "auto" tries a fused kernel on before it uses it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from laid_ds.kernels.attention_matching.omega import Omega
from laid_ds.kernels.attention_matching.problem import Problem, Side, mixture, teacher_sides
from laid_ds.kernels.switch import Trial
from laid_ds.kernels.visible import first_visible

TOKENS, BORDER, WINDOW = 144, 53, 37  # several tiles, a border between samples, a window that cuts
OMEGAS = {
    "uniform": Omega(),
    "frontier": Omega("frontier", gamma=3.0, frontier=24.0, width=8.0),
    "power": Omega("power", delta_0=8.0, alpha=1.0),
}


def trial_of(problem: Problem) -> Trial:
    """The trial of a problem's device, dtypes, heads, masks and omega."""
    student, teacher, choice = problem.student, problem.teacher, problem.teacher_heads
    device, mixed = student.query.device, None if choice is None else choice.shape[1]
    is_cut, narrow = problem.teacher_alone is not None, not torch.equal(student.first, teacher.first)
    shapes = [(x.shape[1], x.shape[3], x.dtype) for x in (student.query, student.key, teacher.query, teacher.key)]
    key = device, *shapes, mixed, problem.omega.kind, is_cut, narrow, problem.positions is not None, student.key.shape[2] % 16 == 0
    (h, d, dtype), (k, *_), (h_t, d_t, _), (k_t, *_) = shapes
    heads = f"{str(dtype).removeprefix('torch.')} heads {h}/{k} x {d} of {h_t}/{k_t} x {d_t}"
    dtypes = {dtype for _, _, dtype in shapes}
    coarsest = next((low for low in (torch.float64, torch.bfloat16, torch.float16) if low in dtypes), torch.float32)

    def run(function) -> dict[str, Tensor]:
        small, query, key, logits = _small(problem, is_cut, narrow)
        mixing = mixture(logits, choice, by_row=small.teacher_alone is not None)  # to the weights themselves each has a gradient of its own
        loss = function(small, query, key, mixing)
        gradients = torch.autograd.grad(loss, [query, key, logits])
        return {"the loss": loss, **dict(zip(("d student_query", "d student_key", "d mixing_logits"), gradients, strict=True))}

    return Trial(key, heads, coarsest, run)


def _small(problem: Problem, is_cut: bool, narrow: bool) -> tuple[Problem, Tensor, Tensor, Tensor]:
    """The same heads and kinds of masks over TOKENS tokens of two samples, and the inputs with a gradient."""
    tokens = TOKENS if problem.student.key.shape[2] % 16 == 0 else TOKENS - 3
    generator, device = torch.Generator().manual_seed(0), problem.student.query.device

    def draw(like: Tensor) -> Tensor:
        return torch.randn(1, like.shape[1], tokens, like.shape[3], generator=generator).to(device, like.dtype)

    segments = (torch.arange(tokens) >= BORDER).long()[None]
    first = first_visible(1, tokens, 0, segments, WINDOW if is_cut else None)
    taught = first_visible(1, tokens, 0, segments, WINDOW if narrow and not is_cut else None)
    weight = torch.ones(1, tokens, dtype=torch.float64)
    query, key = draw(problem.student.query).requires_grad_(), draw(problem.student.key).requires_grad_()
    student = Side(query.detach(), key.detach(), query.shape[3] ** -0.5, first, None)
    own = Side(draw(problem.teacher.query), draw(problem.teacher.key), problem.teacher.query.shape[3] ** -0.5, taught, None)
    teacher, alone = teacher_sides(own, first, weight, problem.teacher_heads)
    positions = None if problem.positions is None else (torch.arange(tokens, device=device) * 2 // 3)[None]
    logits = torch.randn(query.shape[1], own.query.shape[1], generator=generator).to(device).requires_grad_()
    small = replace(problem, student=student, teacher=teacher, teacher_alone=alone, weight=weight, positions=positions, query_offset=0)
    return replace(small, omega=OMEGAS[problem.omega.kind]), query, key, logits
