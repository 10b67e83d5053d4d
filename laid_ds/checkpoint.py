"""The run as one thing on disk: the engine's shards, where the stream stands, every rank's random state.

RUN/checkpoints/step_000100/ holds one checkpoint; RUN/checkpoints/latest names the newest complete one. `latest` is written last, by
rename, after every rank is done and every file is on disk, so a process killed at any moment leaves the previous checkpoint valid.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from laid_ds import distributed


def folder(output: Path) -> Path:
    return output / "checkpoints"


def latest(output: Path) -> Path | None:
    """The newest complete checkpoint of a run folder, or None. Raises ValueError when its files are not those that were saved."""
    pointer = folder(output) / "latest"
    if not pointer.is_file():
        return None
    checkpoint = folder(output) / pointer.read_text().strip()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name, size in manifest["files"].items():
        found = (checkpoint / name).stat().st_size if (checkpoint / name).is_file() else None
        if found != size:
            raise ValueError(f"checkpoint {checkpoint}: {name} has {found} bytes, {size} were saved; restore it or remove {pointer}")
    return checkpoint


def save(engine, output: Path, state: dict[str, Any], keep_last: int) -> Path:
    """Save everything a resumed run needs; `state` must be the same on every rank and hold "step". Collective."""
    name = f"step_{state['step']:06d}"
    target = folder(output) / name
    if distributed.rank() == 0:
        shutil.rmtree(target, ignore_errors=True)  # the remains of a save that was killed; `latest` never named it
    distributed.barrier()
    engine.save_checkpoint(str(folder(output)), tag=name, save_latest=False)
    torch.save(_random_state(), target / f"random_rank{distributed.rank()}.pt")
    distributed.barrier()
    if distributed.rank() == 0:
        _seal(target, state)
        _write_durably(folder(output) / "latest", name)
        _prune(output, keep_last, name)
    distributed.barrier()
    return target


def restore(engine, checkpoint: Path) -> dict[str, Any]:
    """Load a checkpoint into the engine and this rank's random generators; returns the saved state. Collective.

    Raises ValueError when it was saved by another number of ranks.
    """
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    if manifest["world_size"] != distributed.world_size():
        raise ValueError(
            f"checkpoint {checkpoint} was saved by {manifest['world_size']} ranks, this run has {distributed.world_size()}; "
            "start it with the same number"
        )
    engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    _set_random_state(torch.load(checkpoint / f"random_rank{distributed.rank()}.pt", weights_only=False))
    return manifest["state"]


def _seal(target: Path, state: dict[str, Any]) -> None:
    files = {path.name: path.stat().st_size for path in sorted(target.iterdir())}
    for name in files:
        _sync(target / name)
    _write_durably(target / "manifest.json", json.dumps({"state": state, "world_size": distributed.world_size(), "files": files}, indent=1))
    _sync(target)


def _prune(output: Path, keep_last: int, newest: str) -> None:
    """Remove all but the newest `keep_last` checkpoints, and those of an earlier, abandoned continuation of the run."""
    names = sorted(path.name for path in folder(output).glob("step_*"))
    kept = [name for name in names if name <= newest][-keep_last:]
    for name in set(names) - set(kept):
        shutil.rmtree(folder(output) / name)


def _write_durably(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    _sync(partial)
    os.replace(partial, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
