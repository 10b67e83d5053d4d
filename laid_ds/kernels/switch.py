"""Which implementation of a kernel runs: each package has the same function in reference.py, chunked.py and fused.py."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch

IMPLEMENTATIONS = ("reference", "chunked", "fused")


def choose(package: str, function: str, implementation: str, device: torch.device) -> Callable:
    """The function for `implementation`; "auto" is fused on CUDA where triton is installed, else chunked."""
    if implementation == "auto":
        implementation = "fused" if device.type == "cuda" and find_spec("triton") else "chunked"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}: expected 'auto', {', '.join(map(repr, IMPLEMENTATIONS))}")
    return getattr(import_module(f"{package}.{implementation}"), function)
