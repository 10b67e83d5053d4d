"""What a launcher tells a rank, in environment variables, brought into one form before anything reads it. Standard library only.

Under `srun python -m laid_ds.train` SLURM numbers the processes itself: its variables become RANK, WORLD_SIZE and the rest. Whatever else
started the process (torchrun, deepspeed) must have counted all tasks of the SLURM step: several trainings of fewer ranks, side by side,
is what a missing variable would silently give. A part of SLURM's variables, or what is no number, is refused by name.
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
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
DEVICES = (
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "ASCEND_RT_VISIBLE_DEVICES",
    "MLU_VISIBLE_DEVICES",
    "SDAA_VISIBLE_DEVICES",
    "SUPA_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
)
"""Where a user, or SLURM, says which devices of a machine may be used: those of every accelerator that DeepSpeed knows, and AMD's own."""
NO_DEVICES = ("", "-1", "NoDevFiles")  # the last is SLURM's, for a job without GPUs
OF_RANKS = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_(RANK|SIZE|WORLD_SIZE)|NODE_RANK|(GROUP|ROLE|CROSS)_(RANK|SIZE|WORLD_SIZE|NAME)|MASTER_(ADDR|PORT)"
    r"|TORCHELASTIC_(RUN_ID|RESTART_COUNT|MAX_RESTARTS|USE_AGENT_STORE|ERROR_FILE)|(PET|OMPI_COMM_WORLD|MV2_COMM_WORLD|PMI|PMIX|PALS)_\w+"
    r"|MPI_LOCAL(RANKID|NRANKS)"
)
"""What launchers tell the ranks that they start (torchrun also reads its own options from PET_*)."""
NOT_SLURM = "where SLURM has no part in this run, unset its variables (bash: unset ${!SLURM_@})"


def hostnames(node_list: str) -> list[str]:
    """The nodes of a compressed list such as n[0-3]. Raises ValueError where SLURM's command is missing, as in a container."""
    try:
        found = subprocess.run(["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"`scontrol show hostnames {node_list}` failed ({error}); set MASTER_ADDR to the name of the first node") from None
    return found.stdout.split()


def bridge(environ: Mapping[str, str], hostnames: Callable[[str], list[str]] = hostnames) -> dict[str, str]:
    """The variables to add so that a rank started by SLURM looks as one started by any launcher; empty where nothing is to be added.

    Raises ValueError when the number of ranks is not what SLURM started, or a variable is missing or no number: one sentence, with the
    way out.
    """
    added = _of_slurm(environ, hostnames) if {"SLURM_JOB_ID", "SLURM_STEP_ID"} & environ.keys() else {}
    _check_numbers({**environ, **added})
    return added


def without_ranks(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for a launcher: without what another launcher has told this process, which would disturb the ranks."""
    return {name: value for name, value in environ.items() if not OF_RANKS.fullmatch(name)}


def open_rank_log(environ: Mapping[str, str]) -> None:
    """From here on this rank writes into its own file, if LAID_RANK_LOGS names a folder. Later attempts append.

    Raises ValueError when the file cannot be made.
    """
    if RANK_LOGS not in environ:
        return
    path = Path(environ[RANK_LOGS]) / f"rank-{int(environ.get('RANK', 0)):04d}.log"
    try:
        file = path.open("ab", buffering=0)
    except OSError as error:
        raise ValueError(f"{RANK_LOGS} names a folder for the logs of the ranks, but {path} cannot be made: {error.strerror}") from None
    with file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


def _of_slurm(environ: Mapping[str, str], hostnames: Callable[[str], list[str]]) -> dict[str, str]:
    if _number(environ, "SLURM_STEP_ID", SPECIAL_STEPS) >= SPECIAL_STEPS:
        _check_outside_step(environ)
        return {}
    if "RANK" in environ:
        _check_launcher(environ)
        return {}
    return _ranks_of_step(environ, hostnames)


def _text(environ: Mapping[str, str], name: str) -> str:
    if name not in environ:
        known = ", ".join(sorted({"SLURM_JOB_ID", "SLURM_STEP_ID"} & environ.keys()))
        raise ValueError(f"{name} is not set, but {known} is, so SLURM tells only a part; start the ranks with srun, or, {NOT_SLURM}")
    return environ[name]


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    if name not in environ and default is not None:
        return default
    text = _text(environ, name)
    if not re.fullmatch("[0-9]{1,18}", text):
        way_out = f"start the ranks with srun, or, {NOT_SLURM}" if name.startswith("SLURM") else "a launcher sets it: leave it to one"
        raise ValueError(f"{name} is {text!r}, not a whole number; {way_out}")
    return int(text)


def _check_numbers(environ: Mapping[str, str]) -> None:
    """What DeepSpeed and torch would turn into numbers without looking."""
    given = {name: _number(environ, name) for name in NUMBERS if name in environ}
    for number, of in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if number in given and given[number] >= given.get(of, given[number] + 1):
            raise ValueError(f"{number} is {given[number]}, but {of} is {given[of]}; a launcher sets both: leave them to one")
    if given.get("MASTER_PORT", 0) > 65535:
        raise ValueError(f"MASTER_PORT is {given['MASTER_PORT']}; ports end at 65535")


def _check_outside_step(environ: Mapping[str, str]) -> None:
    nodes, tasks = _number(environ, "SLURM_JOB_NUM_NODES", 1), _number(environ, "SLURM_NTASKS", 1)
    if "RANK" not in environ and max(nodes, tasks) > 1:
        raise ValueError(
            f"this process alone would train, but the SLURM job has {nodes} nodes and {tasks} tasks; "
            "start the ranks with `srun python -m laid_ds.train RECIPE`, or let `laid-launch slurm RECIPE` write the job"
        )


def _check_launcher(environ: Mapping[str, str]) -> None:
    """Every task is a launcher that counts all launchers, or every task is a rank that counts all ranks."""
    tasks, world = _number(environ, "SLURM_STEP_NUM_TASKS"), environ.get("WORLD_SIZE", "not set")
    groups = [environ[name] for name in GROUPS if name in environ]
    alone = [number for number in groups[:1] or [world] if number != str(tasks)]
    if alone:
        counted = f"its launcher counts {alone[0]} node(s)" if groups else f"WORLD_SIZE is {world}"
        raise ValueError(
            f"the SLURM step has {tasks} tasks, but for this process {counted}: they would train apart; start one launcher per node and "
            "give each the number of nodes (torchrun --nnodes, deepspeed --hostfile --no_ssh --node_rank), or use srun alone"
        )


def _ranks_of_step(environ: Mapping[str, str], hostnames: Callable[[str], list[str]]) -> dict[str, str]:
    rank, local_rank, node = (_number(environ, name) for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"))
    tasks, per_node = _number(environ, "SLURM_STEP_NUM_TASKS"), _tasks_per_node(_text(environ, "SLURM_STEP_TASKS_PER_NODE"))
    if environ.get("WORLD_SIZE", str(tasks)) != str(tasks):
        raise ValueError(f"WORLD_SIZE is {environ['WORLD_SIZE']}, but the SLURM step has {tasks} tasks; do not set it, srun counts")
    local = per_node[node] if node < len(per_node) else 0
    if rank >= tasks or local_rank >= local:
        raise ValueError(
            f"SLURM contradicts itself: task {rank} of {tasks}, the {local_rank}. of node {node}, in a step of {per_node} tasks per node; "
            f"start the ranks with srun, or, {NOT_SLURM}"
        )
    _check_gpus(environ, local)
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local),
        "LOCAL_SIZE": str(local),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or _first_node(environ, hostnames),
        "MASTER_PORT": environ.get("MASTER_PORT") or _port(environ),
    }


def _first_node(environ: Mapping[str, str], hostnames: Callable[[str], list[str]]) -> str:
    node_list = _text(environ, "SLURM_STEP_NODELIST")
    names = hostnames(node_list)
    if not names:
        raise ValueError(f"SLURM names no node in SLURM_STEP_NODELIST={node_list!r}; set MASTER_ADDR to the name of the first node")
    return names[0]


def _port(environ: Mapping[str, str]) -> str:
    """The same for all ranks of an attempt, another for the next."""
    job, step = _number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID")
    return str(10000 + (31 * job + 7 * step + _number(environ, "SLURM_RESTART_COUNT", 0)) % 20000)


def _tasks_per_node(text: str) -> list[int]:
    """SLURM writes 2(x3),1 for 2, 2, 2, 1."""
    parts = [re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part) for part in text.split(",")]
    if not all(parts):
        raise ValueError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}, not a list such as 2(x3),1; start the ranks with srun, or, {NOT_SLURM}")
    return [int(part[1]) for part in parts for _ in range(int(part[2] or 1))]


def _check_gpus(environ: Mapping[str, str], local: int) -> None:
    for variable in DEVICES:
        visible = [name for name in environ.get(variable, "").split(",") if name not in NO_DEVICES]
        if visible and len(visible) < local:
            raise ValueError(
                f"{local} ranks on this node see only {len(visible)} GPU(s) ({variable}={','.join(visible)}); "
                "ask SLURM for --gpus-per-node, not --gpus-per-task: each rank picks its own by LOCAL_RANK"
            )
