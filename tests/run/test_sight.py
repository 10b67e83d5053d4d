"""A model that answers without its images is told from one that looks, by real tiny models of yes-or-no questions; no luck decides."""

from __future__ import annotations

import io
import itertools
import json
import math
import random
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from laid_ds.data.batch import Prepare
from laid_ds.data.dataset import Dataset
from laid_ds.data.images import Pixels
from laid_ds.data.record import Sample, Turn
from laid_ds.data.stream import Stream
from laid_ds.data.writer import ShardWriter
from laid_ds.models.attention import vision_tower
from laid_ds.models.load import load_model
from laid_ds.models.new_model import write_new_model
from laid_ds.models.processor import Renderer, load_processor
from laid_ds.run.build import build
from laid_ds.run.loop import sight
from laid_ds.run.sight import LEAST, MOST, Costs, doubles, evidence
from laid_ds.runtime import engine
from tests.support.processes import run_ranks
from tests.support.world import tiny_config

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


def png(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(file, "PNG")
    return file.getvalue()


def questions(number: int) -> list[Sample]:
    """Is it red? Each answer is as often right as wrong without the image."""
    rng, samples = random.Random(0), []
    for i in range(number):
        shown, asked = rng.choice(list(COLOURS)), rng.choice(list(COLOURS))
        shade = tuple(min(255, max(0, value + rng.randint(-20, 20))) for value in COLOURS[shown])
        turns = (Turn("user", (0, f"Is it {asked}?")), Turn("assistant", ("yes" if asked == shown else "no",)))
        samples.append(Sample(f"q{i}", turns, (png(shade),)))
    return samples


def taught(folder, samples: list[Sample], blind: bool):
    """The model of a folder after 50 steps on these samples; `blind`: beside images that have nothing to do with the answers."""
    torch.manual_seed(0)
    rng, prepare, model = random.Random(1), prepare_of(folder), load_model(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.98))
    for step in range(50):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 20)
        chosen = rng.sample(samples, 16)
        if blind:
            chosen = [replace(sample, images=rng.choice(samples).images) for sample in chosen]
        batch = prepare.batch(chosen)
        logits = model.lm_head(model.model(**batch.inputs, use_cache=False).last_hidden_state[batch.supervised])
        optimizer.zero_grad()
        F.cross_entropy(logits, batch.labels[batch.supervised]).backward()
        optimizer.step()
    return model


def prepare_of(folder) -> Prepare:
    processor = load_processor(folder)
    return Prepare(Renderer(processor, Pixels()), processor.tokenizer.pad_token_id)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of shards and of three models: `seeing`, `blind` (yes or no at 0.69 nats), `scrambled` (seeing, with random vision)."""
    root, samples = tmp_path_factory.mktemp("sight"), questions(128)
    with ShardWriter(root / "shards") as writer:
        for sample in samples:
            writer.write(sample)
    (root / "config.json").write_text(json.dumps(tiny_config("teacher", "qwen2_5_vl")))
    write_new_model(root / "config.json", root / "new", samples, vocabulary=300, image_tokens=1, seed=1)
    made = {name: taught(root / "new", samples, blind=name == "blind") for name in ("seeing", "blind")}
    for name, model in [*made.items(), ("scrambled", made["seeing"])]:
        shutil.copytree(root / "new", root / name)
        if name == "scrambled":
            with torch.no_grad():
                for parameter in vision_tower(model).parameters():
                    parameter.normal_(std=0.02)
        model.save_pretrained(root / name)
    return root


def run_of(world, models, output, teacher: str, student: str = "seeing", check: bool = True, **data):
    every = {"shards": [str(models / "shards")], "images": None, "questions": None, "micro_batch": 2}
    told = {"path": models / teacher, "check_answers": check}
    return world.run(output / teacher, student={"path": models / student}, teacher=told, data=every | data)


def sights_of(*runs):
    """Of each run: what a rank says, and whether the stream stood still, no random number was drawn, and the student trains again."""
    engine.start_processes()
    return [sight_of(run) for run in runs]


def sight_of(run):
    training = build(run)
    state, position = torch.get_rng_state(), training.stream.state_dict()
    try:
        said = sight(run, training)
    except ValueError as error:
        said = ["refused: " + str(error)]
    return said, torch.equal(torch.get_rng_state(), state) and training.stream.state_dict() == position and training.student.training


def test_a_teacher_that_does_not_see_is_refused_whatever_its_answers_cost(world, models, tmp_path):
    """On two ranks, which agree."""
    runs = [run_of(world, models, tmp_path, name) for name in ("seeing", "blind", "scrambled")]
    results, others = run_ranks(2, sights_of, *runs)
    assert results == others
    (seeing, still), *refused = results
    assert still
    assert len(seeing) == 1
    assert "beside their own images and beside those of other samples" in seeing[0]
    for name, (said, _) in zip(("blind", "scrambled"), refused, strict=True):
        assert said[0].startswith(f"refused: the teacher {models / name} does not see: the answers of {MOST} batches cost ")
        assert "teacher.check_answers = false lets it teach all the same" in said[0]


def test_what_is_said_where_nobody_is_refused(world, models, tmp_path):
    """A blind teacher that is asked for, beside a blind student; packed rows; text alone; the same image everywhere."""
    same = [replace(sample, images=(png((9, 9, 9)),)) for sample in questions(12)]
    text = [replace(sample, turns=(Turn("user", ("Is it?",)), sample.turns[1]), images=()) for sample in same]
    for name, samples in (("same", same), ("text", text)):
        with ShardWriter(tmp_path / name) as writer:
            for sample in samples:
                writer.write(sample)
    asked_for = run_of(world, models, tmp_path, "blind", student="blind", check=False)
    packed = [run_of(world, models, tmp_path, name, micro_batch=1, tokens_per_pack=100) for name in ("seeing", "blind")]
    nothing = [run_of(world, models, tmp_path, "blind", shards=[str(tmp_path / name)]) for name in ("same", "text")]
    (results,) = run_ranks(1, sights_of, asked_for, *packed, *nothing)
    assert all(still for _, still in results[:2] + results[3:])
    said = [lines for lines, _ in results]
    assert said[0][1] == f"warning: nothing shows that the student {models / 'blind'} sees the images"
    assert [lines[0].startswith("refused: ") for lines in said] == [False, False, True, False, False]
    silence = "whether the models see cannot be told: 0 of the first samples have images that those before them lack"
    assert said[3:] == [[silence], [silence]]


def test_a_double_differs_in_its_images_alone(models):
    dataset = Dataset.open(models / "shards")
    stream = Stream(dataset, micro_batch=1, rank=0, world_size=1, seed=0, prepare=prepare_of(models / "seeing"), shuffle="none")
    pairs = list(doubles(stream))
    assert len(pairs) > MOST / 2  # some of the images are like those before them
    for own, others in pairs:
        k = dataset.find(own.keys[0])
        assert own.keys == others.keys == (dataset.read(k).key,)
        assert torch.equal(own.labels, others.labels)
        assert torch.equal(own.inputs["pixel_values"], stream.peek(k).inputs["pixel_values"])
        assert torch.equal(others.inputs["pixel_values"], stream.peek(k - 1).inputs["pixel_values"])


def test_chance_reaches_the_evidence_as_rarely_as_stated():
    """All signs that the gains of a model that does not see could have had."""
    rng = random.Random(0)
    gains = [rng.expovariate(1) for _ in range(14)]
    found = [evidence([0.0] * 14, [s * g for s, g in zip(signs, gains, strict=True)]) for signs in itertools.product((-1, 1), repeat=14)]
    for z in (2.0, 2.5, 3.0):
        assert sum(value >= z for value in found) / len(found) <= math.exp(-(z**2) / 2)
    assert max(found) == pytest.approx(sum(gains) / math.sqrt(sum(gain**2 for gain in gains)))


@pytest.mark.parametrize(
    "own, others, seen",
    [
        ([0.01, 0.02] * 6, [0.01, 4.0] * 6, True),  # half of the other images happen to give the same answer
        ([0.1] * (LEAST - 1), [5.0] * (LEAST - 1), False),  # too few to say
        ([0.69] * 32, [0.69] * 32, False),
        ([0.6, 0.8] * 16, [0.8, 0.6] * 16, False),
        ([0.69] * 32, [0.69] * 31 + [99.0], False),  # one outlier
        ([0.5] * 32, [0.6] * 32, True),  # a little, but always
        ([0.69] * 32, [0.692] * 32, False),  # a trace
        ([math.nan] * 32, [0.6] * 32, False),
        ([0.6] * 32, [0.5] * 32, False),
    ],
)
def test_who_sees(own, others, seen):
    assert Costs(own, others).sees() is seen
