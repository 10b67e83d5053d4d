"""Which heads retrieve, and which look near or far, by the attention that each has: numbers alone, no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

CLEAR = 0.1  # mass on the needle below which no head is called retrieving
SHARE = 0.5  # of the best head's mass: from there on a head is called retrieving, too
NEAR, FAR = 0.05, 0.25  # of a head's attention beyond half of the longest distance, where even attention has about a half


def retrieving_heads(mass: Mapping[int, Sequence[float]]) -> list[tuple[int, int, float]]:
    """(layer, head, mass) of the heads that retrieve, most first: at least CLEAR, and at least SHARE of the best head's mass (ours).

    mass: decoder layer -> mean share of attention on the needle's tokens, one number per query head.
    """
    every = [(layer, head, share) for layer, shares in mass.items() for head, share in enumerate(shares)]
    least = max(CLEAR, SHARE * max((share for _, _, share in every), default=0))
    return sorted((found for found in every if found[2] >= least), key=lambda found: -found[2])


def head_kinds(far_mass: Mapping[int, Sequence[float]]) -> dict[str, int]:
    """How many heads are "local" (at most NEAR of their attention lies beyond half of the longest distance), "global" (at least FAR), and
    "between" (ours). far_mass: decoder layer -> that share, one number per query head."""
    shares = [share for layer in far_mass.values() for share in layer]
    near, far = sum(share <= NEAR for share in shares), sum(share >= FAR for share in shares)
    return {"local": near, "between": len(shares) - near - far, "global": far}
