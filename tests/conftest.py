from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch at its import
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts its background jobs; what tests interrupt would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton at its first import: fused kernels run in its interpreter

if TYPE_CHECKING:  # imported where it is asked for: the GPU tests of the kernels need torch, triton and numpy alone
    from tests.support.world import World


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """A test leaves the environment as it found it: one that starts DeepSpeed in this process would make a rank of all that come after."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Shards, a tiny teacher and a tiny student (not trained)."""
    from tests.support.world import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def worlds(world: World, tmp_path_factory: pytest.TempPathFactory):
    """The same for other families: model_type -> World, made when first asked for."""
    from tests.support.world import make_world

    made = {"qwen2_5_vl": world}

    def of(family: str) -> World:
        if family not in made:
            made[family] = make_world(tmp_path_factory.mktemp(family), family)
        return made[family]

    return of
