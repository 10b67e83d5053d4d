"""The batch script of a job, as text: what SLURM is asked for, what differs between jobs, and a part that is always the same.

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


@dataclass(frozen=True)
class Target:
    """What the job trains."""

    name: str
    output: Path
    """The run folder as the recipe names it; of a sweep, the folder of its runs 0, 1, ..."""
    folder: Path
    """The folder to start in; relative paths of the recipe begin there."""
    overrides: tuple[str, ...]
    python: str

    @property
    def run(self) -> Path:
        return self.folder / self.output

    @property
    def launch(self) -> Path:
        return self.run / "launch"


def render(job: Job, target: Target) -> str:
    """The script. Raises ValueError for what a script cannot hold: paths or overrides of several lines, secrets."""
    _check(job, target)
    lines = ["#!/bin/bash", *(f"#SBATCH {line}" for line in _requests(job, target)), "", *_differences(job, target)]
    return "\n".join(lines) + "\n" + BEGIN + _on_nodes(job, target) + END


def _check(job: Job, target: Target) -> None:
    words = [*target.overrides, *(word for element in job.sweep for word in element)]
    for text in (target.name, str(target.run), str(target.folder), target.python, *words):
        if not is_one_line(text) or text != text.strip():
            raise ValueError(f"{text!r} cannot stand in a job script: one line of printable text is needed, without spaces at its ends")
    found = forms_of_secrets("\n".join(words))
    if found:
        raise ValueError(f"an override holds {found[0]}, which would be written into files; give it by an environment variable or a file")
    if job.container != "none" and any(mark in str(path) for path in (target.run, target.folder) for mark in ",:"):
        raise ValueError(f"{target.run}: a folder that is mounted into a container may not hold a comma or a colon")


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
    arguments = _words([str(target.launch / "recipe.toml"), *target.overrides])
    lines = [
        f"run={_quote(str(target.run))}" + ('"/$SLURM_ARRAY_TASK_ID"' if job.sweep else ""),
        f"arguments=({arguments})",
        f"signal={job.signal} max_restarts={job.max_restarts} max_crashes={job.max_crashes}",
    ]
    if job.sweep:
        lines += ["case $SLURM_ARRAY_TASK_ID in", *map(_element, range(len(job.sweep)), job.sweep), "esac"]
        lines += [f'arguments+=({_quote(f"output={target.output}")}"/$SLURM_ARRAY_TASK_ID")']
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
    srun, prefix = _container(job, target)
    python = _words([*prefix, target.python])
    command = f"srun --kill-on-bad-exit=1 --wait=60{srun}"
    if job.launcher == "srun":
        return f'ranks=({command} {python} -u -m laid_ds.train "${{arguments[@]}}")\n'
    starts = {"torchrun": TORCHRUN, "deepspeed": DEEPSPEED}[job.launcher].format(
        python=python, nodes=job.nodes, ranks=job.ranks, shutdown_seconds=job.lead_seconds
    )
    hostfile = HOSTFILE.format(ranks=job.ranks) if job.launcher == "deepspeed" else ""
    return NODE.format(start=shlex.quote(starts + FORWARD), hostfile=hostfile, srun=command)


def _container(job: Job, target: Target) -> tuple[str, list[str]]:
    """(options of srun, words before the interpreter)."""
    folders = [target.folder] if target.run.is_relative_to(target.folder) else [target.folder, target.run]
    mounts = [*(f"{path}:{path}" for path in folders), *job.mount]
    if job.container == "pyxis":
        options = [f"--container-image={job.image}", f"--container-mounts={','.join(mounts)}", f"--container-workdir={target.folder}"]
        return " " + _words(options), []
    if job.container == "apptainer":
        gpus = ["--nv"] if job.gpus_per_node else []
        binds = [word for mount in mounts for word in ("--bind", mount)]
        return "", ["apptainer", "exec", *gpus, *binds, "--pwd", str(target.folder), job.image]
    return "", []


BEGIN = r"""
# What follows is the same for every job.
launch=$run/launch
attempt=${SLURM_RESTART_COUNT:-0}
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
mkdir -p "$launch/logs"

say() { printf '[%(%F %T)T] laid-launch: %s\n' -1 "$*"; }

record() { # STATUS: what `laid-launch status` tells when SLURM has forgotten the job
  printf '{"job": "%s", "attempt": %d, "status": "%s", "nodes": "%s", "time": "%(%FT%T%z)T"}\n' \
    "$job" "$attempt" "$1" "$SLURM_JOB_NODELIST" -1 > "$launch/state.json.partial"
  mv "$launch/state.json.partial" "$launch/state.json"
}

finish() { # STATUS EXIT WORDS
  trap '' TERM "$signal"
  rm -f "$run/stop"
  record "$1"
  say "${*:3}"
  exit "$2"
}

again() { # WORDS: start this job again, unless that was done often enough or somebody cancelled it
  local answer
  case $(scontrol --oneliner show job "$job") in *JobState=CANCELLED*) finish cancelled 1 "$*; cancelled" ;; esac
  [ "$attempt" -lt "$max_restarts" ] || finish stopped 0 "$*; not started again after $attempt restarts"
  trap '' TERM "$signal"
  record requeued
  say "$*; asking SLURM to start it again"
  answer=$(scontrol requeue "$job" 2>&1) && exit 0
  case $answer in *pending*) finish requeued 0 "$*; SLURM has done so itself" ;; esac # after the failure of a node
  finish stopped 0 "$*; SLURM does not: $answer"
}

newest() { cat "$run/checkpoints/latest" 2> /dev/null; }

crashed() { # EXIT: without a marker
  local crashes=0
  [ "$(newest)" != "$before" ] || crashes=$(cat "$launch/crashes" 2> /dev/null || echo 0)
  crashes=$((crashes + 1))
  echo "$crashes" > "$launch/crashes"
  [ "$crashes" -le "$max_crashes" ] || finish failed 1 "failed (exit $1), $crashes times without a newer checkpoint; see $launch/logs"
  again "failed (exit $1), without a newer checkpoint $crashes of $max_crashes times"
}

# shellcheck disable=SC2317 # called by traps
ask() { # WHY: the ranks finish their step, save and leave
  say "$1: the ranks are asked to save and stop"
  touch "$run/stop"
  [ -z "$step" ] || kill -s "$signal" "$step" 2> /dev/null
}

[ ! -f "$run/done.json" ] || finish "done" 0 "already done"
[ "$attempt" -le "$max_restarts" ] || finish stopped 1 "restarted $attempt times, $max_restarts are allowed"
rm -f "$run/requeue.json" "$run/stop"
before=$(newest)
step=
trap 'ask $signal' "$signal"
trap 'ask TERM' TERM

# Names that do not resolve, or another network: export MASTER_ADDR in the setup lines.
MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
MASTER_PORT=$((10000 + (31 * SLURM_JOB_ID + attempt) % 20000))
LAID_RANK_LOGS=$launch/logs
export MASTER_ADDR MASTER_PORT LAID_RANK_LOGS
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

"""

HOSTFILE = r"""export LAID_HOSTFILE=$launch/hostfile-$job
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed 's/$/ slots={ranks}/' > "$LAID_HOSTFILE"
"""

NODE = r"""# On each node: the launcher starts the ranks. A signal to the task becomes a file, since launchers would not pass it on.
export LAID_STOP=$run/stop LAID_JOB=$job.$attempt
{hostfile}# shellcheck disable=SC2016 # the variables are those of each node
on_node={start}
ranks=({srun} bash -c "$on_node" on_node "${{arguments[@]}}")
"""

TORCHRUN = r"""
start() {{
  exec {python} -m torch.distributed.run --nnodes={nodes} --nproc-per-node={ranks} --rdzv-backend=c10d --rdzv-id="$LAID_JOB" \
    --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --max-restarts=0 --shutdown-timeout={shutdown_seconds} \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 --module laid_ds.train "$@"
}}
"""

DEEPSPEED = r"""
start() {{
  exec {python} -m deepspeed.launcher.runner --hostfile="$LAID_HOSTFILE" --no_ssh --node_rank="$SLURM_NODEID" --master_addr="$MASTER_ADDR" \
    --master_port="$MASTER_PORT" --no_local_rank --module laid_ds.train "$@"
}}
"""

FORWARD = r"""request() {
  touch "$LAID_STOP"
}
trap request TERM USR1 USR2
(trap "" TERM USR1 USR2; start "$@") & # where a signal reaches all processes of a task, it does not end the launcher; the ranks listen anew
launcher=$!
while :; do
  wait "$launcher"; status=$?
  kill -0 "$launcher" 2> /dev/null || exit "$status"
done
"""

END = r"""
say "attempt $attempt on $SLURM_JOB_NODELIST, ${before:-from the beginning}"
record running
"${ranks[@]}" &
step=$!
while :; do # `wait` returns at each signal, too
  wait "$step"
  status=$?
  kill -0 "$step" 2> /dev/null || break
done
[ ! -f "$run/done.json" ] || finish "done" 0 "done"
if [ -f "$run/requeue.json" ]; then
  rm -f "$launch/crashes"
  again "saved and stopped $(cat "$run/requeue.json")"
fi
crashed "$status"
"""
