"""The few collective operations that the code above the engine needs. Without a process group they are the identity."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def started() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if started() else 0


def world_size() -> int:
    return dist.get_world_size() if started() else 1


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an operation failed because another rank's process is gone or does not answer."""
    return any(sign in str(error) for sign in ("onnection closed by peer", "onnection reset by peer", "Broken pipe", "imed out"))


def barrier() -> None:
    if started():
        dist.barrier()


def add(values: Iterable[float]) -> list[float]:
    """Sum of each value over all ranks (fp64: token counts stay exact)."""
    return _reduced(values, "sum")


def largest(values: Iterable[float]) -> list[float]:
    """Maximum of each value over all ranks."""
    return _reduced(values, "max")


def gathered(value: Any) -> list[Any]:
    """`value` (anything that can be pickled) of every rank, on every rank."""
    if not started():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_rank_0(act: Callable[[], T]) -> T | None:
    """act() on rank 0, while the others wait; what it returns there, None on them. A ValueError of it is raised on every rank."""
    result, failure = None, None
    if rank() == 0:
        try:
            result = act()
        except ValueError as error:
            failure = error
    (failed,) = largest([float(failure is not None)])
    if failure is not None:
        raise failure
    if failed:
        raise ValueError("refused by rank 0, which says why")
    return result


def _reduced(values: Iterable[float], operation: str) -> list[float]:
    tensor = torch.tensor(list(values), dtype=torch.float64)
    if started():
        tensor = tensor.to(_device())
        dist.all_reduce(tensor, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[operation])
    return tensor.tolist()


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
