"""What the fused kernels ask of a chip, compiled ahead of time: no GPU is needed, only Triton.

    python -m benchmarks.fused_resources --json                     every kernel, chip and head dim
    python -m benchmarks.fused_resources --json --chips 90 --dims 128

Registers and spills are ptxas' own report, from the copy that Triton ships. Head counts are arguments of the kernels, not constants in
them: one binary serves 28 / 4 and 16 / 2 students of 40 / 8 teachers, and the report names the counts that only pick tile sizes.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from benchmarks.kernel_sources import fingerprint
from laid_ds.kernels import tiles
from laid_ds.kernels.attention_matching import fused
from laid_ds.kernels.attention_profile import fused as profile

REPORT = Path(__file__).with_name("fused_resources.json")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may have, CUDA programming guide, compute capabilities
POINTERS = {"heads": "i32", "student_first": "i32", "teacher_first": "i32", "first": "i32", "last": "i32", "positions": "i32"}
POINTERS |= {name: "fp32" for name in ("pi", "student_lse", "teacher_lse", "lse", "log_mass", "norm", "weight", "excess", "loss", "d_pi")}
POINTERS |= {name: "bf16" for name in ("student_query", "student_key", "teacher_query", "teacher_key", "query", "key")}
POINTERS |= {"edges": "i32", "marked": "i8", "planes": "i32"} | {name: "fp32" for name in ("entropy", "mass", "pairs", "response")}
POINTERS |= {"d_query": "bf16", "d_key": "bf16", "d_scores": "bf16", "teacher_scores": "fp32", "student_scores": "fp32", "row_range": "i32"}
MASKS = {"one head": (), "many heads": (), "positions and windows": ("NARROW", "POSITIONS"), "narrow student": ("BY_ROW", "POSITIONS")}
SEVERAL_HEADS = ("many heads", "narrow student")  # of the teacher to mix
FLOATS = ("student_scale", "teacher_scale", "scale", "gamma", "frontier", "inv_width", "inv_delta_0", "alpha")


def cases(dims: list[int], chip: int) -> Iterator[tuple[str, object, dict]]:
    """(name, kernel, compile-time values and launch options) of everything that may be launched on a chip."""
    for dim in dims:
        yield f"lse D={dim}", tiles.lse_kernel, {"D": dim} | tiles.lse_options(dim)
        values = {"D": dim} | profile.profile_options(dim, 20)
        yield f"profile D={dim}", profile.profile_kernel, values
        yield f"plane D={dim}", profile.plane_kernel, {"D": dim} | profile.PLANE_OPTIONS
        for kind, (case, masks) in product((0, 1, 2), MASKS.items()):
            if fused.sparse_heads(dim) < (2 if case in SEVERAL_HEADS else 1):
                continue
            values = {"DS": dim, "DT": dim, "KIND": kind} | {name: name in masks for name in ("NARROW", "BY_ROW", "POSITIONS")}
            label = f"D={dim} omega={fused.KINDS[kind]} {case}"
            how = {"plain": case == "one head", "by_row": "BY_ROW" in masks}
            row, column = (fused.tile_options(kernel, chip, dim, dim, **how) for kernel in ("row", "column"))
            yield f"row {label}", fused.row_kernel, values | {"BACKWARD": True} | row
            yield f"column {label}", fused.column_kernel, values | column
    for kind in (0, 1, 2):
        for student, teacher in ((28, 40), (16, 40)):
            name = f"mix H={student} and {teacher} omega={fused.KINDS[kind]}"
            for by_row, case in ((False, ""), (True, " narrow student")):
                values = {"KIND": kind, "BY_ROW": by_row, "PRECISION": "tf32"}
                yield name + case, fused.mix_kernel, values | fused.mix_options(student, teacher)
        if kind:
            yield f"norm omega={fused.KINDS[kind]}", fused.norm_kernel, {"KIND": kind, "M": 64, "N": 64}


def resources(kernel: object, values: dict, chip: int) -> dict[str, int]:
    """Registers, spilled bytes, shared memory and wgmma instructions of one kernel on one chip."""
    options = {name: values[name] for name in ("num_warps", "num_stages") if name in values}
    constants = {name: value for name, value in values.items() if name not in options}
    names = kernel.arg_names
    signature = {
        n: "constexpr" if n in constants else f"*{POINTERS[n]}" if n in POINTERS else "fp32" if n in FLOATS else "i32" for n in names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in POINTERS or n == "n"}
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    tool = triton.knobs.nvidia.ptxas_blackwell if chip >= 100 else triton.knobs.nvidia.ptxas
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(compiled.asm["ptx"])
        ptx.flush()
        command = [tool.path, "-v", f"--gpu-name=sm_{chip}{'a' * (chip >= 90)}", ptx.name, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    count = lambda pattern: sum(map(int, re.findall(pattern, log)))  # noqa: E731
    return {
        "registers": count(r"Used (\d+) registers"),
        "spilled_bytes": count(r"(\d+) bytes spill"),
        "shared_bytes": compiled.metadata.shared,
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
        "tcgen05": compiled.asm["ptx"].count("tcgen05.mma"),
        "warps": compiled.metadata.num_warps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", type=int, nargs="+", choices=SHARED_LIMIT, default=list(SHARED_LIMIT))
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--only", default="", help="cases whose name starts so")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    arguments = parser.parse_args()
    report = {}
    for chip in arguments.chips:
        for name, kernel, values in cases(arguments.dims, chip):
            if name.startswith(arguments.only):
                report[f"{name} sm_{chip}"] = figures = resources(kernel, values, chip)
                if not arguments.json:
                    print(f"{name} sm_{chip}", figures, flush=True)
    result = {"triton": triton.__version__, "sources": fingerprint(), "kernels": report}
    if arguments.json:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
