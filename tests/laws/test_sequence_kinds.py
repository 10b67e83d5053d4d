"""Law 7 for all kinds of runs: two ranks that share every batch make the steps, the first looks and the measurements of one rank."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from laid_ds.evaluation import progress
from laid_ds.method import schedule
from laid_ds.method.distill import train_step
from laid_ds.run.build import build
from laid_ds.run.loop import _attention, look, seed_everything, sight
from laid_ds.run.teach import check_teaching
from laid_ds.runtime import engine
from tests.laws.test_lessons import record
from tests.laws.test_teachers import less, own
from tests.support.processes import run_ranks

STEPS = 2
MEASURED = {"student": {"gradient_checkpointing": "offload", "freeze_vision": True}, "align": {"pairs": "proportional"}}


def kinds(world, folder, lessons, size: int) -> dict:
    shared = {"sequence_parallel": size, "steps": STEPS}
    answers = {"match": {"rows_from": "answers"}, "align": {"heads": [[[0, 1], [1, 3]]]}}
    evaluation = {"shards": str(world.shards), "haystacks": 3, "sizes": [1, 3]}
    made = {
        "a teacher that sees the needles": lambda output: less(world, output, 1, **shared),
        "its own teacher": lambda output: own(world, output, **shared),
        "recorded lessons": lambda output: world.run(output, teacher={"lessons": lessons}, **shared),
        "chosen heads at the answers": lambda output: world.run(output, **answers, **shared),
        "rows drawn": lambda output: world.run(output, match={"rows": 3}, **shared),
        "packs": lambda output: world.run(output, data={"micro_batch": 1, "tokens_per_pack": 150}, **shared),
        "measured": lambda output: world.run(output, evaluation=evaluation, **MEASURED, **shared),
    }
    return {kind: make(folder / f"{kind} {size}") for kind, make in made.items()}


def steps_of(runs) -> dict:
    """Of each run what is looked at before its first step, its steps, and what is measured after them."""
    engine.start_processes()
    found = {}
    for kind, run in runs.items():
        seed_everything(run.seed)
        training = build(run)
        seen, said, batches, records = look(run, training), sight(run, training), iter(training.stream), []
        for step in range(STEPS):
            omega = schedule.omega(schedule.progress(step, run.steps), run.match)
            micro = list(islice(batches, run.optimizer.accumulation))
            values = train_step(training.student, training.teacher, micro, run.losses, omega, training.counted_by)
            records.append(values | {"gradient_norm": float(training.student.get_global_grad_norm())})
        attention = _attention(training, micro[-1])["attention"]
        accuracy = progress.measure(training.student, training.renderer, run.evaluation) if run.evaluation else None
        found[kind] = {"seen": tuple(seen), "said": said, "records": records, "attention": attention, "accuracy": accuracy}
    return found


def test_two_ranks_do_what_one_does(world, tmp_path):
    lessons = tmp_path / "lessons"
    run_ranks(1, record, world.run(tmp_path / "recorded", steps=STEPS), lessons, STEPS, 2)
    (alone,) = run_ranks(1, steps_of, kinds(world, tmp_path, lessons, 1))
    for together in run_ranks(2, steps_of, kinds(world, tmp_path, lessons, 2)):
        for kind, expected in alone.items():
            found = together[kind]
            assert found["seen"] == pytest.approx(expected["seen"], rel=1e-5), kind
            assert (found["said"], found["accuracy"]) == (expected["said"], expected["accuracy"]), kind
            for step, wanted in zip(found["records"], expected["records"], strict=True):
                padding = {name: step.pop(name) for name in ("fill",)}
                assert padding["fill"] <= wanted["fill"]
                assert step == pytest.approx({n: v for n, v in wanted.items() if n != "fill"}, rel=2e-5, abs=1e-6), kind
            assert_like(found["attention"], expected["attention"], kind)


def assert_like(found: dict, expected: dict, kind: str) -> None:
    """Entropy and mass by distance of all heads; far is half of the row, and so it moves with its padding."""
    assert found.keys() == expected.keys()
    for who, layers in expected.items():
        assert found[who].keys() == layers.keys()
        for layer, wanted in layers.items():
            for name in ("entropy", "mass"):
                own, theirs = (torch.tensor(numbers[name]) for numbers in (found[who][layer], wanted))
                torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-6, msg=f"{kind}: {name} of {who}, layer {layer}")


def test_lessons_are_not_recorded_by_ranks_that_share_rows(world, tmp_path):
    with pytest.raises(ValueError, match=r"sequence_parallel is 2: lessons are recorded of whole rows.*set sequence_parallel=1"):
        check_teaching(world.run(tmp_path / "run", sequence_parallel=2), tmp_path / "lessons", 1, 4)
