"""Recorded lessons: a run that reads them is the run with the teacher in memory, and no other run reads them."""

from __future__ import annotations

import json
import os
import random
import shutil
from contextlib import nullcontext
from functools import partial
from unittest import mock

import pytest
import torch

from laid_ds.data.lessons import Lessons, file_name, read_manifest
from laid_ds.models import identity
from laid_ds.models.folder import read_header
from laid_ds.plan.pair import Machine, read_pair
from laid_ds.plan.report import plan
from laid_ds.run.build import build_pairs
from laid_ds.run.check import check_lessons
from laid_ds.run.lessons import layout_of
from laid_ds.run.teach import check_teaching, teach
from laid_ds.runtime import engine
from laid_ds.runtime.stop import StopRequest
from tests.laws.test_teachers import own
from tests.support.processes import run_ranks, start_ranks, wait_until
from tests.support.training import rank_steps

STEPS = int(os.environ.get("LAID_LESSON_STEPS", "6"))
KILLS = int(os.environ.get("LAID_TEACH_KILLS", "2"))
BATCH = 4
SHAPES = {"padded": {"micro_batch": 2}, "packed": {"micro_batch": 1, "tokens_per_pack": 150}, "alone": {"micro_batch": 1}}


def record(run, out, steps=STEPS, batch=BATCH):
    engine.start_processes()
    assert teach(run, out, steps, batch, StopRequest())


def make(world, output, shape="padded", ranks=1, lessons=None, repeat=False, **changes):
    data = SHAPES[shape] | changes.pop("data", {})
    teacher = {"lessons": lessons, "lessons_repeat": repeat} if lessons else {}
    accumulation = BATCH // data["micro_batch"] // ranks
    steps = {"steps": STEPS} | changes
    return world.run(output, data=data, teacher=teacher | steps.pop("teacher", {}), optimizer={"accumulation": accumulation}, **steps)


def records_of(result):
    """The records of a run, without what only a teacher in memory reads."""
    return [{name: value for name, value in record.items() if name != "teacher_tokens"} for record in result["records"]]


def assert_same(found, expected):
    assert records_of(found) == records_of(expected)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        assert torch.equal(found["weights"][name], weight), name


@pytest.mark.parametrize("shape, recorded_on, ranks", [("padded", 2, 1), ("padded", 1, 2), ("packed", 2, 1), ("alone", 2, 4)])
def test_lessons_equal_the_live_teacher_bit_for_bit(world, tmp_path, shape, recorded_on, ranks):
    run_ranks(recorded_on, record, make(world, tmp_path / "a", shape), tmp_path / "lessons")
    live = run_ranks(ranks, rank_steps, make(world, tmp_path / "a", shape, ranks), STEPS)
    read = run_ranks(ranks, rank_steps, make(world, tmp_path / "b", shape, ranks, tmp_path / "lessons"), STEPS)
    for found, expected in zip(read, live, strict=True):
        assert_same(found, expected)
        assert found["bytes"].keys() == {"student"}, "no teacher is in memory"
        assert all(step["kl"] > 0 and step["align"] > 0 and step["match"] > 0 for step in found["records"])


def trained_weights(training):
    from deepspeed.utils import safe_get_full_fp32_param

    every = training.student.module.named_parameters()
    return {name: safe_get_full_fp32_param(parameter) for name, parameter in every if parameter.requires_grad}


@pytest.mark.parametrize("ranks, changes", [(1, {}), (2, {"losses": {"align": 0.0, "match": 0.0}, "teacher": {"sees": "needles"}})])
def test_lessons_of_a_student_with_lora_that_teaches_itself(world, tmp_path, ranks, changes):
    """The factors move, what was recorded of the folder stays what the live one shows."""
    data = {"micro_batch": 2, "tokens_per_pack": None}
    run = own(world, tmp_path / "a", data=data, optimizer={"accumulation": BATCH // 2 // ranks}, **changes)
    run_ranks(1, record, run, tmp_path / "lessons", 4)
    live = run_ranks(ranks, rank_steps, run, 4, trained_weights)
    teacher = run.teacher.model_copy(update={"lessons": tmp_path / "lessons"})
    read = run_ranks(ranks, rank_steps, run.model_copy(update={"teacher": teacher}), 4, trained_weights)
    for found, expected in zip(read, live, strict=True):
        assert records_of(found) == records_of(expected)
        assert any("lora_A" in name for name in expected["looked"])
        assert all(torch.equal(found["looked"][name], weight) for name, weight in expected["looked"].items())
        first, *_, last = found["records"]
        assert last["kl"] > first["kl"] + 1e-6, "it moves away from itself"
    planned = [plan(read_pair(each), MACHINE) for each in (run, run.model_copy(update={"teacher": teacher}))]
    head = world.load("student").get_output_embeddings().weight
    assert [each.terms["teacher_parameters"] for each in planned] == [0, 4 * head.numel()]
    assert planned[1].total_bytes == planned[0].total_bytes, "a live one has a copy of its head, too, as long as KL is computed"
    assert planned[1].step_flops < planned[0].step_flops
    without_kl = run.model_copy(update={"losses": run.losses.model_copy(update={"kl": 0.0, "align": 1.0})})
    assert plan(read_pair(without_kl), MACHINE).lessons.saved_bytes == -4 * head.numel()


MACHINE = Machine(gpus=2, gpu_bytes=2**34, peak_flops=1e12, mfu=0.5)
HEADS = (((0, 1), (1, 3)),)
LESS = {
    "chosen heads": {"align": {"heads": HEADS}},
    "answers of chosen heads": {"align": {"heads": HEADS}, "match": {"rows_from": "answers"}, "losses": {"align": 0.0}},
    "answers": {"match": {"rows_from": "answers"}, "losses": {"align": 0.0}},
    "sampled rows": {"match": {"rows": 3}},
    "kl alone": {"losses": {"align": 0.0, "match": 0.0}},
    "needles": {"losses": {"align": 0.0, "match": 0.0}, "teacher": {"sees": "needles", "distractors": 1}},
}


@pytest.mark.parametrize("what", LESS)
def test_lessons_hold_no_more_than_the_loss_asks(world, tmp_path, what):
    """And what they hold is the live teacher's; prepared by a data worker, too."""
    changes, whole, out = LESS[what], tmp_path / "whole", tmp_path / "lessons"
    run_ranks(1, record, make(world, tmp_path / "a", **changes), out, 2)
    teacher = changes.get("teacher", {})
    rest = {name: value for name, value in changes.items() if name != "teacher"}
    (live,) = run_ranks(1, rank_steps, make(world, tmp_path / "a", steps=2, **changes), 2)
    told = {"lessons": out} | teacher
    (read,) = run_ranks(1, rank_steps, make(world, tmp_path / "b", steps=2, teacher=told, data={"workers": 1, "micro_batch": 2}, **rest), 2)
    assert_same(read, live)
    if what in ("chosen heads", "sampled rows"):
        return
    run_ranks(1, record, make(world, tmp_path / "a"), whole, 2)
    less, every = (Lessons(folder, read_manifest(folder)) for folder in (out, whole))
    assert less.num_bytes < every.num_bytes
    if what != "needles":
        (read,) = run_ranks(1, rank_steps, make(world, tmp_path / "c", steps=2, lessons=whole, **rest), 2)
        assert_same(read, live)
        with pytest.raises(AssertionError, match="which the loss asks: record anew"):
            run_ranks(1, rank_steps, make(world, tmp_path / "d", steps=2, lessons=out), 1)


def test_bfloat16_lessons_are_the_live_ones(world, tmp_path):
    """In the same micro-batches bit for bit, in others within one rounding of bfloat16 (2^-8 of a loss)."""
    both = {"student": {"dtype": "bfloat16"}, "teacher": {"dtype": "bfloat16"}, "gain": {"enabled": False}}
    alone = {"data": {"micro_batch": 4}}
    run_ranks(2, record, make(world, tmp_path / "a", **both), tmp_path / "lessons", 2)
    told = both | {"teacher": both["teacher"] | {"lessons": tmp_path / "lessons"}, "steps": 2}
    (live,) = run_ranks(1, rank_steps, make(world, tmp_path / "a", steps=2, **both), 2)
    (read,) = run_ranks(1, rank_steps, make(world, tmp_path / "b", **told), 2)
    assert_same(read, live)
    (live,) = run_ranks(1, rank_steps, make(world, tmp_path / "a", steps=2, **both, **alone), 1)
    (read,) = run_ranks(1, rank_steps, make(world, tmp_path / "b", **told, **alone), 1)
    for term in ("kl", "align", "match", "sft"):
        assert read["records"][0][term] == pytest.approx(live["records"][0][term], rel=2**-8)


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "lock"}


def has_files(out, number, processes):
    return len(list(out.glob("*.lessons"))) >= number or not all(process.is_alive() for process in processes)


def test_killed_and_resumed_on_other_ranks_is_uninterrupted(world, tmp_path):
    """Byte for byte."""
    run, whole = make(world, tmp_path / "a"), tmp_path / "whole"
    run_ranks(1, record, run, whole)
    expected = files_of(whole)
    draw = random.Random(os.environ.get("LAID_TEACH_SEED", "0"))
    for kill in range(KILLS):
        out, seen = tmp_path / f"killed-{kill}", draw.randrange(1, 11)
        processes, _ = start_ranks(2, record, run, out)
        wait_until(partial(has_files, out, seen, processes), f"{seen} files")
        for process in processes:
            process.kill()
            process.join()
        (out / f"{file_name(11)}.partial").write_bytes(b"half")  # what a rank that is killed while it writes leaves
        assert not (out / "lessons.json").exists() or seen == 11
        run_ranks(2 - kill % 2, record, run, out)
        assert files_of(out) == expected


@pytest.fixture(scope="module")
def lessons(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("recorded") / "lessons"
    run_ranks(1, record, make(world, out.parent / "a"), out)
    return out


OTHERS = {
    "seed": ({"seed": 7}, "another seed: 0, and this run has 7"),
    "window": ({"data": {"images": [1, 3], "micro_batch": 2}}, r"another window \(data.images\): \[1, 4\], and this run has \[1, 3\]"),
    "questions": ({"data": {"questions": 1, "micro_batch": 2}}, "another number of questions: 2, and this run has 1"),
    "pictures": ({"data": {"number_images": True, "micro_batch": 2}}, "another way to show pictures"),
    "dtype": ({"teacher": {"dtype": "bfloat16"}}, 'another dtype: "float32", and this run has "bfloat16"'),
    "view": ({"teacher": {"sees": "needles"}, "losses": {"align": 0.0, "match": 0.0}}, r"another view of the teacher"),
    "layer": ({"align": {"pairs": [[0, 0]]}}, "lack queries and keys of the teacher's layer 0"),
    "order": ({"data": {"shuffle": "none", "micro_batch": 2}}, "another order of samples"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_lessons_of_another_run_are_refused(world, tmp_path, lessons, what):
    changes, sentence = OTHERS[what]
    changes = changes | {"teacher": changes.get("teacher", {}) | {"lessons": lessons}}
    with pytest.raises(ValueError, match=sentence) as refused:
        check_lessons(make(world, tmp_path / "run", **changes))
    assert "\n" not in str(refused.value)


def other_folder(world, tmp_path, who):
    shutil.copytree(world.folder / who, tmp_path / who)
    return tmp_path / who


def reading(run, look=check_lessons):
    """Files and MB that were read to the end to know the teacher."""
    told = []

    def tell(label, total, active):
        told.extend([(label, total)] if active else [])
        return nullcontext(lambda more: None)

    with mock.patch.object(identity, "working", tell):
        look(run)
    return told


def reading_of_a_rank(run):
    return reading(run, lambda run: rank_steps(run, 1))


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_teacher_is_known_by_every_byte_and_read_no_oftener_than_it_must(world, tmp_path, lessons):
    """As it was recorded nothing is read; a copy with other times is read once, by one rank; a byte deep inside that differs is found."""
    mine = damaged(lessons, tmp_path)
    assert reading(make(world, tmp_path / "run", lessons=mine)) == []
    teacher = other_folder(world, tmp_path, "teacher")
    for file in teacher.iterdir():
        os.utime(file, (1, 1))
    copied = make(world, tmp_path / "run", "padded", 2, teacher={"path": teacher, "lessons": mine})
    first, second = run_ranks(2, reading_of_a_rank, copied)
    (label, total), *others = first + second
    assert label.startswith(f"reading all of {teacher}")
    assert total == sum((teacher / name).stat().st_size for name in ("config.json", "model.safetensors")) // 10**6
    assert others == []
    assert reading(copied) == [], "that it was read is remembered"
    weights = teacher / "model.safetensors"
    length = int.from_bytes(weights.read_bytes()[:8], "little")
    begin, end = max((entry["data_offsets"] for entry in read_header(weights).values()), key=lambda ends: ends[1] - ends[0])
    assert end - begin > 20_000
    for place in (8 + length + (begin + end) // 2, weights.stat().st_size - 1):
        flip(weights, place)
        with pytest.raises(ValueError, match=r"are of another teacher than .*: model.safetensors has another content \(sha256 ") as refused:
            check_lessons(copied)
        assert "\n" not in str(refused.value)
        flip(weights, place)
    assert len(reading(copied)) == 1, "as it was, but for its time"
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"model.safetensors has [\d,]+ bytes, and had [\d,]+"):
        assert reading(copied) == []


def test_code_of_the_teacher_counts_and_lessons_of_an_earlier_version_are_refused(world, tmp_path, lessons):
    teacher, mine = other_folder(world, tmp_path, "teacher"), damaged(lessons, tmp_path)
    (teacher / "modeling_own.py").write_text("")
    run = make(world, tmp_path / "run", teacher={"path": teacher, "lessons": mine})
    with pytest.raises(ValueError, match=r"modeling_own\.py was not there then"):
        check_lessons(run)
    manifest = read_manifest(mine)
    (mine / "lessons.json").write_text(json.dumps(manifest | {"facts": manifest["facts"] | {"teacher": "0" * 64}}))
    with pytest.raises(ValueError, match="are of an earlier version, which had not read all of its teacher"):
        check_lessons(run)


def test_a_recording_goes_on_with_its_own_teacher_alone(world, tmp_path):
    teacher, out = other_folder(world, tmp_path, "teacher"), tmp_path / "lessons"
    run = make(world, tmp_path / "run", teacher={"path": teacher})
    run_ranks(1, record, run, out, 2)
    flip(teacher / "model.safetensors", (teacher / "model.safetensors").stat().st_size // 2)
    with pytest.raises(ValueError, match="another teacher than"):
        check_teaching(run, out, 4, BATCH)
    with pytest.raises(AssertionError, match="another teacher than"):
        run_ranks(1, record, run, out, 4)


def test_another_processor_is_refused(world, tmp_path, lessons):
    student = other_folder(world, tmp_path, "student")
    settings = next(student.glob("*processor_config.json"))
    settings.write_text(settings.read_text().replace("}", " }", 1))
    with pytest.raises(ValueError, match="another processor"):
        check_lessons(make(world, tmp_path / "run", lessons=lessons, student={"path": student}))


def damaged(lessons, tmp_path):
    shutil.copytree(lessons, tmp_path / "damaged")
    return tmp_path / "damaged"


def read_all(run):
    stream = check_lessons(run)
    for k in range(STEPS * BATCH):
        stream.peek(k)


def test_every_flipped_byte_and_cut_file_is_refused(world, tmp_path, lessons):
    out, draw = damaged(lessons, tmp_path), random.Random(1)
    run = make(world, tmp_path / "run", lessons=out)
    read_all(run)
    path = out / file_name(5)
    whole = path.read_bytes()
    payload = len(whole) - read_manifest(out)["lessons"]  # somewhere in the payload
    for place in (len(whole) - 1, draw.randrange(200, payload)):
        flipped = bytearray(whole)
        flipped[place] ^= 4
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="does not match its crc32: remove the file, and `laid teach` records it again"):
            read_all(run)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="bytes instead of"):
        read_all(run)
    path.unlink()
    with pytest.raises(ValueError, match="is missing"):
        read_all(run)
    run_ranks(1, record, make(world, tmp_path / "a"), out)
    assert path.read_bytes() == whole, "mended by the same command"
    for name, sentence in (("index.table", "is damaged or missing"), ("lessons.json", "its recording has not come to its end")):
        kept = (out / name).read_bytes()
        (out / name).write_bytes(kept[:-1]) if name == "index.table" else (out / name).unlink()
        with pytest.raises(ValueError, match=sentence):
            read_all(run)
        (out / name).write_bytes(kept)
    with pytest.raises(AssertionError, match="another seed"):
        run_ranks(1, record, make(world, tmp_path / "a", seed=3), out)


def test_fewer_steps_than_the_run_has(world, tmp_path, lessons):
    """Six steps of four are two epochs of twelve samples: with lessons_repeat step 7 is step 1 again."""
    more = make(world, tmp_path / "run", lessons=lessons, steps=8)
    with pytest.raises(ValueError, match="holds the lessons of 6 steps, and the run has 8: record more with `laid teach --steps 8`"):
        check_lessons(more)
    stream = check_lessons(make(world, tmp_path / "run", lessons=lessons, steps=8, repeat=True))
    assert stream.repeats == 2
    assert stream.slots(24, 8) == stream.slots(0, 8)
    first, again, other = (stream.peek(k) for k in (0, 24, 12))
    assert torch.equal(first.inputs["input_ids"], again.inputs["input_ids"])
    assert torch.equal(first.lesson.hidden, again.lesson.hidden)
    assert other.keys != first.keys or not torch.equal(first.inputs["input_ids"], other.inputs["input_ids"])
    run_ranks(1, record, make(world, tmp_path / "a"), tmp_path / "short", 2)
    with pytest.raises(ValueError, match="only whole epochs repeat"):
        check_lessons(make(world, tmp_path / "run", lessons=tmp_path / "short", repeat=True))
    run_ranks(2, record, make(world, tmp_path / "a"), tmp_path / "short", STEPS)
    assert files_of(tmp_path / "short") == files_of(lessons), "a recording may be prolonged"


@pytest.mark.parametrize("what", [name for name in LESS if name != "needles"])
def test_the_plan_foresees_the_bytes_of_a_lesson_and_the_head_alone(world, tmp_path, what):
    run = make(world, tmp_path / "run", **LESS[what])
    found = plan(read_pair(run), MACHINE)
    layout = layout_of(run, build_pairs(run), lse=True)
    assert found.lessons.bytes_per_token == layout.num_bytes(1, 0)
    assert found.lessons.bytes_per_token + found.lessons.bytes_per_answer_token == layout.num_bytes(1, 1)
    reads = make(world, tmp_path / "run", **LESS[what] | {"teacher": {"lessons": tmp_path}})
    other = plan(read_pair(reads), MACHINE)
    head = world.load("teacher").get_output_embeddings().weight
    assert other.terms["teacher_parameters"] == 4 * head.numel()
    assert found.total_bytes - other.total_bytes == found.lessons.saved_bytes == other.lessons.saved_bytes
    assert other.step_flops < found.step_flops
    assert other.lessons.used
    assert not found.lessons.used
