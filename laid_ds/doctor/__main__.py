"""A rank of `laid doctor`: `laid doctor` starts it, or any launcher does (`srun python -m laid_ds.doctor`)."""

import sys

from laid_ds.doctor.examine import main

if __name__ == "__main__":
    sys.exit(main())
