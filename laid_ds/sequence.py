"""One row over several ranks: which of its tokens a rank computes, and what it asks of the others.

A group of n consecutive ranks reads one batch. Its rows are cut into 2n stretches of one length, and rank i computes the i-th from either
end: under causal attention a token has the more to do the later it stands, and so all ranks have alike much. Keys and values of all are
gathered for each attention layer; everything else that a rank computes is of its own tokens alone.

Letters: T tokens of a row, t = T / n of them on each rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Stretch(NamedTuple):
    """Tokens start .. stop - 1 of a row."""

    start: int
    stop: int
    at: slice
    """Where they are among a rank's own t tokens."""


def _alone(x: Tensor) -> Tensor:
    return x[None]


def _as_it_is(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share a batch, as one of them sees it. The default shares with nobody: nothing is cut, and nothing is sent."""

    size: int = 1
    """n"""
    place: int = 0
    """Which of them this rank is."""
    gather: Callable[[Tensor], Tensor] = _alone
    """x -> [n, *x.shape]: what each rank gives, on all of them. Differentiable: a gradient is the sum of what all ranks ask. Collective."""
    add: Callable[[Tensor], Tensor] = _as_it_is
    """The sum over the ranks, on all of them, without a gradient. Collective."""

    @property
    def multiple(self) -> int:
        """What divides the number of tokens of a row that can be cut."""
        return 1 if self.size == 1 else 2 * self.size

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for its group: what all of them know counts once."""
        return self.place == 0

    def stretches(self, tokens: int) -> tuple[Stretch, ...]:
        """This rank's tokens of a row of T, in order. Raises ValueError for a row that was not padded to `multiple`."""
        if self.size == 1:
            return (Stretch(0, tokens, slice(None)),)
        if tokens % self.multiple:
            raise ValueError(f"a row of {tokens} tokens cannot be shared by {self.size} ranks: pad it to a multiple of {self.multiple}")
        length = tokens // self.multiple
        numbers = self.place, self.multiple - 1 - self.place
        return tuple(Stretch(n * length, (n + 1) * length, slice(k * length, (k + 1) * length)) for k, n in enumerate(numbers))

    def own(self, x: Tensor, dim: int) -> Tensor:
        """This rank's tokens [.., t, ..] of x [.., T, ..] along `dim`."""
        if self.size == 1:
            return x
        return torch.cat([x.narrow(dim, start, stop - start) for start, stop, _ in self.stretches(x.shape[dim])], dim)

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """x [.., T, ..] of every rank's own tokens [.., t, ..] along `dim`, in the order of the row. Differentiable and collective."""
        return x if self.size == 1 else _in_order(self.gather(x), dim)

    def whole_heads(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """`whole` of keys and values [B, K, t, D] along their tokens, in one message where they are of one size."""
        if self.size == 1 or key.shape[3] != value.shape[3]:
            return self.whole(key, 2), self.whole(value, 2)
        both = self.gather(torch.cat([key, value], 1)).split([key.shape[1], value.shape[1]], 2)
        return _in_order(both[0], 2), _in_order(both[1], 2)


def _in_order(gathered: Tensor, dim: int) -> Tensor:
    """[.., T, ..] of what all ranks gave [n, .., t, ..]; dim: of one rank's."""
    halves = [part.tensor_split(2, dim) for part in gathered.unbind(0)]
    return torch.cat([head for head, _ in halves] + [tail for _, tail in reversed(halves)], dim)


ALONE = SequenceGroup()
