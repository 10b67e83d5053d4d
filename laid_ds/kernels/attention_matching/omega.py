"""The weight of a distance in attention matching, at one moment of training; the schedule over training lives elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Omega:
    """omega(delta) > 0 for a distance delta >= 0, before it is normalised to mean 1 over the keys a row sees.

    `uniform`:  1
    `frontier`: 1 + gamma * sigmoid((delta - frontier) / width)     gamma > -1, width > 0
    `power`:    (1 + delta / delta_0) ** alpha                       delta_0 > 0
    """

    kind: str = "uniform"
    gamma: float = 0.0
    frontier: float = 0.0
    width: float = 1.0
    delta_0: float = 1.0
    alpha: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("uniform", "frontier", "power"):
            raise ValueError(f"omega.kind is {self.kind!r}: expected 'uniform', 'frontier' or 'power'")
        for name in ("gamma", "frontier", "width", "delta_0", "alpha"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"omega.{name} is {getattr(self, name)}: expected a finite number")
        if self.gamma <= -1:
            raise ValueError(f"omega.gamma is {self.gamma}: expected more than -1, else omega is negative far away")
        for name in ("width", "delta_0"):
            if getattr(self, name) <= 0:
                raise ValueError(f"omega.{name} is {getattr(self, name)}: expected a positive number")

    def __call__(self, distance: Tensor) -> Tensor:
        """omega at each distance (floating point, any shape), same shape and dtype."""
        if self.kind == "frontier":
            return torch.sigmoid((distance - self.frontier) / self.width) * self.gamma + 1
        if self.kind == "power":
            return (distance / self.delta_0 + 1) ** self.alpha
        return torch.ones_like(distance)


UNIFORM = Omega()
