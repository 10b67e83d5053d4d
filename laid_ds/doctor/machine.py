"""The machine: driver and cards, memory, disks, what would be compiled and what stands in a compiler's way."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import torch

from laid_ds.disk import DiskError, nearest, writing
from laid_ds.doctor.line import ABSENT, OK, SLOW, WRONG, Line, Room, looked, rate, size

TRIAL_BYTES = 64 << 20
LEAST_SHARED_BYTES = 1 << 30  # what NVIDIA asks for NCCL in a container; docker gives 64 MiB
SLOW_DISK_BYTES_PER_SECOND = 50e6
LEAST_CAPABILITY = (8, 0)  # bfloat16 products and flash kernels
LOCKED = "every process that needs it waits for this file for ever"


def cards() -> Room:
    """Driver, torch's build, and each GPU that may be used here."""
    smi = looked("driver", driver)
    yield smi
    build, gpus = torch.version.cuda or torch.version.hip, torch.cuda.device_count()
    if smi.verdict == OK and not build:
        advice = "install torch's CUDA build (README, On a GPU machine); all else would run on the CPU"
        yield Line("torch's build", WRONG, f"torch {torch.__version__} is made for CPUs, and this machine has a GPU", advice)
    elif build and not gpus and smi.verdict == OK and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        advice = f"the driver may be older than CUDA {build} asks for, or CUDA_VISIBLE_DEVICES names no card"
        yield Line("torch's build", WRONG, f"torch {torch.__version__} finds no GPU, and nvidia-smi does", advice)
    else:
        yield Line("torch's build", OK, f"torch {torch.__version__}, {f'CUDA {build}' if build else 'for CPUs'}")
    for index in range(gpus):
        yield looked(f"GPU {index}", lambda index=index: card(index))
    if not gpus:
        yield Line("GPUs", ABSENT, "none can be used: everything below is looked at on the CPU")


def driver() -> Line:
    if shutil.which("nvidia-smi") is None:
        return Line("driver", ABSENT, "no nvidia-smi: no NVIDIA driver here")
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=30)
    versions = found.stdout.split()
    if found.returncode or not versions:
        said = (found.stderr.strip() or found.stdout.strip() or f"status {found.returncode}").splitlines()[0]
        return Line("driver", WRONG, f"nvidia-smi fails: {said}", "mend the driver first; in a container, start it with --gpus all")
    return Line("driver", OK, f"{versions[0]}, {len(versions)} GPU(s)", "", {"driver": versions[0], "gpus": len(versions)})


def card(index: int) -> Line:
    about = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    numbers = {"name": about.name, "capability": f"{about.major}.{about.minor}", "free_bytes": free, "total_bytes": total}
    found = f"{about.name} (sm_{about.major}{about.minor}), {size(free)} of {size(total)} free"
    if (about.major, about.minor) < LEAST_CAPABILITY:
        return Line(f"GPU {index}", WRONG, f"{found}: too old for bfloat16 and flash kernels", "use Ampere (8.0) or newer", numbers)
    if free < 0.9 * total:
        return Line(f"GPU {index}", SLOW, found, "another process holds memory there: nvidia-smi names it", numbers)
    return Line(f"GPU {index}", OK, found, "", numbers)


def memory() -> Line:
    found = psutil.virtual_memory()
    numbers = {"available_bytes": found.available, "total_bytes": found.total, "cpus": os.cpu_count()}
    return Line("memory", OK, f"{size(found.available)} of {size(found.total)} free, {os.cpu_count()} CPUs", "", numbers)


def disk(folder: Path) -> Line:
    """Room where a run would write, and how fast its disk takes a file; the trial file is gone afterwards."""
    check = f"disk of {folder}"
    try:
        seconds = _written(folder)
    except DiskError as error:
        return Line(check, WRONG, str(error).partition("; ")[0], "make room there, or choose another place")
    except OSError as error:
        return Line(check, WRONG, f"{error.filename or folder}: {error.strerror}", "choose a folder that you may write to")
    free, speed = shutil.disk_usage(nearest(folder)).free, TRIAL_BYTES / seconds
    numbers = {"free_bytes": free, "write_bytes_per_second": speed}
    found = f"{size(free)} free, takes {rate(speed)}"
    if speed < SLOW_DISK_BYTES_PER_SECOND:
        return Line(check, SLOW, found, "a checkpoint would take long: choose a local or a parallel file system", numbers)
    return Line(check, OK, found, "`laid train RECIPE --dry-run` says what a run needs", numbers)


def shared_memory(folder: Path = Path("/dev/shm")) -> Line:
    """What data workers and NCCL hand each other tensors through."""
    check = str(folder)
    if not folder.is_dir():
        return Line(check, WRONG, "is not there", "mount a tmpfs there: data workers and NCCL need it")
    free = shutil.disk_usage(folder).free
    try:
        _written(folder)
    except DiskError as error:
        return Line(check, WRONG, str(error).partition("; ")[0], "remove what is left there, or give it more room")
    advice = "in docker: --shm-size=16g (or --ipc=host)"
    if free < LEAST_SHARED_BYTES:
        return Line(check, WRONG, f"{size(free)} free, {size(LEAST_SHARED_BYTES)} is the least", advice, {"free_bytes": free})
    return Line(check, OK, f"{size(free)} free", "", {"free_bytes": free})


def _written(folder: Path) -> float:
    """Seconds to bring TRIAL_BYTES to a disk. Raises DiskError when it takes no more."""
    trial = nearest(folder) / f".laid-doctor-{os.getpid()}"
    start = time.perf_counter()
    try:
        with writing(folder, "a trial file", TRIAL_BYTES), trial.open("xb") as file:
            file.write(os.urandom(1 << 20) * (TRIAL_BYTES >> 20))
            file.flush()
            os.fsync(file.fileno())
    finally:
        trial.unlink(missing_ok=True)
    return time.perf_counter() - start


def builds() -> Room:
    """What DeepSpeed would compile on first use, and locks that a killed build has left."""
    yield looked("DeepSpeed's own operations", operations)
    yield looked("build locks", lambda: locks(build_folder()))


def operations() -> Line:
    from laid_ds.runtime import engine

    states = engine.compiled_on_use()
    check, (name, state) = "DeepSpeed's own operations", next(iter(states.items()))
    rest = "nothing else is compiled: the optimizer is torch's"
    if state == "built":
        return Line(check, OK, f"{name} is built; {rest}", "", states)
    if state == "could be":
        advice = "takes minutes of g++ on first use: build it before a job with such a teacher"
        return Line(check, ABSENT, f"{name} (a teacher on NVMe alone needs it) is not built; {rest}", advice, states)
    advice = "for a teacher on NVMe: apt-get install libaio-dev g++, pip install ninja"
    return Line(check, ABSENT, f"{name} (a teacher on NVMe alone needs it) cannot be built here; {rest}", advice, states)


def build_folder() -> Path:
    """Where torch keeps the extensions that it compiles."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def locks(folder: Path) -> Line:
    """torch's build waits while `lock` is there and never asks whose it is. A build runs its compiler inside the folder."""
    found = sorted(path for pattern in ("lock", "*/lock", "*/*/lock") for path in folder.glob(pattern))
    stale = [path for path in found if not _is_worked_in(path.parent)]
    if stale:
        named = ", ".join(map(str, stale))
        return Line("build locks", WRONG, f"{named}: no build runs there, and {LOCKED}", f"rm {' '.join(map(str, stale))}")
    if found:
        return Line(
            "build locks", SLOW, f"a build is running in {', '.join(str(path.parent) for path in found)}", "wait until it has ended"
        )
    return Line("build locks", OK, f"none in {folder}")


def _is_worked_in(folder: Path) -> bool:
    """Whether a process of this machine works in a folder, as compilers of a build do."""
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == folder.resolve():
                return True
        except (psutil.Error, OSError):  # it has ended, or is another user's
            continue
    return False
