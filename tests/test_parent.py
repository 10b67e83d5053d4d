"""How a process ends by itself. That it ends with its parent: runtime/test_launchers.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ABORTS = """
import atexit, os, sys, threading, time
from laid_ds.parent import end
class Native:
    def __del__(self):
        os.abort()
native = Native()
atexit.register(print, "done at exit")
threading.Thread(target=lambda: (time.sleep(0.3), print("a thread, too"))).start()
"""


@pytest.mark.parametrize("status", [0, 2])
def test_nothing_that_is_torn_down_takes_the_place_of_the_status(status):
    torn = subprocess.run([sys.executable, "-c", f"{ABORTS}sys.exit({status})"], capture_output=True, text=True)
    ended = subprocess.run([sys.executable, "-c", f"{ABORTS}end({status})"], capture_output=True, text=True)
    assert (torn.returncode, ended.returncode) == (-6, status)
    assert ended.stdout == torn.stdout == "a thread, too\ndone at exit\n"


@pytest.mark.parametrize("words", [["laid_ds.train"], ["laid_ds.cli", "eval", "nothing", "a=b", "--out", "c"]])
def test_a_rank_ends_so_whatever_it_has_to_say(tmp_path, words):
    """`end` leaves a trace here, in the place of the call that it stands for."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nfrom laid_ds import parent\ndone = parent.end\nparent.end = lambda status: (print('ended'), done(status))\n"
    )
    environ = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    found = subprocess.run([sys.executable, "-m", *words], env=environ, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 2, found
    assert found.stdout.splitlines()[-1] == "ended"
