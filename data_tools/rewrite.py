"""Write samples that exist into new shards: other sizes, several sets as one, one set as several, another order."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.console import track
from laid_ds.data.dataset import Dataset
from laid_ds.data.index import DATASET
from laid_ds.data.order import permutation
from laid_ds.data.record import DataError
from laid_ds.data.writer import ShardWriter


def rewrite(
    dataset: Dataset, indices: Sequence[int], out: Path, *, samples_per_shard: int, bytes_per_shard: int, resume: bool = False
) -> dict[str, Any]:
    """These samples, in this order, into new shards. Their records and images stay as they are, byte for byte."""
    if not (resume and (out / DATASET).exists()):
        with ShardWriter(out, samples_per_shard=samples_per_shard, bytes_per_shard=bytes_per_shard, resume=resume) as writer:
            _refuse_other(dataset, indices, [key.decode() for shard in writer.shards for key in shard.keys.tolist()], out)
            for i in track(indices[writer.samples_done :], f"write {out.name}"):
                writer.write(dataset.read(int(i)))
    written = Dataset.open(out)
    _refuse_other(dataset, indices, written.keys.astype(str).tolist(), out)
    return {"folder": str(out), "shards": len(written.shards), "samples": len(written)}


def _refuse_other(dataset: Dataset, indices: Sequence[int], keys: list[str], out: Path) -> None:
    """What an interrupted run left must be the beginning of what is asked for now."""
    if dataset.keys[np.asarray(indices[: len(keys)], np.int64)].astype(str).tolist() != keys:
        raise DataError(f"{out} holds other samples than those asked for now")


def within(dataset: Dataset, tokens: str, max_tokens: int | None) -> np.ndarray:
    """Indices of the samples that are short enough."""
    if max_tokens is None:
        return np.arange(len(dataset))
    return np.flatnonzero(dataset.token_counts(tokens) <= max_tokens)


def shuffled(dataset: Dataset, seed: int) -> np.ndarray:
    """A random order of all samples."""
    return permutation(seed, 0, 0, len(dataset))


def split_parts(dataset: Dataset, shares: str, seed: int) -> dict[str, np.ndarray]:
    """ "train=0.9,val=0.1" as indices: a random split whose parts keep the order of the set. Shares are exact to one sample."""
    parts = dict(re.findall(r"([A-Za-z0-9_-]+)=([0-9.]+)(?:,|$)", shares))
    if ",".join(f"{name}={share}" for name, share in parts.items()) != shares or not parts:
        raise ValueError(f"shares {shares!r} are not of the form train=0.9,val=0.1")
    weights = np.array([float(share) for share in parts.values()])
    if abs(weights.sum() - 1) > 1e-6:
        raise ValueError(f"shares {shares!r} sum to {weights.sum():g}, not 1")
    bounds = np.rint(np.cumsum(weights) * len(dataset)).astype(int)
    order = shuffled(dataset, seed)
    return {name: np.sort(part) for name, part in zip(parts, np.split(order, bounds[:-1]), strict=True)}
