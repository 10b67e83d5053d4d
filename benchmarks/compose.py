"""What composing haystacks costs: 1,000 samples of 20 images from 5,000 pictures, beside what no way of doing it can save.

    python -m benchmarks.compose --json

CPU seconds of the process and its threads. The floor decodes each picture once, reads the bytes of all images of the samples, and writes
them with the sums that shards hold (sha256, crc32).
"""

import argparse
import hashlib
import json
import tempfile
import time
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from benchmarks import measure
from benchmarks.stream import photographs
from data_tools.compose.compose import Compose, compose
from laid_ds.data.images import Pixels

DIFFERENT = 250  # photographs; the rest are the same pixels under other bytes
WORDS = "person bicycle car dog cat horse sheep cow bus train truck boat bench bird bottle cup fork chair sofa pizza"
CLASSES = WORDS.split()


def write_pictures(folder: Path, pictures: int) -> Path:
    """JPEGs under `folder`/pictures, and an instances file of them."""
    (folder / "pictures").mkdir()
    rng, made = np.random.default_rng(0), photographs(min(DIFFERENT, pictures))
    images, annotations = [], []
    for number in range(pictures):
        name = f"{number:06d}.jpg"
        (folder / "pictures" / name).write_bytes(made[number % len(made)] + number.to_bytes(4))
        images.append({"id": number, "file_name": name})
        shown = rng.choice(len(CLASSES), rng.integers(1, 5), replace=False)
        annotations += [{"id": len(annotations) + i, "image_id": number, "category_id": int(kind)} for i, kind in enumerate(shown)]
    tree = {"images": images, "annotations": annotations, "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES)]}
    (folder / "instances.json").write_text(json.dumps(tree))
    return folder / "instances.json"


def floor(folder: Path, samples: int, images: int) -> None:
    """Decode each picture once; copy as many as the samples hold, with their sums."""
    paths, pixels = sorted((folder / "pictures").iterdir()), Pixels(decoder="pil")
    for path in paths:
        pixels.decode(path.read_bytes())
    digest = hashlib.sha256()
    with open(folder / "floor", "wb") as file:
        for number in range(samples * images):
            data = paths[number % len(paths)].read_bytes()
            zlib.crc32(data)
            digest.update(data)
            file.write(data)


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def run(samples: int, images: int, pictures: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        instances = write_pictures(folder, pictures)
        plan = Compose("vhs", (instances,), folder / "pictures", folder / "set", samples=samples, size=(images, images))
        least = cpu_seconds(lambda: floor(folder, samples, images))
        composing = cpu_seconds(lambda: compose(plan))
    return {"cpu_seconds": composing, "cpu_seconds_floor": least, "ratio": composing / least}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=5000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = run(arguments.samples, arguments.images, arguments.pictures)
    case = f"samples={arguments.samples} images={arguments.images} pictures={arguments.pictures}"
    measure.append("compose", "cpu", case, figures)
    measure.show(figures | {"case": {"of": case}, "versions": measure.versions() | {"pillow": version("pillow")}}, arguments.json)


if __name__ == "__main__":
    main()
