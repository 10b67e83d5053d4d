"""Laws of head-level alignment, against Eq. 7 written out head by head."""

from __future__ import annotations

import pytest
import torch

from laid_ds.kernels.head_alignment import head_alignment
from laid_ds.sequence import SequenceGroup


def case(T=13, B=1, Hs=4, Ks=2, Ht=6, Kt=3, Ds=8, Dt=8, seed=0):
    torch.manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    return draw(B, Hs, T, Ds).requires_grad_(), draw(B, Ks, T, Ds).requires_grad_(), draw(B, Ht, T, Dt), draw(B, Kt, T, Dt)


def weights(kind, Hs=4, Ht=6, Ks=2, Kt=3):
    torch.manual_seed(7)
    w = [torch.randn(Hs, Ht, dtype=torch.float64), torch.randn(Ks, Kt, dtype=torch.float64)]
    w = [(x.softmax(-1) if "softmax" in kind else x).requires_grad_() for x in w]
    return w[0] if "tied" in kind else tuple(w)


def by_hand(tensors, mixing, projection=None):
    """Per head (error, target norm) of the Q part and of the K part, for one unpacked sample; K is repeated to the query heads if tied."""
    sq, sk, tq, tk = (x[0] for x in tensors)
    if torch.is_tensor(mixing):
        sk, tk = sk.repeat_interleave(len(sq) // len(sk), 0), tk.repeat_interleave(len(tq) // len(tk), 0)
        mixing = (mixing, mixing)
    parts = []
    for student, teacher, w, project in zip((sq, sk), (tq, tk), mixing, projection or (None, None), strict=True):
        targets = [sum(w[i, j] * teacher[j] for j in range(len(teacher))) for i in range(len(student))]
        targets = [t if project is None else t @ project for t in targets]
        parts.append([((s - t).pow(2).sum(), t.detach().pow(2).sum()) for s, t in zip(student, targets, strict=True)])
    return parts


MIXINGS = ["tied softmax", "tied free", "separate softmax", "separate free"]


@pytest.mark.parametrize("kind", MIXINGS)
@pytest.mark.parametrize("reduction", ["relative", "mean", "sum"])
@pytest.mark.parametrize("sizes", [(8, 8), (8, 12)])
def test_is_equation_7(kind, reduction, sizes):
    tensors, mixing = case(Ds=sizes[0], Dt=sizes[1]), weights(kind)
    projection = None if sizes[0] == sizes[1] else [torch.randn(12, 8, dtype=torch.float64, requires_grad=True) for _ in "qk"]
    loss, count = head_alignment(*tensors, mixing, reduction=reduction, projection=projection)
    parts = by_hand(tensors, mixing, projection)
    if reduction == "sum":
        want, want_count = sum(e for part in parts for e, _ in part), 1
    elif reduction == "mean":
        want, want_count = sum(sum(e for e, _ in part) / (len(part) * sizes[0]) for part in parts), 13
    else:
        want, want_count = sum(sum(e / n for e, n in part) / len(part) for part in parts) * 4, 4
    assert count == want_count
    torch.testing.assert_close(loss, want)
    learned = [*tensors[:2], *([mixing] if torch.is_tensor(mixing) else mixing), *(projection or [])]
    for got, exact in zip(torch.autograd.grad(loss, learned), torch.autograd.grad(want, learned), strict=True):
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("kind", ["tied softmax", "separate free"])
@pytest.mark.parametrize("reduction", ["relative", "mean", "sum"])
def test_packing_and_padding_change_nothing(kind, reduction):
    alone, mixing = [case(T=n, seed=n) for n in (5, 1, 9)], weights(kind)
    singles = [head_alignment(*x, mixing, reduction=reduction) for x in alone]
    packed = [torch.cat([x[k] for x in alone] + [torch.full_like(alone[0][k][:, :, :2], 9.0)], 2) for k in range(4)]
    loss, count = head_alignment(*packed, mixing, reduction=reduction, segments=torch.tensor([[3] * 5 + [4] + [8] * 9 + [-1] * 2]))
    torch.testing.assert_close(loss, sum(s[0] for s in singles))
    assert count == sum(s[1] for s in singles)
    rows = [torch.cat([torch.nn.functional.pad(x[k], (0, 0, 0, 9 - x[k].shape[2]), value=3.0) for x in alone]) for k in range(4)]
    padded = torch.tensor([[0] * n + [-1] * (9 - n) for n in (5, 1, 9)])
    torch.testing.assert_close(head_alignment(*rows, mixing, reduction=reduction, segments=padded)[0], loss)


def test_relative_means_the_same_at_any_length_and_scale():
    mixing = weights("tied softmax")
    (loss, count), tensors = head_alignment(*case(), mixing), case()
    longer = head_alignment(*(torch.cat([x, x], 2) for x in tensors), mixing)
    larger = head_alignment(*(5 * x for x in tensors), mixing)
    for other in (longer, larger):
        torch.testing.assert_close(other[0] / other[1], loss / count)


@pytest.mark.parametrize("reduction", ["relative", "mean", "sum"])
def test_student_equal_to_its_mixture_has_no_loss_and_no_gradient(reduction):
    _, _, tq, tk = case()
    student = tq.clone().requires_grad_(), tk.clone().requires_grad_()
    mixing = torch.eye(6, dtype=torch.float64, requires_grad=True), torch.eye(3, dtype=torch.float64, requires_grad=True)
    loss, _ = head_alignment(*student, tq, tk, mixing, reduction=reduction)
    assert loss == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, [*student, *mixing]))


def test_invariant_under_a_shared_rotation():
    tensors, mixing = case(), weights("tied free")
    angle = torch.arange(13, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64)

    def rotate(x):
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    torch.testing.assert_close(head_alignment(*map(rotate, tensors), mixing)[0], head_alignment(*tensors, mixing)[0])


def test_teacher_gets_no_gradient_and_bfloat16_gives_float32():
    tensors = [x.detach().bfloat16().requires_grad_() for x in case()]
    loss, _ = head_alignment(*tensors, weights("tied softmax").float())
    loss.backward()
    assert loss.dtype == torch.float32
    assert [x.grad is None for x in tensors] == [False, False, True, True]


BAD = {
    "student_query": ({}, lambda x: [x[0][0], *x[1:]]),
    "teacher_key": ({}, lambda x: [*x[:3], x[3][:, :, :4]]),
    "mixing": ({"mixing": torch.ones(6, 4)}, list),
    "mixing.1.": ({"mixing": (torch.ones(4, 6), torch.ones(4, 6))}, list),
    "reduction": ({"reduction": "max"}, list),
    "segments": ({"segments": torch.tensor([[1] * 6 + [0] * 7])}, list),
    "projection": ({}, lambda x: [*x[:2], *(torch.cat([y, y], -1) for y in x[2:])]),
    "projection for the key": ({"projection": (torch.ones(8, 8), torch.ones(8, 9))}, list),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    options, change = BAD[name]
    with pytest.raises(ValueError, match=rf"^{name}.*expected"):
        head_alignment(*change(list(case())), **{"mixing": weights("tied softmax")} | options)


@pytest.mark.parametrize("reduction", ["relative", "mean", "sum"])
@pytest.mark.parametrize("kind", ["tied softmax", "separate softmax"])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_share_rows_add_up_to_one(reduction, kind, size):
    """Packed rows, padding and a sample over several stretches; what ranks add is given to each as it would have come."""
    tensors, mixing = case(T=24, B=2), weights(kind)
    segments = torch.tensor([[0] * 3 + [1] * 14 + [2] * 5 + [-1] * 2, [0] * 20 + [-1] * 4])
    loss, count = head_alignment(*tensors, mixing, reduction=reduction, segments=segments)
    learned = [*tensors[:2], *([mixing] if torch.is_tensor(mixing) else mixing)]

    def part(place, add):
        group = SequenceGroup(size, place, add=add)
        own = [group.own(x, 2) for x in tensors]
        return head_alignment(*own, mixing, reduction=reduction, segments=segments, group=group)

    told = [[] for _ in range(size)]
    for place in range(size):
        part(place, lambda norm, place=place: told[place].append(norm) or norm)
    parts = []
    for place in range(size):
        norms = iter([sum(same) for same in zip(*told, strict=True)])
        parts.append(part(place, lambda norm, norms=norms: next(norms)))
    assert len(told[0]) == (2 if reduction == "relative" else 0)
    assert [one for _, one in parts] == [count] * size
    whole = sum(one for one, _ in parts)
    torch.testing.assert_close(whole, loss)
    for got, wanted in zip(torch.autograd.grad(whole, learned), torch.autograd.grad(loss, learned), strict=True):
        torch.testing.assert_close(got, wanted)
