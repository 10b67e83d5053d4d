"""Laws of order, blending and packing: pure functions, each sample exactly as often as it should be."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laid_ds.data.order import Packing, blend_counts, blend_order, endless_order, global_order, plan_packs

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=8)
SHUFFLES = st.sampled_from(["full", "none", 1, 4, 1000])


@given(seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 10**6), sizes=SIZES, shuffle=SHUFFLES)
@settings(max_examples=100, deadline=None)
def test_an_epoch_is_a_permutation_and_a_pure_function(seed, epoch, sizes, shuffle):
    order = global_order(seed, epoch, sizes, shuffle)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(sum(sizes)))
    assert (order == global_order(seed, epoch, sizes, shuffle)).all()


def test_seeds_and_epochs_give_different_orders():
    orders = [tuple(global_order(seed, epoch, [100])) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


def test_the_order_never_changes_from_one_version_to_the_next():
    """A run must resume after an upgrade: these numbers are part of the format."""
    assert global_order(7, 3, [5, 5]).tolist() == [2, 5, 9, 7, 3, 0, 6, 8, 4, 1]
    assert global_order(7, 3, [5, 5], 4).tolist() == [2, 1, 0, 3, 4, 6, 7, 5, 8, 9]


def test_a_window_touches_few_shards_at_a_time():
    order = global_order(0, 0, [50] * 40, 100)
    for first in range(0, 2000, 100):
        assert len(set(order[first : first + 100] // 50)) == 2


@pytest.mark.parametrize("shuffle", ["some", 0, -1, True, 2.5])
def test_an_unknown_shuffle_is_refused(shuffle):
    with pytest.raises(ValueError, match="neither"):
        global_order(0, 0, [3], shuffle)


def test_a_million_samples_are_ordered_quickly_in_little_memory():
    sizes = [1000] * 1000
    began = time.process_time()
    global_order(0, 0, sizes)
    assert time.process_time() - began < 0.3 * 3  # the target, with room for a busy machine
    tracemalloc.start()
    global_order(0, 1, sizes)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


@given(weights=st.lists(st.floats(0, 100), min_size=1, max_size=5).filter(sum), total=st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_shares_of_an_epoch_are_exact(weights, total):
    counts = blend_counts(weights, total)
    assert counts.sum() == total
    assert (np.abs(counts - np.array(weights) / sum(weights) * total) < 1).all()


@given(seed=st.integers(0, 99), sources=st.lists(SIZES, min_size=1, max_size=3), shuffle=SHUFFLES, data=st.data())
@settings(max_examples=60, deadline=None)
def test_after_any_number_of_epochs_each_sample_of_a_source_was_used_equally_often(seed, sources, shuffle, data):
    weights = data.draw(st.lists(st.integers(1, 5), min_size=len(sources), max_size=len(sources)))
    sizes = [sum(source) for source in sources]
    counts = blend_counts(weights, sum(sizes))
    starts = np.cumsum([0, *sizes])
    used = np.zeros(sum(sizes), int)
    for epoch in range(4):
        np.add.at(used, blend_order(seed, epoch, sources, weights, shuffle), 1)
        for source, size in enumerate(sizes):
            part = used[starts[source] : starts[source] + size]
            assert part.sum() == (epoch + 1) * counts[source]
            assert part.max() - part.min() <= 1


def test_an_endless_order_is_epochs_end_to_end():
    whole = np.concatenate([global_order(3, epoch, [4, 3]) for epoch in range(5)])
    for first in range(0, 30, 4):
        assert (endless_order(3, first, first + 5, [4, 3], "full") == whole[first : first + 5]).all()


def test_a_blend_without_shuffle_is_spread_evenly():
    labels = blend_order(0, 0, [[30], [10]], [3, 1], "none") >= 30
    assert all(labels[first : first + 4].sum() == 1 for first in range(0, 40, 4))


@pytest.mark.parametrize("weights", [[1], [-1, 2], [0, 0], [float("nan"), 1]])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        blend_order(0, 0, [[3], [3]], weights)


@given(lengths=st.lists(st.integers(0, 50), max_size=80), buffer=st.integers(1, 20), group=st.integers(1, 5), seed=st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_each_place_is_in_one_pack_and_no_pack_is_too_long(lengths, buffer, group, seed):
    lengths = np.array(lengths, np.int64)
    packing = Packing(budget=50, buffer=buffer, group=group)
    packs = plan_packs(seed, 0, lengths, packing)
    assert sorted(packs.places.tolist()) == list(range(len(lengths)))
    assert (packs.sums(lengths) <= 50).all()
    again = plan_packs(seed, 0, lengths, packing)
    assert (packs.places == again.places).all()
    assert (packs.bounds == again.bounds).all()


def mix(count=8000):
    """1 to 150 images a sample, 64 to 256 tokens an image: median 6k tokens, longest about 26k."""
    rng = np.random.default_rng(2)
    images = np.clip(rng.lognormal(np.log(37), 0.71, count), 1, 150).astype(int)
    return np.array([int(rng.integers(64, 257, n).sum()) for n in images])


@pytest.mark.parametrize("budget", [1 << 15, 1 << 16, 1 << 17])
def test_packs_are_full_and_neighbours_have_like_work(budget):
    lengths = mix()
    packs = plan_packs(0, 0, lengths, Packing(budget))
    assert lengths.sum() / (budget * len(packs)) > 0.97
    work = packs.sums(lengths**2)
    steps = work[: len(work) // 8 * 8].reshape(-1, 8)
    assert (steps.max(1) / steps.mean(1)).mean() < 1.2 < work.max() / work.mean()


def test_packs_stay_near_their_places_in_the_order():
    """Packing must not undo the shuffle, and no sample may wait for long."""
    packs = plan_packs(0, 0, mix(), Packing(1 << 15, buffer=64))
    assert max(int(np.ptp(packs[k])) for k in range(len(packs))) < 64 * 2


def test_a_sample_that_fits_no_pack_is_refused():
    with pytest.raises(ValueError, match="cannot hold a sample of 51 tokens"):
        plan_packs(0, 0, np.array([3, 51]), Packing(50))
