"""RUN/launch/: what a job was made of, so that a run can be explained and repeated. Nothing in it holds a secret.

job.sh (as submitted), recipe.toml (a copy: later edits do not change a job that waits), run.json (the resolved run; of an evaluation there
is its command instead of both, evaluation.json), environment.json,
version.json and changes.diff (of the code), state.json (the job's own word), logs/.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import laid_ds
from laid_ds.disk import writing
from launch.script import Target
from launch.secrets import clean_environment, redact

STATE = "state.json"
EVALUATED = "evaluation.json"


def write_record(target: Target, recipe: Path, resolved: dict[str, Any], script: str, environ: Mapping[str, str]) -> Path:
    """Fill the folder; returns the script's path."""
    folder = target.launch
    with writing(folder, "the record of the job"):
        folder.mkdir(parents=True, exist_ok=True)
        if recipe.resolve() != (folder / "recipe.toml").resolve():
            shutil.copyfile(recipe, folder / "recipe.toml")
        _write(folder / "run.json", resolved)
        return _write_job(folder, script, environ)


def write_evaluation(target: Target, script: str, environ: Mapping[str, str]) -> Path:
    """Fill the folder of an evaluation's job; returns the script's path."""
    folder = target.launch
    with writing(folder, "the record of the job"):
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / EVALUATED, {"command": ["laid", *target.arguments], "folder": str(target.folder)})
        return _write_job(folder, script, environ)


def _write_job(folder: Path, script: str, environ: Mapping[str, str]) -> Path:
    (folder / "logs").mkdir(exist_ok=True)
    repository = Path(laid_ds.__file__).parents[1]
    _write(folder / "environment.json", clean_environment(environ))
    _write(folder / "version.json", code_version(repository))
    (folder / "changes.diff").write_text(redact(_git(repository, "diff", "HEAD") or ""))
    (folder / "job.sh").write_text(script)
    return folder / "job.sh"


def code_version(repository: Path) -> dict[str, Any]:
    """Installed version; in a git checkout also the commit and the files that git does not know."""
    commit = _git(repository, "rev-parse", "HEAD")
    found: dict[str, Any] = {"laid-ds": version("laid-ds"), "commit": commit.strip() if commit else None}
    if commit:
        found["untracked"] = (_git(repository, "ls-files", "--others", "--exclude-standard") or "").splitlines()
    return found


def read_state(folder: Path) -> dict[str, Any] | None:
    """What the last attempt, or the submission, said of itself. Raises ValueError for a damaged file."""
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        state = json.loads(path.read_text())
        if not all(isinstance(state[name], str) for name in ("job", "status")):
            raise ValueError
        return state
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path} is damaged; the job's own log is in {folder / 'logs'}") from None


def write_state(folder: Path, state: dict[str, Any]) -> None:
    partial = folder / f"{STATE}.partial"
    partial.write_text(json.dumps(state) + "\n")
    os.replace(partial, folder / STATE)


def _write(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(redact(json.dumps(tree, indent=1)) + "\n")


def _git(repository: Path, *words: str) -> str | None:
    if not shutil.which("git"):
        return None
    found = subprocess.run(["git", "-C", str(repository), *words], capture_output=True, text=True)
    return found.stdout if found.returncode == 0 else None
