"""A job of `laid-launch eval` and the files by which the ranks of an evaluation speak to it; SLURM's commands are played."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from launch import cli
from tests.support.processes import wait_until
from tests.support.slurm import ask

RANK = "import os, sys, time; from laid_ds.evaluation.job import *; leave_when_asked(os.environ); open(sys.argv[1], 'w'); time.sleep(600)"


@pytest.fixture
def rank(tmp_path):
    """A process that listens, in the job's folder."""
    (tmp_path / "job").mkdir()
    environ = os.environ | {"LAID_JOB_FOLDER": str(tmp_path / "job")}
    process = subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path / "listens")], env=environ)
    wait_until((tmp_path / "listens").exists, "the rank")
    yield process
    process.kill()


@pytest.mark.parametrize("number, reason", [(signal.SIGUSR1, "SIGUSR1"), (signal.SIGUSR2, "SIGUSR2"), (None, "the file 'stop'")])
def test_a_warned_rank_says_so_and_ends(rank, tmp_path, number, reason):
    rank.send_signal(number) if number else (tmp_path / "job" / "stop").touch()
    assert rank.wait() == 1
    assert json.loads((tmp_path / "job" / "requeue.json").read_text()) == {"reason": reason}


def test_sigterm_is_a_failure_unless_the_job_has_made_the_file(rank, tmp_path):
    rank.send_signal(signal.SIGTERM)
    assert rank.wait() == 1
    assert not (tmp_path / "job" / "requeue.json").exists()


def test_sigterm_with_the_file_is_a_warning(rank, tmp_path):
    rank.send_signal(signal.SIGTERM)
    (tmp_path / "job" / "stop").touch()
    assert rank.wait() == 1
    assert (tmp_path / "job" / "requeue.json").exists()


def test_what_is_done_stays_done(rank, tmp_path):
    (tmp_path / "job" / "done.json").write_text("{}")
    (tmp_path / "job" / "stop").touch()
    rank.send_signal(signal.SIGTERM)
    rank.wait()
    assert not (tmp_path / "job" / "requeue.json").exists()


def test_an_evaluation_is_submitted_followed_and_submitted_again(played, world, tmp_path, capfd):
    out = tmp_path / "e x.json"
    words = [world.shards, f"m={world.student}", "--haystacks", "2", "--sizes=1,2", "--out", out, "--nodes=2", "--ranks-per-node=2"]
    (played / "sbatch.answer").write_text("12\n")
    assert ask(capfd, "eval", *words)[:2] == (0, f"submitted job 12; next: laid-launch status '{tmp_path / 'e x.job'}'\n")
    script = (tmp_path / "e x.job" / "launch" / "job.sh").read_text()
    assert "-u -m laid_ds.cli" in script
    assert json.loads((tmp_path / "e x.job" / "launch" / "evaluation.json").read_text())["command"][:2] == ["laid", "eval"]
    (tmp_path / "e x.answers.jsonl").write_text('{"laid_eval": 1}\n{"question_index": 1}\n')
    (tmp_path / "e x.answers.jsonl.rank-0001").write_text('{"question_index": 1}\n')
    assert "2 answers\n" in ask(capfd, "status", tmp_path / "e x.job")[1]
    (tmp_path / "e x.job" / "done.json").write_text("{}")
    assert "2 answers  done\n" in ask(capfd, "status", tmp_path / "e x.job")[1]
    ask(capfd, "eval", *words)
    assert not (tmp_path / "e x.job" / "done.json").exists()


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--ranks", "2"], "laid-launch: --ranks is not for an evaluation"),
        (["--port=1"], "laid-launch: --port=1 is not for an evaluation"),
        (["--nodse", "2"], "laid: no such option: --nodse"),
        (["--dtype", "int3"], "laid: --dtype 'int3' is none of float32, bfloat16"),
        (["x=nowhere"], "laid: no model at nowhere"),
        (["--nodes", "0"], "laid-launch: nodes: Input should be greater"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_it_waits_in_a_queue(played, world, tmp_path, capfd, more, sentence):
    status, out, err = ask(
        capfd, "eval", world.shards, f"m={world.student}", "--haystacks=2", "--sizes=1", "--out", tmp_path / "e.json", *more
    )
    assert (status, out) == (2, "")
    assert sentence in err
    assert not (tmp_path / "e.job").exists()
    assert not (played / "said").exists()


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["shards", "m=x", "--sizez", "1"], "laid-launch: no such option: --sizez"),
        (["shards", "m=x", "--questions", "x"], "laid-launch: invalid value for '--questions'"),
        ([], "laid-launch: missing argument 'TASKS... NAME=FOLDER...'"),
        (["shards"], "laid-launch: give at least one folder of shards, and at least one model as NAME=FOLDER"),
        (["m=x"], "laid-launch: give at least one folder of shards, and at least one model as NAME=FOLDER"),
    ],
)
@pytest.mark.parametrize("unchecked", ["--dry-run", "--test-only", "--no-check"])
def test_words_that_mean_nothing_are_refused_where_shards_and_models_are_not_looked_at(played, tmp_path, capfd, words, sentence, unchecked):
    status, out, err = ask(capfd, "eval", *words, "--out", tmp_path / "e.json", unchecked)
    assert (status, out) == (2, "")
    assert sentence in err
    assert not (played / "said").exists()


def test_a_dry_run_prints_the_script_and_nothing_else(capfd, tmp_path):
    with pytest.raises(SystemExit) as status:
        cli.main(["eval", "shards", "m=x", "--out", str(tmp_path / "e.json"), "--zero3", "--nodes", "2", "--dry-run"])
    found = capfd.readouterr()
    assert (status.value.code, found.err) == (0, "")
    assert f"arguments=(eval shards m=x --zero3 --out {tmp_path / 'e.json'})\n" in found.out
    subprocess.run(["bash", "-n"], input=found.out, text=True, check=True)
