"""What attention does, in numbers per layer and head: entropy, mass by distance, mass on the needle. No attention map is ever held.

Rows of a haystack are those from which an answer is given: the position before its first token.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from laid_ds.data.batch import collate
from laid_ds.data.dataset import Dataset
from laid_ds.data.record import DataError
from laid_ds.evaluation.haystack import read_haystacks, window_of_size
from laid_ds.kernels.attention_profile import attention_profile, distance_bins
from laid_ds.models.attention import Captured, Tap, attention_layers, last_hidden_state, listen
from laid_ds.models.load import PreTrainedModel
from laid_ds.models.processor import Renderer
from laid_ds.sequence import ALONE, SequenceGroup


def profile_heads(
    captured: Mapping[int, Captured],
    segments: Tensor,
    row_mask: Tensor | None = None,
    marked: Tensor | None = None,
    group: SequenceGroup = ALONE,
) -> dict[str, dict[str, Any]]:
    """Decoder layer -> means over its rows, one number per head: "entropy" in nats, "far_mass" beyond half of the longest distance, with
    `marked` [B, T] "marked_mass"; "mass" by log-spaced distance bins [H][bins] whose lower edges are "bins".

    segments [B, T] int64, -1 = padding; row_mask [B, T] bool, default all rows; group: the ranks that share these rows (collective).
    Source: the definitions of kernels/attention_profile.
    """
    return {str(layer): _means(*_sums(heads, segments, row_mask, marked, group=group)) for layer, heads in captured.items()}


def _sums(
    heads: Captured,
    segments: Tensor,
    row_mask: Tensor | None,
    marked: Tensor | None,
    bins: list[int] | None = None,
    far: int | None = None,
    group: SequenceGroup = ALONE,
) -> tuple[list[int], int, dict[str, Tensor]]:
    """Bins, number of rows, and sums over the rows."""
    tokens, rows = segments.shape[1], 0
    bins, far = bins or distance_bins(tokens - 1), (tokens - 1) // 2 if far is None else far
    sums: dict[str, Tensor] = {}
    for start, stop, at in group.stretches(tokens):
        found = attention_profile(
            heads.query[:, :, at].detach(),
            heads.key[:, :, :stop].detach(),
            scale=heads.scale,
            bins=bins,
            far=far,
            window=heads.window,
            segments=segments[:, :stop],
            row_mask=None if row_mask is None else row_mask[:, start:stop],
            marked=None if marked is None else marked[:, :stop],
            query_offset=start,
        )
        parts = {"entropy": found.entropy_sum, "far_mass": found.far_mass, "mass": found.bin_mass}
        parts |= {} if marked is None else {"marked_mass": found.marked_mass}
        sums = {name: part + sums.get(name, 0) for name, part in parts.items()}
        rows += found.row_count
    rows = int(group.add(torch.tensor(rows)))
    return bins, rows, {name: group.add(total) for name, total in sums.items()}


def _means(bins: list[int], rows: int, sums: dict[str, Tensor]) -> dict[str, Any]:
    return {"bins": bins} | {name: (total / max(rows, 1)).tolist() for name, total in sums.items()}


@torch.inference_mode()
def needle_profile(model: PreTrainedModel, renderer: Renderer, dataset: Dataset, size: int, haystacks: int) -> dict[str, dict[str, Any]]:
    """`profile_heads` of every decoder layer at the answering rows of windows of `size` images with one question each. "marked_mass" is
    the attention on the needle's tokens, "flat_mass" that of a head that looks everywhere alike; "needle_mass" [H][bins] the attention on
    the needle by its distance (from the answering row to its last token), a mean over the "needle_rows" [bins] haystacks that have it
    there, 0 where none has. The model is put on the `laid` attention function.

    One haystack is in memory at a time, and rendered twice: the bins follow from the longest of all.
    """
    samples = read_haystacks(dataset, haystacks)
    longest = max(len(renderer(window_of_size(sample, size, 1)).supervised) for sample in samples)
    tap = Tap(list(attention_layers(model)))
    listen(model, tap)
    bins = distance_bins(longest - 1)
    totals: dict[str, tuple[list[int], int, dict[str, Tensor]]] = {}
    needle_rows, flat = torch.zeros(len(bins)), 0.0
    for sample in samples:
        window = window_of_size(sample, size, 1)
        row = renderer(window)
        batch = collate([row], [window.key], renderer.processor.tokenizer.pad_token_id).to(model.device)
        needles = next(turn for turn in window.turns if turn.role == "user").needles
        shows = row.shows if window.images else renderer.texts(window)
        marked = torch.isin(shows, torch.tensor(needles)).to(model.device)[None]
        answering = batch.supervised & ~batch.supervised.roll(1, dims=1)
        with tap.open() as captured:
            last_hidden_state(model, **batch.inputs)
        row = int(answering[0].nonzero()[0])
        places = marked[0, : row + 1].nonzero()
        there = _bin_of(row - int(places.max()), bins)
        needle_rows += there
        flat += len(places) / (row + 1) / len(samples)
        for layer, heads in captured.items():
            found = _sums(heads, batch.segments, answering, marked, bins, (longest - 1) // 2)
            found[2]["needle_mass"] = found[2]["marked_mass"][:, None].cpu() * there
            totals[str(layer)] = _added(totals[str(layer)], found) if str(layer) in totals else found
    return {layer: _means(*total) | _by_distance(total[2], needle_rows) | {"flat_mass": flat} for layer, total in totals.items()}


def _bin_of(distance: int, bins: Sequence[int]) -> Tensor:
    """[bins]: 1 in the one that holds a distance; `bins` are their lower edges."""
    return (torch.arange(len(bins)) == bisect_right(bins, distance) - 1).float()


def _by_distance(sums: Mapping[str, Tensor], rows: Tensor) -> dict[str, Any]:
    return {"needle_mass": (sums["needle_mass"] / rows.clamp_min(1)).tolist(), "needle_rows": rows.int().tolist()}


def _added(one: tuple, other: tuple) -> tuple:
    return one[0], one[1] + other[1], {name: total + other[2][name] for name, total in one[2].items()}


def check_needles(dataset: Dataset, haystacks: int, who: str) -> None:
    """Raises DataError for a question without needles, at which who (as the user calls it) would look: attention on them cannot be
    measured."""
    for i in range(haystacks):
        if any(turn.role == "user" and not turn.needles for turn in dataset.record(i).turns):
            raise DataError(f"a question records no needles, so that {who} cannot look at them").at(dataset.origin(i))
