"""The image encoder where ranks share a batch: each encodes some of the images, whole, and the features are gathered.

Every rank encodes once in a forward pass, since under ZeRO-3 the encoder's parameters are whole on all ranks or on none: one without an
image of its own encodes the smallest of the batch, and nobody looks at the result. Letters: N images, C size of a feature.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from laid_ds.sequence import SequenceGroup

WAITING = ("pixel_values",)
"""Inputs that may stay on the CPU where ranks share a batch: of a long row the largest tensor, of which each needs its own images alone."""


@contextmanager
def shared_tower(model: PreTrainedModel, group: SequenceGroup, inputs: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Inside the block the ranks of a group share out the images of what the model reads, where its family hands them over as patches with
    their grids, or as squares of one size. Other families' images are encoded by every rank, all of them.

    Yields the inputs to run the model on. Pixels may wait on the CPU (`WAITING`): a rank's own come to where the tokens are."""
    inside, device = getattr(model, "model", model), inputs["input_ids"].device
    encode = getattr(inside, "get_image_features", None)
    if encode is None:
        yield {name: tensor.to(device) for name, tensor in inputs.items()}
        return
    inside.get_image_features = partial(_encode, encode, group, device)
    try:
        yield dict(inputs)
    finally:
        del inside.get_image_features


def _encode(encode: Callable[..., Any], group: SequenceGroup, device: torch.device, *arguments: Any, **named: Any) -> Any:
    """What `encode` makes of all images, this rank having encoded its share."""
    given = dict(zip(signature(encode).parameters, arguments, strict=False)) | named
    sizes = image_sizes(given)
    if sizes is None:
        return encode(**_moved(given, device))
    shares = shared_out(sizes, group.size)
    mine, pixels = shares[group.place], given["pixel_values"]
    if not mine:
        smallest = min(range(len(sizes)), key=sizes.__getitem__)
        mine = range(smallest, smallest + 1)
    given["pixel_values"] = pixels[sum(sizes[: mine.start]) : sum(sizes[: mine.stop])]
    if "image_grid_thw" in given:
        given["image_grid_thw"] = given["image_grid_thw"][mine.start : mine.stop]
    found = encode(**_moved(given, device))
    deeper = getattr(found, "deepstack_features", None)
    levels = [list(level) for level in (found.pooler_output, *(deeper or ()))]  # of each: for each image [.., C]
    every = _gathered([[image.flatten(0, -2) for image in level] for level in levels], shares, group)
    if isinstance(found.pooler_output, Tensor):
        found.pooler_output = torch.stack(every[0]).view(-1, *levels[0][0].shape)
    else:
        found.pooler_output = every[0]
    if deeper:
        found.deepstack_features = every[1:]
    return found


def _moved(given: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}


def image_sizes(given: dict[str, Any]) -> list[int] | None:
    """How many rows of pixel_values each image has; None where the images cannot be told apart by what the encoder is given."""
    tensors, pixels = {name for name, value in given.items() if isinstance(value, Tensor)}, given.get("pixel_values")
    if tensors == {"pixel_values", "image_grid_thw"}:
        return given["image_grid_thw"].prod(-1).tolist()
    return [1] * len(pixels) if tensors == {"pixel_values"} and pixels.ndim == 4 else None


def shared_out(sizes: Sequence[int], ranks: int) -> list[range]:
    """The images of each rank, consecutive ones (their pixels are not copied), with alike much to encode: none has more than the mean and
    one image."""
    ends, total = list(accumulate(sizes)), sum(sizes)
    owners = [int((end - size / 2) * ranks / total) for end, size in zip(ends, sizes, strict=True)]  # where the image's middle lies
    return [range(bisect_left(owners, rank), bisect_right(owners, rank)) for rank in range(ranks)]


def _gathered(levels: list[list[Tensor]], shares: list[range], group: SequenceGroup) -> list[tuple[Tensor, ...]]:
    """For each level and each of all images the features [rows, C], of those [rows, C] that this rank encoded."""
    mine = shares[group.place]
    counts = torch.zeros(sum(map(len, shares)), dtype=torch.long, device=levels[0][0].device)
    for image, features in zip(mine, levels[0], strict=False):  # a rank without images has encoded one all the same
        counts[image] = len(features)
    rows = group.add(counts).tolist()
    totals = [sum(rows[image] for image in share) for share in shares]
    own = torch.stack([torch.cat(level) for level in levels])  # [levels, rows, C]
    every = group.gather(F.pad(own, (0, 0, 0, max(totals) - own.shape[1]))).unbind(0)
    whole = torch.cat([features[:, :total] for features, total in zip(every, totals, strict=True)], 1)
    return [level.split(rows) for level in whole.unbind(0)]
