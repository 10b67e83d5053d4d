"""Law 4 for whole steps: samples in one row give the losses and every gradient that they give alone, on any number of ranks."""

from __future__ import annotations

import itertools

import pytest
import torch

from laid_ds.config import Align as Options
from laid_ds.config import Losses, Match
from laid_ds.data.batch import Prepare
from laid_ds.data.dataset import Dataset
from laid_ds.data.images import Pixels
from laid_ds.data.record import Sample, Turn
from laid_ds.kernels.attention_matching import Omega
from laid_ds.method.align import Align, layer_pairs
from laid_ds.method.distill import Ask, Student, Teacher
from laid_ds.models.attention import Tap, attention_layers, attention_shape, listen
from laid_ds.models.family import family
from laid_ds.models.load import load_config
from laid_ds.models.positions import position_rule
from laid_ds.models.processor import Renderer, load_processor
from laid_ds.models.rope_gain import gain_shapes, responder
from laid_ds.run.build import build_renderer, build_stream
from laid_ds.run.check import check
from tests.laws.test_resume import killed, lines, whole_run
from tests.support.processes import run_ranks
from tests.support.training import plain_steps, rank_steps

TERMS = ("align", "match", "kl", "sft")
TEXT = Sample("text", (Turn("user", ("what colour is it?",)), Turn("assistant", ("red",))))


def samples_of(world) -> list[tuple[int, Sample]]:
    dataset = Dataset.open(world.shards)
    return [(0, dataset.read(0)), (1, TEXT), (2, dataset.read(2)), (3, dataset.read(3)), (4, TEXT)]


def prepare_of(world, packs: bool) -> Prepare:
    processor, rule = load_processor(world.student), position_rule(load_config(world.student))
    return Prepare(Renderer(processor, Pixels(), positions=rule), processor.tokenizer.pad_token_id, questions=2, packs=packs)


CROSSED = [(0, 1), (1, 0)]  # in the Qwen2.5-VL world layer 0 has a sliding window: a student with the narrower one, and a teacher


def pair_of(world, lse: bool, pairs="proportional", heads="all", rows_from="all"):
    """(student, teacher) with gains that are not 1, matching both layers."""
    taps, models = (Tap([0, 1], lse=lse), Tap([0, 1], lse=lse)), (world.load("student"), world.load("teacher"))
    shapes = [attention_shape(model.config) for model in models]
    align = Align(Options(start_logit=1.0, heads=heads), layer_pairs(pairs, 2, 2), *shapes, gain_shapes(models[0]))
    for theta in align.gain.values():
        torch.nn.init.normal_(theta, generator=torch.Generator().manual_seed(1))
    layout = family(models[0].config).layout
    listen(models[0], taps[0], {layer: responder(align.gain, layer, layout) for layer in attention_layers(models[0])})
    listen(models[1], taps[1])
    student = Student(models[0], align, taps[0], Losses(rows_per_chunk=3), world.vocabulary, Match(rows_from=rows_from))
    return student, Teacher(models[1], taps[1], world.vocabulary, True)


def step(world, batches, lse: bool = True, pairs="proportional"):
    """Sums of all terms over the batches, counts, and the gradient of every parameter."""
    student, teacher = pair_of(world, lse, pairs)
    omega = Omega(kind="frontier", gamma=4.0, frontier=5.0, width=2.0)
    totals, counts = dict.fromkeys(TERMS, 0.0), {}
    for batch in batches:
        loss, sums = student(batch, teacher(batch), Ask(dict.fromkeys(TERMS, 1.0), omega))
        loss.backward()
        totals = {term: totals[term] + sums[term].item() for term in TERMS}
        counts = {name: counts.get(name, 0) + value for name, value in batch.counts().items()}
    return totals, counts, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    (sums, counts, gradients), (wanted, other_counts, wanted_gradients) = found, expected
    assert sums == pytest.approx(wanted, rel=1e-5)
    assert {n: counts[n] for n in ("rows", "tokens", "samples")} == {n: other_counts[n] for n in ("rows", "tokens", "samples")}
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=2e-4, atol=2e-5 * float(gradient.abs().max()) + 1e-7, msg=name)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "internvl", "llava"])
def test_a_packed_row_is_its_samples_alone(worlds, name):
    """With sliding windows (the Qwen2.5-VL world), samples without images among them, and every term of the loss."""
    world = worlds(name)
    items = samples_of(world)
    packed = prepare_of(world, True)([items])
    assert packed.labels.shape[0] == 1
    assert packed.counts()["places"] == packed.counts()["tokens"]  # no padding, and no stand-in where others bring images
    alone = [prepare_of(world, False)([item]) for item in items]
    for pairs in ("proportional", CROSSED):
        assert_same(step(world, [packed], pairs=pairs), step(world, alone, pairs=pairs))


def test_padded_rows_are_their_samples_alone(worlds):
    world = worlds("internvl")
    items = samples_of(world)
    alone = [prepare_of(world, False)([item]) for item in items]
    assert_same(step(world, [prepare_of(world, False)(items)]), step(world, alone))


def test_a_row_without_any_image_ends_with_a_stand_in_that_changes_nothing(worlds):
    world = worlds("qwen3_vl")
    items = [(0, TEXT), (1, TEXT)]
    packed = prepare_of(world, True)([items])
    assert packed.num_images == 1
    own = len(prepare_of(world, False)([items[0]]).labels[0]) - 1
    assert packed.segments[0].tolist() == [0] * own + [1] * own + [-1]
    assert_same(step(world, [packed]), step(world, [prepare_of(world, False)([item]) for item in items]))


def test_the_log_sum_exp_of_attention_changes_nothing(worlds):
    """Matching is given what attention computed anyway, or computes it again: the same losses and gradients."""
    world = worlds("qwen2_5_vl")
    for batch, pairs in itertools.product((world.batch(), world.batch(packed=True)), ("proportional", CROSSED)):
        assert_same(step(world, [batch], True, pairs), step(world, [batch], False, pairs))


@pytest.fixture(scope="module")
def packed_run(world):
    def of(folder, accumulation):
        return world.run(
            folder,
            data={"micro_batch": 1, "tokens_per_pack": 300, "images": [1, 4]},
            optimizer={"accumulation": accumulation},
            student={"gradient_checkpointing": True},
        )

    return of


def test_packs_of_windows_stay_within_the_budget_in_the_model_s_own_tokens(packed_run, tmp_path):
    """The index only estimates tokens, of whole samples; the plan is made in the student's, on the safe side."""
    run = packed_run(tmp_path / "run", 1)
    dataset, renderer = Dataset.open(list(run.data.shards)), build_renderer(run, load_processor(run.student.path))
    stream = build_stream(run, dataset, renderer)
    counted = torch.tensor([renderer.count(dataset.record(i)) for i in range(len(dataset))])
    assert (torch.from_numpy(stream.lengths) >= counted).all()
    assert stream.lengths.max() <= 1.05 * counted.max()
    found = [batch.counts() for batch, _ in zip(stream, range(20), strict=False)]
    assert max(counts["tokens"] for counts in found) <= 300
    assert sum(counts["tokens"] for counts in found) > 0.4 * 300 * 20
    assert sum(counts["samples"] for counts in found) >= 2 * 20


@pytest.mark.parametrize("ranks", [1, 2])
def test_zero3_on_packs_is_plain_torch_on_the_samples(packed_run, tmp_path, ranks):
    run = packed_run(tmp_path / "run", 2 // ranks)
    plain = plain_steps(packed_run(tmp_path / "plain", 2), 2, global_batch=2)
    for result in run_ranks(ranks, rank_steps, run, 2):
        for found, expected in zip(result["records"], plain["records"], strict=True):
            assert found["samples"] > 3
            assert found["fill"] == 1.0
            for name, value in expected.items():
                assert found[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name
        for name, weight in plain["weights"].items():
            torch.testing.assert_close(result["weights"][name], weight, rtol=0, atol=1e-5)


def test_a_packed_run_that_dies_goes_on_on_another_number_of_ranks(packed_run, tmp_path):
    straight, moved = packed_run(tmp_path / "straight", 1), packed_run(tmp_path / "moved", 1)
    run_ranks(2, whole_run, straight)
    killed(moved, ranks=2, step=3)
    run_ranks(1, whole_run, packed_run(tmp_path / "moved", 2))
    for line, other in zip(lines(moved), lines(straight), strict=True):
        for name in ("step", "loss", "sft", "kl", "align", "match", "gradient_norm"):
            assert line[name] == pytest.approx(other[name], rel=1e-5), (line["step"], name)


def test_what_cannot_be_packed_is_refused(world, worlds, tmp_path):
    data = {"micro_batch": 1, "tokens_per_pack": 150}
    with pytest.raises(ValueError, match="micro_batch is 2: with tokens_per_pack a forward pass is one pack"):
        world.run(tmp_path / "a", data=data | {"micro_batch": 2})
    with pytest.raises(ValueError, match="packs are planned before the run, for windows of one range"):
        world.run(tmp_path / "a", data=data | {"grow_from": 2})
    with pytest.raises(ValueError, match=r"a sample of .* tokens does not fit a budget of 20"):
        check(world.run(tmp_path / "a", data=data | {"tokens_per_pack": 20}))
    other = worlds("qwen3_vl")
    (tmp_path / "teacher").mkdir()
    for file in other.teacher.iterdir():
        (tmp_path / "teacher" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"student \(qwen2_5_vl\) and teacher \(qwen3_vl\) number positions in their own ways"):
        check(world.run(tmp_path / "a", data=data, teacher={"path": tmp_path / "teacher"}))
