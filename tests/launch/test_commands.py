"""status, cancel, requeue and logs find a job wherever the cluster still knows it. SLURM's commands are played by a script here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.recipes import write_recipe
from tests.support.slurm import ask, said

RUNNING = "12|RUNNING|n[0-1]|None|1:00|59:00\n"


@pytest.fixture
def run(tmp_path) -> Path:
    run = tmp_path / "run"
    (run / "launch" / "logs").mkdir(parents=True)
    (run / "launch" / "jobs.json").write_text('["12"]')
    (run / "launch" / "state.json").write_text('{"job": "12", "attempt": 2, "status": "stopped", "nodes": "n0"}')
    (run / "metrics.jsonl").write_text('{"step": 7}\n')
    return run


def test_a_job_is_looked_for_from_squeue_down_to_its_own_word(played, run, capsys):
    def row():
        status, out, _ = ask(capsys, "status", run, "--json")
        assert status == 0
        answer = json.loads(out)
        assert answer["runs"] == [{"run": str(run), "step": 7, "checkpoint": None, "done": False}]
        return answer["jobs"][0]

    assert row() == {"job": "12", "state": "stopped", "nodes": "n0", "reason": "", "source": "state.json"}
    (played / "sacct.answer").write_text("12|TIMEOUT|n[0-1]|None|0:0\n")
    assert row()["state"] == "TIMEOUT"
    (played / "scontrol.answer").write_text("JobId=12 JobName=a b JobState=NODE_FAIL Reason=None Restarts=3 ExitCode=0:0 NodeList=n[0-1]\n")
    assert (row()["state"], row()["restarts"]) == ("NODE_FAIL", 3)
    (played / "squeue.answer").write_text(RUNNING)
    assert (row()["state"], row()["left"], row()["source"]) == ("RUNNING", "59:00", "squeue")


def test_elements_of_an_array_speak_for_themselves(played, run, capsys):
    for element, status in ((0, "done"), (1, "running")):
        (run / str(element) / "launch").mkdir(parents=True)
        state = {"job": f"12_{element}", "attempt": 0, "status": status}
        (run / str(element) / "launch" / "state.json").write_text(json.dumps(state))
    _, out, _ = ask(capsys, "status", run)
    assert "job 12_0  done" in out
    assert f"{run / '1'}  step 0" in out


def test_cancel_ends_what_is_going_and_says_when_nothing_is(played, run, capsys):
    status, _, err = ask(capsys, "cancel", run)
    assert (status, err) == (2, f"laid-launch: no job of {run} waits or runs\n")
    (played / "squeue.answer").write_text(RUNNING)
    (played / "scancel.answer").write_text("")
    assert ask(capsys, "cancel", run)[0] == 0
    assert said(played)[-1] == ["scancel", "12"]


def test_requeue_asks_a_running_job_to_save_first(played, run, capsys):
    (played / "squeue.answer").write_text(RUNNING)
    _, out, _ = ask(capsys, "requeue", run)
    assert out == "job 12 saves after this step and starts again\n"
    assert (run / "stop").exists()
    (played / "scontrol.answer").write_text("")
    ask(capsys, "requeue", run, "--now")
    assert said(played)[-1] == ["scontrol", "requeue", "12"]


def test_requeue_leaves_a_waiting_job_alone(played, run, capsys):
    (played / "squeue.answer").write_text("12|PENDING||Resources|0:00|1:00\n")
    assert "starts by itself" in ask(capsys, "requeue", run)[2]


def test_requeue_submits_again_what_has_ended(played, run, capsys):
    (played / "sbatch.answer").write_text("13;cluster\n")
    assert ask(capsys, "requeue", run)[1].startswith("submitted job 13")
    assert said(played)[-1] == ["sbatch", "--parsable", str(run / "launch" / "job.sh")]
    assert json.loads((run / "launch" / "jobs.json").read_text()) == ["13"]


def test_two_jobs_never_share_a_folder(played, world, tmp_path, capsys):
    run = world.run(tmp_path / "run")
    recipe = write_recipe(run, tmp_path / "recipe.toml")
    (played / "sbatch.answer").write_text("12\n")
    assert ask(capsys, "slurm", recipe)[:2] == (0, f"submitted job 12; next: laid-launch status {run.output}\n")
    script = (run.output / "launch" / "job.sh").read_text()
    (played / "squeue.answer").write_text(RUNNING)
    assert "already has job 12 (RUNNING)" in ask(capsys, "slurm", recipe, "optimizer.lr=1", "--no-check")[2]
    assert (run.output / "launch" / "job.sh").read_text() == script


def test_what_cannot_be_trained_is_refused_before_it_waits_in_a_queue(played, world, tmp_path, capsys):
    recipe = write_recipe(world.run(tmp_path / "run"), tmp_path / "recipe.toml")
    assert "no model at nowhere" in ask(capsys, "slurm", recipe, "--sweep=seed=1", "--sweep=student.path=nowhere")[2]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--sweep", "stepz=5", "--dry-run"], "unknown key 'stepz'"),
        (["--sweep", "sequence_parallel=4", "--dry-run"], "sequence_parallel = 4 does not divide the 1 rank of this run"),
        (["--sweep", "", "--dry-run"], "`sweep` has an element without a word: give each at least one section.key=value"),
        (["--sweep", "output=x", "--dry-run"], "`sweep` gives each element an output of its own, under that of the recipe: leave out"),
        (["--parallel", "2", "--dry-run"], "--parallel 2 counts elements of a --sweep, and there is none"),
    ],
)
def test_a_dry_run_refuses_a_sweep_that_cannot_be_trained(world, tmp_path, capsys, words, sentence):
    recipe = write_recipe(world.run(tmp_path / "run"), tmp_path / "recipe.toml")
    status, out, err = ask(capsys, "slurm", recipe, *words)
    assert (status, out) == (2, "")
    assert sentence in err


def test_a_launcher_that_is_none_is_refused_before_anything_is_looked_at(capsys):
    status, out, err = ask(capsys, "local", "recipes/none.toml", "--launcher", "foo")
    assert (status, out) == (2, "")
    assert err.startswith("laid-launch: invalid value for '--launcher': 'foo' is not one of 'deepspeed', 'torchrun'")


@pytest.mark.parametrize("text", ["5", "{}", "[12]", "[["])
def test_a_list_of_jobs_that_is_none_is_one_sentence(run, capsys, text):
    (run / "launch" / "jobs.json").write_text(text)
    for command in ("status", "cancel", "requeue"):
        status, out, err = ask(capsys, command, run)
        assert (status, out) == (2, "")
        assert err.startswith(f"laid-launch: {run / 'launch' / 'jobs.json'} is damaged (")


def test_files_that_were_written_by_hand_are_no_traceback(played, run, capsys):
    (run / "metrics.jsonl").write_text('{"step": 7}\n{"loss": 1}\n')
    assert "step 7" in ask(capsys, "status", run)[1]
    (run / "launch" / "state.json").write_text("5")
    assert "state.json is damaged" in ask(capsys, "status", run)[2]


def test_ranks_that_cannot_share_batches_are_refused_before_they_wait_in_a_queue(played, world, tmp_path, capsys):
    """2 nodes x 3 ranks; also where one element of a sweep says so."""
    recipe, job = write_recipe(world.run(tmp_path / "run"), tmp_path / "recipe.toml"), ["--nodes=2", "--ranks-per-node=3", "--no-check"]
    sentence = "laid-launch: sequence_parallel = 4 does not divide the 6 ranks of this run"
    assert ask(capsys, "slurm", recipe, "sequence_parallel=4", *job)[2].startswith(sentence)
    assert ask(capsys, "slurm", recipe, *job, "--sweep=seed=1", "--sweep=sequence_parallel=4")[2].startswith(sentence)
    assert not (tmp_path / "run").exists()
    (played / "sbatch.answer").write_text("12\n")
    assert ask(capsys, "slurm", recipe, "sequence_parallel=3", *job)[0] == 0


def test_slurms_own_words_reach_the_user(played, run, capsys):
    (played / "scontrol").unlink()
    status, _, err = ask(capsys, "slurm", "recipes/demo.toml", "--test-only")
    assert status == 2
    assert err.startswith("laid-launch: sbatch: ")


def test_logs_show_the_job_and_a_rank(run):
    for name in ("job.log", "rank-0000.log", "rank-0001.log"):
        (run / "launch" / "logs" / name).write_text(f"this is {name}\n")
    words = [sys.executable, "-m", "launch.cli", "logs", str(run)]
    found = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "this is job.log" in found
    assert "this is rank-0000.log" in found
    assert "rank-0001" not in found
    assert "this is rank-0001.log" in subprocess.run([*words, "--all"], capture_output=True, text=True, check=True).stdout
    with subprocess.Popen([*words, "-f"], stdout=subprocess.PIPE, text=True) as following:
        read = iter(following.stdout.readline, "")
        assert any("rank-0000.log" in line for line in read)
        with (run / "launch" / "logs" / "job.log").open("a") as log:
            log.write("the end\n")
        assert any(line == "the end\n" for line in read)
        following.terminate()


def test_a_missing_folder_is_one_sentence(tmp_path, capsys):
    for command in ("status", "cancel", "requeue", "logs"):
        assert ask(capsys, command, tmp_path / "none") == (2, "", f"laid-launch: no run folder at {tmp_path / 'none'}\n")


def test_a_folder_of_something_else_is_one_sentence(tmp_path, capsys):
    (tmp_path / "0").mkdir()
    for command in ("status", "cancel", "requeue", "logs"):
        status, out, err = ask(capsys, command, tmp_path)
        assert (status, out) == (2, "")
        assert err.startswith(f"laid-launch: {tmp_path} is no folder of a run: it holds none of launch, run.json")
