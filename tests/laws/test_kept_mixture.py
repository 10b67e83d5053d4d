"""A mixture that is one teacher head for each student head and stays so is no parameter, and matching computes no other head: the sparse
kernels run, and give what the dense ones give of such a mixture. The same for chosen heads."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from laid_ds.config import Align as Options
from laid_ds.kernels.attention_matching import Omega, attention_matching, fused
from laid_ds.method import align as align_room
from laid_ds.method.align import Align, start_mixing
from laid_ds.models.attention import Captured
from tests.kernels.kernel_cases import IN_INTERPRETER
from tests.laws.test_world_size import assert_equal
from tests.support.processes import run_ranks
from tests.support.training import plain_steps, rank_steps

OMEGA = Omega(kind="frontier", gamma=4.0, frontier=5.0, width=2.0)
STUDENT, TEACHER = (4, 2, 16), (6, 3, 16)  # query heads, key heads, size
COUPLES = (((3, 0), (1, 5)),)


def captured(shape, seed, tokens=23, learned=False):
    generator, (heads, keys, size) = torch.Generator().manual_seed(seed), shape
    query, key = (torch.randn(2, number, tokens, size, generator=generator).requires_grad_(learned) for number in (heads, keys))
    return Captured(query, key, scale=0.3, window=None)


def compared(align, terms=("match", "align")):
    """Value and gradients to the student's queries and keys, with padding and a row mask."""
    student, teacher = captured(STUDENT, 0, learned=True), captured(TEACHER, 1)
    segments = torch.zeros(2, 23, dtype=torch.long)
    segments[1, 17:] = -1
    mask = torch.rand(2, 23, generator=torch.Generator().manual_seed(2)) < 0.6
    sums = align({0: student}, {0: teacher}, segments, terms, OMEGA, row_mask=mask)
    sum(sums.values()).backward()
    return [*(sums[term].detach() for term in terms), student.query.grad, student.key.grad]


def align_of(keeps_one_hot=False, **options):
    return Align(Options(**options), [(0, 0)], STUDENT, TEACHER, {}, keeps_one_hot=keeps_one_hot)


@pytest.fixture
def sparse_alone(monkeypatch):
    """Align's matching runs the fused kernels (in Triton's interpreter without a GPU); what they were asked of is in the list."""
    calls = []

    def sparse(problem, *others):
        calls.append(problem.teacher_heads.tolist())
        return own(problem, *others)

    own = fused._sparse
    monkeypatch.setattr(fused, "_sparse", sparse)
    monkeypatch.setattr(fused, "_dense", None)
    monkeypatch.setattr(align_room, "attention_matching", partial(attention_matching, implementation="fused"))
    return calls


@IN_INTERPRETER
@pytest.mark.parametrize("start", ["one_hot", COUPLES], ids=["by share", "probed"])
@pytest.mark.parametrize("mixing", ["tied", "separate"])
@pytest.mark.parametrize("kept", [{"start_logit": math.inf}, {"weights": "free"}], ids=["infinite", "free"])
def test_the_sparse_kernels_give_what_dense_ones_give(sparse_alone, monkeypatch, kept, mixing, start):
    found = compared(align_of(True, mixing=mixing, start=start, **kept))
    heads = [[0], [1], [3], [4]] if start == "one_hot" else [[0], [5], [3], [0]]
    assert sparse_alone == [heads]
    monkeypatch.undo()
    dense = align_of(mixing=mixing, start=start, start_logit=math.inf)
    assert dense.mixing["0"].softmax(-1).argmax(-1).tolist() == [head for (head,) in heads]
    for one, other in zip(found, compared(dense), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@IN_INTERPRETER
def test_chosen_heads_run_the_sparse_kernels_too(sparse_alone):
    """Against the dense form of those heads alone, each with its own copy of its key head."""
    found = compared(align_of(heads=COUPLES))
    assert sparse_alone == [[[0], [1]]]
    student, teacher = captured(STUDENT, 0, learned=True), captured(TEACHER, 1)
    segments = torch.zeros(2, 23, dtype=torch.long)
    segments[1, 17:] = -1
    mask = torch.rand(2, 23, generator=torch.Generator().manual_seed(2)) < 0.6
    value, _ = attention_matching(
        student.query[:, [3, 1]],
        student.key[:, [1, 0]],
        teacher.query[:, [0, 5]],
        teacher.key[:, [0, 2]],
        torch.eye(2).log(),
        student_scale=0.3,
        teacher_scale=0.3,
        omega=OMEGA,
        segments=segments,
        row_mask=mask,
        implementation="chunked",
    )
    torch.testing.assert_close(found[0], value.detach() / 2, rtol=1e-4, atol=1e-6)
    only_match = compared(align_of(heads=COUPLES), ("match",))
    (value / 2).backward()
    torch.testing.assert_close(only_match[1], student.query.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(only_match[2], student.key.grad, rtol=1e-4, atol=1e-6)


def test_nothing_of_it_is_learned():
    assert not list(align_of(True, start_logit=math.inf, mixing="separate").parameters())
    assert start_mixing(4, 6, Options(start_logit=math.inf)).softmax(-1).tolist() == start_mixing(4, 6, Options(weights="free")).tolist()


@pytest.mark.parametrize(
    "align, mixing_lr, kept",
    [
        ({"start_logit": math.inf}, 1e-3, True),
        ({"weights": "free"}, 0.0, True),
        ({"weights": "free", "start": "uniform"}, 0.0, False),
        ({"start_logit": math.inf, "start": "uniform"}, 0.0, False),
        ({"start_logit": math.inf, "pairs": [[1, 1]], "heads": [[[0, 1]]]}, 0.0, False),
        ({}, 0.0, False),
        ({"start_logit": 30.0}, 0.0, False),
    ],
)
def test_which_recipes_keep_it(world, tmp_path, align, mixing_lr, kept):
    losses = {"match": 0.0} if align.get("start") == "uniform" else {}
    run = world.run(tmp_path, align=align, optimizer={"mixing_lr": mixing_lr}, losses=losses)
    assert run.keeps_one_hot == kept
    assert type(run).model_validate_json(run.model_dump_json()) == run, "run.json, which has no inf, is read again"


def test_weights_that_move_freely_are_still_none_to_match(world, tmp_path):
    with pytest.raises(ValueError, match="gives no distribution to match"):
        world.run(tmp_path, align={"weights": "free"})
    with pytest.raises(ValueError, match="gives no distribution to match"):
        world.run(tmp_path, align={"weights": "free", "start": "uniform"}, optimizer={"mixing_lr": 0.0})


@pytest.mark.parametrize("align", [{"start_logit": math.inf}, {"weights": "free"}], ids=["infinite", "free"])
def test_zero3_equals_plain_torch(world, tmp_path, align):
    """Plain torch has the mixture as a parameter, exactly one-hot, and moves it by nothing."""
    changes = {"align": align, "optimizer": {"mixing_lr": 0.0}}
    plain = plain_steps(world.run(tmp_path / "plain", align={"start_logit": math.inf}, optimizer={"mixing_lr": 0.0}), 3, global_batch=4)
    del plain["weights"]["align.mixing.1"]
    for result in run_ranks(2, rank_steps, world.run(tmp_path / "run", data={"micro_batch": 2}, **changes), 3):
        assert_equal(result, plain)
