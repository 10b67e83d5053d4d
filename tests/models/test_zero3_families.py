"""Other families under ZeRO-3: loaded from real folders, sharded or single, they take the step that plain torch takes; whole runs end in a
stock folder."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from laid_ds.data.batch import IGNORED, Batch
from laid_ds.evaluation.evaluate import How, evaluate_models
from laid_ds.evaluation.tasks import Wish
from laid_ds.export import export_run
from laid_ds.kernels.attention_matching import Omega
from laid_ds.method.align import Align
from laid_ds.method.distill import Ask, Student, Teacher, train_step
from laid_ds.models.attention import Tap, attention_shape, listen
from laid_ds.models.family import family
from laid_ds.models.load import load_model, model_class
from laid_ds.models.rope_gain import gain_shapes, responder
from laid_ds.run.build import build_student, build_teacher
from laid_ds.run.check import check
from laid_ds.runtime import distributed, engine
from tests.laws.test_resume import whole_run
from tests.models.family_models import inputs, tiny_model
from tests.support.processes import run_ranks

FAMILIES = {"qwen3_vl": "qwen3_vl_text", "internvl": "qwen2", "smolvlm": "llama", "gemma3": "gemma3_text", "glm4v": "glm4v_text"}
PAIRS = ((0, 1), (1, 0))
OMEGA = Omega(kind="frontier", gamma=4.0, frontier=5.0, width=2.0)
TERMS = ("align", "match", "kl", "sft")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Student and teacher of each family; every other student is in many files."""
    root = tmp_path_factory.mktemp("families")
    for number, key in enumerate(FAMILIES.items()):
        model = tiny_model(*key)
        model.save_pretrained(root / key[0] / "student", max_shard_size="20KB" if number % 2 else "1GB")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
        model.save_pretrained(root / key[0] / "teacher")
    broken = root / "broken"
    load_model(root / "internvl" / "student").save_pretrained(broken)
    weights = load_file(broken / "model.safetensors")
    save_file(dict(list(weights.items())[1:]), broken / "model.safetensors", metadata={"format": "pt"})
    return root


def run_of(world, folders, name, output):
    models = {who: {"path": folders / name / who} for who in ("student", "teacher")}
    losses = {"match": 0.0 if name == "gemma3" else 1.0}
    return world.run(output, **models, losses=losses, align={"pairs": PAIRS}, optimizer={"accumulation": 1})


def batch_of(name: str, seed: int) -> Batch:
    found = inputs(name, seed=seed, num_tokens=20)
    ids: Tensor = found["input_ids"]
    labels = torch.where(ids < 100, ids, IGNORED).roll(-1, 1)
    labels[:, -1] = IGNORED
    return Batch(found, labels, torch.zeros_like(ids), (f"{name}-{seed}",), 1)


def zero3_steps(runs, broken) -> dict:
    """One step of every family, and what the broken folder says."""
    engine.start_processes()
    found, rank = {}, distributed.rank()
    for name, run in runs.items():
        student, align = build_student(run, PAIRS, 128)
        teacher = build_teacher(run, PAIRS, 128)
        counted_by = {"kl": "rows", "sft": "rows"} | align.counted_by()
        values = train_step(student, teacher, [batch_of(name, rank)], run.losses, OMEGA, counted_by)
        found[name] = values | {"gradient_norm": float(student.get_global_grad_norm())}
    mechanics = {dtype: engine.read_deepspeed(run.student.deepspeed, dtype, run, trains=True) for dtype in ("float32", "bfloat16")}
    with pytest.raises(ValueError, match=r"do not fit the model's config: \{'missing_keys'"):
        load_model(broken, "float32", mechanics["float32"])
    for dtype, asked in mechanics.items():
        parameter = next(load_model(run.student.path, dtype, asked).parameters())
        assert parameter.ds_tensor.dtype == getattr(torch, dtype)
        assert parameter.ds_tensor.numel() < parameter.ds_numel  # this rank's share
    return found


def plain_step(run, name: str) -> dict[str, float]:
    """The same on whole models in one process."""
    ours, theirs = load_model(run.student.path), load_model(run.teacher.path)
    taps = Tap([0, 1]), Tap([0, 1])
    align = Align(run.align, PAIRS, attention_shape(ours.config), attention_shape(theirs.config), gain_shapes(ours))
    listen(ours, taps[0], {int(i): responder(align.gain, int(i), family(ours.config).layout) for i in align.gain})
    listen(theirs, taps[1])
    student, teacher = Student(ours, align, taps[0], run.losses, 128), Teacher(theirs, taps[1], 128, True)
    batches, counted_by = [batch_of(name, rank) for rank in range(2)], {"kl": "rows", "sft": "rows"} | align.counted_by()
    weights = {term: getattr(run.losses, term) for term in TERMS if getattr(run.losses, term) > 0}
    factors = {term: weight / sum(batch.counts()[counted_by[term]] for batch in batches) for term, weight in weights.items()}
    loss, means = 0.0, dict.fromkeys(weights, 0.0)
    for batch in batches:
        part, sums = student(batch, teacher(batch), Ask(factors, OMEGA))
        loss += part
        means = {term: mean + factors[term] / weights[term] * sums[term].item() for term, mean in means.items()}
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in student.parameters() if p.grad is not None]).norm()
    return means | {"loss": loss.item(), "gradient_norm": norm.item()}


def test_a_step_of_other_families_under_zero3_is_plain_torch(world, folders, tmp_path):
    """Two ranks, tap and gain on, weights in one file and in many; missing weights are refused, and each model has its dtype."""
    runs = {name: run_of(world, folders, name, tmp_path / name) for name in FAMILIES}
    assert (folders / "internvl" / "student" / "model.safetensors.index.json").is_file()
    for result in run_ranks(2, zero3_steps, runs, folders / "broken"):
        for name, run in runs.items():
            for term, value in plain_step(run, name).items():
                assert result[name][term] == pytest.approx(value, rel=2e-5), (name, term)


@pytest.mark.parametrize("name", ["internvl", "qwen3_vl", "llava", "idefics3"])
def test_a_whole_run_of_another_family(worlds, name, tmp_path):
    """Shards, training on two ranks (packed), export, a stock model, evaluation."""
    world = worlds(name)
    packs = {"micro_batch": 1, "tokens_per_pack": 200}
    run = world.run(tmp_path / "run", steps=3, data=packs if name != "llava" else {})
    check(run)
    run_ranks(2, whole_run, run)
    export_run(run.output, tmp_path / "out")
    stock = model_class(AutoConfig.from_pretrained(tmp_path / "out")).from_pretrained(tmp_path / "out")
    assert type(stock) is type(world.load("student"))
    before = world.load("student").state_dict()
    assert sum(not torch.equal(tensor, before[weight]) for weight, tensor in stock.state_dict().items()) > len(before) / 2
    found = evaluate_models([world.shards], {"student": tmp_path / "out"}, tmp_path / "e.json", Wish([1, 3], 4), How(attention=True))
    assert [len(rows) for rows in found["models"]["student"]["answers"].values()] == [4, 4]
    mass = found["models"]["student"]["attention"]["3"]["1"]["marked_mass"]
    assert all(0 < share < 1 for share in mass)
    last = json.loads((run.output / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 3
    assert f"Training after step 3 of the run: loss {last['loss']:.4g}, align" in (tmp_path / "out" / "README.md").read_text()
