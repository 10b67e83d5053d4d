"""Ranks on this machine: DeepSpeed's launcher or torchrun, started, asked to stop, and waited for."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise

import psutil
import torch

LAUNCHERS = ("deepspeed", "torchrun")
RANK = ("-m", "laid_ds.train")  # how both launchers start a rank


def launch(words: Sequence[str], ranks: int | None = None, port: int = 0, launcher: str = "deepspeed") -> int:
    """Train RECIPE [section.key=value ...] with `ranks` processes (default: one per GPU, or 1); the launcher's exit status.

    Port 0 takes a free one. Ctrl-C and SIGTERM reach the ranks, which save and leave; we wait for them.
    """
    gpus = torch.cuda.device_count()
    ranks = ranks or gpus or 1
    environment = dict(os.environ)
    if not gpus:
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    command = [*_launcher(launcher, ranks, port or _free_port()), *words]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    received: list[int] = []

    def pass_on(number: int, frame) -> None:
        received.append(number)
        _stop_ranks(process.pid)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    status = process.wait()
    return 128 + received[0] if received else status


def _launcher(name: str, ranks: int, port: int) -> list[str]:
    """The command line up to the recipe. Raises ValueError for an unknown launcher."""
    if name == "deepspeed":
        options = ["--quiet", "--num_gpus", str(ranks), "--master_port", str(port), "--no_local_rank", "--module", "laid_ds.train"]
        return [sys.executable, "-m", "deepspeed.launcher.runner", *options]
    if name == "torchrun":
        place = ["--nnodes=1", f"--nproc-per-node={ranks}", "--master-addr=127.0.0.1", f"--master-port={port}", "--max-restarts=0"]
        return [sys.executable, "-m", "torch.distributed.run", *place, "--module", "laid_ds.train"]
    raise ValueError(f"launcher {name!r}: choose one of {', '.join(LAUNCHERS)}")


def _stop_ranks(launcher: int) -> None:
    """Ask the ranks themselves to save and leave: the launcher, if it were asked, would kill them after 30 seconds."""
    processes = {p.pid: p for p in psutil.Process(launcher).children(recursive=True)}
    alike = {pid for pid, p in processes.items() if _is_rank(p)}
    ranks = [processes[pid] for pid in alike if processes[pid].ppid() not in alike]  # a rank's own children look like it
    for process in ranks or [psutil.Process(launcher)]:
        process.send_signal(signal.SIGINT)


def _is_rank(process: psutil.Process) -> bool:
    words = process.cmdline()
    return RANK in pairwise(words)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
