"""Which tokens of a row each rank of a group computes: every one once, with alike much work, and put together in order."""

from __future__ import annotations

import pytest
import torch

from laid_ds.sequence import ALONE, SequenceGroup


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_the_stretches_of_all_ranks_are_the_row(size):
    group = SequenceGroup(size)
    tokens = 7 * group.multiple
    seen = [token for place in range(size) for rows in SequenceGroup(size, place).stretches(tokens) for token in range(*rows[:2])]
    assert sorted(seen) == list(range(tokens))


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_causal_work_is_shared_alike(size):
    """Scores of all rows of a rank, to a thousandth of the mean; one slice for each rank would be up to 1.9 of it."""
    tokens = 512 * size
    places = [SequenceGroup(size, place) for place in range(size)]
    work = [sum(token + 1 for rows in group.stretches(tokens) for token in range(*rows[:2])) for group in places]
    assert max(work) <= 1.001 * sum(work) / size


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_what_is_cut_is_put_together_again(size, dim):
    x = torch.randn(24, 24, 24, requires_grad=True)
    own = [SequenceGroup(size, place).own(x, dim) for place in range(size)]
    assert all(part.shape[dim] == 24 // size for part in own)
    for place in range(size):
        whole = SequenceGroup(size, place, gather=lambda _: torch.stack(own)).whole(own[place], dim)
        assert torch.equal(whole, x)
        (gradient,) = torch.autograd.grad(whole.square().sum(), x, retain_graph=True)
        torch.testing.assert_close(gradient, 2 * x.detach())


def test_alone_nothing_is_cut_or_copied():
    x = torch.randn(2, 5)
    assert ALONE.own(x, 1) is x
    assert ALONE.whole(x, 1) is x
    assert ALONE.add(x) is x
    assert x[:, ALONE.stretches(5)[0].at].data_ptr() == x.data_ptr()
    assert ALONE.multiple == 1


def test_a_row_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="a row of 14 tokens cannot be shared by 2 ranks: pad it to a multiple of 4"):
        SequenceGroup(2).stretches(14)
