"""What a launcher tells a rank, in environment variables, brought into one form before anything reads it. Standard library only.

Under `srun python -m laid_ds.train` SLURM numbers the processes itself: its variables become RANK, WORLD_SIZE and the rest. Whatever else
started the process (torchrun, deepspeed) must have counted all tasks of the SLURM step: several trainings of fewer ranks, side by side,
is what a missing variable would silently give.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

RANK_LOGS = "LAID_RANK_LOGS"
GROUPS = ("GROUP_WORLD_SIZE", "CROSS_SIZE")  # number of launchers, as torchrun and as deepspeed tell it
SPECIAL_STEPS = 0xFFFFFFF0  # from here on a step id stands for a batch script or a login, not for a step of ranks


def hostnames(node_list: str) -> list[str]:
    """The nodes of a compressed list such as n[0-3]. Raises ValueError where SLURM's command is missing, as in a container."""
    try:
        found = subprocess.run(["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"`scontrol show hostnames {node_list}` failed ({error}); set MASTER_ADDR to the name of the first node") from None
    return found.stdout.split()


def bridge(environ: Mapping[str, str], hostnames: Callable[[str], list[str]] = hostnames) -> dict[str, str]:
    """The variables to add so that a rank started by SLURM looks as one started by any launcher; empty where nothing is to be added.

    Raises ValueError when the number of ranks is not what SLURM started: one sentence, with the way out.
    """
    if "SLURM_JOB_ID" not in environ:
        return {}
    if int(environ.get("SLURM_STEP_ID", SPECIAL_STEPS)) >= SPECIAL_STEPS:
        _check_outside_step(environ)
        return {}
    if "RANK" in environ:
        _check_launcher(environ)
        return {}
    return _ranks_of_step(environ, hostnames)


def open_rank_log(environ: Mapping[str, str]) -> None:
    """From here on this rank writes into its own file, if LAID_RANK_LOGS names a folder. Later attempts append."""
    if RANK_LOGS in environ:
        path = Path(environ[RANK_LOGS]) / f"rank-{int(environ.get('RANK', 0)):04d}.log"
        with path.open("ab", buffering=0) as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)


def _check_outside_step(environ: Mapping[str, str]) -> None:
    nodes, tasks = int(environ.get("SLURM_JOB_NUM_NODES", 1)), int(environ.get("SLURM_NTASKS", 1))
    if "RANK" not in environ and max(nodes, tasks) > 1:
        raise ValueError(
            f"this process alone would train, but the SLURM job has {nodes} nodes and {tasks} tasks; "
            "start the ranks with `srun python -m laid_ds.train RECIPE`, or let `laid-launch slurm RECIPE` write the job"
        )


def _check_launcher(environ: Mapping[str, str]) -> None:
    """Every task is a launcher that counts all launchers, or every task is a rank that counts all ranks."""
    tasks, world = int(environ["SLURM_STEP_NUM_TASKS"]), environ.get("WORLD_SIZE", "not set")
    groups = [environ[name] for name in GROUPS if name in environ]
    alone = [number for number in groups[:1] or [world] if number != str(tasks)]
    if alone:
        counted = f"its launcher counts {alone[0]} node(s)" if groups else f"WORLD_SIZE is {world}"
        raise ValueError(
            f"the SLURM step has {tasks} tasks, but for this process {counted}: they would train apart; start one launcher per node and "
            "give each the number of nodes (torchrun --nnodes, deepspeed --hostfile --no_ssh --node_rank), or use srun alone"
        )


def _ranks_of_step(environ: Mapping[str, str], hostnames: Callable[[str], list[str]]) -> dict[str, str]:
    tasks, node = environ["SLURM_STEP_NUM_TASKS"], int(environ["SLURM_NODEID"])
    if environ.get("WORLD_SIZE", tasks) != tasks:
        raise ValueError(f"WORLD_SIZE is {environ['WORLD_SIZE']}, but the SLURM step has {tasks} tasks; do not set it, srun counts")
    local = _tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])[node]
    _check_gpus(environ, local)
    job, step, restarts = (int(environ.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(local),
        "LOCAL_SIZE": str(local),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or hostnames(environ["SLURM_STEP_NODELIST"])[0],
        "MASTER_PORT": environ.get("MASTER_PORT") or str(10000 + (31 * job + 7 * step + restarts) % 20000),
    }


def _tasks_per_node(text: str) -> list[int]:
    """SLURM writes 2(x3),1 for 2, 2, 2, 1."""
    counts = []
    for part in text.split(","):
        number, times = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part).groups()
        counts += [int(number)] * int(times or 1)
    return counts


def _check_gpus(environ: Mapping[str, str], local: int) -> None:
    visible = [name for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if visible and len(visible) < local:
        raise ValueError(
            f"{local} ranks on this node see only {len(visible)} GPU(s) (CUDA_VISIBLE_DEVICES={','.join(visible)}); "
            "ask SLURM for --gpus-per-node, not --gpus-per-task: each rank picks its own by LOCAL_RANK"
        )
