"""Ranks on this machine: DeepSpeed's launcher or torchrun, started, asked to stop, and waited for.

On this machine only, and on the devices that the user made visible: host files, DeepSpeed's environment files, and what other launchers
have left in the environment are not for these ranks.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise

import psutil
import torch

from laid_ds.parent import adopt_orphans, end_with
from laid_ds.runtime.environment import DEVICES, without_ranks
from laid_ds.runtime.launchers import MODULE, STARTED_BY

LAUNCHERS = ("deepspeed", "torchrun")
LAUNCH = """import sys
from deepspeed.utils import logger
for handler in logger.handlers:
    handler.setStream(sys.stderr)
from deepspeed.launcher.launch import main
main()"""
"""DeepSpeed's launcher of one machine; what it says of a rank that failed is no part of a rank's output, which may be JSON."""


def launch(words: Sequence[str], ranks: int | None = None, port: int = 0, launcher: str = "deepspeed", module: str = MODULE) -> int:
    """Run a module (by default: train RECIPE [section.key=value ...]) with these words in `ranks` processes (default: one per GPU, or 1),
    as `python -m`; the launcher's exit status.

    Port 0 takes a free one. Ctrl-C, SIGTERM and a closed terminal reach the ranks, which save and leave; we wait for them. Should this
    process, the launcher or a rank be killed, none of the others stays behind.
    Raises ValueError for an unknown launcher and for more ranks than there are GPUs.
    """
    gpus = torch.cuda.device_count()
    ranks = ranks or gpus or 1
    environment = without_ranks(os.environ)
    if not gpus:
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    elif environment.get("DS_ACCELERATOR") != "cpu":
        _check_gpus(ranks, gpus)
    command = [*_launcher(launcher, ranks, port or free_port(), module), *words]
    process: subprocess.Popen | None = None
    received: list[int] = []

    def pass_on(number: int, frame) -> None:
        received.append(number)
        if process is not None:
            _stop_ranks(process.pid, module)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, pass_on)
    adopt_orphans()
    environment[STARTED_BY] = str(os.getpid())
    process = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=partial(end_with, os.getpid()))
    if received:
        _stop_ranks(process.pid, module)
    status = process.wait()
    _end_orphans()
    if status < 0 and not received:
        sys.stderr.write(f"laid: {signal.Signals(-status).name} ended the launcher; the same command goes on from the newest checkpoint\n")
    return 128 + received[0] if received else 128 - status if status < 0 else status


def _check_gpus(ranks: int, gpus: int) -> None:
    if ranks > gpus:
        chosen = "".join(f" ({name}={os.environ[name]})" for name in DEVICES if name in os.environ)
        raise ValueError(f"{ranks} ranks need {ranks} GPUs, but {gpus} can be used here{chosen}; give --ranks {gpus} or fewer")


def _launcher(name: str, ranks: int, port: int, module: str = MODULE) -> list[str]:
    """The command line up to the words. Raises ValueError for an unknown launcher."""
    if name == "deepspeed":  # the launcher before this one looks for other machines
        slots = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(ranks))}).encode()).decode()
        place = [f"--world_info={slots}", "--master_addr=127.0.0.1", f"--master_port={port}"]
        start = ["-c", LAUNCH, "--quiet", "--no_local_rank", "--no_python", *place]
        return [sys.executable, "-u", *start, *_as_chosen(os.environ), sys.executable, "-u", "-m", module]
    if name == "torchrun":
        place = ["--nnodes=1", f"--nproc-per-node={ranks}", "--master-addr=127.0.0.1", f"--master-port={port}", "--max-restarts=0"]
        return [sys.executable, "-m", "torch.distributed.run", *place, "--module", module]
    raise ValueError(f"launcher {name!r}: choose one of {', '.join(LAUNCHERS)}")


def _as_chosen(environ: Mapping[str, str]) -> list[str]:
    """Words before a rank's command that give back the visible devices, which DeepSpeed's launcher numbers anew from 0."""
    unset = [word for name in DEVICES if name not in environ for word in ("-u", name)]
    return ["env", *unset, *(f"{name}={environ[name]}" for name in DEVICES if name in environ)]


def _stop_ranks(launcher: int, module: str) -> None:
    """Ask the ranks themselves to save and leave: the launcher, if it were asked, would kill them after 30 seconds."""
    with suppress(psutil.NoSuchProcess):  # what has ended needs no asking
        processes = {p.pid: p for p in psutil.Process(launcher).children(recursive=True)}
        alike = {pid for pid, p in processes.items() if _is_rank(p, module)}
        ranks = [processes[pid] for pid in alike if processes[pid].ppid() not in alike]  # a rank's own children look like it
        for process in ranks or [psutil.Process(launcher)]:
            with suppress(psutil.NoSuchProcess):  # it may have ended just now; the others are asked all the same
                process.send_signal(signal.SIGINT)


def _end_orphans() -> None:
    """A launcher that ends as it should leaves none; of one that was killed, those that had just begun may be left."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _is_rank(process: psutil.Process, module: str) -> bool:
    with suppress(psutil.NoSuchProcess):
        return ("-m", module) in pairwise(process.cmdline())
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
