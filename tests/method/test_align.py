"""Align: which layers, how the mixture starts, what each option computes; counts that make means independent of batching."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from laid_ds.config import Align as Options
from laid_ds.kernels.attention_matching import Omega
from laid_ds.method.align import Align, layer_pairs, start_mixing


@dataclass
class Heads:
    query: Tensor
    key: Tensor
    scale: float = 0.25
    window: int | None = None
    lse: Tensor | None = None
    beside: Tensor | None = None


def heads(query_heads, key_heads, dim, seed, batch=2, tokens=7):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(batch, number, tokens, dim, generator=generator, dtype=torch.float64) for number in (query_heads, key_heads)]
    return Heads(*made)


def align_of(options, student=(2, 1, 4), teacher=(6, 3, 4)):
    return Align(options, [(0, 0)], student, teacher, {}, torch.float64)


def alignment(align, student, teacher, segments):
    return align({0: student}, {0: teacher}, segments, ["align"], Omega())["align"]


def test_layer_pairs():
    assert layer_pairs("last", 28, 64) == ((27, 63),)
    assert layer_pairs("proportional", 4, 8) == ((0, 1), (1, 3), (2, 5), (3, 7))
    assert layer_pairs("proportional", 36, 28)[-1] == (35, 27)
    assert layer_pairs([(0, 5)], 4, 8) == ((0, 5),)
    with pytest.raises(ValueError, match=r"\[4, 0\] does not exist; the models have 4 and 8"):
        layer_pairs([(4, 0)], 4, 8)


@pytest.mark.parametrize("student, teacher", [(28, 40), (2, 3), (4, 4)])
def test_a_one_hot_start_spreads_over_the_teacher_s_heads(student, teacher):
    rows = start_mixing(student, teacher, Options(start_logit=20.0)).softmax(-1)
    chosen = rows.argmax(-1).tolist()
    assert len(set(chosen)) == student
    assert chosen[0] == 0
    assert chosen[-1] >= teacher - math.ceil(teacher / student)
    assert rows.max(-1).values.min() > 0.999


def test_named_couples_start_where_they_say_and_the_others_by_share():
    options = Options(start=[[(1, 5), (0, 2)]], mixing="separate", start_logit=7.0)
    align = Align(options, [(0, 0)], (4, 2, 4), (8, 4, 4), {}, torch.float64)
    assert align.mixing["0"].argmax(-1).tolist() == [2, 5, 4, 6]
    assert align.mixing["0"].max(-1).values.tolist() == [7.0] * 4
    assert align.key_mixing["0"].argmax(-1).tolist() == [2, 2], "head 1 comes first: its key head 0 starts on that of head 5"
    with pytest.raises(ValueError, match=r"align.start: \[4, 0\] does not exist; the models have 4 and 8 heads"):
        Align(Options(start=[[(4, 0)]]), [(0, 0)], (4, 2, 4), (8, 4, 4), {})
    with pytest.raises(ValueError, match="a student layer twice, which has one mixture"):
        Align(Options(start=[[(0, 0)], [(1, 1)]]), [(0, 0), (0, 1)], (4, 2, 4), (8, 4, 4), {})


def test_a_uniform_start_is_the_mean_of_all_heads():
    assert torch.allclose(start_mixing(3, 5, Options(start="uniform")).softmax(-1), torch.full((3, 5), 0.2))
    assert torch.allclose(start_mixing(3, 5, Options(start="uniform", weights="free")), torch.full((3, 5), 0.2))


def test_entropy_tells_one_head_from_the_mean():
    assert align_of(Options(start_logit=50.0)).mixture_entropy() == pytest.approx(0, abs=1e-6)
    assert align_of(Options(start="uniform")).mixture_entropy() == pytest.approx(math.log(6))


@pytest.mark.parametrize("mixing", ["tied", "separate"])
@pytest.mark.parametrize("weights", ["softmax", "free"])
def test_the_literal_equation(mixing, weights):
    """reduction = "sum" is Eq. 7: squared norms summed over heads, of queries and of keys."""
    align = align_of(Options(mixing=mixing, weights=weights, reduction="sum", start_logit=1.0))
    student, teacher = heads(2, 1, 4, 0), heads(6, 3, 4, 1)
    found = alignment(align, student, teacher, torch.zeros(2, 7, dtype=torch.long))
    w = align.mixing["0"].softmax(-1) if weights == "softmax" else align.mixing["0"]
    w_key = w
    keys, teacher_keys = student.key.repeat_interleave(2, 1), teacher.key.repeat_interleave(2, 1)
    if mixing == "separate":
        keys, teacher_keys = student.key, teacher.key
        w_key = align.key_mixing["0"].softmax(-1) if weights == "softmax" else align.key_mixing["0"]
    expected = sum(
        (mine[:, i] - sum(v[i, j] * theirs[:, j] for j in range(theirs.shape[1]))).square().sum()
        for mine, theirs, v in ((student.query, teacher.query, w), (keys, teacher_keys, w_key))
        for i in range(mine.shape[1])
    )
    torch.testing.assert_close(found, expected)


def test_heads_of_another_size_need_a_projection_and_learn_it():
    align = align_of(Options(), student=(2, 1, 4), teacher=(4, 2, 6))
    loss = alignment(align, heads(2, 1, 4, 0), heads(4, 2, 6, 1), torch.zeros(2, 7, dtype=torch.long))
    loss.backward()
    assert align.projections["0"].shape == (2, 6, 4)
    assert align.projections["0"].grad.abs().sum() > 0


@pytest.mark.parametrize("reduction", ["relative", "mean", "sum"])
def test_a_mean_over_the_step_does_not_depend_on_the_batches(reduction):
    """Two rows together, with padding, equal the two alone: sums add up and are divided by what counted_by names."""
    align = align_of(Options(reduction=reduction))
    student, teacher = heads(2, 1, 4, 0), heads(6, 3, 4, 1)
    segments = torch.zeros(2, 7, dtype=torch.long)
    segments[1, 4:] = -1
    omega = Omega(kind="frontier", gamma=3.0, frontier=2.0, width=1.0)

    def sums(rows, tokens):
        cut = [Heads(h.query[rows, :, :tokens], h.key[rows, :, :tokens]) for h in (student, teacher)]
        return align({0: cut[0]}, {0: cut[1]}, segments[rows, :tokens], ["align", "match"], omega)

    together, first, second = sums(slice(0, 2), 7), sums(slice(0, 1), 7), sums(slice(1, 2), 4)
    for term in together:
        torch.testing.assert_close(together[term], first[term] + second[term])
    assert align.counted_by() == {"align": "tokens" if reduction == "mean" else "samples", "match": "tokens"}
