"""Do the ranks meet, is what they send right, and how fast is it?"""

from __future__ import annotations

import torch

from laid_ds.doctor.line import OK, SLOW, WRONG, Line, rate
from laid_ds.runtime import distributed

BYTES = {"cuda": 256 << 20, "cpu": 16 << 20}
SLOW_BYTES_PER_SECOND = {"cuda": 5e9, "cpu": 50e6}


def messages(device: torch.device) -> Line:
    """All-gather and reduce-scatter over all ranks, which is what ZeRO-3 does with every layer. Collective."""
    found, ranks = distributed.exchange(BYTES[device.type]), distributed.world_size()
    slowest = min(found.gather_bytes_per_second, found.scatter_bytes_per_second)
    numbers = {
        "ranks": ranks,
        "backend": found.backend,
        "all_gather_bytes_per_second": found.gather_bytes_per_second,
        "reduce_scatter_bytes_per_second": found.scatter_bytes_per_second,
    }
    said = f"{found.backend}: all-gather {rate(found.gather_bytes_per_second)}, reduce-scatter {rate(found.scatter_bytes_per_second)}"
    if not found.is_right:
        return Line(
            "messages", WRONG, f"{said}: what came is not what was sent", "try NCCL_P2P_DISABLE=1; a card or a link may be bad", numbers
        )
    if ranks > 1 and slowest < SLOW_BYTES_PER_SECOND[device.type]:
        return Line("messages", SLOW, said, "NCCL_DEBUG=INFO says which way they take; between nodes, is it the fast network?", numbers)
    return Line("messages", OK, said, "" if ranks > 1 else "one rank sends to itself; --ranks N tries more", numbers)
