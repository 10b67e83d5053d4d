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
from collections.abc import Callable
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
    before = _status_mb("VmRSS")
    work(prepared)
    send.send(_status_mb("VmHWM") - before)


def _status_mb(field: str) -> float:
    """A size in megabytes from /proc/self/status; ru_maxrss would be inherited from the parent process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def versions() -> dict[str, str]:
    """What a figure depends on besides the code."""
    return {"python": platform.python_version(), "torch": torch.__version__}


def commit() -> str:
    """The short hash of HEAD, with + if the tree has changes; "none" outside a repository or before its first commit."""
    git = ["git", "-C", str(RESULTS.parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout.strip()
    return head.stdout.strip() + "+" * bool(changed) if head.returncode == 0 else "none"


def append(benchmark: str, device: str, case: str, figures: dict[str, float]) -> None:
    """One row of results.csv per figure."""
    fresh = not RESULTS.exists()
    date, head, software = datetime.date.today().isoformat(), commit(), json.dumps(versions())
    with RESULTS.open("a", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        if fresh:
            rows.writerow(FIELDS)
        rows.writerows([date, head, benchmark, device, case, name, f"{value:.4g}", software] for name, value in figures.items())
