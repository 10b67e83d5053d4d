"""The examination: rooms in their order, on every rank; rank 0 prints each line as soon as all ranks have said theirs."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from laid_ds.doctor import software
from laid_ds.doctor.line import ABSENT, OK, WRONG, Line, looked, merged, sentence, status
from laid_ds.runtime import environment
from laid_ds.terminal import as_json

if TYPE_CHECKING:  # whatever may be missing is imported after `software` has looked
    import torch


OUT_OF_STEP = "ranks out of step"
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""What a launcher of one rank would say; port 0 is any that is free."""


def main(arguments: list[str] | None = None) -> int:
    """[--run FOLDER] [--json] [--wait SECONDS]; returns the exit status: 1 where a line is wrong, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m laid_ds.doctor", description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs"), help="folder that runs are written to")
    parser.add_argument("--wait", type=float, default=120, help="seconds to wait for ranks that do not come or do not answer")
    parser.add_argument("--json", action="store_true", help="one JSON object, at the end")
    parser.add_argument("--status-to", type=Path, help="file for the status, which then is 0 for the launcher")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        os.environ.update(environment.bridge(os.environ))
    except ValueError as error:
        sys.stderr.write(f"laid: {error}\n")
        return 2
    os.environ |= {} if "RANK" in os.environ else ALONE
    speaks, local = os.environ["RANK"] == "0", os.environ["LOCAL_RANK"] == "0"
    start, lines = time.perf_counter(), []
    try:
        with quiet() as out:
            for line in examined(options.run, options.wait, local):
                lines.append(line)
                if speaks and not options.json:
                    print(line.as_text(), file=out, flush=True)
            if speaks:
                print(summary(lines, time.perf_counter() - start, options.json), file=out, flush=True)
    except KeyboardInterrupt:
        return 130
    if not speaks:  # it leaves with 1 only where no other rank can speak: a launcher would end those
        apart = [line for line in lines if line.check in ("ranks", OUT_OF_STEP) and line.verdict == WRONG]
        sys.stderr.write("".join(f"{line.as_text()}\n" for line in apart))
        return int(any(line.check == "ranks" for line in apart))
    if options.status_to is not None:
        options.status_to.write_text(str(status(lines)))
        return 0
    return status(lines)


def summary(lines: Sequence[Line], seconds: float, in_json: bool) -> str:
    counts = {verdict: sum(line.verdict == verdict for line in lines) for verdict in ("ok", "slow", "wrong", "absent")}
    if in_json:
        return as_json({"status": status(lines), **counts, "seconds": round(seconds, 1), "lines": [line.as_json() for line in lines]})
    return f"{', '.join(f'{number} {verdict}' for verdict, number in counts.items() if number)}; {seconds:.0f} s"


def examined(folder: Path, wait_seconds: float, local: bool) -> Iterator[Line]:
    """Every line; each room's, when all ranks have looked. `local`: this rank looks at the machine for those beside it."""
    here = list(software.software()) if local else []
    missing = software.missing()
    if missing:
        yield from here
        yield Line("the machine", ABSENT, f"cannot be looked at without {', '.join(missing)}", "install what is missing above")
        return
    from laid_ds.runtime import distributed

    here += of_machine(folder) if local else []
    met = looked("ranks", lambda: meet(wait_seconds))
    if met.verdict == WRONG:
        yield from here
        yield met
        return
    try:
        yield from merged(distributed.gathered(here))
        yield from merged(distributed.gathered([met]))
        yield from on_device()
    finally:
        distributed.leave()


def on_device() -> Iterator[Line]:
    """What runs on this rank's device. Collective."""
    import torch

    from laid_ds.runtime import distributed

    device = torch.device("cuda", torch.cuda.current_device()) if os.environ.get("DS_ACCELERATOR") != "cpu" else torch.device("cpu")
    lost = ""
    for name, room in rooms(device):
        found = [Line(name, ABSENT, f"not tried: {lost}", "mend the line above that is wrong")] if lost else _looked(name, room)
        lost = lost or _lost(device, found)
        try:
            of_ranks = distributed.gathered(found)
        except RuntimeError as error:  # a rank that met an error in the middle of a message waits for none any more
            own = next((line.found for line in found if line.verdict == WRONG), sentence(error))
            yield Line(OUT_OF_STEP, WRONG, f"rank {distributed.rank()}, in {name!r}: {own}", "what the ranks say on stderr tells who began")
            return
        yield from merged(of_ranks)


def of_machine(folder: Path) -> list[Line]:
    """What is the same for all ranks of a machine."""
    from laid_ds.doctor import machine

    memory, disk = looked("memory", machine.memory), looked(f"disk of {folder}", lambda: machine.disk(folder))
    return [*machine.cards(), memory, disk, looked("/dev/shm", machine.shared_memory), *machine.builds()]


def meet(wait_seconds: float) -> Line:
    """Join the group that the launcher described; every rank counts."""
    from laid_ds.runtime import distributed, engine

    expected = int(os.environ["WORLD_SIZE"])
    engine.start_processes(wait_seconds)
    (came,) = distributed.add([1])
    if came != expected or distributed.world_size() != expected:
        return Line("ranks", WRONG, f"{came:.0f} came, the launcher counts {expected}", "let one launcher start all ranks")
    return Line("ranks", OK, f"{expected} of {expected} met", "", {"ranks": expected})


def rooms(device: torch.device) -> Iterator[tuple[str, Callable[[], Sequence[Line]]]]:
    """(name, what looks) of all that runs on the device; imported late, each after the one before it."""
    from laid_ds.doctor import ranks

    yield "messages", lambda: [looked("messages", lambda: ranks.messages(device))]
    from laid_ds.doctor import attention, kernels

    yield "attention", lambda: list(attention.attention(device))
    yield "kernels", lambda: list(kernels.kernels(device))
    from laid_ds.doctor import step

    yield "a LAid step under ZeRO-3", lambda: [looked("a LAid step under ZeRO-3", lambda: step.zero3_step(device))]
    from laid_ds.doctor import speed

    yield "speed", lambda: list(speed.speed(device))


def _looked(name: str, room: Callable[[], Sequence[Line]]) -> Sequence[Line]:
    try:
        return room()
    except Exception as error:
        return [Line(name, WRONG, sentence(error), "a run would meet the same error")]


def _lost(device: torch.device, found: Sequence[Line]) -> str:
    """After an illegal access nothing works on a GPU any more in this process: what comes then would be blamed wrongly."""
    import torch

    if device.type == "cuda" and any(line.verdict == WRONG for line in found):
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            wrong = next(line.check for line in found if line.verdict == WRONG)
            return f"the GPU was lost at {wrong!r} ({sentence(error)})"
    return ""


@contextmanager
def quiet() -> Iterator[TextIO]:
    """Inside the block nothing but what is printed to the yielded file is seen: libraries and their compilers speak to both streams.

    What they said is shown after all where an error leaves the block.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(stream) for stream in (1, 2)]
    with tempfile.TemporaryFile() as noise, os.fdopen(os.dup(1), "w") as out:
        for stream in (1, 2):
            os.dup2(noise.fileno(), stream)
        try:
            yield out
        except Exception:
            noise.seek(0)
            os.write(kept[1], noise.read())
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, stream)
                os.close(copy)
