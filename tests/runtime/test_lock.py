"""A run folder is held by who trains in it, as long as one of its ranks lives, and by nobody else."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from laid_ds import cli
from laid_ds.config import Checkpoint
from laid_ds.runtime import checkpoint, lock
from tests.runtime.test_checkpoint import Engine

RANK_0 = """
handle = lock.take(folder)
lock.let_ranks_in(folder, handle)
"""
RANK_1 = """
lock.join(folder, 1)
"""
WITH_CHILD = """
if os.fork() == 0:
    time.sleep(3600)
"""
FRAME = """
import os, sys, time
from pathlib import Path
from laid_ds.runtime import lock
folder = Path(sys.argv[1])
{acts}
print("holds", flush=True)
time.sleep(3600)
"""


@pytest.fixture
def holding(tmp_path):
    """Starts a process that holds a part of the folder; whole process groups are killed in the end."""
    started = []

    def start(*acts):
        command = [sys.executable, "-c", FRAME.format(acts="".join(acts)), str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        assert process.stdout.readline() == "holds\n"
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "HERE_SECONDS", 0.0)
    monkeypatch.setattr(lock, "ELSEWHERE_SECONDS", 0.0)


def end(process):
    process.kill()
    process.wait()


def is_free(folder):
    try:
        lock.wait_until_free(folder)
        return True
    except ValueError:
        return False


def test_who_holds_it_is_said_in_one_sentence(tmp_path, holding, impatient):
    process = holding(RANK_0)
    for attempt in (lock.take, lock.wait_until_free):
        with pytest.raises(ValueError) as error:
            attempt(tmp_path)
        said = str(error.value)
        assert said.startswith(f"{tmp_path} is in use by the training of process {process.pid} on {socket.gethostname()}, since 2")
        assert said.endswith(f"; stop it (`touch {tmp_path}/stop`), or give another output=...")
        assert "\n" not in said


def test_the_file_of_a_dead_holder_blocks_nobody(tmp_path, holding, impatient):
    end(holding(RANK_0))
    assert json.loads((tmp_path / lock.FILE).read_text())["host"] == socket.gethostname()
    assert is_free(tmp_path)
    holding(RANK_0)
    assert not is_free(tmp_path)


def test_what_a_dead_holder_had_forked_holds_nothing(tmp_path, holding, impatient):
    end(holding(RANK_0, WITH_CHILD))
    assert is_free(tmp_path)


def test_the_folder_is_held_until_the_last_rank_is_gone(tmp_path, holding, impatient):
    first, second = holding(RANK_0), holding(RANK_1)
    end(first)
    assert not is_free(tmp_path)
    end(second)
    assert is_free(tmp_path)


def test_one_that_is_ending_is_waited_for(tmp_path, holding, monkeypatch, capsys):
    process, waits = holding(RANK_0), []
    monkeypatch.setattr(lock, "HERE_SECONDS", float("inf"))
    monkeypatch.setattr(time, "sleep", lambda seconds: (waits.append(seconds), end(process)))
    lock.wait_until_free(tmp_path)
    assert len(waits) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"laid: {tmp_path} is in use by the training of process {process.pid}")
    assert said.endswith("; waiting up to inf s for its end\n")


def test_of_another_machine_it_is_said_what_to_do_when_that_is_dead(tmp_path, holding, monkeypatch, impatient):
    monkeypatch.setattr(lock, "HERE_SECONDS", float("inf"))
    holding(RANK_0)
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    with pytest.raises(ValueError, match=rf"; if .* is dead and its file server does not let go, remove {tmp_path}/lock$"):
        lock.wait_until_free(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"host"', b"[1]", b'{"host": "n1"}', b"\xff\xfe"])
def test_a_damaged_note_is_no_obstacle(tmp_path, holding, impatient, content):
    holding(RANK_0)
    (tmp_path / lock.FILE).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path} is in use by another training; stop it"):
        lock.wait_until_free(tmp_path)


@pytest.mark.parametrize("number", lock.NO_LOCKS)
def test_a_file_system_without_locks_is_one_sentence(tmp_path, monkeypatch, capsys, number):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    lock.let_ranks_in(tmp_path, lock.take(tmp_path))
    lock.join(tmp_path, 1)
    lock.wait_until_free(tmp_path)
    reason = f"the file system of {tmp_path} has no locks ({os.strerror(number)})"
    assert capsys.readouterr().err == f"laid: {reason}: see to it yourself that nothing else trains there at the same time\n"


def test_another_error_of_a_lock_is_one_sentence(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "lockf", fail)
    with pytest.raises(ValueError, match=f"^{tmp_path}/lock cannot be locked: Input/output error; give another output"):
        lock.take(tmp_path)


def prune(folder, *options):
    with pytest.raises(SystemExit) as status:
        cli.main(["checkpoint", "prune", str(folder), "--keep-last", "1", *options])
    return status.value.code or 0


def test_checkpoints_are_not_removed_while_the_run_is_running(tmp_path, holding, capsys):
    for step in (10, 20):
        checkpoint.save(Engine(), tmp_path, {"step": step}, Checkpoint(keep_last=2))
    (tmp_path / "run.json").write_text(json.dumps({"run": {"checkpoint": {"keep_last": 2}}}))
    process = holding(RANK_0)
    for options in ((), ("--damaged",)):
        assert prune(tmp_path, *options) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"laid: {tmp_path} is in use by the training of process {process.pid}")
        assert said.endswith(f"; `touch {tmp_path}/stop` makes it save and end\n")
    assert [saved.step for saved in checkpoint.all_saved(tmp_path)] == [10, 20]
    end(process)
    assert prune(tmp_path) == 0
    assert [saved.step for saved in checkpoint.all_saved(tmp_path)] == [20]
