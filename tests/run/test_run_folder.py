"""Whose folder it is: a run goes on in its own, also after an upgrade that added keys, and in no other."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest

from laid_ds import config
from laid_ds.run import folder
from laid_ds.run.folder import check_output, open_output, reopen

NOBODY = 65534


@pytest.fixture
def recorded(world, tmp_path):
    """A run that began, and its record as a tree to change."""
    run = world.run(tmp_path / "run")
    run.output.mkdir()
    tree = config.as_tree(run)

    def write(tree):
        (run.output / "run.json").write_text(json.dumps({"run": tree}))

    write(tree)
    return run, tree, write


def test_a_run_goes_on_in_its_own_folder(recorded):
    check_output(recorded[0])


def test_keys_that_a_later_version_added_stand_at_their_defaults(recorded):
    run, tree, write = recorded
    del tree["data"]["count_tokens"], tree["stop"]
    write(tree)
    check_output(run)


def test_each_attempt_is_recorded_with_its_ranks_and_machine(world, tmp_path):
    run = world.run(tmp_path / "run")
    for _ in range(2):
        open_output(run, 0.0)
    attempts = json.loads((run.output / "run.json").read_text())["attempts"]
    assert [(one["after_step"], one["ranks"], one["sequence_parallel"]) for one in attempts] == [(0, 1, 1), (0, 1, 1)]
    assert all(one["since"] and one["host"] and one["device"] for one in attempts)


@pytest.mark.parametrize("section, key, value", [("optimizer", "lr", 0.5), ("data", "key_of_another_version", 1)])
def test_another_run_is_refused_by_what_differs(recorded, section, key, value):
    run, tree, write = recorded
    tree[section][key] = value
    write(tree)
    with pytest.raises(ValueError, match=rf"holds another run \(it differs in {section}.{key}\)"):
        check_output(run)


def test_an_engines_file_may_lie_elsewhere_and_may_not_say_something_else(world, tmp_path):
    """A shipped one lies where laid_ds is installed."""
    files = [tmp_path / name for name in ("a.json", "b.json", "c.json")]
    for file, buckets in zip(files, (1000, 1000, 2000), strict=True):
        file.write_text(json.dumps({"zero_optimization": {"stage": 3, "reduce_bucket_size": buckets}}))
    first, moved, other = (world.run(tmp_path / "run", student={"deepspeed": file}) for file in files)
    open_output(first, 0.0)
    record = json.loads((first.output / "run.json").read_text())
    assert record["run"]["student"]["deepspeed"] == str(files[0])
    assert record["engines"]["student"] == json.loads(files[0].read_text())
    assert record["engines"].keys() == {"student", "teacher"}
    check_output(moved)
    with pytest.raises(ValueError, match=r"holds another run \(it differs in student.deepspeed\)"):
        check_output(other)
    (first.output / "run.json").write_text(json.dumps({"run": record["run"]}))  # as versions before wrote it
    check_output(first)
    with pytest.raises(ValueError, match=r"it differs in student.deepspeed"):
        check_output(moved)


def test_the_samples_of_a_step_may_be_shared_out_anew_and_not_become_others(world, tmp_path, monkeypatch):
    """4 ranks in 2 groups read as much as 2 ranks, or 6 in 2 groups of 3; not as 2 ranks in one group."""

    def opened(ranks: int, shared: int) -> int | None:
        monkeypatch.setattr(folder.distributed, "world_size", lambda: ranks)
        return open_output(world.run(tmp_path / "run", sequence_parallel=shared), 0.0)

    for ranks, shared in ((4, 2), (2, 1), (6, 3)):
        assert opened(ranks, shared) is None
    with pytest.raises(
        ValueError, match=r"began with 4 samples per step .* 4 ranks / sequence_parallel 2\), these are 2 \(2 x 1 x 2 / 2\)"
    ):
        opened(2, 2)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    del record["run"]["sequence_parallel"]  # as versions before wrote it: 4 ranks, 4 groups
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert opened(8, 2) is None


def test_what_does_not_decide_the_outcome_may_change(recorded):
    run, tree, write = recorded
    tree["logging"]["every_steps"], tree["checkpoint"]["keep_last"], tree["stop"]["after_minutes"] = 7, 9, 30.0
    write(tree)
    check_output(run)


def test_a_finished_run_and_a_foreign_folder_are_left_alone(recorded, world, tmp_path):
    run, _, _ = recorded
    (run.output / "done.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a finished run"):
        check_output(run)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        check_output(world.run(tmp_path / "foreign"))


def test_a_run_can_be_given_more_steps_and_not_fewer(recorded):
    run, _, _ = recorded
    check_output(run.model_copy(update={"steps": 5}))
    with pytest.raises(ValueError, match=r"holds a run of 4 steps, which can get more but not fewer \(steps=3\)"):
        check_output(run.model_copy(update={"steps": 3}))


def test_a_finished_run_that_has_steps_to_do_is_not_done(recorded):
    run, _, _ = recorded
    (run.output / "done.json").write_text('{"steps": 4}')
    reopen(run)
    with pytest.raises(ValueError, match="holds a finished run of 4 steps"):
        check_output(run)
    longer = run.model_copy(update={"steps": 5})
    check_output(longer)
    assert (run.output / "done.json").exists()
    reopen(longer)
    assert not (run.output / "done.json").exists()
    check_output(run)


def below_a_file(folder):
    (folder / "file").write_text("x")
    return folder / "file" / "run"


def a_file(folder):
    (folder / "run").write_text("x")
    return folder / "run"


def a_link_to_nothing(folder):
    (folder / "run").symlink_to(folder / "nothing")
    return folder / "run"


def too_long_a_name(folder):
    return folder / ("x" * 300)


def where_nothing_can_be_made(folder):
    return Path("/proc/1/run")


@pytest.mark.parametrize("place", [below_a_file, a_file, a_link_to_nothing, too_long_a_name, where_nothing_can_be_made])
def test_an_output_that_cannot_be_made_is_one_sentence(world, tmp_path, place):
    output = place(tmp_path)
    with pytest.raises(ValueError) as error:
        check_output(world.run(output))
    assert str(error.value).startswith(f"output {output} ")
    assert "\n" not in str(error.value)


@pytest.fixture
def ordinary_user():
    """To root nothing is forbidden: its tests are somebody else's for a while."""
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(NOBODY)
    yield
    if was_root:
        os.seteuid(0)


def test_an_output_without_permission_is_one_sentence(world, ordinary_user):
    with tempfile.TemporaryDirectory() as folder:  # of that user
        (Path(folder) / "closed").mkdir(mode=0o500)
        with pytest.raises(ValueError, match="cannot be written: Permission denied"):
            check_output(world.run(Path(folder) / "closed" / "run"))


def test_looking_whether_an_output_can_be_made_makes_nothing(world, tmp_path):
    check_output(world.run(tmp_path / "a" / "b" / "run"))
    assert not list(tmp_path.iterdir())


def test_hidden_files_that_systems_leave_are_nobodys(world, tmp_path):
    run = world.run(tmp_path / "run")
    run.output.mkdir()
    (run.output / ".DS_Store").write_text("x")
    check_output(run)
