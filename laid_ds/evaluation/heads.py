"""Which heads retrieve, by the attention that each has on the needle: numbers alone, no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

CLEAR = 0.1  # mass on the needle below which no head is called retrieving
SHARE = 0.5  # of the best head's mass: from there on a head is called retrieving, too


def retrieving_heads(mass: Mapping[int, Sequence[float]]) -> list[tuple[int, int, float]]:
    """(layer, head, mass) of the heads that retrieve, most first: at least CLEAR, and at least SHARE of the best head's mass (ours).

    mass: decoder layer -> mean share of attention on the needle's tokens, one number per query head.
    """
    every = [(layer, head, share) for layer, shares in mass.items() for head, share in enumerate(shares)]
    least = max(CLEAR, SHARE * max((share for _, _, share in every), default=0))
    return sorted((found for found in every if found[2] >= least), key=lambda found: -found[2])
