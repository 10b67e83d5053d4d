"""Small samples and data sets made of random pictures."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from laid_ds.data.dataset import Dataset
from laid_ds.data.record import Sample, Turn
from laid_ds.data.writer import ShardWriter


def picture(seed: int, fmt: str = "JPEG", width: int = 24, height: int = 18) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, fmt)
    return file.getvalue()


def make_sample(number: int, num_images: int = 2, text: str = "which one?") -> Sample:
    fmt = ("JPEG", "PNG", "WEBP")[number % 3]
    return Sample(
        key=f"sample-{number:05d}",
        turns=(
            Turn("user", (*range(num_images), text), needles=tuple(range(num_images))[-1:], choices=("yes", "no")),
            Turn("assistant", ("yes",)),
        ),
        images=tuple(picture(1000 * number + i, fmt) for i in range(num_images)),
        source="random pixels",
        licence="CC0-1.0",
        meta={"number": number},
    )


def write_dataset(folder: Path, samples, **options) -> Dataset:
    with ShardWriter(folder, **options) as writer:
        for sample in samples:
            writer.write(sample)
    return Dataset.open(folder)
