"""The options of a job, which `laid-launch slurm` and `laid-launch eval` share (job.py says what they are)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def option(text: str) -> Any:
    return typer.Option(help=text, show_default=False)


Site = Annotated[Path | None, option("TOML file with this cluster's values of the options below (names with _).")]
Launcher = Annotated[str | None, option("srun (default: one task per rank), torchrun or deepspeed (one task per node).")]
Nodes = Annotated[int | None, option("Nodes; default 1.")]
GpusPerNode = Annotated[int | None, option("GPUs of each node, one rank each.")]
RanksPerNode = Annotated[int | None, option("Ranks of each node, where it has no GPUs.")]
CpusPerRank = Annotated[int | None, option("CPUs of each rank.")]
Mem = Annotated[str | None, option("Memory of each node, such as 200G.")]
Time = Annotated[str | None, option("Time limit, such as 24:00:00.")]
Account = Annotated[str | None, option("Account.")]
Partition = Annotated[str | None, option("Partition.")]
Qos = Annotated[str | None, option("Quality of service.")]
Constraint = Annotated[str | None, option("Features that nodes must have.")]
Dependency = Annotated[str | None, option("singleton, afterok:123, ...")]
Signal = Annotated[str | None, option("Warning signal: USR1 (default) or USR2.")]
LeadSeconds = Annotated[int | None, option("Seconds from the warning to the time limit; default 180.")]
MaxRestarts = Annotated[int | None, option("Restarts in all; default 50.")]
MaxCrashes = Annotated[int | None, option("Restarts in a row after failures, without a newer checkpoint or answer; default 2.")]
Chain = Annotated[int | None, option("Submit so many times, each going on from the last; for clusters that never requeue.")]
Container = Annotated[str | None, option("none, pyxis or apptainer.")]
Image = Annotated[str | None, option("Image of the container.")]
Mount = Annotated[list[str] | None, option("SOURCE:TARGET to mount beside the run and this folder.")]
Python = Annotated[str | None, option("Interpreter of the ranks; default: this one, or the container's python3.")]
Setup = Annotated[list[str] | None, option("Line of bash before the ranks start; may be given more than once.")]
Extra = Annotated[list[str] | None, option("Further option of sbatch, such as --extra=--exclude=n3.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the script and do nothing.")]
TestOnly = Annotated[bool, typer.Option("--test-only", help="Ask SLURM whether it would take the script.")]
Check = Annotated[bool, typer.Option(help="Look at shards and models before submitting.")]
