"""Rows that ranks share are cut where a decoder takes them over: until there the model's own code makes embeddings, image features and
positions of whole rows.

Letters: B batch, T tokens of a row, t of them a rank's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from laid_ds.sequence import SequenceGroup

CUT = ("inputs_embeds", "position_ids", "visual_pos_masks", "deepstack_visual_embeds")


@contextmanager
def cut_inputs(decoder: nn.Module, group: SequenceGroup) -> Iterator[None]:
    """Inside the block the decoder takes whole rows and computes this rank's tokens of them. Raises ValueError, when it runs, for what it
    is given beside embeddings, positions and the features of images for its layers."""

    def cut(module: nn.Module, arguments: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return (), _cut(group, module, arguments, named)

    hook = decoder.register_forward_pre_hook(cut, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _cut(group: SequenceGroup, decoder: nn.Module, arguments: tuple, named: dict[str, Any]) -> dict[str, Any]:
    other = sorted(name for name, value in named.items() if name not in CUT and _holds_tensors(value))
    if arguments or other or named.get("inputs_embeds") is None:
        what = ", ".join(other) or "other arguments than embeddings"
        raise ValueError(f"{type(decoder).__name__} takes {what} too, which ranks cannot share: set sequence_parallel = 1")
    embeddings, positions = named["inputs_embeds"], named.get("position_ids")
    batch, tokens = embeddings.shape[:2]
    if positions is None:  # it would count the cut ones
        positions = torch.arange(tokens, device=embeddings.device).expand(batch, -1)
    cut = {"inputs_embeds": group.own(embeddings, 1), "position_ids": group.own(positions, -1)}
    if (places := named.get("visual_pos_masks")) is not None:  # [B, T]: where image tokens stand
        cut["visual_pos_masks"] = group.own(places, 1)
        of_image = (places.flatten().cumsum(0) - 1).view_as(places)
        features = group.own(of_image, 1)[cut["visual_pos_masks"]]
        cut["deepstack_visual_embeds"] = [level[features] for level in named["deepstack_visual_embeds"]]  # of [image tokens, hidden]
    return named | cut


def _holds_tensors(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
    return any(isinstance(part, Tensor) for part in parts)
