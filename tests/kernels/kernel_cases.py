"""Which implementations the kernel tests run. The fused ones run in Triton's interpreter, on CPU tensors and slowly."""

from __future__ import annotations

import importlib.util
import os

import pytest

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it at its first import, which may be past
WHY_NOT = (
    "TRITON_INTERPRET=1 is not set, and fused kernels run in Triton's interpreter here"
    if HAS_TRITON
    else "triton is not installed (the extra `triton`)"
)
IN_INTERPRETER = pytest.mark.skipif(not INTERPRETED, reason=WHY_NOT)

FAST = ["chunked", pytest.param("fused", marks=IN_INTERPRETER)]
LENGTHS = [(T, "chunked") for T in (1, 2, 63, 500)] + [pytest.param(T, "fused", marks=IN_INTERPRETER) for T in (1, 2, 63)]
