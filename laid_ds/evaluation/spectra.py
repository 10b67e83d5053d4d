"""What attention does, in numbers per layer and head: entropy, mass by distance, mass on the needle. No attention map is ever held.

Rows of a haystack are those from which an answer is given: the position before its first token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laid_ds.data.batch import collate
from laid_ds.data.dataset import Dataset
from laid_ds.data.haystack import draw_window
from laid_ds.kernels.attention_profile import attention_profile
from laid_ds.models.attention import Captured, Tap, attention_layers, last_hidden_state, listen
from laid_ds.models.load import PreTrainedModel
from laid_ds.models.processor import Renderer


def profile_heads(
    captured: Mapping[int, Captured], segments: Tensor, row_mask: Tensor | None = None, marked: Tensor | None = None
) -> dict[str, dict[str, Any]]:
    """Decoder layer -> means over its rows, one number per head: "entropy" in nats, "far_mass" beyond half of the longest distance, with
    `marked` [B, T] "marked_mass"; "mass" by log-spaced distance bins [H][bins] whose lower edges are "bins".

    segments [B, T] int64, -1 = padding; row_mask [B, T] bool, default all rows. Source: the definitions of kernels/attention_profile.
    """
    return {str(layer): _numbers(heads, segments, row_mask, marked) for layer, heads in captured.items()}


def _numbers(heads: Captured, segments: Tensor, row_mask: Tensor | None, marked: Tensor | None) -> dict[str, Any]:
    found = attention_profile(
        heads.query.detach(),
        heads.key.detach(),
        scale=heads.scale,
        window=heads.window,
        segments=segments,
        row_mask=row_mask,
        marked=marked,
    )
    rows = max(found.row_count, 1)
    numbers = {"entropy": found.entropy_sum, "far_mass": found.far_mass, "mass": found.bin_mass}
    if marked is not None:
        numbers["marked_mass"] = found.marked_mass
    return {"bins": found.bins.tolist()} | {name: (total / rows).tolist() for name, total in numbers.items()}


@torch.inference_mode()
def needle_profile(model: PreTrainedModel, renderer: Renderer, dataset: Dataset, size: int, haystacks: int) -> dict[str, dict[str, Any]]:
    """`profile_heads` of every decoder layer at the answering rows of windows of `size` images with one question each; "marked_mass" is
    the attention on the needle's tokens. The model is put on the `laid` attention function."""
    samples = [dataset.read(i) for i in range(min(haystacks, len(dataset)))]
    windows = [draw_window(sample, size, 1, ("evaluation", size, sample.key)) for sample in samples]
    rows = [renderer(window) for window in windows]
    batch = collate(rows, [window.key for window in windows], renderer.processor.tokenizer.pad_token_id).to(model.device)
    marked = torch.zeros_like(batch.segments, dtype=torch.bool)
    for row, rendered, window in zip(marked, rows, windows, strict=True):
        row[: len(rendered.shows)] = torch.isin(rendered.shows, torch.tensor(window.turns[0].needles)).to(row.device)
    answering = batch.supervised & ~batch.supervised.roll(1, dims=1)
    tap = Tap(list(attention_layers(model)))
    listen(model, tap)
    with tap.open() as captured:
        last_hidden_state(model, **batch.inputs)
    return profile_heads(captured, batch.segments, answering, marked)
