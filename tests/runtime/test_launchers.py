"""Ranks, launchers and data workers end when what started them is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

from tests.laws.test_one_trainer import is_gone
from tests.support.processes import wait_until

RANK = """
import ctypes, os, threading, time
PR_GET_PDEATHSIG = 2
from laid_ds.runtime.launchers import end_with_launchers
end_with_launchers(os.environ)
dies_with_parent = ctypes.c_int()
ctypes.CDLL(None).prctl(PR_GET_PDEATHSIG, ctypes.byref(dies_with_parent))
print("rank", os.getpid(), dies_with_parent.value, threading.active_count(), flush=True)
time.sleep(3600)
"""
LAUNCHER = """
import os, subprocess, sys
print("launcher", os.getpid(), flush=True)
sys.exit(subprocess.run([sys.executable, "-c", *sys.argv[1:]]).returncode)
"""


def start(*scripts, environ=None):
    """Processes, each started by the one before it, with the name of our module as their last word."""
    command = [sys.executable, "-c", *scripts, "laid_ds.train"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | (environ or {}), start_new_session=True)


def told(process, number):
    return [psutil.Process(int(process.stdout.readline().split()[1])) for _ in range(number)]


TWIN = """
import os, time
from laid_ds.runtime import launchers
launchers.GRACE_SECONDS, found = 0.0, launchers._ranks_of
def tell(launcher):
    ranks = found(launcher)
    if len(ranks) == 2:
        os.write(1, f"rank {os.getpid()}\\n".encode())  # whole, which print is not where output is unbuffered
    return ranks
launchers._ranks_of = tell
launchers.end_with_launchers(os.environ)
time.sleep(3600)
"""
OF_TWO = """
import os, subprocess, sys
ranks = [subprocess.Popen([sys.executable, "-c", *sys.argv[1:]]) for _ in range(2)]
sys.exit([rank.wait() for rank in ranks][0])
"""


def test_a_rank_ends_with_another_of_its_launcher():
    """Of itself: it waits for nobody here, and its launcher does nothing about it."""
    process = start(OF_TWO, TWIN, environ={"LOCAL_WORLD_SIZE": "2"})
    told(process, 2)[1].kill()
    assert process.wait() == 256 - 9
    process.stdout.close()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_ends_with_any_of_its_launchers(victim):
    process = start(LAUNCHER, LAUNCHER, RANK)
    chain = told(process, 2)
    _, rank, dies_with_parent, _ = process.stdout.readline().split()
    assert int(dies_with_parent) == signal.SIGKILL
    chain.append(psutil.Process(int(rank)))
    chain[victim].kill()
    process.wait()
    wait_until(lambda: all(map(is_gone, chain)), "the end of the rank and its launchers")
    process.stdout.close()


def test_a_rank_whose_command_is_already_gone_ends_at_once():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    process = start(RANK, environ={"LAID_STARTED_BY": str(gone.pid)})
    assert process.communicate()[0] == ""
    assert process.returncode == -9


def test_a_rank_that_a_shell_started_does_not_end_with_it():
    process = subprocess.Popen(["bash", "-c", '"$0" -c "$1" & wait', sys.executable, RANK], stdout=subprocess.PIPE, text=True)
    _, rank, dies_with_parent, threads = process.stdout.readline().split()
    psutil.Process(int(rank)).kill()
    process.wait()
    process.stdout.close()
    assert (dies_with_parent, threads) == ("0", "1")
