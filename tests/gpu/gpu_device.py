"""Where the GPU tests run. `pytest -m gpu` runs them on a machine with a CUDA GPU; elsewhere all are skipped, for one reason.

LAID_GPU_STAND_IN=cpu runs those of the kernels on CPU tensors in Triton's interpreter instead: slow, and only to try the tests themselves.
"""

from __future__ import annotations

import os

import pytest
import torch

STAND_IN = os.environ.get("LAID_GPU_STAND_IN") == "cpu"
HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
WHY_NOT = "no CUDA GPU can be used here (torch.cuda.is_available() is False)"
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason=WHY_NOT)]
KERNELS_ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not (HAS_GPU or STAND_IN), reason=WHY_NOT)]
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason=WHY_NOT if not HAS_GPU else "needs two GPUs")
GPU_ALONE = pytest.mark.skipif(not HAS_GPU, reason=WHY_NOT)  # beyond what the interpreter can do

HALVES = [
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(STAND_IN, reason="the interpreter has no products of bfloat16")),
    torch.float16,
]
DTYPES = [*HALVES, torch.float32]
