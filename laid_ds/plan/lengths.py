"""How long the micro-batches of a run are, from the index of its shards: a few records are read besides, and no picture.

Tokens are the student's where its processor is at hand, by what it makes of some samples; else those that the index estimates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np

from laid_ds.config import Run
from laid_ds.data.dataset import Dataset, LocalFolder
from laid_ds.data.haystack import draw_window, evidence, images_drawn
from laid_ds.data.images import Pixels
from laid_ds.data.index import ESTIMATE
from laid_ds.data.order import Packing
from laid_ds.data.record import DataError, Record, Turn, estimate_tokens
from laid_ds.data.stream import Slot, Stream
from laid_ds.method.schedule import image_range
from laid_ds.models.image_pixels import limit_pixels
from laid_ds.models.processor import Renderer, load_processor

COUNTED, LEAST = 64, 4  # samples whose tokens are counted: at most and at least
IMAGES = 640  # of a source, whose tokens are counted: some 20 s of photographs
KNOTS = 8  # sizes of windows that are counted
MOST_SLOTS = 20_000  # places of micro-batches that are looked at; later ones are taken to be like them
SHOWN, UNSHOWN = [Turn("user", (0,))], [Turn("user", ())]


@dataclass(frozen=True)
class Lengths:
    """The micro-batches of a run in the order of its stream, all ranks (or groups of ranks that share one) side by side."""

    micro_batches: tuple[tuple[int, ...], ...]
    """Tokens to be expected of each row, padding included, or of each sample of a pack."""
    longest: int
    """Tokens of a micro-batch, on the safe side."""
    taught: tuple[tuple[int, ...], ...]
    """The same of the teacher's rows, which are shorter where it sees the needles alone."""
    taught_longest: int
    samples: float
    """Samples of one micro-batch, in the mean."""
    data_samples: int
    """Samples in the shards."""
    every: bool
    """Whether these are all micro-batches of the run, or its first ones."""
    counted_by: str
    """Whose tokens these are, as the rest of a sentence."""

    @property
    def mean(self) -> float:
        return sum(map(sum, self.micro_batches)) / len(self.micro_batches)


def read_lengths(run: Run, dataset: Dataset, groups: int) -> Lengths:
    """The micro-batches that the stream of this run makes of its shards (`dataset`), so many at a time (`Run.groups`).

    Of each source some samples are counted, as windows of several sizes where the run draws them; the others are taken to be to their
    lengths in the index as these are. Raises DataError for a sample that cannot be read or rendered, or that no pack can hold.
    """
    data, renderer, planned = run.data, _renderer(run), dataset.token_counts(run.data.count_tokens)
    number = max(LEAST, min(COUNTED, int(IMAGES // max(1.0, float(dataset.num_images.mean())))))
    looked_at = [
        dataset.spread(source, number) if isinstance(folder, LocalFolder) else []  # of a URL a whole shard would have to come
        for source, folder in enumerate(dataset.folders)
    ]
    curves = [_curve(run, dataset, renderer, planned, indices) for indices in looked_at]
    source_of = np.repeat(range(len(curves)), [int(sizes.sum()) for sizes in dataset.source_shard_sizes])
    per_step = data.micro_batch * groups * run.optimizer.accumulation

    def length(position: int, index: int) -> tuple[float, ...]:
        """Tokens that are to be expected of a place of the stream, and the most; and of what the teacher reads of it."""
        bounds = image_range(position // per_step, run.steps, data) if data.tokens_per_pack is None else data.images
        images = images_drawn(run.seed, position, bounds) if bounds else 0
        curve = curves[source_of[index]]
        own = tuple(planned[index] * np.interp(images, curve.images, of) for of in (curve.mean, curve.most))
        if curve.taught is None:
            return own + own
        return own + tuple(min(all_of, np.interp(images, curve.images, of)) for all_of, of in zip(own, curve.taught, strict=True))

    packing = build_packing(run, dataset, renderer, per_step, [i for indices in looked_at for i in indices])
    alone = {"rank": 0, "world_size": 1, "micro_batch": 1, "prepare": list}
    stream = Stream(dataset, **alone, seed=run.seed, shuffle=data.shuffle, weights=data.weights, packing=packing)
    needed = run.steps * per_step
    slots = list(islice(_slots(stream), min(needed, max(per_step, MOST_SLOTS // per_step * per_step))))
    found = [[length(*place) for place in slot] for slot in slots]
    by_kind = ([[round(lengths[kind]) for lengths in slot] for slot in found] for kind in range(4))
    expected, most, taught, taught_most = (tuple(_micro_batches(each, data.micro_batch, packing is not None)) for each in by_kind)
    longest, taught_longest = (max(map(sum, each)) for each in (most, taught_most))
    return Lengths(
        micro_batches=expected,
        longest=longest if packing is None else min(longest, packing.budget),
        taught=taught,
        taught_longest=taught_longest if packing is None else min(taught_longest, packing.budget),
        samples=data.micro_batch * sum(map(len, slots)) / len(slots),
        data_samples=len(dataset),
        every=len(slots) == needed,
        counted_by=_told(run, renderer, data.count_tokens),
    )


@dataclass(frozen=True)
class _Curve:
    """Tokens of a source's samples for each token of the index, by the images of their windows."""

    images: list[int]
    mean: list[float]
    most: list[float]
    taught: tuple[list[float], list[float]] | None
    """Tokens of what the teacher reads of such a window, in the mean and the most; None where it reads all, or nobody has looked."""


def _curve(run: Run, dataset: Dataset, renderer: Renderer | None, planned: np.ndarray, indices: list[int]) -> _Curve:
    """By some samples; without any (a URL's) windows are taken to be as long as their share of images."""
    bounds = run.data.images
    images = sorted({round(size) for size in np.linspace(*bounds, KNOTS)}) if bounds else [0]
    if not indices:
        share = [1.0 if bounds is None else min(1.0, size / max(1.0, float(dataset.num_images.mean()))) for size in images]
        return _Curve(images, share, share, None)
    records = {i: dataset.record(i) for i in indices}
    drawn = {i: [draw_window(r, size, run.data.questions, (run.seed, i)) if bounds else r for size in images] for i, r in records.items()}
    totals, whole, taught = _totals(renderer, dataset, drawn), planned[indices], None
    if run.taught and run.teacher.sees == "needles":
        seen = {i: [evidence(window, run.teacher.distractors, (run.seed, i)) for window in windows] for i, windows in drawn.items()}
        needles = _totals(renderer, dataset, seen)
        taught = needles.mean(0).tolist(), [int(needles.max())] * len(images)  # which hardly depends on the images of the window
    return _Curve(images, (totals.sum(0) / whole.sum()).tolist(), (totals / whole[:, None]).max(0).tolist(), taught)


def _totals(renderer: Renderer | None, dataset: Dataset, windows: Mapping[int, list[Record]]) -> np.ndarray:
    """Tokens [samples, windows of each]."""
    return np.array([[_count(renderer, dataset, i, window)[0] for window in drawn] for i, drawn in windows.items()])


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
    processor = load_processor(run.student.path, run.student.trust_remote_code)
    return Renderer(limit_pixels(processor, run.data.image_pixels), Pixels(run.data.decoder, run.data.resizer))


def _told(run: Run, renderer: Renderer | None, name: str) -> str:
    if renderer is not None:
        return f"as the processor of {run.student.path} makes them"
    return f"as the index has them under {name!r} ({run.student.path} holds no processor to count with)"


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
    elif renderer is not None:
        _check_recorded(dataset, data.count_tokens, {i: tokens for i, (tokens, _) in counted.items()})
    of_image = [length for _, lengths in counted.values() for length in lengths]
    return Packing(
        data.tokens_per_pack,
        group=packs_per_step,
        tokens=data.count_tokens,
        scale=scale,
        images=data.images,
        image_tokens=min(of_image, default=0),
    )


def _check_recorded(dataset: Dataset, name: str, counted: Mapping[int, int]) -> None:
    """Raises DataError for a sample that is longer than its record says: packs planned by it would be longer than allowed."""
    recorded = dataset.token_counts(name)
    for i, tokens in counted.items():
        if tokens > recorded[i]:
            raise DataError(
                f"the student's processor makes {tokens} tokens of it, its record under {name!r} says {recorded[i]}: leave out"
                " data.count_tokens, or record the counts with this processor and data.image_pixels"
            ).at(dataset.origin(i))


def _count(renderer: Renderer | None, dataset: Dataset, i: int, window: Record | None = None) -> tuple[int, list[int]]:
    """Tokens of sample i, or of a window of it, and of each of its images; without a renderer as the index estimates them.

    Raises DataError, naming the sample, when it cannot be rendered.
    """
    record = window or dataset.record(i)
    if renderer is None:
        of_images = [estimate_tokens(SHOWN, [image]) - estimate_tokens(UNSHOWN, []) for image in record.images]
        return estimate_tokens(record.turns, record.images), of_images
    try:
        return renderer.count(record), [renderer.image_length(image.width, image.height) for image in record.images]
    except ValueError as error:
        raise DataError(str(error)).at(dataset.origin(i)) from error
