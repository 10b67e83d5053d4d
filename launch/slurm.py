"""SLURM's commands: submit a script, and find, end or repeat the jobs of a run folder.

A job is looked for where clusters keep it, in turn: squeue (waits or runs), scontrol (ended minutes ago), sacct (where there is
accounting), and the file that the job itself wrote.
"""

from __future__ import annotations

import glob
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laid_ds.files import read_json_lines
from laid_ds.runtime.stop import DONE, STOP
from launch.record import EVALUATED, read_state, write_state

JOBS = "jobs.json"
GOING = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "RESIZING", "SIGNALING", "STAGE_OUT")


def test_only(script: str) -> str:
    """SLURM's own verdict on a script, without submitting it. Raises ValueError when it would be refused."""
    return _run(["sbatch", "--test-only"], script).stderr.strip().removeprefix("sbatch: ")


def check_free(run: Path) -> None:
    """Raises ValueError when a job of this run waits or runs: its folder may not be touched."""
    going = [row for row in find(run) if row["state"] in GOING]
    if going:
        raise ValueError(
            f"{run} already has job {going[0]['job']} ({going[0]['state']}), and two jobs may not share a folder; "
            f"`laid-launch cancel {run}` ends it"
        )


def submit(run: Path, times: int = 1) -> list[str]:
    """Submit RUN/launch/job.sh, in a run that is free; returns the job ids. Raises ValueError when SLURM refuses."""
    jobs = [_run(["sbatch", "--parsable", str(run / "launch" / "job.sh")]).stdout.strip().split(";")[0] for _ in range(times)]
    (run / "launch" / JOBS).write_text(json.dumps(jobs) + "\n")
    write_state(run / "launch", {"job": jobs[0], "attempt": 0, "status": "submitted"})
    return jobs


def find(run: Path) -> list[dict[str, Any]]:
    """A row for each job of the run, or element of its array: job, state, nodes, reason, and `source`, who told it."""
    return [row for job in _jobs(run) for row in _squeue(job) or _scontrol(job) or _sacct(job) or _own_word(run, job)]


def progress(run: Path) -> dict[str, Any]:
    """How far a run came, from its own files."""
    if (run / "launch" / EVALUATED).is_file():
        files = run.parent.glob(f"{glob.escape(run.stem)}.answers.jsonl*")
        answers = sum('"question_index"' in line for path in files for line in path.read_text(encoding="utf-8").splitlines())
        return {"run": str(run), "answers": answers, "done": (run / DONE).is_file()}
    steps = [line["step"] for line in read_json_lines(run / "metrics.jsonl") if isinstance(line, dict) and "step" in line]
    latest = run / "checkpoints" / "latest"
    return {
        "run": str(run),
        "step": steps[-1] if steps else 0,
        "checkpoint": latest.read_text().strip() if latest.is_file() else None,
        "done": (run / DONE).is_file(),
    }


def runs_of(run: Path) -> list[Path]:
    """The run itself, or the runs of a sweep."""
    elements = sorted((path for path in run.iterdir() if path.name.isdigit() and path.is_dir()), key=lambda path: int(path.name))
    return elements or [run]


def cancel(run: Path) -> list[str]:
    """End the jobs that wait or run; returns their ids. The ranks get SLURM's KillWait seconds (often 30) to save."""
    going = list(dict.fromkeys(row["job"] for row in find(run) if row["state"] in GOING))
    if not going:
        raise ValueError(f"no job of {run} waits or runs")
    _run(["scancel", *going])
    return going


def requeue(run: Path, now: bool = False) -> str:
    """Start a run's job again; returns what happens. A running job first saves, unless `now`."""
    rows = [row for row in find(run) if row["state"] in GOING]
    running = [row for row in rows if row["state"] == "RUNNING"]
    if rows and not running:
        raise ValueError(f"job {rows[0]['job']} is {rows[0]['state']}: it starts by itself when SLURM has nodes for it")
    if not rows:
        _jobs(run, must=True)
        return f"submitted job {submit(run)[0]}, which goes on where it stopped"
    if now:
        for row in running:
            _run(["scontrol", "requeue", row["job"]])
        return f"job {running[0]['job']} starts again from what it has saved"
    for folder in runs_of(run):
        if not (folder / DONE).exists():
            (folder / STOP).touch()
    return f"job {running[0]['job']} saves after this step and starts again"


def _jobs(run: Path, must: bool = False) -> list[str]:
    path = run / "launch" / JOBS
    if path.is_file():
        try:
            jobs = json.loads(path.read_text())
            if not isinstance(jobs, list) or not all(isinstance(job, str) for job in jobs):
                raise ValueError("no list of texts")
            return jobs
        except (ValueError, RecursionError) as error:
            raise ValueError(f'{path} is damaged ({error}); it lists the jobs of the run, such as ["12"]') from None
    if must:
        raise ValueError(f"{run} was not submitted by laid-launch: there is no {path}")
    return []


def _squeue(job: str) -> list[dict[str, Any]]:
    found = _ask(["squeue", "--noheader", "--array", f"--jobs={job}", "--format=%i|%T|%N|%r|%M|%L"])
    names = ("job", "state", "nodes", "reason", "elapsed", "left")
    return [dict(zip(names, line.split("|"), strict=True)) | {"source": "squeue"} for line in found.splitlines()]


def _scontrol(job: str) -> list[dict[str, Any]]:
    rows = []
    for line in _ask(["scontrol", "--oneliner", "show", "job", job]).splitlines():
        values = dict(re.findall(r"(\w+)=(\S*)", line))
        if "JobState" in values:
            element = f"{values['ArrayJobId']}_{values['ArrayTaskId']}" if "ArrayTaskId" in values else values["JobId"]
            row = {"job": element, "state": values["JobState"], "nodes": values.get("NodeList", ""), "reason": values["Reason"]}
            rows.append(row | {"exit": values["ExitCode"], "restarts": int(values["Restarts"]), "source": "scontrol"})
    return sorted(rows, key=lambda row: row["job"])


def _sacct(job: str) -> list[dict[str, Any]]:
    found = _ask(["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}", "--format=JobID,State,NodeList,Reason,ExitCode"])
    names = ("job", "state", "nodes", "reason", "exit")
    return [dict(zip(names, line.split("|"), strict=True)) | {"source": "sacct"} for line in found.splitlines()]


def _own_word(run: Path, job: str) -> list[dict[str, Any]]:
    """The states that the job's scripts wrote into the run folder, or into each element's."""
    states = [state for folder in runs_of(run) if (state := read_state(folder / "launch"))]
    mine = [state for state in states if state["job"].split("_")[0] == job] or [{"job": job, "status": "unknown"}]
    return [{"job": s["job"], "state": s["status"], "nodes": s.get("nodes", ""), "reason": "", "source": "state.json"} for s in mine]


def _ask(command: Sequence[str]) -> str:
    """Output of a command that may be missing, or know nothing of the job."""
    if not shutil.which(command[0]):
        return ""
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout if found.returncode == 0 else ""


def _run(command: Sequence[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Raises ValueError with SLURM's own words."""
    if not shutil.which(command[0]):
        raise ValueError(f"no `{command[0]}` here: run this on a login node of the cluster")
    found = subprocess.run(command, input=text, capture_output=True, text=True)
    if found.returncode:
        raise ValueError(f"{command[0]}: {found.stderr.strip() or found.stdout.strip()}")
    return found
