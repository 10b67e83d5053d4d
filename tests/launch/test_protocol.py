"""The job script and the files by which attempts speak to it. srun and scontrol are played; the script is the real one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from launch.job import Job
from launch.script import EVALUATION, Target, render
from tests.support.processes import output_of, wait_until

SRUN = """#!/bin/bash
{first}
touch "$RUN/started"
{acts}
"""
SCONTROL = """#!/bin/bash
case "$*" in
  *hostnames*) echo n0 ;;
  *requeue*) echo "$@" >> "$RUN/requeued"; echo "{answer}"; [ -z "{answer}" ] ;;
  *show*job*) echo "JobId=5 JobState={state}" ;;
esac
"""


@dataclass
class Attempt:
    """One start of the script."""

    folder: Path
    status: int | None = None
    said: str = ""

    def run(
        self,
        acts: str,
        job: Job | None = None,
        restarts: int = 0,
        state: str = "RUNNING",
        answer: str = "no",
        tell: int | None = None,
        first: str = "",
    ) -> Attempt:
        """`acts`: what the ranks do; `answer`: why SLURM will not requeue, empty if it will.

        `tell`: a signal to the script when the ranks have done what stands in `first` and the script waits for them.
        """
        run, commands = self.folder / "run", self.folder / "bin"
        for path in (run, commands):
            path.mkdir(exist_ok=True)
        (run / "started").unlink(missing_ok=True)
        for name, text in (("srun", SRUN.format(first=first, acts=acts)), ("scontrol", SCONTROL.format(state=state, answer=answer))):
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
        environ = {"PATH": f"{commands}:{os.environ['PATH']}", "RUN": str(run), "SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n0"}
        environ |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
        script = self.folder / "job.sh"
        script.write_text(render(job or Job(), Target("x", Path("run"), self.folder, (), "python")))
        process = start_script(["bash", str(script)], environ)
        if tell is not None:
            wait_until(lambda: (run / "started").exists() and sleeps(process), "the ranks")
            process.send_signal(tell)
        said = output_of(process)
        return Attempt(self.folder, process.returncode, said)

    @property
    def recorded(self) -> str:
        return json.loads((self.folder / "run" / "launch" / "state.json").read_text())["status"]

    @property
    def requeues(self) -> int:
        path = self.folder / "run" / "requeued"
        return len(path.read_text().splitlines()) if path.exists() else 0


def start_script(command: list[str], environ: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def sleeps(process: subprocess.Popen) -> bool:
    """Of a script whose ranks have started: whether it has come to wait for them."""
    return psutil.Process(process.pid).status() == psutil.STATUS_SLEEPING


@pytest.fixture
def attempt(tmp_path) -> Attempt:
    return Attempt(tmp_path)


DONE, SAVED = 'echo {} > "$RUN/done.json"', 'echo {} > "$RUN/requeue.json"'
CHECKPOINT = 'mkdir -p "$RUN/checkpoints"; echo step_$RANDOM$RANDOM > "$RUN/checkpoints/latest"'


def test_done_is_done(attempt):
    first = attempt.run(DONE + "; exit 143")
    assert (first.status, first.recorded, first.requeues) == (0, "done", 0)
    second = attempt.run("exit 1", restarts=1)
    assert (second.status, second.requeues) == (0, 0)
    assert "already done" in second.said
    assert not (second.folder / "run" / "started").exists()


def test_saved_is_started_again_whatever_the_status(attempt):
    assert attempt.run(SAVED + "; exit 143").requeues == 1
    assert attempt.run(SAVED, restarts=1).requeues == 2


def test_a_marker_of_an_earlier_attempt_does_not_count(attempt):
    attempt.run(SAVED)
    found = attempt.run("exit 3", Job(max_crashes=0), restarts=1)
    assert (found.status, found.recorded, found.requeues) == (1, "failed", 1)


def test_restarts_are_capped_without_losing_what_was_saved(attempt):
    found = attempt.run(SAVED, Job(max_restarts=2), restarts=2)
    assert (found.status, found.recorded, found.requeues) == (0, "stopped", 0)
    beyond = attempt.run(DONE, Job(max_restarts=2), restarts=3)
    assert (beyond.status, beyond.recorded) == (1, "stopped")
    assert not (beyond.folder / "run" / "done.json").exists()


def test_crashes_in_a_row_are_capped_and_a_newer_checkpoint_counts_anew(attempt):
    job = Job(max_crashes=2)
    assert [attempt.run("exit 1", job, restarts=i).recorded for i in range(2)] == ["stopped", "stopped"]  # this SLURM does not requeue
    assert attempt.requeues == 2
    assert attempt.run(f"{CHECKPOINT}; exit 1", job, restarts=2).requeues == 3
    assert attempt.run("exit 1", job, restarts=3).requeues == 4
    last = attempt.run("exit 1", job, restarts=4)
    assert (last.status, last.recorded, last.requeues) == (1, "failed", 4)


@pytest.mark.parametrize("acts", [SAVED, "exit 1"])
def test_a_cancelled_job_stays_cancelled(attempt, acts):
    found = attempt.run(acts, state="CANCELLED")
    assert (found.status, found.recorded, found.requeues) == (1, "cancelled", 0)


@pytest.mark.parametrize("answer, recorded", [("Job is pending execution for job 5", "requeued"), ("Requeue is disabled", "stopped")])
def test_what_slurm_answers_is_recorded(attempt, answer, recorded):
    found = attempt.run(SAVED, answer=answer)
    assert (found.status, found.recorded, found.requeues) == (0, recorded, 1)


def test_an_accepted_requeue_ends_the_script_at_once(attempt):
    found = attempt.run(SAVED, answer="")
    assert (found.status, found.recorded, found.requeues) == (0, "requeued", 1)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_warning_reaches_the_ranks_by_file_and_by_signal(attempt, number, launcher):
    acts = f'until [ -f "$RUN/stop" ] && [ -f "$RUN/warned" ]; do sleep 0.05; done; {SAVED}'
    found = attempt.run(acts, Job(launcher=launcher), tell=number, first="trap 'touch \"$RUN/warned\"' USR1")
    assert found.requeues == 1
    assert "the ranks are asked to save and stop" in found.said
    assert not (found.folder / "run" / "stop").exists()


def test_a_late_warning_does_not_change_the_end(attempt):
    acts = 'until [ -f "$RUN/stop" ]; do sleep 0.05; done'  # the script has heard the warning
    found = attempt.run(acts, tell=signal.SIGUSR1, first=f"trap '' USR1; {DONE}")
    assert (found.status, found.recorded, found.requeues) == (0, "done", 0)


def test_another_warning_signal(attempt):
    acts = 'until [ -f "$RUN/requeue.json" ]; do sleep 0.05; done'
    assert attempt.run(acts, Job(signal="USR2"), tell=signal.SIGUSR2, first=f"trap '{SAVED}' USR2").requeues == 1


NODE = """#!/bin/bash
while [ "$1" != bash ]; do shift; done
"$@" &
echo $! > "$RUN/task.partial"
mv "$RUN/task.partial" "$RUN/task"
wait $!
while kill -0 "$(cat "$RUN/task")" 2> /dev/null; do wait "$(cat "$RUN/task")"; done
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_signal_to_the_task_of_a_node_becomes_the_stop_file(tmp_path, launcher, number):
    run = tmp_path / "run"
    (tmp_path / "bin").mkdir()
    run.mkdir()
    python = f'#!/bin/bash\ntouch "{run}/python"; until [ -f "{run}/stop" ]; do sleep 0.05; done; echo {{}} > "{run}/done.json"\n'
    for name, text in (("srun", NODE), ("scontrol", SCONTROL.format(state="RUNNING", answer="no")), ("python", python)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    script = render(Job(launcher=launcher), Target("x", Path("run"), tmp_path, (), str(tmp_path / "bin" / "python")))
    environ = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "RUN": str(run), "SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n0"}
    environ |= {"SLURM_NODEID": "0"}
    process = start_script(["bash", "-c", script], environ)
    wait_until(lambda: (run / "python").exists() and (run / "task").exists(), "the launcher of the node")
    os.kill(int((run / "task").read_text()), number)  # the task only, as under proctrack/cgroup
    said = output_of(process)
    assert process.returncode == 0, said
    assert json.loads((run / "launch" / "state.json").read_text())["status"] == "done"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_sigterm_to_the_task_of_an_evaluation_ends_its_launcher_and_asks_for_nothing(tmp_path, number):
    """srun sends it to the other nodes when one has failed: a file would make that failure look like a warning."""
    run = tmp_path / "run.job"
    (tmp_path / "bin").mkdir()
    run.mkdir()
    python = (
        f'#!/bin/bash\ntrap \'touch "{run}/ended"; exit 1\' TERM\ntouch "{run}/python"\n'
        f'until [ -f "{run}/stop" ]; do sleep 0.05; done; echo {{}} > "{run}/requeue.json"\n'
    )
    for name, text in (("srun", NODE), ("scontrol", SCONTROL.format(state="RUNNING", answer="no")), ("python", python)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    target = Target("x", Path("run.job"), tmp_path, (), str(tmp_path / "bin" / "python"), EVALUATION)
    script = render(Job(launcher="torchrun", max_crashes=0), target)
    environ = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "RUN": str(run), "SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n0"}
    process = start_script(["bash", "-c", script], environ | {"SLURM_NODEID": "0"})
    wait_until(lambda: (run / "python").exists() and (run / "task").exists(), "the launcher of the node")
    os.kill(int((run / "task").read_text()), number)
    said = output_of(process)
    failed = number == signal.SIGTERM
    assert (process.returncode, (run / "ended").exists(), (run / "requeued").exists()) == (int(failed), failed, not failed), said
    assert ("1 times without a further answer" in said) == failed
