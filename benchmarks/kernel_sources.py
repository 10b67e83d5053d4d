"""Which sources decide what a fused kernel asks of a chip: the jitted functions, their constants, and the tables of tile sizes."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1] / "laid_ds" / "kernels"
FILES = ("tiles.py", "attention_matching/fused.py", "attention_profile/fused.py")


def fingerprint(kernels: Path = KERNELS) -> str:
    """Changes with them, and not with comments or with the functions that launch the kernels."""
    nodes = [node for name in FILES for node in ast.parse((kernels / name).read_text()).body if _decides(node)]
    return hashlib.sha256("\n".join(map(ast.unparse, nodes)).encode()).hexdigest()[:16]


def _decides(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assign | ast.AnnAssign):
        return True
    if not isinstance(node, ast.FunctionDef):
        return False
    return "triton.jit" in " ".join(map(ast.unparse, node.decorator_list)) or node.name.endswith("_options") or node.name == "block_d"
