"""Drafts become shards: bytes are copied, and a data set appears whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.compose.draw import Draft
from data_tools.compose.pool import Picture
from data_tools.console import track
from laid_ds.data.dataset import Dataset
from laid_ds.data.record import DataError, Sample, Turn
from laid_ds.data.writer import ShardWriter

Facts = Mapping[str, Any]
"""`source`, `licence` of each sample, and what more of it."""


def sample_of(draft: Draft, read: Callable[[Picture], bytes], facts: Facts) -> Sample:
    """The sample: all images, then the questions as turns, each with its needle and its choices."""
    turns: list[Turn] = []
    for question in draft.questions:
        lead = () if turns else tuple(range(len(draft.pictures)))
        turns.append(Turn("user", (*lead, question.text), needles=(question.needle,), choices=question.choices))
        turns.append(Turn("assistant", (question.answer,)))
    return Sample(draft.key, tuple(turns), tuple(read(picture) for picture in draft.pictures), **facts)


def write(drafts: Sequence[Draft], read: Callable[[Picture], bytes], facts: Callable[[Draft], Facts], folder: Path, label: str) -> Dataset:
    """The data set of these haystacks in a new folder."""
    with ShardWriter(folder, samples_per_shard=256) as writer:
        for draft in track(drafts, label, len(drafts)):
            writer.write(sample_of(draft, read, facts(draft)))
    return Dataset.open(folder)


def as_read(read: Callable[[Picture], bytes]) -> Callable[[Picture], bytes]:
    """The reader, which refuses a file that has changed since the pool was made."""

    def unchanged(picture: Picture) -> bytes:
        data = read(picture)
        if hashlib.sha256(data).hexdigest() != picture.digest:
            raise DataError(f"image {picture.name!r} has changed since this command began; start it again")
        return data

    return unchanged
