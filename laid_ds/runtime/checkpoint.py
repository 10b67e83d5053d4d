"""The run as one thing on disk: the engine's shards, where the stream stands, every rank's random state.

RUN/checkpoints/step_000100/ holds one checkpoint; RUN/checkpoints/latest names the newest complete one. `latest` is written last, by
rename, after every rank is done and every file is on disk, so a process killed at any moment leaves the previous checkpoint valid.
manifest.json, the last file of a checkpoint, holds size and crc32 of all others; the ranks share the work of computing and checking them.

Another number of ranks goes on from the same checkpoint: it is rewritten once, beside itself, as step_000100_universal/ (a file for each
parameter). Everything is carried over exactly but the ranks' random states, which have no counterpart there: the caller seeds them anew.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from isal import isal_zlib

from laid_ds.config import Checkpoint
from laid_ds.disk import DiskError, no_room, writing
from laid_ds.runtime import distributed
from laid_ds.runtime.engine import load_universal, write_universal

NAME = re.compile(r"step_(\d+)$")
BLOCK_BYTES = 1 << 24


class Saved(NamedTuple):
    """A complete checkpoint."""

    path: Path
    step: int
    ranks: int
    num_bytes: int
    is_latest: bool


def folder(output: Path) -> Path:
    return output / "checkpoints"


def latest(output: Path) -> Path | None:
    """The checkpoint that a run goes on from, every byte of it verified, or None. Collective.

    Raises ValueError when a file is not what was saved: with its name, the newest older checkpoint that is whole, and how to take it.
    """
    name = _latest_name(output)
    if name is None:
        return None
    checkpoint = folder(output) / name
    wrong = damage(checkpoint)
    if wrong:
        older = next((saved.path.name for saved in _before(output, name) if not damage(saved.path)), None)
        way_on = f"{older} is whole: `laid checkpoint prune {output} --damaged` goes back to it" if older else "no older one is whole"
        raise ValueError(f"checkpoint {checkpoint}: {wrong}; {way_on}")
    return checkpoint


def of_step(output: Path, step: int) -> Path:
    """The verified checkpoint of a step. Raises ValueError when there is none or a file of it is damaged."""
    steps = {saved.step: saved.path for saved in all_saved(output)}
    if step not in steps:
        raise ValueError(f"{folder(output)} holds no checkpoint of step {step}; there are {sorted(steps)}")
    wrong = damage(steps[step])
    if wrong:
        raise ValueError(f"checkpoint {steps[step]}: {wrong}")
    return steps[step]


def all_saved(output: Path) -> list[Saved]:
    """The complete checkpoints of a run folder, oldest first; their files are not looked into."""
    found = []
    for path in folder(output).glob("step_*"):
        manifest = _manifest(path)
        if NAME.fullmatch(path.name) and manifest:
            num_bytes = sum(manifest["files"].values())
            found.append(Saved(path, _step(path.name), manifest["world_size"], num_bytes, path.name == _latest_name(output)))
    return sorted(found, key=lambda saved: saved.step)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None: sizes and checksums are compared, each rank reading its share. Collective."""
    manifest = _manifest(checkpoint)
    if manifest is None:
        return "manifest.json is missing or damaged"
    checksums = manifest.get("crc32", {})  # checkpoints of the first versions hold sizes only
    names = list(manifest["files"])
    wrong_sizes = [name for name in names if _size(checkpoint / name) != manifest["files"][name]]
    if wrong_sizes:
        name = wrong_sizes[0]
        return f"{name} has {_size(checkpoint / name)} bytes, {manifest['files'][name]} were saved"
    found = _in_turn([checkpoint / name for name in checksums], _checksum)
    wrong = [name for name, value in zip(checksums, found, strict=True) if value != checksums[name]]
    return f"{wrong[0]} is damaged (its crc32 is not that of what was saved)" if wrong else None


def save(engine, output: Path, state: dict[str, Any], options: Checkpoint) -> Path:
    """Save everything a resumed run needs; `state` must be the same on every rank and hold "step". Collective.

    Raises ValueError (DiskError) when the disk has no room for it; the checkpoints before it stay as they are.
    """
    name = f"step_{state['step']:06d}"
    target = folder(output) / name
    if distributed.rank() == 0:
        for stale in (target, _universal_of(target)):
            _remove(stale)  # the remains of a save that was killed, or of an abandoned continuation
    distributed.barrier()
    needed_bytes = next((saved.num_bytes for saved in reversed(all_saved(output))), None)  # as much as the one before it
    _check_room(folder(output), f"checkpoint {name}", needed_bytes)
    try:
        with writing(folder(output), f"checkpoint {name}", needed_bytes):
            engine.save_checkpoint(str(folder(output)), tag=name, save_latest=False)
            torch.save(_random_state(), target / f"random_rank{distributed.rank()}.pt")
            distributed.barrier()
            _seal(target, state)
    except DiskError:
        if distributed.world_size() == 1:  # else other ranks may be writing there; the next save removes it
            _remove(target)
        raise
    if distributed.rank() == 0:
        write_durably(folder(output) / "latest", name)
        prune(output, options.keep_last, options.keep_every)
    distributed.barrier()
    return target


def restore(engine, checkpoint: Path) -> dict[str, Any]:
    """Load a verified checkpoint into the engine, on any number of ranks; returns the saved state. Collective.

    On as many ranks as saved it, each rank's random generators are restored too; on another number they are left as they are.
    Raises ValueError for another number of ranks where the engine is not ZeRO-3.
    """
    manifest = _manifest(checkpoint)
    if manifest["world_size"] == distributed.world_size():
        engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        _set_random_state(torch.load(checkpoint / f"random_rank{distributed.rank()}.pt", weights_only=False))
    elif engine.zero_optimization_stage() == 3:
        load_universal(engine, universal(checkpoint))
    else:
        raise ValueError(
            f"checkpoint {checkpoint} was saved by {manifest['world_size']} ranks, this run has {distributed.world_size()}; "
            "only ZeRO stage 3 can change the number: start with the same"
        )
    return manifest["state"]


def universal(checkpoint: Path) -> Path:
    """The folder that holds the checkpoint by parameters instead of by ranks; rank 0 writes it unless it is there. Collective."""
    target = _universal_of(checkpoint)
    if distributed.rank() == 0 and not target.is_dir():
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with writing(target.parent, target.name, sum(_manifest(checkpoint)["files"].values())):
                write_universal(checkpoint, partial / "whole")
                for path in partial.rglob("*"):
                    _sync(path)
        except DiskError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        os.replace(partial, target)
        _sync(target.parent)
    distributed.barrier()
    return target / "whole"


def prune(output: Path, keep_last: int, keep_every: int | None = None) -> list[str]:
    """Keep the newest `keep_last` checkpoints and those of every `keep_every` steps; returns the names of the folders removed.

    What is newer than `latest` goes too: it was never completed, or belongs to an abandoned continuation.
    """
    newest = _latest_name(output)
    if newest is None:
        return []
    current = [saved for saved in all_saved(output) if saved.step <= _step(newest)]
    kept = current[-keep_last:] + [saved for saved in current if keep_every and saved.step % keep_every == 0]
    kept_names = {saved.path.name for saved in kept} | {newest, f"{newest}_universal"}
    removed = sorted(path.name for path in folder(output).glob("step_*") if path.name not in kept_names)
    for name in removed:
        _remove(folder(output) / name)
    return removed


def go_back(output: Path) -> list[str]:
    """Let `latest` name the newest whole checkpoint and remove every folder that holds none; returns the names removed.

    Raises ValueError, and removes nothing, when none is whole.
    """
    whole = [saved.path.name for saved in all_saved(output) if not damage(saved.path)]
    if not whole:
        raise ValueError(f"{folder(output)} holds no whole checkpoint; nothing was removed")
    write_durably(folder(output) / "latest", whole[-1])
    removed = sorted(path.name for path in folder(output).glob("step_*") if path.name not in {*whole, f"{whole[-1]}_universal"})
    for name in removed:
        _remove(folder(output) / name)
    return removed


def write_durably(path: Path, text: str) -> None:
    """Replace a file at once: whoever is killed, the old text or the new one is there. Raises DiskError when the disk takes no more."""
    partial = path.with_name(path.name + ".partial")
    try:
        with writing(path.parent, path.name):
            partial.write_text(text)
            _sync(partial)
            os.replace(partial, path)
    except DiskError:
        partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _check_room(place: Path, what: str, needed_bytes: int | None) -> None:
    """Refuse on all ranks together, before anything is written, what the disk has no room for. Collective."""
    lacking = no_room(place, what, needed_bytes) if distributed.rank() == 0 and needed_bytes is not None else ""
    (refused,) = distributed.largest([float(bool(lacking))])
    if refused:
        raise ValueError(lacking)


def _seal(target: Path, state: dict[str, Any]) -> None:
    """Bring every file to the disk and write the manifest, which makes the folder a checkpoint. Collective."""
    files = sorted(path for path in target.iterdir() if not path.name.startswith("."))  # systems leave others: .nfs..., ._NAME
    checksums = _in_turn(files, _synced_checksum)
    if distributed.rank() == 0:
        sizes = {path.name: path.stat().st_size for path in files}
        sums = {path.name: value for path, value in zip(files, checksums, strict=True)}
        manifest = {"state": state, "world_size": distributed.world_size(), "files": sizes, "crc32": sums}
        write_durably(target / "manifest.json", json.dumps(manifest, indent=1))
    distributed.barrier()


def _in_turn(files: Sequence[Path], measure: Callable[[Path], int]) -> list[int]:
    """measure(file) of each file, on every rank; each rank measures its share. Values below 2^53. Collective."""
    ranks, rank = distributed.world_size(), distributed.rank()
    return [int(value) for value in distributed.add(measure(file) if i % ranks == rank else 0 for i, file in enumerate(files))]


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            value = isal_zlib.crc32(block, value)
    return value


def _synced_checksum(path: Path) -> int:
    _sync(path)
    return _checksum(path)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _manifest(checkpoint: Path) -> dict[str, Any] | None:
    """None when it is missing or cannot be read, which makes the folder no complete checkpoint."""
    try:
        return json.loads((checkpoint / "manifest.json").read_text())
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
        return None


def _latest_name(output: Path) -> str | None:
    pointer = folder(output) / "latest"
    return pointer.read_text().strip() if pointer.is_file() else None


def _before(output: Path, name: str) -> list[Saved]:
    """The checkpoints older than `name`, newest first."""
    return [saved for saved in reversed(all_saved(output)) if saved.step < _step(name)]


def _universal_of(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}_universal")


def _step(name: str) -> int:
    return int(NAME.fullmatch(name)[1])


def _remove(checkpoint: Path) -> None:
    """The manifest goes first: what is left by a process killed here is no checkpoint any more."""
    (checkpoint / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


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
