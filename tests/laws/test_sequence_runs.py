"""Law 8 for ranks that share batches: a run goes on with any number of them, and killed or asked to stop it is an uninterrupted one."""

from __future__ import annotations

import json
import multiprocessing.connection
import random
import signal

import pytest

from laid_ds.run.check import check
from laid_ds.runtime import checkpoint
from tests.laws.test_lessons import record
from tests.laws.test_one_trainer import BY_US, Attempt, is_gone, ranks_of
from tests.laws.test_resume import killed, lines, run_until_death, whole_run
from tests.runtime.test_stop import ask_by_term, asked_at_step, write_stop_file
from tests.support.processes import run_ranks, start_ranks, wait_until
from tests.support.recipes import write_recipe
from tests.support.training import rank_steps

STEPS = 8


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """Uninterrupted on 4 ranks, of which 2 share each batch: 4 samples a step."""
    run = world.run(tmp_path_factory.mktemp("shared") / "run", steps=STEPS, sequence_parallel=2)
    run_ranks(4, whole_run, run)
    return run


def test_a_run_moves_between_numbers_of_ranks_that_share_a_batch(world, tmp_path, straight):
    """Saved at n = 2 on 4 ranks, it goes on at n = 1 on 2, and at n = 4 on 4 that take turns with the two batches of a step."""

    def on(shared, accumulation=1):
        return world.run(tmp_path / "run", steps=STEPS, sequence_parallel=shared, optimizer={"accumulation": accumulation})

    killed(on(2), ranks=4, step=3)
    killed(on(1), ranks=2, step=5)
    run_ranks(4, whole_run, on(4, accumulation=2))
    moved, expected = lines(on(2)), lines(straight)
    assert [line["step"] for line in moved] == list(range(1, STEPS + 1))
    for line, other in zip(moved, expected, strict=True):
        assert sorted(line["keys"]) == sorted(other["keys"])
        assert len(line["keys"]) == 4  # each sample once, however many ranks read it
        for name in ("lr", "loss", "sft", "kl", "align", "match", "gradient_norm"):
            assert line[name] == pytest.approx(other[name], rel=1e-6), (line["step"], name)


def test_killed_at_random_moments_and_resumed_is_uninterrupted_bit_for_bit(world, tmp_path):
    """Rows are drawn for matching, so that the random states of all ranks of a group have to come back, too."""

    def make(name):
        return world.run(tmp_path / name, sequence_parallel=2, match={"rows": 5}, checkpoint={"every_steps": 1})

    chance, run = random.Random(1), make("killed")
    run_ranks(2, whole_run, make("straight"))
    for death in (("call", 60_000), ("write", chance.randint(1, 12))):
        processes, _ = start_ranks(2, run_until_death, run, chance.randrange(2), *death)
        multiprocessing.connection.wait([process.sentinel for process in processes])
        for process in processes:
            process.kill()  # as a launcher does when one rank is gone
            process.join()
        assert not (run.output / "done.json").exists()
    run_ranks(2, whole_run, run)
    assert lines(run) == lines(make("straight"))


def test_a_rank_of_a_group_that_is_killed_takes_all_with_it_and_the_same_command_goes_on(world, tmp_path):
    run = world.run(tmp_path / "run", sequence_parallel=2, steps=60, checkpoint={"every_steps": 2})
    recipe = write_recipe(run, tmp_path / "recipe.toml")
    first = Attempt(run, recipe, BY_US)
    started = first.killed("rank", 3, random.Random(0))
    first.process.wait()
    wait_until(lambda: all(is_gone(process) for process in started) and not ranks_of(recipe), "the end of all processes")
    assert first.process.returncode not in (0, None)
    saved = int(checkpoint.latest(run.output).name.removeprefix("step_"))
    second = Attempt(run, recipe, BY_US)
    second.wait_for(lambda: second.lines() >= 3, "three more steps")
    second.process.send_signal(signal.SIGTERM)
    second.process.wait()
    assert json.loads((run.output / "requeue.json").read_text())["step"] >= saved + 3
    assert [line["step"] for line in lines(run)] == list(range(1, 1 + len(lines(run))))


@pytest.mark.parametrize("ask, reason", [(ask_by_term, "SIGTERM"), (write_stop_file, "the file 'stop'")])
def test_one_rank_of_a_group_is_asked_and_all_save_the_same_step(world, tmp_path, straight, ask, reason):
    """On 4 ranks in 2 groups; then the run goes on to the end of the uninterrupted one."""
    run = world.run(tmp_path / "run", steps=STEPS, sequence_parallel=2, checkpoint={"every_steps": 100})
    run_ranks(4, asked_at_step, run, 2, ask)
    assert json.loads((run.output / "requeue.json").read_text()) == {"step": 2, "reason": reason}
    assert checkpoint.latest(run.output).name == "step_000002"
    if ask is ask_by_term:
        run_ranks(4, whole_run, run)
        assert lines(run) == lines(straight)
    else:
        assert lines(run) == lines(straight)[:2]


def test_ranks_that_share_a_batch_share_its_recorded_lessons(world, tmp_path):
    """Their dry run is one process, which has no one to share with; their steps are those of one rank beside a live teacher."""
    run_ranks(1, record, world.run(tmp_path / "recorded"), tmp_path / "lessons", 3, 2)
    (live,) = run_ranks(1, rank_steps, world.run(tmp_path / "live", steps=3), 3)
    shared = world.run(tmp_path / "shared", sequence_parallel=2, teacher={"lessons": tmp_path / "lessons"}, steps=3)
    check(shared)
    for found in run_ranks(2, rank_steps, shared, 3):
        for step, expected in zip(found["records"], live["records"], strict=True):
            for name in ("loss", "sft", "kl", "align", "match", "rows", "tokens", "samples", "gradient_norm"):
                assert step[name] == pytest.approx(expected[name], rel=1e-5), name
