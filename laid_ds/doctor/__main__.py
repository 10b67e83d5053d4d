"""A rank of `laid doctor`: `laid doctor` starts it, or any launcher does (`srun python -m laid_ds.doctor`)."""

from laid_ds.doctor.examine import main
from laid_ds.parent import end

if __name__ == "__main__":
    end(main())
