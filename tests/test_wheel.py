"""What is installed from a wheel works in any folder: the engines' files, the recipes and the parts of job scripts come with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.recipes import write_recipe

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("laid_ds", "data_tools", "launch", "ds_configs", "recipes")


def files(folder: Path) -> set[str]:
    found = {path.relative_to(folder).as_posix() for top in PACKAGES for path in (folder / top).rglob("*") if path.is_file()}
    return {name for name in found if "__pycache__" not in name}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """A wheel of this checkout, in a folder of its own."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("unpacked")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "out", "."]
    made = subprocess.run(build, cwd=source, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (wheel,) = (source / "out").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture
def there(unpacked, tmp_path):
    """Run a module of the wheel in a folder that knows of no checkout; its stdout."""

    def run(module: str, *words) -> str:
        command = [sys.executable, "-m", module, *map(str, words)]
        found = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(unpacked)}, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
        return found.stdout

    return run


def test_the_wheel_holds_every_file_of_its_packages(unpacked):
    assert files(unpacked) == files(ROOT)


@pytest.fixture
def recipe(world, tmp_path) -> Path:
    """Names its engines as the shipped recipes do."""
    path = write_recipe(world.run(tmp_path / "run"), tmp_path / "recipe.toml")
    path.write_text(path.read_text().replace(str(ROOT / "ds_configs"), "ds_configs"))
    return path


def test_a_recipe_finds_the_shipped_engine_unless_the_user_has_one_of_that_name(there, unpacked, recipe, tmp_path):
    assert 'deepspeed = "ds_configs/zero3_cpu.json"' in recipe.read_text()
    resolved = json.loads(there("laid_ds.cli", "train", recipe, "--dry-run"))
    assert {resolved[who]["deepspeed"] for who in ("student", "teacher")} == {str(unpacked / "ds_configs" / "zero3_cpu.json")}
    (tmp_path / "ds_configs").mkdir()
    shutil.copy(ROOT / "ds_configs" / "zero3_cpu.json", tmp_path / "ds_configs")
    assert json.loads(there("laid_ds.cli", "train", recipe, "--dry-run"))["student"]["deepspeed"] == "ds_configs/zero3_cpu.json"


def test_a_shipped_recipe_is_planned_and_a_job_is_written(there, recipe):
    configs = [
        word for who, size in (("student", 7), ("teacher", 32)) for word in (f"--{who}-config", f"recipes/configs/qwen2_5_vl_{size}b.json")
    ]
    planned = json.loads(there("laid_ds.cli", "plan", "recipes/qwen2_5_vl_7b_from_32b.toml", *configs, "--json"))
    assert planned
    script = there("launch.cli", "slurm", recipe, "--nodes", "1", "--gpus-per-node", "2", "--dry-run")
    assert script.startswith("#!/bin/bash\n")
    assert "laid-launch: %s" in script
