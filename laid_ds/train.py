"""The entry point of a rank. A launcher starts one process per rank:
`deepspeed --num_gpus 2 --module laid_ds.train recipes/demo.toml losses.match=0`
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

from laid_ds.parent import end
from laid_ds.runtime import environment
from laid_ds.runtime.launchers import end_with_launchers, leave
from laid_ds.runtime.stop import StopRequest, ignore_signals
from laid_ds.terminal import working

LOST = 1  # the status of a rank that goes because another process is gone, or by an error of ours


def read_teaching(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What `laid teach` puts before a recipe, and the other words."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--teach", dest="out", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    return parser.parse_known_args(words)


def main(arguments: list[str] | None = None) -> int:
    """RECIPE [section.key=value ...]; DeepSpeed's launcher puts --local_rank before them. Returns the exit status."""
    stop = StopRequest().listen()  # before the imports below, which take seconds
    end_with_launchers(os.environ)
    try:
        os.environ.update(environment.bridge(os.environ))
        environment.open_rank_log(os.environ)
    except ValueError as error:
        sys.stderr.write(f"laid: {error}\n")
        return 2
    with working("importing torch, transformers and DeepSpeed", active=os.environ.get("RANK") == "0"):
        from laid_ds import config
        from laid_ds.data.record import DataError
        from laid_ds.data.stream import is_lost_worker
        from laid_ds.disk import DiskError
        from laid_ds.method.distill import NonFiniteLoss
        from laid_ds.run.loop import StoppedByOthers, train
        from laid_ds.run.teach import teach
        from laid_ds.runtime import distributed, engine

    words = [word for word in (sys.argv[1:] if arguments is None else arguments) if not word.startswith("--local_rank")]
    try:
        if not words:
            raise ValueError("no recipe given; usage: deepspeed --num_gpus N --module laid_ds.train RECIPE [section.key=value ...]")
        options, words = read_teaching(words)
        run = config.load(words[0], words[1:])
        engine.start_processes()
        assert distributed.add([1])[0] == distributed.world_size() == int(os.environ["WORLD_SIZE"])
        run.groups(distributed.world_size())
        if options.out is not None:
            return int(not teach(run, options.out, options.steps, options.batch, stop))
        train(run, stop)
    except StoppedByOthers:
        return 2
    except KeyboardInterrupt:
        return 130
    except (ValueError, NonFiniteLoss) as error:
        if distributed.rank() == 0 or isinstance(error, DataError | DiskError | NonFiniteLoss):
            sys.stderr.write(f"laid: {error}\n")  # one write: ranks that speak together do not mix their words
        return 2
    except RuntimeError as error:
        if not (distributed.is_lost_peer(error) or is_lost_worker(error)):
            raise
        lost = "one of its data workers" if is_lost_worker(error) else "another rank"
        sys.stderr.write(f"laid: rank {distributed.rank()} lost {lost}; the same command goes on from the newest checkpoint ({error})\n")
        return LOST
    finally:
        leave()
        ignore_signals()
    return 0


if __name__ == "__main__":
    try:
        status = main()
    except Exception:  # ours to mend
        traceback.print_exc()
        status = LOST
    if (
        status == LOST
    ):  # what Python and the libraries would tear down may wait for the dead, or for data workers, which end with this process
        sys.stdout.flush()
        os._exit(status)
    end(status)
