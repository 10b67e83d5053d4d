"""Tensors travel from data workers to the trainer in slabs of shared memory that are used again and again.

Fresh shared memory, PyTorch's way, costs about 30 times as much (each page must be made, cleared and mapped), as much as decoding the
images, and it lives in /dev/shm, which containers keep small.
"""

import io
import math
import mmap
import pickle
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

SLAB_BYTES = 1 << 30  # address space for the tensors of one micro-batch; memory is taken only as far as it is used


@dataclass(frozen=True)
class Parcel:
    """What a worker made: pickled, with its tensors in a slab, or as it is where no slab was free."""

    content: Any
    slab: int | None


class Slabs:
    """The trainer's side: hands slabs out with the tasks, and takes one back when the last tensor in it is gone."""

    def __init__(self, count: int):
        self.memory = [mmap.mmap(-1, SLAB_BYTES) for _ in range(count)]
        self.free = list(range(count))

    def take(self) -> int | None:
        """A free slab, or None while the trainer holds on to many micro-batches."""
        return self.free.pop() if self.free else None

    def open(self, parcel: Parcel) -> Any:
        """The content of a parcel. Its tensors are views of the slab."""
        if parcel.slab is None:
            return parcel.content
        room = memoryview(self.memory[parcel.slab])
        weakref.finalize(room, self.free.append, parcel.slab)
        return _Unpacker(io.BytesIO(parcel.content), room).load()


class _Room:
    """A slab while a worker fills it."""

    def __init__(self, slab: mmap.mmap):
        self.memory, self.used = torch.frombuffer(slab, dtype=torch.uint8), 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
        """Memory for a tensor, or None if that much is not left."""
        first, num_bytes = self.used, math.prod(shape) * dtype.itemsize
        if not num_bytes or first + num_bytes > SLAB_BYTES:
            return None
        self.used = first + num_bytes + -num_bytes % 64
        return self.memory[first : first + num_bytes].view(dtype).view(tuple(shape))

    def place(self, tensor: torch.Tensor) -> int | None:
        """Where in the slab the tensor lies, if it does."""
        first = tensor.data_ptr() - self.memory.data_ptr()
        return first if tensor.is_contiguous() and 0 <= first < SLAB_BYTES else None


_room: _Room | None = None  # of the micro-batch that this worker is preparing


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """`torch.empty` for what `prepare` returns: in a worker it is memory that goes to the trainer as it is, so that a large result is not
    copied once more."""
    shared = _room.take(shape, dtype) if _room is not None else None
    return torch.empty(tuple(shape), dtype=dtype) if shared is None else shared


class Sender:
    """The worker's side: makes of each task what `make` does, with the tensors in the slab that came with the task."""

    def __init__(self, make: Callable[[Any], Any], memory: list[mmap.mmap]):
        self.make, self.memory = make, memory

    def __getitem__(self, task: tuple[Any, int | None]) -> Parcel:
        global _room
        what, slab = task
        _room = None if slab is None else _Room(self.memory[slab])
        made = self.make(what)
        if _room is None:
            return Parcel(made, None)
        text = io.BytesIO()
        _Packer(text, _room).dump(made)
        return Parcel(text.getvalue(), slab)


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, room: _Room):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.room = room

    def persistent_id(self, obj: Any) -> tuple | None:
        if type(obj) is not torch.Tensor or obj.layout != torch.strided or obj.device.type != "cpu" or not obj.numel():
            return None
        first = self.room.place(obj)
        if first is None:
            shared = self.room.take(obj.shape, obj.dtype)
            if shared is None:
                return None
            first = self.room.place(shared.copy_(obj.detach()))
        return first, obj.nbytes, obj.dtype, tuple(obj.shape)


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, room: memoryview):
        super().__init__(file)
        self.room = torch.frombuffer(room, dtype=torch.uint8)

    def persistent_load(self, pid: tuple) -> torch.Tensor:
        first, num_bytes, dtype, shape = pid
        return self.room[first : first + num_bytes].view(dtype).reshape(shape)
