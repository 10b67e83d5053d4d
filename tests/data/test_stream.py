"""Laws of the stream: one global order for any number of ranks and workers, resumed at any step, never uneven, nothing dropped silently."""

import logging
import math
import socket
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from data_samples import make_sample, write_dataset

from laid_ds.data.dataset import Dataset
from laid_ds.data.haystack import images_drawn
from laid_ds.data.order import Packing
from laid_ds.data.record import DataError
from laid_ds.data.slabs import Slabs, empty
from laid_ds.data.stream import Stream

GLOBAL_BATCH = 24
PACKING = Packing(budget=120, buffer=8, group=3)
WINDOWS = Packing(budget=120, buffer=8, group=3, images=(1, 2), image_tokens=3)
each_packing = pytest.mark.parametrize("packing", [None, PACKING, WINDOWS], ids=["samples", "packs", "packs of windows"])


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> Dataset:
    """23 samples of different lengths in shards of 5, 5, 5, 5, 3."""
    folder = tmp_path_factory.mktemp("uneven")
    return write_dataset(folder, [make_sample(i, i % 3, "word " * (i % 11)) for i in range(23)], samples_per_shard=5)


def keys(batch):
    """A batch as comparable values, packed or not."""
    return [keys(entry) if isinstance(entry, list) else (entry[0], entry[1].key) for entry in batch]


def run(dataset, world_size, steps, state=None, workers=0, **options):
    """Global batches of all ranks together, and the state after them."""
    options = {"seed": 5, "prepare": keys, "workers": workers, **options}
    ranks = [Stream(dataset, micro_batch=GLOBAL_BATCH // world_size, rank=r, world_size=world_size, **options) for r in range(world_size)]
    for rank in ranks:
        if state is not None:
            rank.load_state_dict(state)
    iterators = [iter(rank) for rank in ranks]
    batches = [[entry for iterator in iterators for entry in next(iterator)] for _ in range(steps)]
    states = [rank.state_dict() for rank in ranks]
    assert all(other == states[0] for other in states)
    return batches, states[0]


@each_packing
@pytest.mark.parametrize("shuffle", ["full", "none", 6])
def test_global_batches_do_not_depend_on_the_world_size(uneven, packing, shuffle):
    reference, _ = run(uneven, 1, 5, packing=packing, shuffle=shuffle)
    for world_size in (2, 3, 4, 6, 8):
        assert run(uneven, world_size, 5, packing=packing, shuffle=shuffle)[0] == reference


@each_packing
def test_the_world_size_may_change_at_any_step(uneven, packing):
    reference, _ = run(uneven, 1, 6, packing=packing)
    for step in range(1, 6):
        for before, after in ((4, 3), (1, 8), (6, 2)):
            first, state = run(uneven, before, step, packing=packing)
            assert first + run(uneven, after, 6 - step, state, packing=packing)[0] == reference


@each_packing
def test_workers_change_neither_the_order_nor_the_random_state(uneven, packing):
    reference, _ = run(uneven, 1, 5, packing=packing)
    before = torch.get_rng_state()
    first, state = run(uneven, 1, 2, packing=packing, workers=2)
    assert first + run(uneven, 1, 3, state, packing=packing, workers=1)[0] == reference
    assert torch.equal(torch.get_rng_state(), before)


@each_packing
def test_each_epoch_holds_each_sample_once_and_epochs_differ(uneven, packing):
    stream = Stream(uneven, micro_batch=1, rank=0, world_size=1, seed=5, prepare=keys, packing=packing)
    epochs = [[entry for slot in stream.epoch_slots(epoch) for entry in slot] for epoch in range(2)]
    for epoch, entries in enumerate(epochs):
        assert sorted(index for _, index in entries) == list(range(23))
        assert sorted(position for position, _ in entries) == list(range(23 * epoch, 23 * epoch + 23))
    assert [index for _, index in epochs[0]] != [index for _, index in epochs[1]]


def test_packs_keep_to_their_budget(uneven):
    stream = Stream(uneven, micro_batch=1, rank=0, world_size=1, seed=5, prepare=keys, packing=PACKING)
    assert all(sum(int(uneven.lengths[index]) for _, index in slot) <= PACKING.budget for slot in stream.epoch_slots(0))
    with pytest.raises(DataError, match=r"does not fit a budget of 20 .shard"):
        Stream(uneven, micro_batch=1, rank=0, world_size=1, seed=5, prepare=keys, packing=Packing(budget=20))


def test_another_data_set_or_order_is_refused(uneven, dataset):
    _, state = run(uneven, 1, 1)
    with pytest.raises(ValueError, match="the data set changed"):
        run(dataset, 1, 1, state)
    with pytest.raises(ValueError, match="saved with seed 5, this run has 6"):
        run(uneven, 1, 1, state, seed=6)
    with pytest.raises(ValueError, match="packing"):
        run(uneven, 1, 1, state, packing=PACKING)


@each_packing
def test_a_blend_keeps_every_law(uneven, tmp_path, packing):
    write_dataset(tmp_path / "more", [make_sample(i, 1) for i in range(100, 109)], samples_per_shard=4)
    both = Dataset.open([uneven.folders[0].path, tmp_path / "more"])
    options = {"packing": packing, "weights": [1, 3]}
    reference, _ = run(both, 1, 6, **options)
    first, state = run(both, 4, 2, **options)
    assert first + run(both, 3, 4, state, **options)[0] == reference
    with pytest.raises(ValueError, match="weights"):
        run(both, 1, 1, state, packing=packing, weights=[1, 2])


def spoil(folder, dataset, i):
    """Flip a byte in the middle of sample `i`."""
    origin = dataset.origin(i)
    with open(folder / origin.shard, "r+b") as file:
        file.seek(origin.offset + sum(map(len, dataset.parts(i))) // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    return origin


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_stops_the_stream_with_its_place(dataset, tmp_path, workers):
    origin = spoil(tmp_path / "set", dataset, 11)
    with pytest.raises(DataError, match="crc32") as caught:
        run(dataset, 1, 2, workers=workers)
    assert (caught.value.shard, caught.value.key, caught.value.offset) == (origin.shard, origin.key, origin.offset)


@each_packing
def test_a_bad_sample_is_replaced_by_the_same_one_on_any_world_size_and_logged(dataset, tmp_path, packing, caplog):
    origin = spoil(tmp_path / "set", dataset, 11)
    with caplog.at_level(logging.WARNING):
        reference, _ = run(dataset, 1, 4, packing=packing, on_bad="replace")
    assert all(origin.key not in str(batch) for batch in reference)
    assert f"shard {origin.shard}, key {origin.key}, offset {origin.offset}" in caplog.text
    assert run(dataset, 3, 4, packing=packing, on_bad="replace")[0] == reference
    sound, _ = run(write_dataset(tmp_path / "sound", dataset_samples(), samples_per_shard=7), 1, 4, packing=packing)
    assert [[len(slot) for slot in batch] for batch in sound] == [[len(slot) for slot in batch] for batch in reference]


def dataset_samples():
    return [make_sample(i, i % 4) for i in range(25)]


def test_a_sample_that_prepare_refuses_is_replaced_too(dataset):
    def picky(batch):
        for _, sample in batch:
            if sample.key == "sample-00011":
                raise DataError("image 0 cannot be decoded", key=sample.key)
        return keys(batch)

    with pytest.raises(DataError, match="cannot be decoded"):
        run(dataset, 1, 2, prepare=picky)
    batches, _ = run(dataset, 2, 2, prepare=picky, on_bad="replace")
    assert all(len(batch) == GLOBAL_BATCH for batch in batches)
    assert "sample-00011" not in str(batches)


def test_any_other_error_of_prepare_is_not_hidden(dataset):
    def broken(batch):
        raise KeyError("bug")

    with pytest.raises(KeyError, match="bug"):
        run(dataset, 1, 1, prepare=broken, on_bad="replace")


def tensors_of(batch):
    """Tensors of every awkward kind, all of them functions of the positions."""
    torch.manual_seed(batch[0][0])
    wide = torch.randn(300, 40)
    made_there = torch.cat([wide, wide], out=empty((600, 40), torch.float32))
    return {
        "keys": keys(batch),
        "kinds": [wide.to(kind) for kind in (torch.float64, torch.bfloat16, torch.int32, torch.uint8, torch.bool)],
        "made there": [made_there, made_there[20:], made_there[:, 3:9], made_there.T, empty((0, 3), torch.int64)],
        "views": (wide.T, wide[::3], wide[0, 0], wide[:0], wide.expand(2, 300, 40)),
    }


def flat(item):
    if isinstance(item, dict):
        return flat(list(item.values()))
    if isinstance(item, (list, tuple)):
        return [leaf for entry in item for leaf in flat(entry)]
    return [item]


@pytest.mark.parametrize("slab_bytes", [1 << 22, 1 << 12], ids=["in slabs", "slabs too small"])
def test_tensors_arrive_from_workers_as_they_were_made(uneven, monkeypatch, slab_bytes):
    monkeypatch.setattr("laid_ds.data.slabs.SLAB_BYTES", slab_bytes)

    def batches(workers):
        stream = Stream(uneven, micro_batch=3, rank=0, world_size=1, seed=5, prepare=tensors_of, workers=workers)
        return [batch for _, batch in zip(range(20), stream, strict=False)]  # kept while the slabs are used again

    for one, other in zip(flat(batches(0)), flat(batches(2)), strict=True):
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        else:
            assert one == other


def test_slabs_are_used_again_and_again(uneven, monkeypatch):
    taken = []
    take = Slabs.take
    monkeypatch.setattr(Slabs, "take", lambda self: taken.append(take(self)) or taken[-1])
    stream = Stream(uneven, micro_batch=3, rank=0, world_size=1, seed=5, prepare=tensors_of, workers=1)
    for _, batch in zip(range(40), stream, strict=False):
        assert batch["views"][0].shape == (40, 300)
    assert set(taken) == set(taken[:4])
    assert None not in taken


def _train(rank, world_size, port, folder, results):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    stream = Stream(Dataset.open(folder), micro_batch=2, rank=rank, world_size=world_size, seed=0, prepare=keys)
    seen = torch.zeros(1)
    for _, batch in zip(range(15), stream, strict=False):  # beyond the epoch's end on every rank
        count = torch.tensor([float(len(batch))])
        dist.all_reduce(count)  # hangs if a rank runs out of steps
        seen += count
    results[rank] = int(seen)
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_has_the_same_steps_over_uneven_shards(dataset, tmp_path, world_size):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = torch.zeros(world_size, dtype=torch.int64).share_memory_()
    torch.multiprocessing.start_processes(
        _train, (world_size, port, str(tmp_path / "set"), results), nprocs=world_size, start_method="fork"
    )
    assert results.tolist() == [15 * 2 * world_size] * world_size


def test_windows_are_packed_by_the_tokens_that_they_may_have(uneven):
    """A window is shorter than its sample by the images that it lacks, so that a pack may hold what whole samples would burst."""
    packing = replace(WINDOWS, budget=60, scale=0.5, images=(1, 1))
    stream = Stream(uneven, micro_batch=1, rank=0, world_size=1, seed=5, prepare=keys, packing=packing)
    windows, whole = [], []
    for slot in stream.epoch_slots(0):
        lengths, images = ([int(column[index]) for _, index in slot] for column in (uneven.lengths, uneven.num_images))
        assert all(images_drawn(5, position, packing.images) == 1 for position, _ in slot)
        whole.append(sum(math.ceil(length / 2) for length in lengths))
        windows.append(whole[-1] - sum(3 * max(number - 1, 0) for number in images))
    assert max(windows) <= packing.budget < max(whole)
