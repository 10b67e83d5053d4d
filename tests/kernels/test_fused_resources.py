"""The fused kernels fit the chips: few spilled registers, shared memory within the limit, and Hopper's matrix instructions in use.

The report is benchmarks/fused_resources.json, made by `python -m benchmarks.fused_resources --json`; it holds for the sources whose
fingerprint it carries.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.kernel_sources import fingerprint

ROOT = Path(__file__).parents[2]
REPORT = json.loads((ROOT / "benchmarks" / "fused_resources.json").read_text())
KERNELS = REPORT["kernels"]
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448}  # bytes per block, CUDA programming guide


def test_report_is_of_these_sources():
    assert REPORT["sources"] == fingerprint(), "make benchmarks/fused_resources.json anew"


def test_every_kernel_chip_and_head_dim_is_there():
    for chip in SHARED_LIMIT:
        for dim in (64, 128, 256):
            assert f"lse D={dim} {chip}" in KERNELS
            assert f"profile D={dim} {chip}" in KERNELS
            for omega in ("uniform", "frontier", "power"):
                for case in ("one head", "positions and windows", *(("many heads", "narrow student") if dim <= 128 else ())):
                    assert {f"{kernel} D={dim} omega={omega} {case} {chip}" for kernel in ("row", "column")} <= KERNELS.keys()
        for heads in (28, 16):
            assert f"mix H={heads} and 40 omega=frontier {chip}" in KERNELS
            assert f"mix H={heads} and 40 omega=frontier narrow student {chip}" in KERNELS


@pytest.mark.parametrize("name", KERNELS)
def test_shared_memory_fits(name):
    assert KERNELS[name]["shared_bytes"] <= SHARED_LIMIT[name.split()[-1]]


@pytest.mark.parametrize("name", KERNELS)
def test_few_registers_spill(name):
    """Hopper's tiles of rows and columns were chosen by timing them, where spilling paid; the others by this."""
    timed = name.endswith("sm_90") and name.startswith(("row", "column"))
    assert KERNELS[name]["spilled_bytes"] <= (4096 if timed else 256)


@pytest.mark.parametrize("name", [name for name in KERNELS if name.split()[0] in ("lse", "row", "column", "profile")])
def test_products_over_the_head_dim_use_the_chips_own_instruction(name):
    instruction = {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(name.split()[-1])
    assert instruction is None or KERNELS[name][instruction] > 0
