"""Imports go down only, and never in a circle. The floors are those of docs/layout.md; a file that is on none of them fails here."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "laid_ds.commands": 1,
    "laid_ds.config": 1,
    "laid_ds.disk": 1,
    "laid_ds.files": 1,
    "laid_ds.keys": 1,
    "laid_ds.sequence": 1,
    "laid_ds.terminal": 1,
    "laid_ds.recipe_page": 2,
    "laid_ds.parent": 1,
    "laid_ds.kernels": 1,
    "laid_ds.evaluation.window": 1,
    "laid_ds.evaluation.summary": 1,
    "laid_ds.evaluation.heads": 1,
    "laid_ds.evaluation.rules": 1,
    "laid_ds.evaluation.scores": 1,
    "laid_ds.evaluation.kinds": 1,
    "laid_ds.evaluation.harness": 1,
    "laid_ds.evaluation.official": 1,
    "laid_ds.evaluation.visual_haystacks_rule": 1,
    "laid_ds.evaluation.mm_niah_rule": 1,
    "laid_ds.evaluation.mmlongbench_rule": 1,
    "laid_ds.models": 2,
    "laid_ds.data": 2,
    "laid_ds.runtime": 2,
    "laid_ds.method": 3,
    "laid_ds.evaluation": 3,
    "laid_ds.report": 3,
    "laid_ds.doctor": 4,
    "laid_ds.plan": 4,
    "laid_ds.export": 4,
    "laid_ds.study": 4,
    "laid_ds.run": 5,
    "laid_ds.train": 6,
    "laid_ds.cli": 6,
}
ONLY_IN = {
    "deepspeed": ("laid_ds.runtime.engine", "laid_ds.runtime.checkpoint"),
    "torch.distributed": ("laid_ds.runtime.distributed",),
    "transformers": ("laid_ds.models",),
    "webdataset": ("laid_ds.data",),
}
APART = ("laid_ds.models", "laid_ds.data", "laid_ds.runtime")  # of one floor, and none imports another
OUTSIDE = ("data_tools", "launch", "benchmarks")  # import laid_ds and are imported by none of it
FILES = sorted((ROOT / "laid_ds").rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


EVERYWHERE = {module_of(path): path for top in ("laid_ds", *OUTSIDE) for path in sorted((ROOT / top).rglob("*.py"))}


def imports_of(path: Path) -> set[str]:
    """Modules, and names in modules, that a file imports at any place."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relative to itself"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files_imported(module: str) -> set[str]:
    """The files, by module, that a file imports. `from room import file` imports the file, not the room, whose __init__ imports nothing
    that could lead back."""
    names = imports_of(EVERYWHERE[module])
    return {
        name for name in names if name in EVERYWHERE and not any(within(other, name) for other in names - {name} if other in EVERYWHERE)
    }


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def floor_of(module: str) -> int | None:
    homes = [name for name in FLOORS if within(module, name)]
    return FLOORS[max(homes, key=len)] if homes else None


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_down_only(path):
    module, imports = module_of(path), imports_of(path)
    if module == "laid_ds":
        assert not any(within(name, "laid_ds") for name in imports)
        return
    floor = floor_of(module)
    assert floor is not None, f"{module} is on no floor"
    for name in imports:
        below = floor_of(name)
        assert below is None or below <= floor, f"{module} (floor {floor}) imports {name} (floor {below})"
        assert not any(within(name, top) for top in OUTSIDE), f"{module} imports {name}, which stands outside"
        for library, homes in ONLY_IN.items():
            if within(name, library):
                assert any(within(module, home) for home in homes), f"{module} imports {library}, which only {homes} may"
    for ours, theirs in combinations(APART, 2):
        for mine, other in ((ours, theirs), (theirs, ours)):
            if within(module, mine):
                assert not any(within(name, other) for name in imports), f"{module} imports {other}"


def test_no_two_files_import_each_other():
    try:
        TopologicalSorter({module: files_imported(module) for module in EVERYWHERE}).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_every_floor_entry_exists():
    modules = {module_of(path) for path in FILES}
    assert all(name in modules for name in FLOORS)
