"""A teacher that sees the needles alone, and a student with LoRA that teaches itself: what they read, what they cost, what is learned."""

from __future__ import annotations

import json

import pytest
import torch

from laid_ds.config import Run
from laid_ds.data.dataset import Dataset
from laid_ds.data.haystack import draw_window, evidence
from laid_ds.data.images import Pixels
from laid_ds.data.record import DataError, Sample, Turn
from laid_ds.data.writer import ShardWriter
from laid_ds.kernels.attention_matching import Omega
from laid_ds.method.distill import Ask
from laid_ds.models.processor import Renderer, load_processor
from laid_ds.run.build import build_prepare, build_renderer
from laid_ds.run.check import check
from tests.laws.test_resume import whole_run
from tests.laws.test_world_size import assert_equal
from tests.support.processes import run_ranks
from tests.support.training import plain_steps, rank_steps

ALONE = {"align": 0.0, "match": 0.0}
LORA = {"rank": 4, "targets": ["q_proj", "k_proj", "down_proj"]}


def less(world, output, distractors=0, **changes):
    teacher = {"sees": "needles", "distractors": distractors}
    return world.run(output, losses=ALONE | changes.pop("losses", {}), teacher=teacher | changes.pop("teacher", {}), **changes)


def prepared(world, run):
    return build_prepare(run, build_renderer(run, load_processor(world.student)), 4)


@pytest.mark.parametrize("distractors", [0, 1, 99])
@pytest.mark.parametrize("packed", [False, True])
def test_its_rows_lack_the_other_images_and_hold_the_same_answers(world, tmp_path, packed, distractors):
    """By tokens and by pixels, against windows from which the images were taken by hand."""
    run = less(world, tmp_path, distractors, data={"tokens_per_pack": 400, "micro_batch": 1} if packed else {})
    prepare, dataset = prepared(world, run), Dataset.open(world.shards)
    items = [(i, dataset.read(i)) for i in range(4)]
    windows = prepare.windows([items] if packed else items)
    batch = prepare.batch(windows)
    renderer = Renderer(load_processor(world.student), Pixels())
    image = renderer.processor.image_token_id
    needles = [{n for turn in window.turns for n in turn.needles} for window in windows]
    shown = [min(len(found) + distractors, len(window.images)) for found, window in zip(needles, windows, strict=True)]
    assert int((batch.taught.inputs["input_ids"] == image).sum()) == sum(shown)  # an image is one token here
    assert int((batch.inputs["input_ids"] == image).sum()) == sum(len(window.images) for window in windows)
    assert torch.equal(batch.labels[batch.supervised], batch.taught.labels[batch.taught.supervised])
    assert batch.taught.keys == batch.keys
    if distractors == 0:
        by_hand = torch.cat(
            [renderer(alone(window)).images[n]["pixel_values"] for window in windows for n in range(len(alone(window).images))]
        )
        assert torch.equal(batch.taught.inputs["pixel_values"], by_hand)


def alone(window: Sample) -> Sample:
    """The window with its needles alone, written without the code that is tested."""
    kept = [i for i in range(len(window.images)) if any(i in turn.needles for turn in window.turns)]
    turns = [
        Turn(t.role, tuple(s if isinstance(s, str) else kept.index(s) for s in t.segments if isinstance(s, str) or s in kept))
        for t in window.turns
    ]
    return Sample(window.key, tuple(turns), images=tuple(window.images[i] for i in kept))


def test_distractors_come_from_the_same_window_and_follow_from_the_seed(world):
    window = draw_window(Dataset.open(world.shards).read(0), 6, 1, (0,))
    one, again, other = (evidence(window, 2, (seed,)) for seed in (1, 1, 5))
    assert [len(found.images) for found in (one, other)] == [3, 3]
    assert one == again
    assert any(evidence(window, 2, (seed,)).images != one.images for seed in range(2, 12))
    assert all(image in window.images for image in one.images)
    needle = next(turn for turn in window.turns if turn.needles).needles[0]
    kept = next(turn for turn in one.turns if turn.needles).needles[0]
    assert one.images[kept] == window.images[needle]


@pytest.mark.parametrize("ranks, packed", [(1, False), (2, False), (2, True)])
def test_zero3_equals_plain_torch(world, tmp_path, ranks, packed):
    data = {"tokens_per_pack": 150, "micro_batch": 1} if packed else {"micro_batch": 4 // ranks}
    run = less(world, tmp_path / "run", 1, data=data, optimizer={"accumulation": 4 // ranks if packed else 1})
    plain = plain_steps(less(world, tmp_path / "plain", 1, data=data), 3, global_batch=4)
    del plain["weights"]["align.mixing.1"]
    whole = plain_steps(world.run(tmp_path / "whole", losses=ALONE, data=data), 1, global_batch=4)
    assert whole["records"][0]["kl"] != pytest.approx(plain["records"][0]["kl"], rel=1e-4), "what it sees is learned"
    for result in run_ranks(ranks, rank_steps, run, 3):
        assert_equal(result, plain)


def test_a_whole_run_of_it_goes_through_checks_and_first_looks(world, tmp_path):
    run = less(world, tmp_path / "run", teacher={"check_answers": True}, data={"workers": 1})
    check(run)
    with pytest.raises(AssertionError, match=r"does not (know|see)"):  # an untrained one is asked beside its own row, and refused as ever
        run_ranks(2, whole_run, run)
    run = less(world, tmp_path / "other", data={"workers": 1})
    run_ranks(2, whole_run, run)
    records = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(record["kl"] > 0 and "align" not in record for record in records)


def test_samples_without_needles_are_refused_before_the_run(world, tmp_path):
    picture = Dataset.open(world.shards).read(0).images[0]
    with ShardWriter(tmp_path / "shards", samples_per_shard=4) as writer:
        for i in range(4):
            writer.write(Sample(f"plain-{i}", (Turn("user", (0, "what is it?")), Turn("assistant", ("red",))), images=(picture,)))
    run = less(world, tmp_path / "run", data={"shards": [str(tmp_path / "shards")], "images": None, "questions": None})
    with pytest.raises(DataError, match=r"records no needles for a question.*key plain-\d"):
        check(run)


def what_it_shows(training):
    """A batch, and what the teacher and the student say of it after the steps."""
    batch = training.stream.peek(0)
    ask = Ask({"kl": 1.0}, Omega())
    shown = training.teacher(batch)
    training.student.eval()
    with torch.no_grad():
        distance = training.student(batch, shown, ask)[1]["kl"].item()
    return batch, shown.logits.rows, distance


@pytest.mark.parametrize("ranks", [1, 2])
def test_with_lora_it_teaches_itself_and_holds_one_set_of_weights(world, tmp_path, ranks):
    run = own(world, tmp_path / "run")
    elements = sum(parameter.numel() for parameter in world.load("student").parameters())
    for result in run_ranks(ranks, rank_steps, run, 3, what_it_shows):
        first = result["records"][0]
        assert [first[term] for term in ("kl", "align", "match")] == pytest.approx([0, 0, 0], abs=1e-6)
        assert first["sft"] > 0
        assert result["bytes"].keys() == {"student"}
        assert result["bytes"]["student"] < 1.2 * 4 * elements / ranks, "its own weights, the factors, and no others"
        batch, shown, distance = result["looked"]
        assert distance > 1e-4, "the factors and the gains have moved"
        stock = world.load("student")(**batch.inputs).logits[batch.supervised][:, : shown.shape[1]]
        torch.testing.assert_close(shown, stock, rtol=1e-4, atol=1e-5)


def test_without_lora_it_is_loaded_as_any_teacher(world, tmp_path):
    tree = json.loads(world.run(tmp_path / "run").model_dump_json())
    tree["teacher"] = {"self": True, "check_answers": False, "deepspeed": tree["teacher"]["deepspeed"]}
    run = Run.model_validate(tree)
    assert (run.teacher.path, run.teacher.dtype) == (run.student.path, "float32")
    (result,) = run_ranks(1, rank_steps, run, 2)
    assert result["records"][0]["kl"] == pytest.approx(0, abs=1e-6)
    assert result["bytes"].keys() == {"student", "teacher"}


def own(world, output, **changes):
    told = changes.pop("teacher", {})
    tree = json.loads(world.run(output, student={"lora": LORA}, align={"start_logit": 40.0}, **changes).model_dump_json())
    tree["teacher"] = {"self": True, "check_answers": False} | told
    run = Run.model_validate(tree)
    assert Run.model_validate(json.loads(run.model_dump_json())) == run, "run.json is read again"
    return run


@pytest.mark.parametrize(
    "teacher, changes, sentence",
    [
        ({"sees": "needles"}, {}, "set losses.align and losses.match to 0"),
        ({"distractors": 2}, {"losses": ALONE}, 'distractors = 2 is for teacher.sees = "needles"'),
        ({"self": True}, {}, "teacher.self = true takes the student's: leave out one"),
    ],
)
def test_what_does_not_fit_together_is_one_sentence(world, tmp_path, teacher, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        world.run(tmp_path, teacher=teacher, **changes)
