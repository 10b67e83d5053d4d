"""The attention profile as it is defined, with every map written out: O(T S) memory, for tests and small sizes only."""

from __future__ import annotations

import torch

from laid_ds.kernels.attention_profile.problem import Problem, Profile


def attention_profile(problem: Problem, row_count: int, chunk_size: int | None = None) -> Profile:
    """Letters: B batch, T query rows, S keys, H heads, E bins, P planes. `chunk_size` has no meaning here."""
    device, dtype = problem.query.device, problem.dtype
    group = problem.query.shape[1] // problem.key.shape[1]
    query, key = problem.query.to(dtype) * problem.scale, problem.key.to(dtype).repeat_interleave(group, dim=1)
    last = torch.arange(query.shape[2], device=device) + problem.query_offset
    index = torch.arange(key.shape[2], device=device)
    visible = (index >= problem.first.to(device)[..., None]) & (index <= last[:, None])  # [B, T, S]
    positions = index.expand(len(query), -1) if problem.positions is None else problem.positions
    distance = (positions[:, last, None] - positions[:, None, :]).clamp_min(0)
    scores = query @ key.mT  # [B, H, T, S]
    seen = scores.masked_fill(~visible[:, None], -torch.inf)
    lse, p = seen.logsumexp(-1), seen.softmax(-1)
    entropy = -torch.xlogy(p, p).sum(-1)
    weight = problem.weight.to(device)
    pairs = (weight[..., None] * visible).double()  # [B, T, S]: each pair's weight
    in_bin = (torch.bucketize(distance, problem.bins, right=True) - 1)[..., None] == torch.arange(len(problem.bins), device=device)
    binned = pairs[..., None] * in_bin  # [B, T, S, E]
    far = pairs * (distance >= problem.far)
    response = None
    if problem.planes is not None:
        parts = [(query[..., plane] @ key[..., plane].mT).abs().double() for plane in problem.planes]
        response = torch.stack([torch.einsum("bhts,bts->h", part, far) for part in parts], -1)
    taken = (weight > 0)[:, None]
    return Profile(
        row_count,
        lse.masked_fill(~taken, torch.nan),
        entropy.masked_fill(~taken, torch.nan),
        torch.einsum("bht,bt->h", entropy.double(), weight),
        problem.bins,
        torch.einsum("bhts,btse->he", p.double(), binned),
        binned.sum((0, 1, 2)),
        torch.einsum("bhts,bts->h", p.double(), far),
        far.sum(),
        response,
        None if problem.marked is None else torch.einsum("bhts,bts->h", p.double(), pairs * problem.marked[:, None]),
    )
