"""What reading costs, beside `cat`, webdataset and wids in the same run; how near the loader comes to its decoder; how full packs are;
what it takes to open a set of a million samples.

    python -m benchmarks.stream --json

CPU seconds, not wall time: they hold on a busy machine. Files are in the page cache. Each figure is the best of several rounds.
"""

import argparse
import hashlib
import io
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import measure
from laid_ds.data.dataset import Dataset
from laid_ds.data.images import Pixels, simplejpeg_equals_pil
from laid_ds.data.index import DATASET, ESTIMATE, INDEX, Row, ShardIndex, dataset_json
from laid_ds.data.order import Packing, global_order, plan_packs
from laid_ds.data.record import Sample, Turn
from laid_ds.data.slabs import empty
from laid_ds.data.stream import Stream
from laid_ds.data.tar import BLOCK, END_OF_ARCHIVE
from laid_ds.data.writer import ShardWriter

ROUNDS = 9
PIXELS = Pixels()


def photographs(count: int) -> list[bytes]:
    """JPEGs of 224 to 448 pixels a side whose spectrum falls like that of photographs."""
    rng = np.random.default_rng(0)
    return [_photograph(rng) for _ in range(count)]


def _photograph(rng: np.random.Generator) -> bytes:
    width, height = rng.integers(224, 449, 2)
    pixels = np.zeros((height, width, 3), np.float32)
    for scale in (2, 4, 8, 16, 32, 64, 128):
        noise = rng.normal(0, scale**0.85, (max(height // scale, 2), max(width // scale, 2), 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(noise[..., channel]).resize((int(width), int(height)), Image.Resampling.BICUBIC)
            pixels[..., channel] += np.asarray(layer)
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels + 128, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_set(folder: Path, megabytes: int) -> Dataset:
    """Samples of 20 to 50 photographs, 25 in a shard."""
    rng, pool = np.random.default_rng(1), photographs(200)
    written = 0
    with ShardWriter(folder, samples_per_shard=25) as writer:
        while written < megabytes << 20:
            images = tuple(pool[i] for i in rng.integers(0, len(pool), rng.integers(20, 51)))
            turns = (Turn("user", (*range(len(images)), "Which of them?"), needles=(0,)), Turn("assistant", ("The first.",)))
            writer.write(Sample(f"sample-{writer.samples_done:06d}", turns, images))
            written += sum(map(len, images))
    return Dataset.open(folder)


def length_mix(count: int = 20_000) -> np.ndarray:
    """Token counts of long image-text samples: 1 to 150 images (lognormal) of 64 to 256 tokens each."""
    rng = np.random.default_rng(2)
    images = np.clip(rng.lognormal(np.log(37), 0.71, count), 1, 150).astype(int)
    return np.array([int(rng.integers(64, 257, n).sum()) for n in images])


def cpu_seconds(work: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Least CPU time over some rounds, of this process and of children that ended."""
    return min(_cpu_seconds_once(work) for _ in range(rounds))


def _cpu_seconds_once(work: Callable[[], Any]) -> float:
    before = _cpu_clock()
    work()
    return _cpu_clock() - before


def _cpu_clock() -> float:
    usages = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def reading(dataset: Dataset, folder: Path) -> dict[str, float]:
    """CPU of one pass over all bytes, each sample's images apart."""
    paths = [str(folder / shard.name) for shard in dataset.shards]
    shuffled = global_order(0, 0, dataset.shard_sizes).tolist()
    seconds = {
        "cat": cpu_seconds(lambda: subprocess.run(["cat", *paths], stdout=subprocess.DEVNULL, check=True)),
        "random_order": cpu_seconds(lambda: _exhaust(map(dataset.parts, shuffled))),
        "sequential": cpu_seconds(lambda: _exhaust(map(dataset.parts, range(len(dataset))))),
        "whole_samples": cpu_seconds(lambda: _exhaust(map(dataset.read, shuffled))),
        "webdataset": cpu_seconds(lambda: _read_webdataset(paths), rounds=2),
    }
    if wids := _wids(folder):
        seconds["wids"] = cpu_seconds(lambda: _exhaust(_wids_parts(wids[i]) for i in range(len(dataset))), rounds=2)
    return seconds


def _exhaust(results: Iterable[Any]) -> None:
    """Take each result and let it go at once: what is kept would have to be paged in."""
    deque(results, maxlen=0)


def _read_webdataset(paths: list[str]) -> None:
    import webdataset

    for sample in webdataset.WebDataset(paths, shardshuffle=False):
        assert sample["json"]


def _wids(folder: Path):
    try:
        import wids
    except ModuleNotFoundError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return wids.ShardListDataset(str(folder / "dataset.json"), cache_dir=str(folder.parent / "wids"), keep=True, transformations=[])


def _wids_parts(sample: dict) -> list[bytes]:
    return [value.read() for value in sample.values() if hasattr(value, "read")]


def decode_batch(batch: list[tuple[int, Sample]]) -> torch.Tensor:
    """All pixels of a micro-batch, as one tensor."""
    pixels = [torch.from_numpy(np.array(PIXELS.decode(image))).flatten() for _, sample in batch for image in sample.images]
    return torch.cat(pixels, out=empty((sum(map(len, pixels)),), torch.uint8))


def loading(dataset: Dataset, samples: int) -> dict[str, float]:
    """Images per CPU second: decoding alone, from memory, and the whole loader up to pixels in the main process. The cost of starting is
    taken off, by the difference between a long and a short run."""
    batch = [(i, dataset.read(i)) for i in range(samples)]
    short = samples // 10

    def images_per_second(run: Callable[[int], None]) -> float:
        spent = cpu_seconds(lambda: run(samples), rounds=4) - cpu_seconds(lambda: run(short), rounds=4)
        return int(dataset.num_images[short:samples].sum()) / spent

    return {
        "decoder": images_per_second(lambda n: _exhaust(decode_batch([entry]) for entry in batch[:n])),
        "loader": images_per_second(lambda n: _load(dataset, n, 0)),
        "loader_1_worker": images_per_second(lambda n: _load(dataset, n, 1)),
        "loader_2_workers": images_per_second(lambda n: _load(dataset, n, 2)),
    }


def _load(dataset: Dataset, samples: int, workers: int) -> None:
    stream = Stream(dataset, micro_batch=1, rank=0, world_size=1, seed=0, shuffle="none", workers=workers, prepare=decode_batch)
    batches = iter(stream)
    for _ in range(samples):
        next(batches)
    batches.close()


def write_large_index(folder: Path, shards: int = 3906, samples: int = 256) -> Path:
    """The index of a set of a million samples in shards of about half a GB. The shards' bytes are holes: opening reads none of them."""
    rng, folder = np.random.default_rng(3), folder / "large"
    folder.mkdir()
    made = []
    for number in range(shards):
        numbers = [(int(n) for n in rng.integers(low, high, samples)) for low, high in ((20, 4000), (0, 1 << 32), (1, 150), (100, 100_000))]
        rows = [
            Row(f"sample-{number * samples + i:08d}", blocks * BLOCK, crc32, images, {ESTIMATE: tokens})
            for i, (blocks, crc32, images, tokens) in enumerate(zip(*numbers, strict=True))
        ]
        num_bytes = sum(row.num_bytes for row in rows) + len(END_OF_ARCHIVE)
        made.append(ShardIndex.of(f"shard-{number:06d}.tar", num_bytes, hashlib.sha256(str(number).encode()).hexdigest(), rows))
        with open(folder / made[-1].name, "wb") as file:
            file.truncate(num_bytes)
    index = b"".join(shard.line() for shard in made)
    (folder / INDEX).write_bytes(index)
    (folder / DATASET).write_bytes(dataset_json(made, index))
    return folder


def opening(workplace: Path) -> dict[str, float]:
    """What a process pays to open a set of a million samples: CPU seconds, memory that stays, and the most on the way."""
    found = subprocess.run([sys.executable, "-c", OPEN, write_large_index(workplace)], capture_output=True, text=True, check=True)
    return dict(zip(("open_cpu_seconds_1m", "open_mb_1m", "open_peak_mb_1m"), map(float, found.stdout.split()), strict=True))


OPEN = """
import sys, time
from pathlib import Path
from benchmarks.measure import status_mb
from laid_ds.data.dataset import Dataset

Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the present size
before, began = status_mb("VmRSS"), time.process_time()
dataset = Dataset.open(sys.argv[1])
print(time.process_time() - began, status_mb("VmRSS") - before, status_mb("VmHWM") - before)
"""


def ordering() -> dict[str, float]:
    """Time and memory of the order of a million samples in a thousand shards."""
    sizes = [1000] * 1000
    spent = min(_seconds(lambda: global_order(0, 0, sizes)) for _ in range(ROUNDS))
    tracemalloc.start()
    global_order(0, 0, sizes)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {"order_seconds_1m": spent, "order_peak_mb_1m": peak / 1e6}


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def packing() -> dict[str, float]:
    """Fill of packs, and how unequal the work of eight ranks is."""
    lengths = length_mix()
    p50, p95, longest = np.percentile(lengths, [50, 95, 100]).tolist()
    result = {"packing_length_p50": p50, "packing_length_p95": p95, "packing_length_max": longest}
    for name, budget in (("32k", 1 << 15), ("64k", 1 << 16), ("128k", 1 << 17)):
        began = time.process_time()
        packs = plan_packs(0, 0, lengths, Packing(budget))
        result[f"packing_us_per_sample_{name}"] = (time.process_time() - began) / len(lengths) * 1e6
        result[f"packing_fill_{name}"] = float(lengths.sum() / (budget * len(packs)))
        work = packs.sums(lengths.astype(np.int64) ** 2)
        steps = work[: len(work) // 8 * 8].reshape(-1, 8)
        result[f"rank_imbalance_{name}"] = float((steps.max(1) / steps.mean(1)).mean())
    return result


def run(megabytes: int, decoded_samples: int) -> dict[str, float]:
    """Every figure."""
    workplace = Path(tempfile.mkdtemp(prefix="laid-stream-"))
    try:
        dataset = write_set(workplace / "set", megabytes)
        seconds = reading(dataset, workplace / "set")
        speed = loading(dataset, min(decoded_samples, len(dataset)))
        opened = opening(workplace)
    finally:
        shutil.rmtree(workplace)
    ratios = {f"cpu_ratio_{name}_vs_cat": spent / seconds["cat"] for name, spent in seconds.items() if name not in ("cat", "sequential")}
    return {
        "cpu_ratio_vs_cat": seconds["sequential"] / seconds["cat"],
        **ratios,
        "cat_cpu_seconds": seconds["cat"],
        "decode_limit_share": speed["loader_1_worker"] / speed["decoder"],
        "decode_limit_share_2_workers": speed["loader_2_workers"] / speed["decoder"],
        "decode_limit_share_no_workers": speed["loader"] / speed["decoder"],
        "images_per_cpu_second_decoder": speed["decoder"],
        "images_per_cpu_second_loader": speed["loader_1_worker"],
        **opened,
        **packing(),
        **ordering(),
        "images": int(dataset.num_images.sum()),
        "simplejpeg": float(simplejpeg_equals_pil()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--megabytes", type=int, default=400, help="size of the set (default 400)")
    parser.add_argument("--decoded-samples", type=int, default=100, help="samples that are decoded (default 100)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = run(arguments.megabytes, arguments.decoded_samples)
    peers = {name: version(name) for name in ("numpy", "pillow", "webdataset")}
    measure.append("stream", "cpu", f"megabytes={arguments.megabytes}", figures)
    measure.show(figures | {"megabytes": arguments.megabytes, "versions": measure.versions() | peers}, arguments.json)


if __name__ == "__main__":
    main()
