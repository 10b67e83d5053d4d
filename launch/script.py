"""The batch script of a job, as text: what SLURM is asked for, what differs between jobs, and the bash of `launch/bash/`.

How an attempt ended is read from files in the run folder (laid_ds/runtime/stop.py), never from an exit status: launchers lose those.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.job import Job, is_one_line
from launch.secrets import forms_of_secrets

BASH = Path(__file__).with_name("bash")


@dataclass(frozen=True)
class Program:
    """What the ranks run, and how a job sees that they came further."""

    module: str
    newest: str
    """Bash that prints what is newest in the folder $run: the same as before where nothing was added."""
    gain: str
    """What is newer then."""
    passes_on: str
    """The file of bash that runs the launcher of a node, and tells the ranks of signals."""


TRAINING = Program("laid_ds.train", 'cat "$run/checkpoints/latest" 2> /dev/null', "newer checkpoint", "forward")
EVALUATION = Program(
    "laid_ds.cli", 'echo "lines of answers: $(cat "${run%.job}.answers.jsonl"* 2> /dev/null | wc -l)"', "further answer", "end_launcher"
)


@dataclass(frozen=True)
class Target:
    """What the job does: a training, or an evaluation."""

    name: str
    output: Path
    """The run folder as the recipe names it; of a sweep, the folder of its runs 0, 1, ...; of an evaluation, X.job beside its X.json."""
    folder: Path
    """The folder to start in; relative paths begin there."""
    words: tuple[str, ...]
    """Overrides of the recipe, or what follows `laid eval`."""
    python: str
    program: Program = TRAINING

    @property
    def run(self) -> Path:
        return self.folder / self.output

    @property
    def launch(self) -> Path:
        return self.run / "launch"

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of the program."""
        return (str(self.launch / "recipe.toml") if self.program == TRAINING else "eval", *self.words)

    @property
    def written(self) -> Path:
        """The folder into which the ranks write: the results of an evaluation lie beside its job's."""
        return self.run if self.program == TRAINING else self.run.parent


def render(job: Job, target: Target) -> str:
    """The script. Raises ValueError for what a script cannot hold: paths or overrides of several lines, secrets."""
    _check(job, target)
    lines = ["#!/bin/bash", *(f"#SBATCH {line}" for line in _requests(job, target)), "", *_differences(job, target)]
    begin = _bash("begin", newest=target.program.newest, gain=target.program.gain)
    return "\n".join([*lines, "", begin, _on_nodes(job, target), _bash("end")])


def _check(job: Job, target: Target) -> None:
    words = [*target.words, *(word for element in job.sweep for word in element)]
    for text in (target.name, str(target.run), str(target.folder), target.python, *words):
        if not is_one_line(text) or text != text.strip():
            raise ValueError(f"{text!r} cannot stand in a job script: one line of printable text is needed, without spaces at its ends")
    found = forms_of_secrets("\n".join(words))
    if found:
        raise ValueError(
            f"a word of the command holds {found[0]}, which would be written into files; give it by an environment variable or a file"
        )
    if job.container != "none" and any(mark in str(path) for path in (target.written, target.folder) for mark in ",:"):
        raise ValueError(f"{target.written}: a folder that is mounted into a container may not hold a comma or a colon")


def _requests(job: Job, target: Target) -> list[str]:
    """Options of sbatch. In file names, SLURM replaces what follows a percent sign."""
    log = str(target.launch / "logs" / ("job-%A_%a.log" if job.sweep else "job.log"))
    folder = str(target.launch).replace("%", "%%")
    options = {
        "job-name": target.name,
        "chdir": str(target.folder),
        "output": log.replace(str(target.launch), folder),
        "open-mode": "append",
        "account": job.account,
        "partition": job.partition,
        "qos": job.qos,
        "constraint": job.constraint,
        "nodes": str(job.nodes),
        "ntasks-per-node": str(job.tasks),
        "gpus-per-node": str(job.gpus_per_node) if job.gpus_per_node else None,
        "cpus-per-task": str(job.cpus_per_rank * job.ranks // job.tasks) if job.cpus_per_rank else None,
        "mem": job.mem,
        "time": job.time,
        "signal": f"B:{job.signal}@{job.lead_seconds}",
        "array": f"0-{len(job.sweep) - 1}" + (f"%{job.parallel}" if job.parallel else "") if job.sweep else None,
        "dependency": "singleton" if job.chain > 1 else job.dependency,
    }
    return [f"--{name}={_slurm_quote(value)}" for name, value in options.items() if value is not None] + ["--requeue", *job.extra]


def _slurm_quote(text: str) -> str:
    if all(mark.isalnum() or mark in "/._-:@%,=+[]" for mark in text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _differences(job: Job, target: Target) -> list[str]:
    lines = [
        f"run={_quote(str(target.run))}" + ('"/$SLURM_ARRAY_TASK_ID"' if job.sweep else ""),
        f"arguments=({_words(target.arguments)})",
        f"signal={job.signal} max_restarts={job.max_restarts} max_crashes={job.max_crashes}",
    ]
    if job.sweep:
        lines += ["case $SLURM_ARRAY_TASK_ID in", *map(_element, range(len(job.sweep)), job.sweep), "esac"]
        lines += [f'arguments+=({_quote(f"output={target.output}")}"/$SLURM_ARRAY_TASK_ID")']
    if target.program == EVALUATION:
        lines += ["export LAID_JOB_FOLDER=$run"]
    if job.setup:
        lines += ["", "# Setup, as given.", *job.setup]
    return lines


def _element(number: int, overrides: Sequence[str]) -> str:
    return f"  {number}) arguments+=({_words(overrides)}) ;;"


def _quote(text: str) -> str:
    """A word of bash. What single quotes cannot hold, or would seem to have forgotten to expand, stands in double quotes."""
    if re.search("['$`]", text):
        return '"' + re.sub(r'([\\"$`])', r"\\\1", text) + '"'
    return f"'{text}'" if "," in text else shlex.quote(text)


def _words(texts: Iterable[str]) -> str:
    return " ".join(map(_quote, texts))


def _on_nodes(job: Job, target: Target) -> str:
    """The part that starts the ranks."""
    options, prefix = _container(job, target)
    srun = f"srun --kill-on-bad-exit=1 --wait=60{options}"
    run = {"python": _words([*prefix, target.python]), "module": target.program.module}
    if job.launcher == "srun":
        return _bash("srun", srun=srun, **run)
    starts = {
        "torchrun": _bash("torchrun", nodes=job.nodes, ranks_per_node=job.ranks, shutdown_seconds=job.lead_seconds, **run),
        "deepspeed": _bash("deepspeed", **run),
    }
    start = shlex.quote("\n" + starts[job.launcher] + _bash(target.program.passes_on))
    hostfile = _bash("hostfile", ranks_per_node=job.ranks) if job.launcher == "deepspeed" else ""
    return _bash("node") + hostfile + _bash("on_node", start=start, srun=srun)


def _container(job: Job, target: Target) -> tuple[str, list[str]]:
    """(options of srun, words before the interpreter)."""
    folders = [target.folder] if target.written.is_relative_to(target.folder) else [target.folder, target.written]
    mounts = [*(f"{path}:{path}" for path in folders), *job.mount]
    if job.container == "pyxis":
        options = [f"--container-image={job.image}", f"--container-mounts={','.join(mounts)}", f"--container-workdir={target.folder}"]
        return " " + _words(options), []
    if job.container == "apptainer":
        gpus = ["--nv"] if job.gpus_per_node else []
        binds = [word for mount in mounts for word in ("--bind", mount)]
        return "", ["apptainer", "exec", *gpus, *binds, "--pwd", str(target.folder), job.image]
    return "", []


def _bash(name: str, **values: str | int) -> str:
    """A file of launch/bash below its head (the lines up to the first empty one); each @name@ in it is replaced by that value."""
    text = (BASH / f"{name}.sh").read_text(encoding="utf-8").split("\n\n", 1)[1]
    return re.sub(r"@(\w+)@", lambda mark: str(values[mark[1]]), text)
