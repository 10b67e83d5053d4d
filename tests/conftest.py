import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton at its first import: fused kernels run in its interpreter
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from tests.support.world import World, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Shards, a tiny teacher and a tiny student (not trained)."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def worlds(world: World, tmp_path_factory: pytest.TempPathFactory):
    """The same for other families: model_type -> World, made when first asked for."""
    made = {"qwen2_5_vl": world}

    def of(family: str) -> World:
        if family not in made:
            made[family] = make_world(tmp_path_factory.mktemp(family), family)
        return made[family]

    return of
