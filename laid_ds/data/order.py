"""The order of samples: pure functions of (seed, epoch, shard sizes). No rank, no worker, no state.

Every random choice comes from raw Philox bits, whose stream numpy guarantees across versions; its permutation methods it does not.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Shuffle = str | int
"""\"full\", \"none\", or the number of samples in a shuffle window (for remote shards: few are open at a time)."""


def random_bits(seed: int, epoch: int, purpose: int, count: int) -> np.ndarray:
    """`count` uint64 numbers that depend on the arguments alone."""
    if not (0 <= seed < 1 << 64 and 0 <= epoch < 1 << 64):
        raise ValueError(f"seed {seed} and epoch {epoch} must be in [0, 2^64)")
    generator = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=np.array([0, 0, 0, purpose], np.uint64))
    return generator.random_raw(count)


def permutation(seed: int, epoch: int, purpose: int, count: int) -> np.ndarray:
    """A random order of `range(count)`."""
    return np.argsort(random_bits(seed, epoch, purpose, count), kind="stable")


def global_order(seed: int, epoch: int, shard_sizes: Sequence[int], shuffle: Shuffle = "full") -> np.ndarray:
    """Sample index at each place of an epoch; each index once. int64 [N]"""
    sizes = np.asarray(shard_sizes, np.int64)
    total = int(sizes.sum())
    if shuffle == "none":
        return np.arange(total)
    if shuffle == "full":
        return permutation(seed, epoch, 0, total)
    if isinstance(shuffle, bool) or not isinstance(shuffle, int) or shuffle < 1:
        raise ValueError(f'shuffle {shuffle!r} is neither "full", "none" nor a window of at least one sample')
    return _window_order(seed, epoch, sizes, shuffle)


def _window_order(seed: int, epoch: int, sizes: np.ndarray, window: int) -> np.ndarray:
    starts = np.cumsum(sizes) - sizes
    shards = permutation(seed, epoch, 1, len(sizes))
    in_shard_order = np.concatenate([np.arange(starts[shard], starts[shard] + sizes[shard]) for shard in shards])
    windows = np.arange(len(in_shard_order)) // window
    return in_shard_order[np.lexsort((random_bits(seed, epoch, 2, len(in_shard_order)), windows))]


def blend_counts(weights: Sequence[float], total: int) -> np.ndarray:
    """Samples that each source gives to an epoch of `total`: proportional to the weights, exact in sum. int64 [sources]"""
    shares = np.asarray(weights, np.float64)
    if not (np.isfinite(shares).all() and (shares >= 0).all() and shares.sum() > 0):
        raise ValueError(f"weights {list(weights)} must be finite, not negative, and not all zero")
    exact = shares / shares.sum() * total
    counts = np.floor(exact).astype(np.int64)
    largest_remainders = np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]
    counts[largest_remainders] += 1
    return counts


def blend_order(
    seed: int, epoch: int, sources: Sequence[Sequence[int]], weights: Sequence[float], shuffle: Shuffle = "full", total: int | None = None
) -> np.ndarray:
    """Sample index (into the sources side by side) at each place of a blended epoch. int64 [total]

    Each source runs through its own endless epochs, so that after any number of blended epochs each of its samples was used equally often
    (to within one): source `s` has given `epoch * blend_counts(weights, total)[s]` samples before this epoch.
    """
    sizes = [int(np.sum(shard_sizes)) for shard_sizes in sources]
    total = sum(sizes) if total is None else total
    if len(weights) != len(sources):
        raise ValueError(f"{len(weights)} weights for {len(sources)} sources")
    counts = blend_counts(weights, total)
    if shuffle == "none":  # spread each source evenly
        places = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
        labels = np.repeat(np.arange(len(counts)), counts)[np.argsort(places, kind="stable")]
    else:
        labels = np.repeat(np.arange(len(counts)), counts)[permutation(seed, epoch, 3, total)]
    order = np.empty(total, np.int64)
    source_seeds = random_bits(seed, 0, 4, len(sources))
    for source, shard_sizes in enumerate(sources):
        first = epoch * int(counts[source])
        part = endless_order(int(source_seeds[source]), first, first + int(counts[source]), shard_sizes, shuffle)
        order[labels == source] = sum(sizes[:source]) + part
    return order


def endless_order(seed: int, first: int, stop: int, shard_sizes: Sequence[int], shuffle: Shuffle) -> np.ndarray:
    """Places [first, stop) of the epochs of one source laid end to end."""
    size = int(np.sum(shard_sizes))
    if first == stop:
        return np.empty(0, np.int64)
    if size == 0:
        raise ValueError("a source without samples has a weight above zero")
    epochs = range(first // size, (stop - 1) // size + 1)
    laid_out = np.concatenate([global_order(seed, epoch, shard_sizes, shuffle) for epoch in epochs])
    return laid_out[first - epochs[0] * size : stop - epochs[0] * size]


@dataclass(frozen=True)
class Packing:
    """How samples become packs of at most `budget` tokens."""

    budget: int
    buffer: int = 256
    """Samples that are looked at together; the places of a pack lie within two buffers."""
    group: int = 8
    """Packs of similar work that lie side by side: best the number of packs in one optimizer step."""
    tokens: str = "estimate"
    """Which lengths of the index: `Dataset.token_counts`."""
    scale: float = 1.0
    """Tokens of the budget's kind for each token of the index."""
    images: tuple[int, int] | None = None
    """Samples enter as windows of [least, most] images."""
    image_tokens: int = 0
    """By how many tokens a window is at least shorter than its sample, for each image that it lacks."""


@dataclass(frozen=True)
class Packs:
    """An epoch cut into packs: pack `k` holds the places `places[bounds[k]:bounds[k + 1]]` of the epoch's order."""

    places: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, k: int) -> np.ndarray:
        return self.places[self.bounds[k] : self.bounds[k + 1]]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum of a per-place value over each pack. [packs]"""
        return np.add.reduceat(values[self.places], self.bounds[:-1]) if len(self) else np.empty(0, values.dtype)


def single_packs(total: int) -> Packs:
    """Every place by itself: no packing."""
    return Packs(np.arange(total), np.arange(total + 1))


def plan_packs(seed: int, epoch: int, lengths: np.ndarray, packing: Packing) -> Packs:
    """Packs of an epoch whose places have these `lengths`; every place is in exactly one pack.

    Best fit decreasing over a buffer of places; the least full pack of a buffer goes back into the next one, once. Packs are then
    brought into groups of similar sum of squared lengths (attention's work), and the groups into a random order, so that ranks which
    work on neighbouring packs finish together.
    """
    longest = int(lengths.max(initial=0))
    if longest > packing.budget or packing.buffer < 1 or packing.group < 1:
        raise ValueError(f"{packing} cannot hold a sample of {longest} tokens; buffer and group must be at least 1")
    packs: list[list[int]] = []
    carried: list[int] = []
    for first in range(0, len(lengths), packing.buffer):
        places = carried + list(range(first, min(first + packing.buffer, len(lengths))))
        full = _fit_buffer(lengths, places, packing.budget)
        carried = _least_full(full, carried)
        packs += [pack for pack in full if pack is not carried]
    packs += [carried] if carried else []
    return _lay_out(_balanced(seed, epoch, lengths, packs, packing.group))


def _fit_buffer(lengths: np.ndarray, places: list[int], budget: int) -> list[list[int]]:
    """Best fit decreasing; the fullest pack first."""
    room_left: list[int] = []  # ascending
    packs: list[list[int]] = []  # in step with room_left
    sizes = lengths[places].tolist()
    for size, place in sorted(zip(sizes, places, strict=True), key=lambda pair: (-pair[0], pair[1])):
        best = bisect_left(room_left, size)
        if best < len(packs):
            room, pack = room_left.pop(best) - size, packs.pop(best)
        else:
            room, pack = budget - size, []
        pack.append(place)
        at = bisect_left(room_left, room)
        room_left.insert(at, room)
        packs.insert(at, pack)
    return packs


def _least_full(packs: list[list[int]], carried: list[int]) -> list[int]:
    """The pack to carry on: the least full one of which nothing was carried before; none if there is no such pack."""
    return next((pack for pack in reversed(packs) if set(carried).isdisjoint(pack)), [])


def _balanced(seed: int, epoch: int, lengths: np.ndarray, packs: list[list[int]], group: int) -> list[list[int]]:
    """Sort by work within windows of 16 groups, then shuffle the groups of each window."""
    squares = lengths.astype(np.int64) ** 2
    work = np.array([int(squares[pack].sum()) for pack in packs])
    window = 16 * group
    shuffled: list[list[int]] = []
    for number, first in enumerate(range(0, len(packs), window)):
        by_work = first + np.argsort(work[first : first + window], kind="stable")
        groups = [by_work[start : start + group] for start in range(0, len(by_work), group)]
        for which in np.argsort(random_bits(seed, epoch, 1 << 32 | number, len(groups)), kind="stable"):
            shuffled += [packs[k] for k in groups[which]]
    return shuffled


def _lay_out(packs: list[list[int]]) -> Packs:
    bounds = np.cumsum([0] + [len(pack) for pack in packs])
    return Packs(np.array([place for pack in packs for place in sorted(pack)], np.int64), bounds)
