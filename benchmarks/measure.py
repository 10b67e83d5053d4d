"""How the benchmarks measure: CPU seconds of one thread, peak memory in a process of its own, versions, one row per result."""

from __future__ import annotations

import csv
import datetime
import json
import multiprocessing
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

import torch

RESULTS = Path(__file__).with_name("results.csv")
FIELDS = ["date", "commit", "benchmark", "device", "case", "metric", "value", "versions"]


def cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median CPU seconds of `work` over `repeats` runs after one to warm up; the process should have one thread."""
    work()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def added_peak_mb(prepare: Callable, work: Callable, *arguments: object) -> float:
    """Megabytes that work(prepare(*arguments)) adds to the peak memory of a fresh process, beyond what `prepare` left it with."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measure_peak, args=(send, prepare, work, arguments))
    process.start()
    send.close()
    peak = receive.recv()
    process.join()
    return peak


def _measure_peak(send, prepare: Callable, work: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    prepared = prepare(*arguments)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the present size
    before = status_mb("VmRSS")
    work(prepared)
    send.send(status_mb("VmHWM") - before)


def status_mb(field: str) -> float:
    """A size in megabytes from /proc/self/status; ru_maxrss would be inherited from the parent process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def gpu(work: Callable[[], object], repeats: int) -> dict[str, float]:
    """Milliseconds at the 20th, 50th and 80th percentile of `repeats` runs after two to warm up, and added peak megabytes."""
    work(), work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    low, middle, high = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    added = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {"ms_p20": low, "ms_p50": middle, "ms_p80": high, "added_peak_mb": added}


def versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """What a figure depends on besides the code: Python, torch and the packages named."""
    gpu_name = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if torch.cuda.is_available() else {}
    named = {name: metadata.version(name) for name in packages}
    return {"python": platform.python_version(), "torch": torch.__version__} | named | gpu_name


def is_installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def show(figures: dict, as_json: bool) -> None:
    """Print one JSON object, or one line per figure."""
    if as_json:
        print(json.dumps(figures))
    else:
        print("\n".join(f"{name:24} {value if isinstance(value, dict) else f'{value:.4g}'}" for name, value in figures.items()))


def commit() -> str:
    """The short hash of HEAD, with + if the tree has changes; "none" outside a repository or before its first commit."""
    git = ["git", "-C", str(RESULTS.parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout.strip()
    return head.stdout.strip() + "+" * bool(changed) if head.returncode == 0 else "none"


def append(benchmark: str, device: str, case: str, figures: dict[str, float], packages: Iterable[str] = ()) -> None:
    """One row of results.csv per figure."""
    fresh = not RESULTS.exists()
    date, head, software = datetime.date.today().isoformat(), commit(), json.dumps(versions(packages))
    with RESULTS.open("a", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        if fresh:
            rows.writerow(FIELDS)
        rows.writerows([date, head, benchmark, device, case, name, f"{value:.4g}", software] for name, value in figures.items())
