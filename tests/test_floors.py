"""Imports go down only. The floors are those of docs/layout.md; a file that is on none of them fails here."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "laid_ds.config": 0,
    "laid_ds.environment": 0,
    "laid_ds.schedule": 0,
    "laid_ds.losses": 0,
    "laid_ds.align": 0,
    "laid_ds.kernels": 0,
    "laid_ds.data.record": 0,
    "laid_ds.evaluation.window": 0,
    "laid_ds.evaluation.report": 0,
    "laid_ds.distributed": 1,
    "laid_ds.metrics": 1,
    "laid_ds.stop": 1,
    "laid_ds.models": 2,
    "laid_ds.data": 2,
    "laid_ds.engine": 3,
    "laid_ds.checkpoint": 3,
    "laid_ds.distill": 4,
    "laid_ds.evaluation.haystack": 4,
    "laid_ds.evaluation.progress": 4,
    "laid_ds.evaluation.spectra": 4,
    "laid_ds.first_look": 5,
    "laid_ds.build": 5,
    "laid_ds.loop": 5,
    "laid_ds.run_folder": 5,
    "laid_ds.train": 5,
    "laid_ds.plan": 5,
    "laid_ds.export": 5,
    "laid_ds.evaluation.evaluate": 5,
    "laid_ds.local": 5,
    "laid_ds.cli": 5,
}
PACKAGES = {"laid_ds", "laid_ds.evaluation"}  # their __init__ files import nothing
ONLY_IN = {
    "deepspeed": ("laid_ds.engine", "laid_ds.checkpoint"),
    "transformers": ("laid_ds.models",),
    "webdataset": ("laid_ds.data",),
    "torch.distributed": ("laid_ds.distributed",),
}
NEVER_TOGETHER = ("laid_ds.models", "laid_ds.data")
FILES = sorted((ROOT / "laid_ds").rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def floor_of(module: str) -> int | None:
    homes = [name for name in FLOORS if within(module, name)]
    return FLOORS[max(homes, key=len)] if homes else None


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_down_only(path):
    module, imports = module_of(path), imports_of(path)
    if module in PACKAGES:
        assert not any(within(name, "laid_ds") for name in imports)
        return
    floor = floor_of(module)
    assert floor is not None, f"{module} is on no floor"
    for name in imports:
        below = floor_of(name)
        assert below is None or below <= floor, f"{module} (floor {floor}) imports {name} (floor {below})"
        assert not within(name, "data_tools"), f"{module} imports {name}: the tools stand outside"
        assert not within(name, "launch"), f"{module} imports {name}: the launcher stands outside"
        for library, homes in ONLY_IN.items():
            if within(name, library):
                assert any(within(module, home) for home in homes), f"{module} imports {library}, which only {homes} may"
    for ours, theirs in (NEVER_TOGETHER, NEVER_TOGETHER[::-1]):
        if within(module, ours) and floor > 0:
            assert not any(within(name, theirs) for name in imports), f"{module} imports {theirs}"


def test_every_floor_entry_exists():
    modules = {module_of(path) for path in FILES}
    assert all(name in modules for name in FLOORS)
