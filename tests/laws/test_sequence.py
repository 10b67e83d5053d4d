"""Law 7: ranks that share a batch compute what one rank computes of it, every loss and every gradient, under ZeRO-3."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from laid_ds.config import Match
from laid_ds.data.batch import Batch, Prepare
from laid_ds.data.images import Pixels
from laid_ds.kernels.attention_matching import Omega
from laid_ds.method.distill import Ask, Student, Teacher
from laid_ds.models.attention import Tap, enable_checkpointing, listen
from laid_ds.models.family import family
from laid_ds.models.image_pixels import limit_pixels
from laid_ds.models.load import load_config, load_model
from laid_ds.models.positions import position_rule
from laid_ds.models.processor import Renderer, load_processor
from laid_ds.models.rope_gain import responder
from laid_ds.run.build import build_align, build_pairs
from laid_ds.runtime import distributed, engine
from laid_ds.sequence import ALONE, SequenceGroup
from tests.laws.test_packing import TERMS, TEXT, samples_of
from tests.support.processes import run_ranks
from tests.support.world import make_world

FAMILIES = {"qwen2_5_vl": [3136, 9408], "qwen3_vl": [3136, 9408], "internvl": None, "llava": None}
"""With the limits of their images in pixels: of all families several tokens each."""
OMEGA = Omega(kind="frontier", gamma=4.0, frontier=5.0, width=2.0)
ASK = Ask(dict.fromkeys(TERMS, 1.0), OMEGA)
MULTIPLE = 24  # of rows that 2, 3 and 4 ranks can share


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each family, whose batches come from it."""
    root = tmp_path_factory.mktemp("shared")
    worlds = {name: make_world(root / name, name, image_side=64) for name in FAMILIES}
    changes = {"student": {"gradient_checkpointing": True}, "align": {"pairs": "proportional", "start_logit": 1.0}}
    return {
        name: (world, world.run(root / "run", losses={"rows_per_chunk": 3}, data={"image_pixels": FAMILIES[name]}, **changes))
        for name, world in worlds.items()
    }


def batches_of(world, run) -> dict[str, Batch]:
    """Rows with padding, samples in one row, text alone, and other samples in one row."""
    processor = limit_pixels(load_processor(world.student), run.data.image_pixels)
    render = Renderer(processor, Pixels(), positions=position_rule(load_config(world.student)))
    prepare = Prepare(render, processor.tokenizer.pad_token_id, questions=2, multiple=MULTIPLE)
    items, packs = samples_of(world), replace(prepare, packs=True)
    return {"padded": prepare(items[:3]), "packed": packs([items]), "text": prepare([(0, TEXT)]), "more": packs([items[2:]])}


def pair_of(world, run, group: SequenceGroup, sharded: bool = False):
    """(student, teacher, their engines' configs or None): gains that are not 1, all layers matched, checkpointing on."""
    mechanics = engine.read_deepspeed(run.student.deepspeed, "float32", run, trains=True) if sharded else None
    pairs, models = build_pairs(run), [load_model(path, "float32", mechanics) for path in (world.student, world.teacher)]
    align = build_align(run, pairs, models[0])
    for theta in align.gain.values():
        torch.nn.init.normal_(theta, generator=torch.Generator().manual_seed(1))
    enable_checkpointing(models[0])
    student = Student(models[0], align, Tap([0, 1], lse=True), run.losses, world.vocabulary)
    teacher = Teacher(models[1], Tap([0, 1], lse=True), world.vocabulary, True)
    share(student, teacher, group)
    return student.train(), teacher, mechanics


def share(student: Student, teacher: Teacher, group: SequenceGroup) -> None:
    """Both models from now on share their rows in this group."""
    layout, align = family(student.model.config).layout, student.align
    listen(student.model, student.tap, {int(layer): responder(align.gain, int(layer), layout) for layer in align.gain}, group=group)
    listen(teacher.model, teacher.tap, group=group)


def plain(world, run, batch: Batch, match: Match) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The losses' sums and all gradients on one rank, without DeepSpeed."""
    student, teacher, _ = pair_of(world, run, ALONE)
    student.match = match
    torch.manual_seed(3)  # of rows that are drawn
    loss, sums = student(batch, teacher(batch), ASK)
    loss.backward()
    return {term: sums[term].item() for term in TERMS}, {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


def shared(runs, cases) -> dict:
    """For each case (family, size of a group, the batch of each group, match) the sums of each group, and the gradients added up."""
    from deepspeed.utils import safe_get_full_grad

    engine.start_processes()
    groups = {size: distributed.sequence_group(size) for _, size, _, _ in cases}
    found = {}
    for name, (world, run) in runs.items():
        student, teacher, mechanics = pair_of(world, run, ALONE, sharded=True)
        trained = engine.training_engine(student, run, mechanics)
        frozen = engine.teacher_engine(teacher, engine.read_deepspeed(run.teacher.deepspeed, "float32", run, trains=False))
        engine.set_learning_rate(trained, 0.0)
        batches = batches_of(world, run)
        for case in cases:
            of, size, names, match = case
            if of not in (name, None):
                continue
            share(student, teacher, groups[size])
            student.match, batch = match, batches[names[distributed.rank() // size]]
            torch.manual_seed(3)
            loss, sums = trained(batch, frozen(batch), ASK)
            trained.backward(loss * distributed.world_size(), scale_wrt_gas=False)
            gradients = {name: safe_get_full_grad(p) for name, p in student.named_parameters()}
            trained.step()
            found[name, *case] = {term: groups[size].add(sums[term]).item() for term in TERMS}, gradients
    return found


EVERY = Match()
CASES = {
    4: [
        *((None, 4, (name,), EVERY) for name in ("padded", "packed", "text")),
        (None, 2, ("padded", "packed"), EVERY),
        (None, 2, ("text", "more"), EVERY),
        ("qwen2_5_vl", 4, ("packed",), Match(rows=2)),
        ("qwen2_5_vl", 2, ("more", "padded"), Match(rows_from="answers")),
    ],
    3: [(None, 3, (name,), EVERY) for name in ("padded", "packed", "text")],
}


@pytest.fixture(scope="module")
def expected(runs):
    """(family, batch, match) -> what one rank computes of it."""
    known = {}

    def of(name: str, batch: str, match: Match):
        if (name, batch, match) not in known:
            known[name, batch, match] = plain(*runs[name], batches_of(*runs[name])[batch], match)
        return known[name, batch, match]

    return of


def image_tokens(world, batch: Batch) -> Tensor:
    """[B, T] bool"""
    return batch.inputs["input_ids"] == load_config(world.student).image_token_id


@pytest.mark.parametrize("ranks", CASES)
def test_ranks_that_share_a_batch_compute_what_one_does(runs, expected, ranks):
    """And two groups of two, each with a batch of its own, what two ranks do."""
    for world, run in runs.values():
        shown = image_tokens(world, batches_of(world, run)["padded"])
        borders = [rows.start for place in range(ranks) for rows in SequenceGroup(ranks, place).stretches(shown.shape[1]) if rows.start]
        assert any((shown[:, border - 1] & shown[:, border]).any() for border in borders), "no image is cut"
    results = run_ranks(ranks, shared, runs, CASES[ranks])
    for rank, result in enumerate(results):
        for (name, _, size, batches, match), (sums, gradients) in result.items():
            wanted = [expected(name, batch, match) for batch in batches]
            assert sums == pytest.approx(wanted[rank // size][0], rel=1e-5), (name, size, batches)
            if rank == 0:
                assert_gradients(gradients, [found for _, found in wanted], (name, size, batches, match))


def assert_gradients(found: dict[str, Tensor], parts: list[dict[str, Tensor]], case) -> None:
    """Each within 1e-5 of the largest entry of its tensor; of one that is nothing but rounding, of 1e-5 of the largest of all."""
    whole = {name: sum(part.get(name, torch.zeros(())) for part in parts) for name in set().union(*parts)}
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    for name, gradient in found.items():
        expected = whole.get(name, torch.zeros(()))
        scale = max(float(expected.abs().max()), 1e-5 * largest)
        found_nothing = gradient is None or not gradient.any()
        assert (found_nothing and name not in whole) or float((gradient - expected).abs().max()) <= 1e-5 * scale, (case, name)
