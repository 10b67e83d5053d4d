"""One batch element's attention, a chunk of query rows at a time, under grouped-query attention: what the chunked kernels share.

Letters: H query heads, K key heads, T query rows, S keys, D head dim; U the heads in use, C rows of a chunk, n keys it sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from laid_ds.kernels.visible import Hidden, hidden, hide_

LOG2E = math.log2(math.e)
SCRATCH_BYTES = {"cpu": 24 * 2**20, "cuda": 512 * 2**20}  # on a CPU the scratch should stay in the cache


def log_(x: Tensor) -> Tensor:
    """The natural logarithm in place. For one CPU thread NumPy's, which takes 0.4 of the time of torch's on float32."""
    if x.device.type == "cpu" and torch.get_num_threads() == 1:
        np.log(x.numpy(), out=x.numpy())
        return x
    return x.log_()


def rows_that_fit(row_bytes: int, query: Tensor) -> int:
    """Rows of query [B, H, T, D] whose score buffers fit the device's scratch budget, at least 16 and at most 256 or T."""
    budget = SCRATCH_BYTES.get(query.device.type, SCRATCH_BYTES["cpu"])
    return min(max(budget // row_bytes, 16), 256, query.shape[2])


class Attention:
    """Scores, probabilities and gradients of chunks of rows; all arithmetic in `dtype`, all large results written where the caller says."""

    def __init__(
        self,
        query: Tensor,  # [H, T, D]
        key: Tensor,  # [K, S, D]
        scale: float,
        first: Tensor,  # [T] on the CPU: the first key each row sees; the last is row + query_offset
        query_offset: int,
        dtype: torch.dtype,
        lse: Tensor | None = None,  # [H, T]
        heads: Tensor | None = None,  # [U] sorted, on the CPU: the heads in use, default all
    ) -> None:
        self.query, self.key, self.scale, self.first, self.offset, self.lse = query, key.to(dtype), scale, first, query_offset, lse
        self.heads = torch.arange(len(query)) if heads is None else heads
        key_heads, sizes = (self.heads // (len(query) // len(key))).unique_consecutive(return_counts=True)
        ends = sizes.cumsum(0)
        self.groups = list(zip(key_heads.tolist(), (ends - sizes).tolist(), ends.tolist(), strict=True))

    def keys_of(self, rows: Tensor) -> slice:
        """The keys that some row of a sorted chunk sees."""
        return slice(int(self.first[rows].min()), int(rows[-1]) + self.offset + 1)

    def hidden(self, rows: Tensor, keys: slice) -> Hidden:
        """Which of the chunk's scores a row does not see."""
        return hidden(self.first[rows], rows + self.offset, keys, self.key.device)

    def forward(self, rows: Tensor, keys: slice, where: Hidden, scores: Tensor, probabilities: Tensor) -> Tensor:
        """Fill both [U, C, n] (one tensor may serve as both) and return the scaled query [U, C, D].

        Scores are -inf and probabilities 0 where a row does not see a key. With a given log-sum-exp the scores are log2 of the
        probabilities: on a CPU exp2 takes a third of the time of exp, and half of softmax's.
        """
        query = self.query[self.heads[:, None], rows].to(self.key.dtype) * self.scale
        lse = None if self.lse is None else self.given_lse(rows) * LOG2E
        factors = query if lse is None else query * LOG2E
        for group in self._score(factors, keys, where, scores):
            z, p = scores[group], probabilities[group]
            if lse is None:
                torch.softmax(z, -1, out=p)
            else:
                torch.exp2(z.sub_(lse[group]), out=p)
        return query

    def softmax_(self, rows: Tensor, keys: slice, where: Hidden, scores: Tensor) -> Tensor:
        """Fill scores [U, C, n] with the probabilities and return the scores' log-sum-exp [U, C, 1]; a given one is not used."""
        query = self.query[self.heads[:, None], rows].to(self.key.dtype) * self.scale
        lse = scores.new_empty(*query.shape[:2], 1)
        for group in self._score(query, keys, where, scores):
            z = scores[group]
            lse[group] = z.amax(-1, keepdim=True)
            lse[group] -= torch.softmax(z, -1, out=z).amax(-1, keepdim=True).log_()
        return lse

    def _score(self, query: Tensor, keys: slice, where: Hidden, scores: Tensor) -> Iterator[slice]:
        """Fill scores [U, C, n] group after group, -inf at hidden keys; each is handed out while it is still in the cache."""
        for k, start, stop in self.groups:
            z = scores[start:stop]
            torch.mm(query[start:stop].flatten(0, 1), self.key[k, keys].mT, out=z.flatten(0, 1))
            hide_(z, where, -torch.inf)
            yield slice(start, stop)

    def log_sum_exp(self, rows: Tensor, scores: Tensor, probabilities: Tensor) -> Tensor:
        """[U, C, 1] of a finished forward: the given one, else from each row's largest entry, ln p = score - lse."""
        if self.lse is not None:
            return self.given_lse(rows)
        return scores.amax(-1, keepdim=True) - probabilities.amax(-1, keepdim=True).log()

    def given_lse(self, rows: Tensor) -> Tensor:
        """[U, C, 1]"""
        return self.lse[self.heads[:, None], rows, None].to(self.key.dtype)

    def subtract_log_(self, x: Tensor, rows: Tensor, scores: Tensor, probabilities: Tensor) -> Tensor:
        """x -= ln p [U, C, n] of a finished forward, in place; +inf at hidden keys."""
        if self.lse is not None:
            return x.sub_(scores, alpha=math.log(2))
        return x.sub_(scores).add_(self.log_sum_exp(rows, scores, probabilities))

    def products(self, query: Tensor, key: Tensor, keys: slice, out: Tensor) -> Tensor:
        """out [U, C, n] = query [U, C, d] . key [K, S, d] for the chunk's keys."""
        for k, start, stop in self.groups:
            torch.mm(query[start:stop].flatten(0, 1), key[k, keys].mT, out=out[start:stop].flatten(0, 1))
        return out

    def backward(self, d_scores: Tensor, query: Tensor, keys: slice, d_key: Tensor) -> Tensor:
        """d query [U, C, D] for d_scores [U, C, n] and the scaled query of the forward; adds into d_key [K, D, S]."""
        d_query = torch.empty_like(query)
        for k, start, stop in self.groups:
            torch.mm(d_scores[start:stop].flatten(0, 1), self.key[k, keys], out=d_query[start:stop].flatten(0, 1))
        self.add_to_keys_(d_key, query, d_scores, keys)
        return d_query.mul_(self.scale)

    def add_to_keys_(self, d_key: Tensor, rows: Tensor, weights: Tensor, keys: slice) -> None:
        """d_key [K, D, S] += rows [U, C, D] summed over rows and heads with weights [U, C, n].

        Keys come last there, so that the product reads the weights along their rows: on a CPU that takes 0.6 of the time.
        """
        for k, start, stop in self.groups:
            d_key[k, :, keys].addmm_(rows[start:stop].flatten(0, 1).mT, weights[start:stop].flatten(0, 1))
