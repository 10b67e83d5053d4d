"""learned.json is what the newest checkpoint holds of mixtures and gains, as they act, sharded or not."""

from __future__ import annotations

import json
import math

import pytest
import torch

from laid_ds.runtime import checkpoint, engine
from tests.laws.test_resume import whole_run
from tests.support.processes import run_ranks
from tests.support.world import ENGINE


def sharded_engine(folder, threshold):
    mechanics = json.loads(ENGINE.read_text())
    mechanics["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    (folder / "engine.json").write_text(json.dumps(mechanics))
    return folder / "engine.json"


@pytest.mark.parametrize("ranks, threshold, mixing", [(2, 0, "separate"), (1, 4096, "tied")])
def test_it_is_what_the_checkpoint_holds(world, tmp_path, ranks, threshold, mixing):
    fast = {"lr": 1e-3, "mixing_lr": 0.5, "gain_lr": 0.05}
    student = {"deepspeed": sharded_engine(tmp_path, threshold)}
    losses = {"match": 0.0} if mixing == "separate" else {}
    run = world.run(tmp_path / "run", align={"mixing": mixing}, optimizer=fast, student=student, losses=losses, steps=3)
    run_ranks(ranks, whole_run, run)
    found = json.loads((run.output / "learned.json").read_text())
    weights = engine.checkpoint_weights(checkpoint.latest(run.output))
    assert (found["step"], found["pairs"]) == (3, [[1, 1]])
    parts = {"mixing": [2, 4], "key_mixing": [1, 2] if mixing == "separate" else None}
    for name, shape in parts.items():
        assert list(found[name]) == (["1"] if shape else [])
        if shape:
            own = weights[f"align.{name}.1"].exp()
            assert list(own.shape) == shape
            torch.testing.assert_close(torch.tensor(found[name]["1"]), own / own.sum(1, keepdim=True), rtol=1e-3, atol=1e-6)
    assert list(found["gain"]) == ["0", "1"]
    for layer, factors in found["gain"].items():
        theta = weights[f"align.gain.{layer}"]
        expected = 4 ** torch.tanh(theta / math.log(4))
        torch.testing.assert_close(torch.tensor(factors), expected, rtol=1e-3, atol=0)
        assert (expected - 1).abs().min() > 1e-3
    last = json.loads((run.output / "metrics.jsonl").read_text().splitlines()[-1])
    shares = torch.softmax(weights["align.mixing.1"], -1)
    assert last["mixture_entropy"] == pytest.approx(float(-(shares * shares.log()).sum(1).mean()), rel=1e-4)


@pytest.mark.parametrize(
    "align, mixing",
    [({"pairs": [[1, 1]], "heads": [[[0, 2]]]}, {}), ({"start_logit": math.inf}, {"1": [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]})],
    ids=["chosen heads", "kept one-hot"],
)
def test_a_run_without_a_parameter_beside_the_student_says_so(world, tmp_path, align, mixing):
    run = world.run(tmp_path / "run", align=align, gain={"enabled": False}, steps=1)
    run_ranks(1, whole_run, run)
    found = json.loads((run.output / "learned.json").read_text())
    assert found == {"step": 1, "pairs": [[1, 1]], "mixing": mixing, "key_mixing": {}, "gain": {}}
    assert "mixture_entropy" not in json.loads((run.output / "metrics.jsonl").read_text())


def test_a_run_without_a_teacher_keeps_none(world, tmp_path):
    run = world.run(tmp_path / "run", teacher=None, losses={"align": 0.0, "match": 0.0, "kl": 0.0}, steps=1)
    run_ranks(1, whole_run, run)
    assert (run.output / "checkpoints").is_dir()
    assert not (run.output / "learned.json").exists()
