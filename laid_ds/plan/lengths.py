"""How long the micro-batches of a run are, from the index of its shards: a few records are read besides, and no picture.

Tokens are the student's where its processor is at hand, by what it makes of some samples; else those that the index estimates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np

from laid_ds.config import Run
from laid_ds.data.dataset import Dataset, LocalFolder
from laid_ds.data.haystack import images_drawn, why_whole
from laid_ds.data.images import Pixels
from laid_ds.data.index import ESTIMATE
from laid_ds.data.order import Packing
from laid_ds.data.record import DataError, Turn, estimate_tokens
from laid_ds.data.stream import Slot, Stream
from laid_ds.method.schedule import image_range
from laid_ds.models.processor import Renderer, load_processor

COUNTED = 64  # samples whose tokens are counted
MOST_SLOTS = 100_000  # places of micro-batches that are looked at; later ones are taken to be like them
SHOWN, UNSHOWN = [Turn("user", (0,))], [Turn("user", ())]


@dataclass(frozen=True)
class Lengths:
    """The micro-batches of a run in the order of its stream, all ranks side by side."""

    micro_batches: tuple[tuple[int, ...], ...]
    """Tokens of each row, padding included, or of each sample of a pack."""
    samples: float
    """Samples of one micro-batch, in the mean."""
    data_samples: int
    """Samples in the shards."""
    every: bool
    """Whether these are all micro-batches of the run, or its first ones."""
    counted_by: str
    """Whose tokens these are, as the rest of a sentence."""

    @property
    def longest(self) -> int:
        return max(map(sum, self.micro_batches))

    @property
    def mean(self) -> float:
        return sum(map(sum, self.micro_batches)) / len(self.micro_batches)


def read_lengths(run: Run, dataset: Dataset, gpus: int) -> Lengths:
    """The micro-batches that the stream of this run makes of its shards (`dataset`) on so many GPUs.

    Windows are as long as the sample without the images that are left out, by the mean image; a source that holds a sample which stays
    whole is taken to stay whole, so that nothing is underestimated. Raises DataError for a sample that cannot be read or rendered, or
    that no pack can hold.
    """
    data, renderer = run.data, _renderer(run)
    looked_at = [
        dataset.spread(source, COUNTED) if isinstance(folder, LocalFolder) else []  # of a URL a whole shard would have to come
        for source, folder in enumerate(dataset.folders)
    ]
    counted = {i: _count(renderer, dataset, i) for indices in looked_at for i in indices}
    planned = dataset.token_counts(data.count_tokens)
    exact = data.count_tokens != ESTIMATE
    scale = 1.0 if exact or not counted else sum(total for total, _ in counted.values()) / sum(int(planned[i]) for i in counted)
    of_images = [tokens for _, images in counted.values() for tokens in images]
    image_tokens = sum(of_images) / len(of_images) if of_images else planned.sum() / max(1, dataset.num_images.sum())
    stays = np.repeat(
        [any(why_whole(dataset.record(i)) is not None for i in indices) for indices in looked_at],
        [int(sizes.sum()) for sizes in dataset.source_shard_sizes],
    )
    per_step = data.micro_batch * gpus * run.optimizer.accumulation

    def length(position: int, index: int) -> int:
        whole = planned[index] * scale
        bounds = image_range(position // per_step, run.steps, data) if data.tokens_per_pack is None else data.images
        if bounds is None or stays[index]:
            return round(whole)
        left_out = max(0, int(dataset.num_images[index]) - images_drawn(run.seed, position, bounds))
        return max(1, round(whole - left_out * image_tokens))

    packing = build_packing(run, dataset, renderer, per_step, [i for indices in looked_at for i in indices])
    alone = {"rank": 0, "world_size": 1, "micro_batch": 1, "prepare": list}
    stream = Stream(dataset, **alone, seed=run.seed, shuffle=data.shuffle, weights=data.weights, packing=packing)
    needed = run.steps * per_step
    slots = list(islice(_slots(stream), min(needed, max(per_step, MOST_SLOTS // per_step * per_step))))
    return Lengths(
        micro_batches=tuple(_micro_batches([[length(*place) for place in slot] for slot in slots], data.micro_batch, packing is not None)),
        samples=data.micro_batch * sum(map(len, slots)) / len(slots),
        data_samples=len(dataset),
        every=len(slots) == needed,
        counted_by=_told(run, renderer, exact),
    )


def _slots(stream: Stream) -> Iterator[Slot]:
    return (slot for epoch in count() for slot in stream.epoch_slots(epoch))


def _micro_batches(slots: list[list[int]], micro_batch: int, packs: bool) -> Iterator[tuple[int, ...]]:
    """Packs as they are, or rows padded to the longest of each micro-batch."""
    if packs:
        yield from map(tuple, slots)
        return
    rows = np.array(slots).reshape(-1, micro_batch)
    yield from ((int(longest),) * micro_batch for longest in rows.max(1))


def _renderer(run: Run) -> Renderer | None:
    """What counts tokens as the student's processor does, where its folder holds one."""
    if not (Path(run.student.path) / "tokenizer_config.json").is_file():
        return None
    return Renderer(load_processor(run.student.path, run.student.trust_remote_code), Pixels(run.data.decoder, run.data.resizer))


def _told(run: Run, renderer: Renderer | None, exact: bool) -> str:
    if exact:
        return f"as the samples record them under {run.data.count_tokens!r}"
    if renderer is not None:
        return f"as the processor of {run.student.path} makes them"
    return f"as the index estimates them, 28 x 28 pixels a token ({run.student.path} holds no processor)"


def build_packing(
    run: Run, dataset: Dataset, renderer: Renderer | None, packs_per_step: int = 1, chosen: Sequence[int] | None = None
) -> Packing | None:
    """How packs are planned, in the student's tokens, by what it makes of some samples spread over the data; on the safe side.

    renderer: None plans by the index alone. chosen: the samples to count, in place of some spread over the data.
    """
    data = run.data
    if data.tokens_per_pack is None:
        return None
    if chosen is None:
        chosen = {i * len(dataset) // COUNTED for i in range(COUNTED)}
    by_length = sorted(chosen, key=lambda i: dataset.lengths[i])
    counted = {i: _count(renderer, dataset, i) for i in by_length}
    scale = 1.0
    if data.count_tokens == ESTIMATE:  # short samples may be off by more, but by few tokens
        scale = max((counted[i][0] / int(dataset.lengths[i]) for i in by_length[len(by_length) // 2 :]), default=1.0)
    of_image = [length for _, lengths in counted.values() for length in lengths]
    return Packing(
        data.tokens_per_pack,
        group=packs_per_step,
        tokens=data.count_tokens,
        scale=scale,
        images=data.images,
        image_tokens=min(of_image, default=0),
    )


def _count(renderer: Renderer | None, dataset: Dataset, i: int) -> tuple[int, list[int]]:
    """Tokens of sample i, and of each of its images; without a renderer as the index estimates them.

    Raises DataError, naming the sample, when it cannot be rendered.
    """
    record = dataset.record(i)
    if renderer is None:
        return int(dataset.lengths[i]), [estimate_tokens(SHOWN, [image]) - estimate_tokens(UNSHOWN, []) for image in record.images]
    try:
        return renderer.count(record), [renderer.image_length(image.width, image.height) for image in record.images]
    except ValueError as error:
        raise DataError(str(error)).at(dataset.origin(i)) from error
