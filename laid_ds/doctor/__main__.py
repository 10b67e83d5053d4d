"""A rank of `laid doctor`: `laid doctor` starts it, or any launcher does (`srun python -m laid_ds.doctor`)."""

import os
import sys

from laid_ds.doctor.examine import main

if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of a group that fell apart may abort a process that is tidying up
