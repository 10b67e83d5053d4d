"""What is in a data set: info, stats, and the plan of an epoch."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_tools.console import track
from laid_ds.data.dataset import Dataset
from laid_ds.data.haystack import why_whole
from laid_ds.data.order import Packing
from laid_ds.data.stream import Stream


def info(folders: list[str]) -> dict[str, Any]:
    """What the index says."""
    dataset = Dataset.open(folders)
    names = set.intersection(*(set(shard.tokens) for shard in dataset.shards))
    return {
        "samples": len(dataset),
        "shards": len(dataset.shards),
        "bytes": sum(shard.num_bytes for shard in dataset.shards),
        "images": int(dataset.num_images.sum()),
        "estimated_tokens": int(dataset.lengths.sum()),
        "token_counts": sorted(names),
        "fingerprint": dataset.fingerprint,
        "samples_per_shard": _spread(dataset.shard_sizes),
    }


def stats(folders: list[str], tokens: str) -> dict[str, Any]:
    """Histograms of lengths and image counts, and what the records say of themselves."""
    dataset = Dataset.open(folders)
    lengths = dataset.token_counts(tokens)
    counts: dict[str, Counter] = {name: Counter() for name in ("source", "licence", "format", "questions", "needles", "pixels", "windows")}
    for i in track(range(len(dataset)), "read records"):
        record = dataset.record(i)
        counts["source"][record.source or "not stated"] += 1
        counts["licence"][record.licence or "not stated"] += 1
        counts["windows"][(why_whole(record) or "allowed").partition(" (")[0]] += 1
        questions = [turn for turn in record.turns if turn.role == "user"]
        counts["questions"][len(questions)] += 1
        counts["needles"].update(len(turn.needles) for turn in questions)
        counts["format"].update(image.fmt for image in record.images)
        counts["pixels"].update(2 ** int(image.width * image.height).bit_length() for image in record.images)
    return {
        "samples": len(dataset),
        "tokens": _spread(lengths),
        "tokens_histogram": _histogram(lengths),
        "images": _spread(dataset.num_images),
        "images_histogram": _histogram(dataset.num_images),
        "sources": dict(counts["source"].most_common()),
        "licences": dict(counts["licence"].most_common()),
        "image_formats": dict(counts["format"].most_common()),
        "windows": dict(counts["windows"].most_common()),
        "image_pixels_below": _by_number(counts["pixels"]),
        "questions_per_sample": _by_number(counts["questions"]),
        "needles_per_question": _by_number(counts["needles"]),
    }


@dataclass(frozen=True)
class Layout:
    """How an epoch is laid out over ranks."""

    world_size: int = 1
    micro_batch: int = 1
    budget: int | None = None
    """Tokens of a pack; without it nothing is packed."""
    group: int = 8
    seed: int = 0
    epoch: int = 0
    shuffle: str = "full"
    """full, none, or a window in samples."""
    weights: str | None = None
    """One for each folder, as "0.7,0.3"."""
    tokens: str = "estimate"

    def stream(self, dataset: Dataset) -> Stream:
        """The first rank's stream, whose slots are those of all ranks."""
        return Stream(
            dataset,
            micro_batch=self.micro_batch,
            rank=0,
            world_size=self.world_size,
            seed=self.seed,
            shuffle=int(self.shuffle) if self.shuffle.isdecimal() else self.shuffle,
            packing=Packing(self.budget, group=self.group, tokens=self.tokens) if self.budget else None,
            weights=_weights(self.weights) if self.weights else None,
            prepare=list,
        )


def plan(folders: list[str], layout: Layout) -> dict[str, Any]:
    """What one epoch will be: steps, fill, balance over ranks, and its first global positions."""
    dataset = Dataset.open(folders)
    slots = layout.stream(dataset).epoch_slots(layout.epoch)
    lengths = dataset.token_counts(layout.tokens)
    slot_tokens = np.array([sum(int(lengths[index]) for _, index in slot) for slot in slots])
    slot_work = np.array([sum(int(lengths[index]) ** 2 for _, index in slot) for slot in slots], np.float64)
    step = layout.world_size * layout.micro_batch
    room = layout.budget or int(lengths.max())
    return {
        "samples": sum(len(slot) for slot in slots),
        "packs" if layout.budget else "slots": len(slots),
        "micro_steps_per_epoch": len(slots) / step,
        "tokens": int(slot_tokens.sum()),
        "fill": float(slot_tokens.sum() / (room * len(slots))),
        "rank_imbalance": _imbalance(slot_work, layout.world_size, layout.micro_batch),
        "first": [{"position": position, "key": dataset.keys[index].decode()} for slot in slots[:4] for position, index in slot][:8],
    }


def _weights(text: str) -> list[float]:
    try:
        weights = [float(weight) for weight in text.split(",")]
    except ValueError:
        weights = []
    if not weights or not all(0 < weight < np.inf for weight in weights):
        raise ValueError(f"--weights {text!r}: give one number above 0 for each folder, as 0.7,0.3")
    return weights


def _imbalance(work: np.ndarray, world_size: int, micro_batch: int) -> float:
    """Mean over micro-steps of (work of the busiest rank / mean work): what waiting for each other costs."""
    steps = len(work) // (world_size * micro_batch)
    if steps == 0:
        return 1.0
    ranks = work[: steps * world_size * micro_batch].reshape(steps, world_size, micro_batch).sum(2)
    return float((ranks.max(1) / ranks.mean(1)).mean())


def _spread(values: np.ndarray) -> dict[str, float]:
    p50, p95 = np.percentile(values, [50, 95])
    return {"min": int(values.min()), "p50": float(p50), "mean": float(values.mean()), "p95": float(p95), "max": int(values.max())}


def _histogram(values: np.ndarray) -> dict[str, int]:
    """Counts in powers of two: "below 8" holds 4 to 7."""
    edges = np.array([int(value).bit_length() for value in values])
    return {f"below {2**edge}": int((edges == edge).sum()) for edge in range(edges.min(), edges.max() + 1)}


def _by_number(counts: Counter) -> dict[str, int]:
    return {str(number): counts[number] for number in sorted(counts)}
