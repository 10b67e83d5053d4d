"""Law 5: a student that is its teacher has nothing to learn from it."""

from __future__ import annotations

from laid_ds.config import Align as Options
from laid_ds.config import Losses
from laid_ds.kernels.attention_matching import Omega
from laid_ds.method.align import Align, layer_pairs
from laid_ds.method.distill import Ask, Student, Teacher
from laid_ds.models.attention import Tap, listen


def test_every_loss_and_gradient_is_zero(world):
    batch, vocabulary = world.batch(), world.vocabulary
    pairs = layer_pairs("proportional", 2, 2)
    shape = (4, 2, 16)
    align = Align(Options(start_logit=80.0), pairs, shape, shape, {})
    teacher_tap, student_tap = Tap([0, 1]), Tap([0, 1])
    original, copy = world.load("teacher"), world.load("teacher")
    listen(original, teacher_tap)
    listen(copy, student_tap)
    teacher = Teacher(original, teacher_tap, vocabulary, shows_logits=True)
    student = Student(copy, align, student_tap, Losses(rows_per_chunk=3), vocabulary)
    omega = Omega(kind="frontier", gamma=4.0, frontier=5.0, width=2.0)
    loss, sums = student(batch, teacher(batch), Ask({"align": 1.0, "match": 1.0, "kl": 1.0}, omega))
    for name, value in sums.items():
        assert abs(value.item()) < 1e-4, name
    loss.backward()
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.abs().max() < 1e-4, name
    assert sum(p.grad is not None for p in student.parameters()) > 10


def test_a_different_student_has_losses_and_gradients(world):
    """The law above could hold for a loss that is always zero; this one could not."""
    batch = world.batch()
    pairs = layer_pairs("last", 2, 2)
    align = Align(Options(), pairs, (2, 1, 16), (4, 2, 16), {})
    teacher_tap, student_tap = Tap([1]), Tap([1])
    teacher_model, student_model = world.load("teacher"), world.load("student")
    listen(teacher_model, teacher_tap)
    listen(student_model, student_tap)
    lesson = Teacher(teacher_model, teacher_tap, world.vocabulary, shows_logits=True)(batch)
    student = Student(student_model, align, student_tap, Losses(), world.vocabulary)
    for term in ("align", "match", "kl", "sft"):
        student.zero_grad()
        loss, sums = student(batch, lesson, Ask({term: 2.0}, Omega()))
        assert loss == 2 * sums[term] > 0.02
        loss.backward()
        touched = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert any(name.startswith("model.") for name in touched), term
        assert ("align.mixing.1" in touched) == (term in ("align", "match")), term
