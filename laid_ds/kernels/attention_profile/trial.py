"""A small profile that runs the same code as a given one: what "auto" tries the fused kernel on before it uses it."""

from __future__ import annotations

from dataclasses import asdict, replace

import torch
from torch import Tensor

from laid_ds.kernels.attention_profile.problem import Problem
from laid_ds.kernels.switch import Trial
from laid_ds.kernels.visible import first_visible

TOKENS, BORDER, WINDOW = 144, 53, 37


def trial_of(problem: Problem) -> Trial:
    """The trial of a problem's device, dtypes, heads and number of bins."""
    query, key = problem.query, problem.key
    shape = query.shape[1], key.shape[1], query.shape[3]
    optional = problem.positions is None, problem.marked is None, None if problem.planes is None else len(problem.planes)
    heads = f"{str(query.dtype).removeprefix('torch.')} heads {shape[0]}/{shape[1]} x {shape[2]}"

    def run(function) -> dict[str, Tensor]:
        found = asdict(function(_small(problem), TOKENS))
        names = ("lse", "entropy", "bin_mass", "bin_pairs", "far_mass", "plane_response", "marked_mass")
        return {name: found[name] for name in names if found[name] is not None}

    return Trial((query.device, query.dtype, key.dtype, shape, len(problem.bins), optional), heads, problem.dtype, run)


def _small(problem: Problem) -> Problem:
    generator, device = torch.Generator().manual_seed(0), problem.query.device

    def draw(like: Tensor) -> Tensor:
        return torch.randn(1, like.shape[1], TOKENS, like.shape[3], generator=generator).to(device, like.dtype)

    segments = (torch.arange(TOKENS) >= BORDER).long()[None]
    return replace(
        problem,
        query=draw(problem.query),
        key=draw(problem.key),
        scale=problem.query.shape[3] ** -0.5,
        first=first_visible(1, TOKENS, 0, segments, WINDOW),
        weight=torch.ones(1, TOKENS, dtype=torch.float64),
        query_offset=0,
        positions=None if problem.positions is None else (torch.arange(TOKENS, device=device) * 2 // 3)[None],
        lse=None,
        far=9,
        marked=None if problem.marked is None else (torch.arange(TOKENS, device=device) % 3 == 0)[None],
    )
