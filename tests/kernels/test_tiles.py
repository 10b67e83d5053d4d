"""Row plans: which rows the fused kernels are given, and where their gradients go."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from laid_ds.kernels import tiles
from laid_ds.kernels.visible import first_visible

CPU = torch.device("cpu")


def test_rows_that_all_take_part_are_not_moved():
    plan = tiles.plan(torch.ones(2, 5), first_visible(2, 5, 3, None, None), 3, CPU)
    x = torch.randn(2, 4, 5, 8)
    assert plan.gather(x) is x
    assert plan.scatter(x, 5) is x


@pytest.mark.parametrize("weights", [[[1, 0, 2, 1], [0, 0, 0, 3]], [[1, 1, 1, 1], [0, 1, 1, 1]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
def test_rows_are_gathered_in_order_and_put_back(weights):
    weight, x = torch.tensor(weights, dtype=torch.float64), torch.randn(2, 3, 4, 8)
    plan = tiles.plan(weight, first_visible(2, 4, 0, None, None), 0, CPU)
    gathered = plan.gather(x)
    for b in range(2):
        rows = weight[b].nonzero().flatten()
        assert torch.equal(gathered[b, :, : len(rows)], x[b][:, rows])
        assert plan.weight[b].tolist() == weight[b, rows].tolist() + [0.0] * (gathered.shape[2] - len(rows))
        assert torch.equal(plan.bounds[b], torch.stack([plan.first[b], plan.last[b]]))
    counted = plan.weight[:, None, :, None] > 0
    back = plan.scatter(torch.where(counted, gathered, 0.0), 4)
    assert torch.equal(back, torch.where(weight[:, None, :, None] > 0, x, 0.0))
