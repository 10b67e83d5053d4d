"""A run of a test as a recipe file, for what starts from files: entry points and launchers."""

from __future__ import annotations

import json
from pathlib import Path

import tomli_w

from laid_ds.config import Run


def write_recipe(run: Run, path: Path) -> Path:
    path.write_text(tomli_w.dumps(json.loads(run.model_dump_json(exclude_none=True))))
    return path
