"""`laid eval` as one process, as the command that starts ranks on this machine, or as a rank that any launcher has started."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from laid_ds.evaluation.evaluate import How, check, evaluate_models
from laid_ds.evaluation.tasks import Wish
from laid_ds.parent import end_with
from laid_ds.runtime import distributed, engine, environment, local
from laid_ds.runtime.launchers import STARTED_BY
from laid_ds.terminal import say

MODULE = "laid_ds.cli"  # what a rank runs, with the words of the command


def evaluate(
    folders: Sequence[Path], models: Mapping[str, Path], out: Path, wish: Wish, how: How, words: Sequence[str], ranks: int, port: int
) -> dict[str, Any] | None:
    """What `evaluate_models` returns; None on ranks other than 0. A process that was started by no launcher starts `ranks` of this
    command, given as its words, once what can be checked is in order, and ends with them. Raises ValueError as that, and for a launcher's
    environment that makes no sense."""
    os.environ.update(environment.bridge(os.environ))
    environment.open_rank_log(os.environ)
    engine.choose_accelerator()
    if "RANK" in os.environ:
        if STARTED_BY in os.environ:
            end_with(os.getppid())  # the launcher, so that none of its ranks asks on unseen
        check(folders, models, wish, how, int(os.environ["WORLD_SIZE"]))  # every rank alike, before they wait for each other
        engine.start_processes()
    elif ranks > 1:
        check(folders, models, wish, how, ranks)
        sys.exit(local.launch(words, ranks, port, module=MODULE))
    try:
        results = evaluate_models(folders, models, out, wish, how)
    except RuntimeError as error:
        if not distributed.is_lost_peer(error):
            raise
        say(f"laid: rank {distributed.rank()} lost another rank; the same command goes on with what is not answered yet ({error})")
        sys.exit(1)
    return results if distributed.rank() == 0 else None
