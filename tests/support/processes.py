"""Real ranks for a test: processes forked from a server that has imported the heavy libraries once."""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "transformers", "accelerate", "deepspeed", "laid_ds.run.loop"])


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
