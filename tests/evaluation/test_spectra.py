"""What heads attend to: the streamed numbers are those of the dense attention map, on the needle and by distance."""

from __future__ import annotations

import json

import pytest
import torch

from laid_ds.data.batch import collate
from laid_ds.data.dataset import Dataset
from laid_ds.data.haystack import draw_window
from laid_ds.data.images import Pixels
from laid_ds.evaluation.evaluate import How, evaluate_models
from laid_ds.evaluation.spectra import needle_profile
from laid_ds.evaluation.tasks import Wish
from laid_ds.models.attention import Tap, listen
from laid_ds.models.processor import Renderer, load_processor
from laid_ds.run.loop import train
from laid_ds.runtime import engine
from laid_ds.runtime.stop import StopRequest
from tests.support.processes import run_ranks


def test_numbers_are_those_of_the_dense_map(world):
    dataset, renderer = Dataset.open(world.shards), Renderer(load_processor(world.teacher), Pixels())
    found = needle_profile(world.load("teacher").eval(), renderer, dataset, size=4, haystacks=3)
    assert sorted(found) == ["0", "1"]
    model, tap, needle, entropy = world.load("teacher").eval(), Tap([1]), torch.zeros(4), torch.zeros(4)
    at: dict[int, list[torch.Tensor]] = {}
    flat = 0.0
    listen(model, tap)
    image_token = renderer.processor.image_token_id
    for i in range(3):
        sample = draw_window(dataset.read(i), 4, 1, ("evaluation", 4, dataset.read(i).key))
        batch = collate([renderer(sample)], ["k"], 0)
        with tap.open() as heads, torch.no_grad():
            model.model(**batch.inputs, use_cache=False)
        row = int(torch.nonzero(batch.supervised[0])[0])
        query, key = heads[1].query[0, :, row], heads[1].key[0].repeat_interleave(2, 0)[:, : row + 1]
        p = (torch.einsum("hd,hnd->hn", query, key) * heads[1].scale).softmax(-1)
        places = torch.nonzero(batch.inputs["input_ids"][0] == image_token).flatten()  # one token an image
        place = places[sample.turns[0].needles[0]]
        needle += p[:, place]
        at.setdefault(max(edge for edge in found["1"]["bins"] if edge <= row - place), []).append(p[:, place])
        flat += 1 / (row + 1) / 3
        entropy += torch.special.entr(p).sum(-1)
    torch.testing.assert_close(torch.tensor(found["1"]["marked_mass"]), needle / 3)
    torch.testing.assert_close(torch.tensor(found["1"]["entropy"]), entropy / 3)
    assert [found["1"]["bins"][n] for n, rows in enumerate(found["1"]["needle_rows"]) if rows] == sorted(at)
    for n, edge in enumerate(found["1"]["bins"]):
        wanted = torch.stack(at[edge]).mean(0) if edge in at else torch.zeros(4)
        torch.testing.assert_close(torch.tensor(found["1"]["needle_mass"])[:, n], wanted)
        assert found["1"]["needle_rows"][n] == len(at.get(edge, []))
    assert found["0"]["flat_mass"] == pytest.approx(flat)
    for numbers in found.values():
        torch.testing.assert_close(torch.tensor(numbers["mass"]).sum(-1), torch.ones(4))


def test_evaluation_keeps_them_in_its_results(world, tmp_path):
    out = tmp_path / "evaluation.json"
    evaluate_models([world.shards], {"student": world.student}, out, Wish([1, 3], 4), How(attention=True))
    attention = json.loads(out.read_text())["models"]["student"]["attention"]
    assert set(attention) == {"1", "3"}
    assert len(attention["3"]["1"]["marked_mass"]) == 2
    assert all(0 <= share <= 1 for share in attention["3"]["1"]["marked_mass"])


def whole_run(run):
    engine.start_processes()
    train(run, StopRequest().listen())


def test_training_records_both_models_at_its_interval(world, tmp_path):
    run = world.run(tmp_path / "run", logging={"attention_every_steps": 2})
    run_ranks(1, whole_run, run)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["attention" in record for record in records] == [False, True, False, True]
    assert len(records[1]["attention"]["teacher"]["1"]["entropy"]) == 4
    student = records[1]["attention"]["student"]["1"]
    assert sum(student["mass"][0]) == pytest.approx(1, abs=1e-4)
