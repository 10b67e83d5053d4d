"""The plan of ranks that share a batch: what is divided by them, what is whole on each, and how long a window they hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from laid_ds import cli, config
from laid_ds.data.batch import lengthened
from laid_ds.data.dataset import Dataset
from laid_ds.data.stream import Stream
from laid_ds.method.distill import Ask, Student, Teacher
from laid_ds.method.schedule import omega
from laid_ds.models.attention import Tap, enable_checkpointing, listen
from laid_ds.models.load import load_config, load_model
from laid_ds.models.processor import load_processor
from laid_ds.models.rope_gain import responder
from laid_ds.plan.advice import SHARED, suggestion, windows, with_settings
from laid_ds.plan.flops import sent_bytes, step_flops
from laid_ds.plan.lengths import build_packing, read_lengths
from laid_ds.plan.memory import memory, peak_bytes, tokens_that_fit
from laid_ds.plan.pair import Machine, read_pair
from laid_ds.plan.report import plan
from laid_ds.run.build import build_align, build_pairs, build_prepare, build_renderer
from laid_ds.runtime import distributed, engine
from tests.support.processes import run_ranks
from tests.support.world import make_world
from tests.test_plan import allocated_at_most, resized

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "recipes" / "configs"
PAPER = ROOT / "recipes" / "qwen2_5_vl_7b_from_32b.toml"
A100 = Machine(8, 80 * 2**30, 312e12, 0.35)
OF_PARAMETERS = ("parameters", "gradients", "optimizer", "gradient_bucket", "teacher_parameters", "live_layer", "reserved")
OF_ROWS = ("activations", "tapped_qk", "layer_backward", "alignment", "logits_chunk")


def paper(*overrides):
    engines = [f"{who}.deepspeed={ROOT}/ds_configs/zero3_{who}.json" for who in ("student", "teacher")]
    run = config.load(PAPER, [*engines, "align.pairs=[[17, 38], [27, 63]]", *overrides])
    return read_pair(run, CONFIGS / "qwen2_5_vl_7b.json", CONFIGS / "qwen2_5_vl_32b.json")


@pytest.fixture(scope="module")
def pair():
    return paper("losses.match=1", "losses.align=1", "gain.enabled=true")


def rank_peak(world, run, checkpointing):
    """(bytes that a step has taken on this rank at one time, bytes that were planned)."""
    engine.start_processes()
    group = distributed.sequence_group(run.sequence_parallel)
    student, teacher = (load_model(model.path, model.dtype) for model in (run.student, run.teacher))
    if checkpointing:
        enable_checkpointing(student.train())
    batch = world.batch(samples=10, images=6)
    names = {name for name, x in batch.inputs.items() if x.shape == batch.labels.shape}
    batch = lengthened(batch, names, 0, group.multiple)
    align, taps = build_align(run, build_pairs(run), student), (Tap([3]), Tap([5]))
    listen(student, taps[0], {int(layer): responder(align.gain, int(layer)) for layer in align.gain}, group=group)
    listen(teacher, taps[1], group=group)
    learner, shower = Student(student, align, taps[0], run.losses, world.vocabulary), Teacher(teacher, taps[1], world.vocabulary, True)
    for parameter in learner.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ask = Ask(dict.fromkeys(("align", "match", "kl", "sft"), 1.0), omega(0, run.match))

    def step():
        learner(batch, shower(batch), ask)[0].backward()
        for tap in taps:  # which keep what they heard until the next step, and would lend it to the next measurement
            tap.captured, tap.companions = {}, {}

    step()
    planned = memory(read_pair(run), Machine(2, 2**30, 1e12, 0.5), batch.labels.numel())
    lasting = planned["activations"] + planned["tapped_qk"]
    # A busy machine lets go of a message's buffers late, so the least of several steps is what a step takes.
    measured = min(allocated_at_most(step) for _ in range(8))
    return measured, lasting + max(planned["layer_backward"], planned["alignment"] + planned["logits_chunk"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_of_a_rank_are_those_of_a_real_step(world, tmp_path, checkpointing):
    """Teacher, student and every loss, forward and backward: the peak of each rank's CPU allocations within 15 %."""
    for who, hidden, heads, layers in (("student", 256, 8, 4), ("teacher", 512, 16, 6)):
        model = resized(getattr(world, who), tmp_path / who, hidden, heads, layers, "float32")
        model.save_pretrained(tmp_path / who)
    run = world.run(
        tmp_path / "run",
        student={"path": tmp_path / "student", "gradient_checkpointing": checkpointing},
        teacher={"path": tmp_path / "teacher"},
        losses={"rows_per_chunk": 10_000},
        align={"pairs": [[3, 5]]},
        sequence_parallel=2,
    )
    for measured, planned in run_ranks(2, rank_peak, world, run, checkpointing):
        print(f"planned / measured = {planned / measured:.3f} of {measured / 2**20:.0f} MiB")
        assert planned == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "internvl", "llava"])
def test_pictures_are_the_pixels_of_real_batches(worlds, tmp_path, family):
    """Were all tokens images': for those that are, a batch holds so many bytes. All of a step are on the GPU; of ranks that share them, one
    at a time, each rank's own images'."""
    world = worlds(family)
    batch, pair = world.batch(), read_pair(world.run(tmp_path / "run", optimizer={"accumulation": 3}))
    of_images = (batch.inputs["input_ids"] == load_config(world.student).image_token_id).sum().item()
    held = batch.inputs["pixel_values"].nbytes
    assert held > 0
    assert memory(pair, A100, of_images)["pictures"] == 3 * held
    assert memory(with_settings(pair, {SHARED: 2}), A100, of_images)["pictures"] == pytest.approx(held / 2)


@pytest.mark.parametrize("tokens", [64_000, 64_001, 64_015])
@pytest.mark.parametrize("shared", [2, 3, 8])
def test_what_is_of_rows_shrinks_and_what_is_of_parameters_does_not(pair, shared, tokens):
    """A slice is t tokens, of rows that are padded to a multiple of 2 n; whole on every rank are the embeddings before the cut, the keys of
    the compared layers, and one layer's gathered keys and values with their gradients."""
    alone, found = memory(pair, A100, tokens), memory(with_settings(pair, {SHARED: shared}), A100, tokens)
    own = -(-tokens // (2 * shared)) * 2
    assert all(found[name] == alone[name] for name in OF_PARAMETERS)
    width, hidden, keys, size = 2, 3584, 4, 128
    in_part = memory(pair, A100, own)
    teacher_keys = 8
    others = tokens - own
    whole = {
        "activations": 2 * width * hidden * others,
        "tapped_qk": 2 * width * size * (keys + teacher_keys) * others,
        "layer_backward": 2 * 2 * width * size * keys * others,
        "alignment": 2 * 2 * width * size * keys * others,
        "logits_chunk": 0,
    }
    assert {name: found[name] - in_part[name] for name in OF_ROWS} == whole


def test_without_checkpointing_every_layer_keeps_the_keys_and_values_of_all_tokens(pair):
    """And the backward pass needs no second copy of one layer's."""
    plain = paper("student.gradient_checkpointing=false", "losses.match=1", "losses.align=1")
    shared, own, others = with_settings(plain, {SHARED: 4}), 16_000, 48_000
    found, in_part = memory(shared, A100, 64_000), memory(plain, A100, own)
    gathered = 2 * 2 * 128 * 4 * others
    assert found["activations"] - in_part["activations"] == 2 * 2 * 3584 * others + 28 * gathered
    assert found["layer_backward"] - in_part["layer_backward"] == gathered


def test_each_rank_computes_its_share(pair):
    alone = step_flops(pair, 64_000)
    for shared in (2, 3, 8):
        assert step_flops(with_settings(pair, {SHARED: shared}), 64_000) == pytest.approx(alone / shared)


def test_images_that_a_family_cannot_share_out_are_encoded_by_each(pair):
    """Their cost is then whole on each rank, and so is what a trained tower keeps of them."""
    trained = paper(f"{SHARED}=8", "student.freeze_vision=false")
    whole = replace(trained, student=replace(trained.student, shares_images=False))
    once = 2 * trained.student.images * 64_000 * trained.student.patches_per_token
    more = step_flops(whole, 64_000) - step_flops(trained, 64_000)
    assert more == pytest.approx(trained.run.optimizer.accumulation * 4 * once * 7 / 8)
    alone = with_settings(trained, {SHARED: 1})
    vision = memory(alone, A100, 64_000)["activations"] - memory(paper(), A100, 64_000)["activations"]
    kept = [memory(each, A100, 64_000)["activations"] for each in (trained, whole)]
    assert kept[1] - kept[0] == pytest.approx(vision * 7 / 8)


def test_what_is_sent_is_the_keys_and_values_of_a_slice_to_each_of_the_others(pair):
    """By docs/method.md: a token of 4 ranks is 768 elements in one layer of the student, forward, and 1,536 in one of the teacher."""
    shared = with_settings(pair, {SHARED: 4})
    sent = sent_bytes(shared, 64_000)
    assert sent["teacher"] == 64_000 // 4 * 3 * 2 * 8 * 128 * 2
    assert sent["teacher"] / 2 / 64_000 == 1536
    assert sent["student"] / 3 / 2 / 64_000 == 768  # forward, forward again, and the gradients
    assert sent_bytes(paper(f"{SHARED}=4", "student.gradient_checkpointing=false"), 64_000)["student"] / 2 / 2 / 64_000 == 768
    assert set(sent_bytes(pair, 64_000).values()) == {0}


@pytest.mark.parametrize("shared", [1, 2, 8])
def test_the_longest_window_is_the_last_that_fits(pair, shared):
    pair = with_settings(pair, {SHARED: shared})
    most = plan(pair, A100, 1024).tokens_that_fit
    assert peak_bytes(memory(pair, A100, most)) <= A100.gpu_bytes < peak_bytes(memory(pair, A100, most + 2 * shared))
    assert windows(pair, A100)[shared] == most


def test_eight_gpus_of_80_gib_hold_more_than_250_000_tokens():
    fitting = windows(paper("align.pairs=[[17, 38]]"), A100)
    assert list(fitting) == [1, 2, 4, 8]
    assert list(fitting.values()) == sorted(fitting.values())
    assert fitting[8] > 250_000


def test_a_plan_counts_a_micro_batch_once_for_those_that_share_it(pair):
    machine = replace(A100, gpus=64)
    alone, shared = (plan(with_settings(pair, {SHARED: n}), machine, 8192) for n in (1, 8))
    assert (shared.samples, shared.total_tokens) == (alone.samples / 8, alone.total_tokens / 8)
    assert shared.step_seconds == pytest.approx(alone.step_seconds / 8)
    assert shared.lessons.bytes_per_step == pytest.approx(alone.lessons.bytes_per_step / 8)
    assert "8,192 tokens on the 8 GPUs that share a micro-batch fit" in shared.as_text()
    assert f"longest by sequence_parallel: 1: {shared.windows[1]:,}, 2: " in shared.as_text()


@pytest.mark.parametrize("data", [{"images": [1, 6], "questions": None}, {"micro_batch": 1, "tokens_per_pack": 700, "questions": None}])
def test_lengths_are_those_of_the_groups(world, tmp_path, data):
    """The stream of 4 ranks in 2 groups is that of 2 ranks."""
    run = world.run(tmp_path / "run", data=data, sequence_parallel=2)
    dataset = Dataset.open(world.shards)
    found, groups = read_lengths(run, dataset, run.groups(4)), 2
    renderer = build_renderer(run, load_processor(run.student.path))
    prepare = build_prepare(run, renderer, run.data.micro_batch * groups)
    packing = build_packing(run, dataset, renderer, run.data.micro_batch * groups)
    streams = [
        iter(Stream(dataset, micro_batch=run.data.micro_batch, rank=r, world_size=groups, seed=run.seed, prepare=prepare, packing=packing))
        for r in range(groups)
    ]
    batches = [next(stream) for _ in range(run.steps) for stream in streams]
    assert len(found.micro_batches) == len(batches)
    for rows, batch in zip(found.micro_batches, batches, strict=True):
        assert sum(rows) == pytest.approx(batch.labels.numel(), rel=0.06)


def test_where_windows_are_too_long_it_is_said_how_many_gpus_should_share_them():
    frugal = paper('student.gradient_checkpointing="offload"', f"teacher.deepspeed={ROOT}/ds_configs/zero3_teacher_offload.json")
    said = suggestion(frugal, A100, 250_000)
    assert said.startswith(
        "let 2 GPUs share each micro-batch (sequence_parallel = 2; optimizer.accumulation = 4 keeps the samples of a step)"
    )
    fitting = tokens_that_fit(with_settings(frugal, {SHARED: 2}), A100)
    assert fitting >= 250_000
    assert said.endswith(f"then {fitting:,} tokens fit")


def test_of_families_that_cannot_share_rows_nothing_is_suggested(tmp_path):
    """Qwen3.5 and its linear attention: more GPUs, and no shares of a row."""
    world = make_world(tmp_path)
    pair = read_pair(world.run(tmp_path / "run"))
    whole = replace(pair, student=replace(pair.student, sliceable=False))
    machine = Machine(8, 2**28, 1e12, 0.5)
    assert list(windows(pair, machine)) == [1, 2, 4, 8]
    assert list(windows(whole, machine)) == [1]
    assert "longest by sequence_parallel" not in plan(whole, machine, 100).as_text()
    assert "sequence_parallel" not in suggestion(whole, machine, 10_000_000)


def test_the_command_names_the_longest_window_and_refuses_what_does_not_divide(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["plan", str(PAPER), "--gpus", "64", "--student-config", str(CONFIGS / "qwen2_5_vl_7b.json")]
    words += ["--teacher-config", str(CONFIGS / "qwen2_5_vl_32b.json")]
    with pytest.raises(SystemExit):
        cli.main([*words, "sequence_parallel=8", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["sequence_parallel"] == 8
    assert found["windows"]["8"] == found["tokens_that_fit"] > 250_000
    assert found["sent_bytes"].keys() == {"student", "teacher"}
    with pytest.raises(SystemExit) as exit_status:
        cli.main([*words, "sequence_parallel=7"])
    assert exit_status.value.code == 2
    assert capsys.readouterr().err.startswith("laid: sequence_parallel = 7 does not divide the 64 ranks of this run")
