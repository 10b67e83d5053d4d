"""The attention profile in one pass over chunks of query rows, in plain torch on any device; nothing T x S is ever held.

Letters: C rows of a chunk, n keys that it sees, E bins; others as in reference.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from laid_ds.kernels.attention import Attention, rows_that_fit
from laid_ds.kernels.attention_profile.problem import Problem, Profile
from laid_ds.kernels.visible import Hidden, hide_, row_chunks


def attention_profile(problem: Problem, row_count: int, chunk_size: int | None = None) -> Profile:
    """As reference.attention_profile, `chunk_size` rows at a time (default: as many as a byte budget holds)."""
    (batch, heads, tokens, _), keys_total, dtype = problem.query.shape, problem.key.shape[2], problem.dtype
    chunk_size = chunk_size or rows_that_fit(2 * heads * keys_total * dtype.itemsize, problem.query)
    make = {"device": problem.query.device}
    scratch = [torch.empty(heads * chunk_size * keys_total, dtype=dtype, **make) for _ in range(2)]
    lse, entropy = torch.full((2, batch, heads, tokens), torch.nan, dtype=dtype, **make)
    entropy_sum = torch.zeros(heads, dtype=torch.float64, **make)
    num_masks = len(problem.bins) + 1 + (problem.marked is not None)  # the bins, far, marked
    mass, pairs = torch.zeros(heads, num_masks, dtype=torch.float64, **make), torch.zeros(num_masks, dtype=torch.float64, **make)
    response = None if problem.planes is None else torch.zeros(heads, len(problem.planes), dtype=torch.float64, **make)
    for b in range(batch):
        lse_b = None if problem.lse is None else problem.lse[b]
        attention = Attention(problem.query[b], problem.key[b], problem.scale, problem.first[b], problem.query_offset, dtype, lse_b)
        for rows in row_chunks(problem.weight[b], chunk_size):
            keys = attention.keys_of(rows)
            shape = heads, len(rows), keys.stop - keys.start
            z, p = (x[: shape[0] * shape[1] * shape[2]].view(shape) for x in scratch)
            where = attention.hidden(rows, keys)
            query = attention.forward(rows, keys, where, z, p)
            row_lse = attention.log_sum_exp(rows, z, p)  # [H, C, 1]
            row_entropy = hide_(attention.subtract_log_(torch.zeros_like(z), rows, z, p), where, 0.0).mul_(p).sum(-1)  # [H, C]
            lse[b, :, rows], entropy[b, :, rows] = row_lse[..., 0], row_entropy
            entropy_sum += row_entropy.double() @ problem.weight[b, rows].to(**make)
            for i, mask in enumerate(_masks(problem, b, rows, keys, where)):
                mass[:, i] += p.flatten(1) @ mask.flatten()
                pairs[i] += mask.sum(dtype=torch.float64)
                if response is not None and i == len(problem.bins):
                    for f, plane in enumerate(problem.planes):
                        part = attention.products(query[..., plane], attention.key[..., plane], keys, z).abs_()
                        response[:, f] += part.flatten(1) @ mask.flatten()
    bin_mass, far_mass, *marked_mass = mass.split([len(problem.bins), *[1] * (num_masks - len(problem.bins))], 1)
    return Profile(
        row_count=row_count,
        lse=lse,
        entropy=entropy,
        entropy_sum=entropy_sum,
        bins=problem.bins,
        bin_mass=bin_mass,
        bin_pairs=pairs[: len(problem.bins)],
        far_mass=far_mass[:, 0],
        far_pairs=pairs[len(problem.bins)],
        plane_response=response,
        marked_mass=marked_mass[0][:, 0] if marked_mass else None,
    )


def _masks(problem: Problem, b: int, rows: Tensor, keys: slice, where: Hidden) -> Iterator[Tensor]:
    """Each pair's weight [C, n] where it lies in a bin, for each bin; then where it is far; then where its key is marked."""
    device = problem.query.device
    last = (rows + problem.query_offset).to(device)
    key = torch.arange(keys.start, keys.stop, device=device)
    if problem.positions is not None:
        last, key = problem.positions[b, last], problem.positions[b, keys]
    distance = (last[:, None] - key).clamp_min(0)
    weight = problem.weight[b, rows, None].to(device, problem.dtype).repeat(1, len(key))
    hide_(weight, where, 0.0)
    bins = torch.bucketize(distance, problem.bins, right=True) - 1
    yield from (weight * (bins == e) for e in range(len(problem.bins)))
    yield weight * (distance >= problem.far)
    if problem.marked is not None:
        yield weight * problem.marked[b, keys]
