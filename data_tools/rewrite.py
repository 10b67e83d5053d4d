"""Write samples that exist into new shards: other sizes, several sets as one, one set as several, another order."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.console import track
from laid_ds.data.dataset import Dataset
from laid_ds.data.index import DATASET, INDEX
from laid_ds.data.order import permutation
from laid_ds.data.record import DataError
from laid_ds.data.writer import ShardWriter


@dataclass(frozen=True)
class Bounds:
    """How large shards become, and whether an interrupted run goes on."""

    samples: int = 256
    megabytes: int = 512
    resume: bool = False


def reshard(folder: str, out: Path, bounds: Bounds, tokens: str = "estimate", max_tokens: int | None = None) -> dict[str, Any]:
    """The same samples in other shards, without those that are longer than `max_tokens`."""
    dataset = Dataset.open(folder)
    counts = dataset.token_counts(tokens) if max_tokens is not None else None
    kept = np.arange(len(dataset)) if counts is None else np.flatnonzero(counts <= max_tokens)
    if not len(kept):
        raise ValueError(f"--max-tokens {max_tokens} leaves no sample of {folder}, whose shortest has {counts.min()} tokens")
    return {**_rewrite(dataset, kept, out, bounds), "left_out": len(dataset) - len(kept)}


def merge(folders: list[str], out: Path, bounds: Bounds) -> dict[str, Any]:
    """Several data sets, one after the other, as one."""
    dataset = Dataset.open(folders)
    return _rewrite(dataset, range(len(dataset)), out, bounds)


def split(folder: str, out: Path, bounds: Bounds, shares: str, seed: int) -> dict[str, Any]:
    """One data set as several, one folder each under `out`."""
    dataset = Dataset.open(folder)
    parts = _parts(len(dataset), shares, seed)
    if not bounds.resume and (there := next((out / name for name in parts if (out / name / INDEX).exists()), None)):
        raise ValueError(f"{there} already holds a data set; choose another folder, remove it, or go on with --resume")
    return {name: _rewrite(dataset, part, out / name, bounds) for name, part in parts.items()}


def shuffle(folder: str, out: Path, bounds: Bounds, seed: int) -> dict[str, Any]:
    """The samples in a random order."""
    dataset = Dataset.open(folder)
    return _rewrite(dataset, permutation(seed, 0, 0, len(dataset)), out, bounds)


def _rewrite(dataset: Dataset, indices: Sequence[int], out: Path, bounds: Bounds) -> dict[str, Any]:
    """These samples, in this order, into new shards. Their records and images stay as they are, byte for byte."""
    if not (bounds.resume and (out / DATASET).exists()):
        sizes = {"samples_per_shard": bounds.samples, "bytes_per_shard": bounds.megabytes << 20}
        with ShardWriter(out, **sizes, resume=bounds.resume) as writer:
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


def _parts(num_samples: int, shares: str, seed: int) -> dict[str, np.ndarray]:
    """ "train=0.9,val=0.1" as indices: a random split whose parts keep the order of the set. Shares are exact to one sample."""
    parts = dict(re.findall(r"([A-Za-z0-9_-]+)=([0-9]+\.?[0-9]*|\.[0-9]+)(?:,|$)", shares))
    if ",".join(f"{name}={share}" for name, share in parts.items()) != shares or not parts:
        raise ValueError(f"shares {shares!r} are not of the form train=0.9,val=0.1")
    weights = np.array([float(share) for share in parts.values()])
    if abs(weights.sum() - 1) > 1e-6:
        raise ValueError(f"shares {shares!r} sum to {weights.sum():g}, not 1")
    bounds = np.rint(np.cumsum(weights) * num_samples).astype(int)
    order = permutation(seed, 0, 0, num_samples)
    found = {name: np.sort(part) for name, part in zip(parts, np.split(order, bounds[:-1]), strict=True)}
    if empty := next((name for name, part in found.items() if not len(part)), None):
        raise ValueError(f"the share {empty}={parts[empty]} of {num_samples} samples is none; give it more")
    return found
