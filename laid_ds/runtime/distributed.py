"""The few collective operations that the code above the engine needs. Without a process group they are the identity."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from laid_ds.sequence import ALONE, SequenceGroup

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


def sequence_group(size: int) -> SequenceGroup:
    """The `size` consecutive ranks that share this rank's batches. Collective over all ranks; size divides their number."""
    if size == 1:
        return ALONE
    assert world_size() % size == 0, (world_size(), size)
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world_size(), size)]
    own = groups[rank() // size]
    return SequenceGroup(size, rank() % size, partial(_Gather.apply, own), partial(_sum, own))


class _Gather(torch.autograd.Function):
    """What each rank of a group gives, on all of them; the gradient is the sum of what they ask of this one's."""

    @staticmethod
    def forward(ctx, group, x: Tensor) -> Tensor:
        ctx.group = group
        found = x.new_empty(dist.get_world_size(group), *x.shape)
        dist.all_gather_into_tensor(found.view(-1), x.contiguous().view(-1), group=group)
        return found

    @staticmethod
    def backward(ctx, asked: Tensor) -> tuple[None, Tensor]:
        own = asked.new_empty(asked.shape[1:])
        dist.reduce_scatter_tensor(own.view(-1), asked.contiguous().view(-1), group=ctx.group)
        return None, own


def _sum(group, x: Tensor) -> Tensor:
    added = x.detach().to(_device(), copy=True)
    dist.all_reduce(added, group=group)
    return added.to(x.device)


class Exchange(NamedTuple):
    """What the ranks sent each other."""

    backend: str
    gather_bytes_per_second: float
    """Bytes that a rank has after an all-gather, by its time: the faster of the repetitions."""
    scatter_bytes_per_second: float
    """Bytes that a rank gives into a reduce-scatter, by its time."""
    is_right: bool
    """Whether what came is what was sent."""


def exchange(num_bytes: int, repetitions: int = 3) -> Exchange:
    """All-gather and reduce-scatter of about `num_bytes` of float32, as ZeRO-3 does, timed and checked. Collective."""
    ranks, device = world_size(), _device()
    part = torch.full((max(num_bytes // 4 // ranks, 1),), float(rank() + 1), device=device)
    whole, reduced = part.new_empty(part.numel() * ranks), torch.empty_like(part)
    gather = _fastest(lambda: dist.all_gather_into_tensor(whole, part), device, repetitions)
    wanted = torch.arange(1, ranks + 1, device=device, dtype=part.dtype).repeat_interleave(part.numel())
    is_right = torch.equal(whole, wanted)
    scatter = _fastest(lambda: dist.reduce_scatter_tensor(reduced, wanted), device, repetitions)
    is_right &= torch.equal(reduced, part * ranks)
    num_bytes = 4 * whole.numel()
    return Exchange(dist.get_backend(), num_bytes / gather, num_bytes / scatter, is_right)


def _fastest(work: Any, device: torch.device, repetitions: int) -> float:
    """Seconds; the first time, in which connections are made, does not count."""
    seconds = []
    for _ in range(1 + repetitions):
        barrier()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def leave() -> None:
    """End this process's part in the group, if it has one."""
    if started():
        dist.destroy_process_group()


def _reduced(values: Iterable[float], operation: str) -> list[float]:
    tensor = torch.tensor(list(values), dtype=torch.float64)
    if started():
        tensor = tensor.to(_device())
        dist.all_reduce(tensor, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[operation])
    return tensor.tolist()


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
