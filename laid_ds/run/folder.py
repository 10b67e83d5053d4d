"""The folder of a run: whose it is, and whether this recipe may go on in it.

run.json (the resolved recipe, versions, each attempt) claims it; done.json or requeue.json says how the last one ended (runtime/stop.py).
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from laid_ds.config import Run, as_tree
from laid_ds.disk import nearest, writing
from laid_ds.files import read_json
from laid_ds.runtime import checkpoint, distributed, lock
from laid_ds.runtime.stop import DONE, STOP, clear

# keys that do not decide the outcome of a run; what follows from align.probe stands in the other keys of [align]
MAY_CHANGE = ("logging.", "checkpoint.", "evaluation", "stop.", "data.workers", "align.probe")
MAY_BE_THERE = ("run.json.partial", "launch", STOP, lock.FILE)  # in a folder that no run has claimed yet: a job script lives in launch/
SHARES_OF_BATCH = ("data.micro_batch", "optimizer.accumulation", "sequence_parallel")  # may change with the ranks: see _check_global_batch


def check_output(run: Run) -> None:
    """Raises ValueError unless the folder is new and can be made, or belongs to this very run, which has steps to do."""
    _check_can_be_made(run.output)
    record = run.output / "run.json"
    if (run.output / DONE).is_file() and run.steps <= _done_steps(run):
        raise ValueError(
            f"{run.output} holds a finished run of {_done_steps(run)} steps; give more steps=... to go on from there, another output=... "
            "or remove the folder"
        )
    if record.is_file():
        old = _with_defaults(recorded(run.output)["run"])
        differing = [name for name in _differences(old, as_tree(run)) if not name.startswith(MAY_CHANGE + SHARES_OF_BATCH)]
        differing = [name for name in differing if not _same_engine(name, run)]
        if "steps" in differing and run.steps > old["steps"]:
            differing.remove("steps")
        if differing == ["steps"]:
            raise ValueError(f"{run.output} holds a run of {old['steps']} steps, which can get more but not fewer (steps={run.steps})")
        if differing:
            raise ValueError(
                f"{run.output} holds another run (it differs in {', '.join(differing)}); give another output=... or remove the folder"
            )
    elif run.output.is_dir() and any(_is_anothers(path.name) for path in run.output.iterdir()):
        raise ValueError(f"{run.output} is not empty and holds no run; give another output=...")


def recorded(output: Path) -> dict[str, Any]:
    """run.json of a run folder. Raises ValueError when there is none or it is damaged."""
    path = output / "run.json"
    if not path.is_file():
        raise ValueError(f"no run at {output} (no run.json)")
    record = read_json(path)
    if not isinstance(record.get("run"), dict):
        raise ValueError(f"{path} holds no run; give another output=... or remove the folder")
    return record


def _is_anothers(name: str) -> bool:
    """Systems leave hidden files anywhere; they belong to nobody."""
    return name not in MAY_BE_THERE and not name.startswith(".")


def _check_can_be_made(output: Path) -> None:
    """Raises ValueError unless files can be written into the folder, or into the nearest one above it that exists."""
    try:
        place = nearest(output)
        if output.is_symlink() and not output.exists():
            raise ValueError(f"output {output} is a link to nothing; give another output=...")
        if not place.is_dir():
            raise ValueError(f"output {output} cannot be made: {place} is a file, not a folder; give another output=...")
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(f"output {output} cannot be written: {error.strerror} ({error.filename}); give another output=...") from None


def _with_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """A recorded run with the keys that later versions added; as it is where this version does not know it any more."""
    try:
        return as_tree(Run.model_validate(tree))
    except ValidationError:
        return tree


def open_output(run: Run, started: float) -> int | None:
    """Lock the run folder for as long as the ranks live, claim it by writing the resolved run into it, and clear what attempts before
    `started` said of their end. Returns the steps that the run had until now where it is given more. Collective.

    Raises ValueError on every rank where the folder is not this run's, or another training holds it.
    """
    steps_before = distributed.on_rank_0(partial(_claim, run, started))
    if distributed.rank() != 0:
        lock.join(run.output, distributed.rank())
    distributed.barrier()
    return steps_before


def _claim(run: Run, started: float) -> int | None:
    check_output(run)
    _check_global_batch(run)
    with writing(run.output, "the run"):
        run.output.mkdir(parents=True, exist_ok=True)
    handle = lock.take(run.output)
    check_output(run)  # again: of what happened while another training held it
    _check_global_batch(run)
    clear(run.output, started)
    steps_before = None
    if not (run.output / "run.json").is_file():
        resolved = {"run": as_tree(run), "versions": versions(), "world_size": distributed.world_size(), "engines": _engines(run)}
        write_record(run, resolved)
    elif run.steps > recorded(run.output)["run"]["steps"]:
        steps_before = _prolong(run)
    _add_attempt(run)
    reopen(run)
    lock.let_ranks_in(run.output, handle)
    return steps_before


def _add_attempt(run: Run) -> None:
    """Record that the run starts, or goes on: after which step, on how many ranks of which machine, how many of them to a batch."""
    record = recorded(run.output)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    ranks = {"ranks": distributed.world_size(), "sequence_parallel": run.sequence_parallel}
    place = ranks | {"host": socket.gethostname(), "device": device}
    attempt = {"after_step": _latest_step(run), "since": time.strftime("%F %T %z")} | place
    write_record(run, record | {"attempts": [*record.get("attempts", []), attempt]})


def _latest_step(run: Run) -> int:
    return next((saved.step for saved in checkpoint.all_saved(run.output) if saved.is_latest), 0)


def _prolong(run: Run) -> int:
    """Record that a run has more steps now; returns those that it had."""
    record = recorded(run.output)
    before = record["run"]["steps"]
    record["run"]["steps"] = run.steps
    record["prolonged"] = [*record.get("prolonged", []), {"after_step": _latest_step(run), "from": before, "to": run.steps}]
    write_record(run, record)
    return before


def reopen(run: Run) -> None:
    """A run that has steps to do is not done: job scripts look at the file alone."""
    if (run.output / DONE).is_file() and run.steps > _done_steps(run):
        (run.output / DONE).unlink()


def write_record(run: Run, record: dict[str, Any]) -> None:
    checkpoint.write_durably(run.output / "run.json", json.dumps(record, indent=1))


def _done_steps(run: Run) -> int:
    """Steps of a finished run; done.json of other versions may not say."""
    return read_json(run.output / DONE).get("steps", run.steps)


def _engines(run: Run) -> dict[str, Any]:
    """What the files of the engines say."""
    files = {who: model.deepspeed for who, model in (("student", run.student), ("teacher", run.teacher)) if model is not None}
    return {who: read_json(file) for who, file in files.items() if file.is_file()}


def _same_engine(name: str, run: Run) -> bool:
    """Whether the path of an engine's file is another, but not what the file says: one that is shipped lies where laid_ds is installed."""
    who, _, key = name.partition(".")
    recorded_now = recorded(run.output).get("engines", {}).get(who), _engines(run).get(who)
    return key == "deepspeed" and None not in recorded_now and recorded_now[0] == recorded_now[1]


def versions() -> dict[str, str]:
    """Of everything that decides the numbers of a run."""
    return {name: version(name) for name in ("laid-ds", "torch", "transformers", "deepspeed")}


def _check_global_batch(run: Run) -> None:
    """Raises ValueError unless a run goes on with as many samples per step as it began with, on whatever number of ranks."""
    record = run.output / "run.json"
    if not record.is_file():
        return
    began = recorded(run.output)
    before = _shares(_with_defaults(began["run"]), began["world_size"])
    now = _shares(as_tree(run), distributed.world_size())
    if before.samples != now.samples:
        names = "data.micro_batch {} x optimizer.accumulation {} x {} ranks / sequence_parallel {}".format(*before)
        raise ValueError(
            f"{run.output} began with {before.samples} samples per step ({names}), these are {now.samples}"
            f" ({now.micro_batch} x {now.accumulation} x {now.ranks} / {now.sequence_parallel}); keep the product the same"
        )


class _Shares(NamedTuple):
    """Of what the samples of a step are the product."""

    micro_batch: int
    accumulation: int
    ranks: int
    sequence_parallel: int

    @property
    def samples(self) -> int:
        return self.micro_batch * self.accumulation * self.ranks // self.sequence_parallel


def _shares(tree: dict[str, Any], ranks: int) -> _Shares:
    """tree: a resolved run; of a version that did not know sequence_parallel, too."""
    return _Shares(tree["data"]["micro_batch"], tree["optimizer"]["accumulation"], ranks, tree.get("sequence_parallel", 1))


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the values in which two resolved runs differ."""
    names = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            names += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            names.append(prefix + key)
    return names
