"""The endless stream of this rank's micro-batches: the same global order for any number of ranks and workers, resumed exactly.

A slot is what one place of a micro-batch holds: a sample or, with packing, a pack of samples. Slots have global positions that count on
over epochs. Micro-step `t` of rank `r` takes the slots `start + t*W*B + r*B + [0, B)`, so no rank ever has fewer steps than another.
"""

import copy
import json
import logging
import os
import signal
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from laid_ds.data.dataset import Dataset
from laid_ds.data.haystack import images_drawn
from laid_ds.data.order import Packing, Packs, Shuffle, blend_order, global_order, plan_packs, random_bits, single_packs
from laid_ds.data.record import DataError, Sample
from laid_ds.data.slabs import Sender, Slabs
from laid_ds.parent import end_with

log = logging.getLogger(__name__)

Slot = list[tuple[int, int]]  # (sample position, sample index)
Outcome = tuple[Any, list[str], DataError | None]  # (what prepare made, notes on replaced samples, the error)
REPLACEMENT = 5  # purpose number of the random bits
MAX_REPLACEMENTS = 16
PREFETCH = 2  # micro-batches that a worker prepares ahead


class Stream:
    """Iterate over what `prepare` makes of each micro-batch of this rank.

    `prepare` gets `[(position, sample), ...]`, or with packing one such list per pack; it runs in a worker when `workers > 0`. A position
    is unique over all epochs, so randomness should be a function of (seed, position). `weights` blends the folders of the data set.

    A sample that cannot be read raises `DataError`; so may `prepare`, naming the key. With `on_bad="replace"` another sample, chosen by
    (seed, position) alone and no longer than the bad one, takes its place, and shard, key and offset are logged.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        micro_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        prepare: Callable[[list], Any],
        shuffle: Shuffle = "full",
        workers: int = 0,
        weights: Sequence[float] | None = None,
        packing: Packing | None = None,
        on_bad: str = "raise",
        repeats: int | None = None,
    ):
        """repeats: after so many epochs they come again, the same samples in the same windows at the same positions."""
        if micro_batch < 1 or not 0 <= rank < world_size:
            raise ValueError(f"micro_batch {micro_batch}, rank {rank} of {world_size}: nothing to stream")
        if on_bad not in ("raise", "replace"):
            raise ValueError(f'on_bad {on_bad!r} is neither "raise" nor "replace"')
        self.dataset, self.seed, self.shuffle, self.weights, self.packing = dataset, seed, shuffle, weights, packing
        self.prepare, self.repeats = prepare, repeats
        self.micro_batch, self.rank, self.world_size, self.workers = micro_batch, rank, world_size, workers
        self.lengths = budgeted_lengths(dataset, packing) if packing else dataset.lengths
        self._reader = _Reader(dataset, prepare, self.lengths if packing else None, seed, on_bad)
        self._plans: dict[int, tuple[np.ndarray, Packs]] = {}
        self._epoch, self._offset, self._position = 0, 0, 0

    def __iter__(self) -> Iterator[Any]:
        for prepared in self.read(self._micro_batches()):
            self._advance()
            yield prepared

    def read(self, micro_batches: Iterable[list[Slot]]) -> Iterator[Any]:
        """What `prepare` makes of these micro-batches. The stream does not move."""
        for prepared, replaced, failure in self._loader(micro_batches):
            if failure is not None:
                raise failure
            for reason in replaced:
                log.warning(reason)
            yield prepared

    def with_prepare(self, prepare: Callable[[list], Any], repeats: int | None = None) -> "Stream":
        """The same stream, from where this one stands, with another `prepare` and other `repeats`."""
        other = copy.copy(self)
        other.prepare, other.repeats, other._plans, other._reader = prepare, repeats, {}, copy.copy(self._reader)
        other._reader.prepare = prepare
        return other

    def slots(self, first: int, number: int) -> list[Slot]:
        """So many slots of the global order of all epochs, from slot `first` on."""
        return [self._slot(*self._seek(0, first + k)) for k in range(number)]

    def _loader(self, micro_batches: Iterable[list[Slot]]) -> Iterator[Outcome]:
        if self.workers == 0:
            yield from map(self._reader.__getitem__, micro_batches)
            return
        slabs = Slabs(self.workers * PREFETCH + 2)  # what the workers prepare, what is trained on, and what was before
        loader = DataLoader(
            Sender(self._reader.__getitem__, slabs.memory),
            batch_size=None,
            sampler=((slots, slabs.take()) for slots in micro_batches),
            num_workers=self.workers,
            prefetch_factor=PREFETCH,
            collate_fn=_unchanged,
            worker_init_fn=partial(_begin_worker, os.getpid()),
            multiprocessing_context="fork",  # the slabs are shared by inheritance
            generator=torch.Generator(),  # else each new iterator would draw from the global one, and resume would shift it
        )
        for parcel in loader:
            yield slabs.open(parcel)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the micro-batches already yielded: the same on every rank."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "offset": self._offset,
            "fingerprint": self.dataset.fingerprint,
            "order": self.order_facts(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, on any number of ranks. Call it before iterating."""
        if state["fingerprint"] != self.dataset.fingerprint:
            raise ValueError(
                f"the data set changed: the state was saved on {state['fingerprint'][:12]}, this one is {self.dataset.fingerprint[:12]}"
            )
        for name, value in self.order_facts().items():
            if state["order"].get(name) != value:
                raise ValueError(f"the order changed: the state was saved with {name} {state['order'].get(name)!r}, this run has {value!r}")
        self._epoch, self._offset, self._position = state["epoch"], state["offset"], state["position"]

    def peek(self, k: int, prepare: Callable[[list], Any] | None = None) -> Any:
        """What `prepare` (or another such function) makes of the k-th slot from where the stream stands: the same on every rank. The stream
        does not move."""
        reader = copy.copy(self._reader)
        reader.prepare = prepare or reader.prepare
        prepared, _, failure = reader[[self._slot(*self._seek(self._epoch, self._offset + k))]]
        if failure is not None:
            raise failure
        return prepared

    def epoch_slots(self, epoch: int) -> list[Slot]:
        """All slots of an epoch, in global order: what every rank together will read."""
        return [self._slot(epoch, k) for k in range(len(self._plan(epoch)[1]))]

    def order_facts(self) -> dict[str, Any]:
        """What the order of the samples follows from, beside the data set."""
        return {
            "seed": self.seed,
            "shuffle": self.shuffle,
            "weights": None if self.weights is None else [float(weight) for weight in self.weights],
            "repeats": self.repeats,
            "packing": json.loads(json.dumps(asdict(self.packing))) if self.packing else None,
            "lengths_crc32": zlib.crc32(self.lengths.tobytes()) if self.packing else None,
        }

    def _plan(self, epoch: int) -> tuple[np.ndarray, Packs]:
        """The epoch's order and its packs. The last few are kept: workers run ahead of the state over an epoch's end."""
        epoch = epoch if self.repeats is None else epoch % self.repeats
        plan = self._plans.pop(epoch, None) or self._make_plan(epoch)
        self._plans[epoch] = plan
        if len(self._plans) > 4:
            del self._plans[next(iter(self._plans))]
        return plan

    def _make_plan(self, epoch: int) -> tuple[np.ndarray, Packs]:
        order = self._order(epoch)
        if self.packing is None:
            return order, single_packs(len(order))
        return order, plan_packs(self.seed, epoch, self._lengths_of(epoch, order), self.packing)

    def _lengths_of(self, epoch: int, order: np.ndarray) -> np.ndarray:
        """Tokens at each place of an epoch: of the whole sample, or of the window that will be drawn of it."""
        bounds = self.packing.images
        if bounds is None:
            return self.lengths[order]
        drawn = np.array([images_drawn(self.seed, epoch * len(order) + place, bounds) for place in range(len(order))], np.int64)
        return _of_windows(self.lengths[order], self.dataset.num_images[order], drawn, self.packing.image_tokens)

    def _order(self, epoch: int) -> np.ndarray:
        if self.weights is None:
            return global_order(self.seed, epoch, self.dataset.shard_sizes, self.shuffle)
        return blend_order(self.seed, epoch, self.dataset.source_shard_sizes, self.weights, self.shuffle)

    def _slot(self, epoch: int, k: int) -> Slot:
        order, packs = self._plan(epoch)
        epoch = epoch if self.repeats is None else epoch % self.repeats
        return [(epoch * len(order) + int(place), int(order[place])) for place in packs[k]]

    def _seek(self, epoch: int, offset: int) -> tuple[int, int]:
        """Carry an offset beyond the epoch's end into the epochs after it."""
        while offset >= len(self._plan(epoch)[1]):
            epoch, offset = epoch + 1, offset - len(self._plan(epoch)[1])
        return epoch, offset

    def _advance(self) -> None:
        step = self.world_size * self.micro_batch
        self._position += step
        self._epoch, self._offset = self._seek(self._epoch, self._offset + step)

    def _micro_batches(self) -> Iterator[list[Slot]]:
        epoch, offset = self._epoch, self._offset
        while True:
            mine = offset + self.rank * self.micro_batch
            yield [self._slot(*self._seek(epoch, mine + b)) for b in range(self.micro_batch)]
            epoch, offset = self._seek(epoch, offset + self.world_size * self.micro_batch)


class _Reader:
    """Reads and prepares one micro-batch. Lives in the worker processes; holds nothing that changes."""

    def __init__(self, dataset: Dataset, prepare: Callable[[list], Any], lengths: np.ndarray | None, seed: int, on_bad: str):
        self.dataset, self.prepare, self.lengths, self.seed, self.on_bad = dataset, prepare, lengths, seed, on_bad

    def __getitem__(self, slots: list[Slot]) -> Outcome:
        """The micro-batch of these slots. An error is a value: raised in a worker it would lose its fields."""
        try:
            return *self._prepare(slots), None
        except DataError as error:
            return None, [], error

    def _prepare(self, slots: list[Slot]) -> tuple[Any, list[str]]:
        replaced: list[str] = []
        slots = [[(position, *self._read(position, index, replaced)) for position, index in slot] for slot in slots]
        for _ in range(MAX_REPLACEMENTS):
            packs = [[(position, sample) for position, _, sample in slot] for slot in slots]
            try:
                return self.prepare(packs if self.lengths is not None else [pack[0] for pack in packs]), replaced
            except DataError as error:
                if self.on_bad == "raise" or error.key is None:
                    raise
                slots = [[self._without(error, *entry, replaced) for entry in slot] for slot in slots]
        raise DataError(f"{MAX_REPLACEMENTS} replacements in one micro-batch were refused as well")

    def _read(self, position: int, index: int, replaced: list[str]) -> tuple[int, Sample]:
        try:
            return index, self.dataset.read(index)
        except DataError as error:
            if self.on_bad == "raise":
                raise
            return self._replace(position, index, error, replaced)

    def _without(self, error: DataError, position: int, index: int, sample: Sample, replaced: list[str]) -> tuple[int, int, Sample]:
        if sample.key != error.key:
            return position, index, sample
        return position, *self._replace(position, index, error.at(sample.origin), replaced)

    def _replace(self, position: int, index: int, error: DataError, replaced: list[str]) -> tuple[int, Sample]:
        """The first readable sample of a random row that only (seed, position) determines."""
        candidates = np.arange(len(self.dataset)) if self.lengths is None else np.flatnonzero(self.lengths <= self.lengths[index])
        candidates = candidates[candidates != index]
        if not len(candidates):
            raise DataError(f"{error}; no other sample can take its place")
        for bits in random_bits(self.seed, position, REPLACEMENT, MAX_REPLACEMENTS):
            chosen = int(candidates[int(bits) % len(candidates)])
            try:
                sample = self.dataset.read(chosen)
            except DataError:  # bad as well: it will be reported at its own position
                continue
            replaced.append(f"sample replaced by {sample.key} of {sample.origin.shard}: {error}")
            return chosen, sample
        raise DataError(f"{error}; {MAX_REPLACEMENTS} samples drawn to take its place are bad as well")


def _of_windows(lengths: np.ndarray, num_images: np.ndarray, drawn: np.ndarray | int, image_tokens: int) -> np.ndarray:
    """The most tokens that windows of `drawn` images have: all text, and what the images that are left out would have taken is gone."""
    return np.maximum(lengths - np.maximum(num_images - drawn, 0) * image_tokens, 1)


def _begin_worker(rank: int, number: int) -> None:
    """A worker ends with its rank, and not before it: DeepSpeed's launcher and SLURM send SIGTERM to all processes of a rank, which asks it
    to finish its step and save."""
    end_with(rank)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def is_lost_worker(error: RuntimeError) -> bool:
    """Whether a process that prepares batches is gone: killed, most often for want of memory."""
    return str(error).startswith("DataLoader worker")


def budgeted_lengths(dataset: Dataset, packing: Packing) -> np.ndarray:
    """Tokens of each whole sample as the budget counts them. Raises DataError for a sample, or a window of it, that no pack can hold."""
    lengths = np.ceil(dataset.token_counts(packing.tokens) * packing.scale).astype(np.int64)
    largest = lengths if packing.images is None else _of_windows(lengths, dataset.num_images, packing.images[1], packing.image_tokens)
    longest = int(largest.argmax())
    if largest[longest] > packing.budget:
        raise DataError(f"a sample of {largest[longest]} tokens does not fit a budget of {packing.budget}").at(dataset.origin(longest))
    return lengths


def _unchanged(item: Any) -> Any:
    return item
