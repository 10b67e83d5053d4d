"""Real ranks for a test: processes forked from a server that has imported the heavy libraries once."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import socket
import subprocess
import time
import traceback
from collections.abc import Callable
from typing import Any

import psutil
import torch

HANG_SECONDS = 900
"""A wait of so long is a hang. It guards against one and nothing else: no test comes near it, on a busy machine either."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "transformers", "accelerate", "deepspeed", "laid_ds.run.loop"])


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a state, however long the machine takes."""
    end = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < end, f"waited {HANG_SECONDS} s for {what}"
        time.sleep(0.02)


def output_of(process: subprocess.Popen) -> str:
    """What a process that leads a session of its own says until it ends. One that hangs is killed with all that it started."""
    try:
        return process.communicate(timeout=HANG_SECONDS)[0]
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def interrupted(process: subprocess.Popen, is_under_way: Callable[[], bool]) -> str:
    """Ctrl-C for a command that has started ranks, once they are under way; what it said. None of its processes is left."""
    wait_until(lambda: is_under_way() or process.poll() is not None, "the first step")
    assert process.poll() is None, output_of(process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    said = output_of(process)
    assert not psutil.wait_procs(children, timeout=HANG_SECONDS)[1]
    return said


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(number: int, function: Callable[..., Any], *arguments: Any) -> tuple[list[Any], Any]:
    """(processes, queue of (rank, ok, result)) of `number` ranks that run function(*arguments) with a launcher's environment."""
    queue, port = _context.SimpleQueue(), free_port()
    processes = [_context.Process(target=_rank, args=(rank, number, port, queue, function, arguments)) for rank in range(number)]
    for process in processes:
        process.start()
    return processes, queue


def run_ranks(number: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What function(*arguments) returns on each rank. A failing rank fails the test with its traceback."""
    processes, queue = start_ranks(number, function, *arguments)
    results: dict[int, Any] = {}
    failures = []
    while len(results) + len(failures) < number and not failures:
        rank, ok, result = queue.get()
        if ok:
            results[rank] = torch.load(io.BytesIO(result), weights_only=False)
        else:
            failures.append(f"rank {rank}:\n{result}")
    for process in processes:
        if failures:
            process.kill()
        process.join()
    assert not failures, "\n".join(failures)
    return [results[rank] for rank in range(number)]


def _rank(rank: int, number: int, port: int, queue, function, arguments) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(number),
        LOCAL_WORLD_SIZE=str(number),
        LOCAL_SIZE=str(number),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
    )
    try:
        result = io.BytesIO()
        torch.save(function(*arguments), result)  # tensors sent as they are would need this process to stay alive
        queue.put((rank, True, result.getvalue()))
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
