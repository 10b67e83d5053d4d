"""Imported by every Python of a job whose PYTHONPATH begins here: ranks obey files in the folder LAID_TEST_FAULTS.

exit-RANK: that rank leaves at once with status 3. slow: each flush to disk takes a second longer, so that a save can be hit.
linger: ranks that have finished do not end before it is gone.
"""

import atexit
import os
import sys
import threading
import time
from pathlib import Path

FOLDER = Path(os.environ.get("LAID_TEST_FAULTS", "/nonexistent"))
fsync = os.fsync


def slow_fsync(descriptor):
    if (FOLDER / "slow").exists():
        time.sleep(1)
    fsync(descriptor)


def obey():
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID"))
    order = FOLDER / f"exit-{rank}"
    while True:
        if order.exists():
            order.unlink()
            os._exit(3)
        time.sleep(0.05)


def linger():
    while (FOLDER / "linger").exists():
        time.sleep(0.05)


if FOLDER.is_dir():
    if "laid_ds.train" in sys.orig_argv:
        atexit.register(linger)
    os.fsync = slow_fsync
    threading.Thread(target=obey, daemon=True).start()
