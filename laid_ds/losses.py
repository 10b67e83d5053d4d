"""Losses at the head (Paper, Eq. 8): cross-entropy on the answers and KL to the teacher, as sums with counts.

Every term of a run is a sum and a count. Sums are added over the micro-batches of an optimizer step, counts are added over micro-batches
and ranks before the first backward, and each sum is divided once: accumulation and world size change nothing.

Letters: R supervised rows, C hidden size, V vocabulary (cut to the tokenizer's real length).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

TERMS = ("align", "match", "kl", "sft")


def head_losses(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    vocabulary: int,
    teacher_logits: Tensor | None = None,
    temperature: float = 1.0,
    chunks: int = 1,
) -> dict[str, Tensor]:
    """Sums over rows of cross-entropy ("sft") and of temperature^2 KL(teacher || student) ("kl").

    hidden [R, C], labels [R], teacher_logits [R, V] without gradient or None. `head` maps [r, C] to logits [r, >= V]; columns from V on
    are dropped, so the distribution is renormalised over the shared vocabulary. The head runs on `chunks` slices of the rows and again in
    the backward pass, so that [R, V] never exists; under ZeRO-3 every rank must give the same number of chunks. Returns fp32 scalars.
    """

    def sums(rows: Tensor, row_labels: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = head(rows)[:, :vocabulary].float()
        sft = F.cross_entropy(logits, row_labels, reduction="sum")
        if teacher is None:
            return sft, sft.new_zeros(())
        student_log = F.log_softmax(logits / temperature, -1)
        teacher_log = F.log_softmax(teacher.float() / temperature, -1)
        return sft, temperature**2 * F.kl_div(student_log, teacher_log, reduction="sum", log_target=True)

    slices = zip(
        hidden.tensor_split(chunks),
        labels.tensor_split(chunks),
        teacher_logits.tensor_split(chunks) if teacher_logits is not None else [None] * chunks,
        strict=True,
    )
    parts = [checkpoint(sums, *part, use_reentrant=False) for part in slices]
    sft, kl = (torch.stack(column).sum() for column in zip(*parts, strict=True))
    return {"sft": sft} if teacher_logits is None else {"sft": sft, "kl": kl}


def head_chunks(most_rows: int, rows_per_chunk: int) -> int:
    """Chunks of the head that stay under rows_per_chunk. most_rows is that of the fullest rank: ZeRO-3 gathers the head for each chunk."""
    return max(1, -(-most_rows // rows_per_chunk))


def weighted_mean(sums: dict[str, Tensor], counts: dict[str, float], weights: dict[str, float]) -> Tensor:
    """The loss: over terms with a positive weight, weight x sum / count. Counts are those of the whole optimizer step and all ranks."""
    terms = [weights[name] * total / counts[name] for name, total in sums.items() if weights[name] > 0]
    return torch.stack(terms).sum()
