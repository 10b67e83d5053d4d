"""What a study's file may say: what is not understood is refused by name, and what it lists is what would run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from laid_ds import config
from laid_ds.study import results
from laid_ds.study.file import read_study, recipe_of
from laid_ds.study.jobs import Wanted, check_asked, check_trained, chosen, jobs, made_with, next_command
from tests.study.study_world import ASKED, made_up, write_study
from tests.support.world import ROOT

SHIPPED = sorted((ROOT / "recipes" / "study").glob("*.toml"))
BEFORE = {"model": "{world}/student"}
SWEEP = {"values": [1e-3, 3e-3], "seeds": [9], "shards": "{world}/other", "set": ["steps=2"]}


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"seed": [1]}, "unknown key 'seed'; did you mean 'seeds'?"),
        ({"arms": {"before": BEFORE, "kl+sft": {"sets": []}}}, "unknown key 'arms.kl+sft.sets'; did you mean 'set'?"),
        ({"asked": {"shards": "x", "sizes": [1], "haystack": 3}}, "unknown key 'asked.haystack'; did you mean 'haystacks'?"),
        ({"asked": {"sizes": [1]}}, "'asked.shards' is missing"),
        ({"title": None}, "'title' is missing"),
        ({"baseline": "laid"}, "no arm 'laid', which `before` or `baseline` names; the arms are before, kl+sft, sft, align"),
        ({"arms": {"before": {}, "kl+sft": {}}}, "the arm 'before' is the student before: give it a model"),
        ({"arms": {"before": BEFORE | {"set": ["steps=2"]}, "kl+sft": {}}}, "arms.before: an arm with a model trains nothing"),
        ({"arms": {"before": BEFORE, "kl+sft": {"yarn": 2.0}}}, "arms.kl+sft: yarn and self_extend are for an arm with a model"),
        ({"arms": {"before": BEFORE, "kl+sft": {}, "a/b": {}}}, "the arm 'a/b' becomes the name of a folder"),
        ({"arms": {"before": BEFORE, "kl+sft": {"teachers": ["two"]}}}, "arms.kl+sft.teachers names 'two'; the study's teachers are one"),
        ({"arms": {"before": BEFORE, "kl+sft": {"seeds": [3]}}}, "arms.kl+sft.seeds names 3; the study's seeds are 1, 2"),
        ({"arms": {"before": BEFORE, "kl+sft": {"against": "kl+sft"}}}, "arms.kl+sft.against names 'kl+sft'; the other arms are before"),
        ({"arms": {"before": BEFORE, "kl+sft": {}, "a": {"against": "b"}}}, "arms.a.against names 'b'; the other arms are before, kl+sft"),
        ({"arms": {"before": BEFORE | {"seeds": [1]}, "kl+sft": {}}}, "arms.before.seeds: every seed needs its student before"),
        ({"set": ["student.path={wrld}/student"]}, "set: {wrld} in 'student.path={wrld}/student' stands for nothing"),
        ({"teachers": None}, "set: {teacher} in 'teacher.path={teacher}', and [teachers] names none"),
        ({"sweep": SWEEP | {"seeds": [2]}}, "seed 2 is in seeds and in sweep.seeds"),
        ({"seeds": []}, "seeds: the list is empty; give at least one"),
        ({"seeds": [1, 2, 1]}, "seeds: 1 stands twice; give each once"),
        ({"asked": {"shards": "x", "sizes": []}}, "asked.sizes: the list is empty"),
        ({"asked": {"shards": "x", "sizes": [1, 1]}}, "asked.sizes: 1 stands twice"),
        ({"sweep": SWEEP | {"values": []}}, "sweep.values: the list is empty"),
        ({"sweep": SWEEP | {"values": [1e-3, 1e-3]}}, "sweep.values: 0.001 stands twice"),
        ({"sweep": SWEEP | {"seeds": []}}, "sweep.seeds: the list is empty"),
        ({"sweep": SWEEP | {"seeds": [9, 9]}}, "sweep.seeds: 9 stands twice"),
        ({"sweep": SWEEP | {"keys": []}}, "sweep.keys: the list is empty"),
        ({"sweep": SWEEP | {"sizes": []}}, "sweep.sizes: the list is empty"),
        ({"arms": {"before": BEFORE, "kl+sft": {"seeds": []}}}, "arms.kl+sft.seeds: the list is empty"),
        ({"arms": {"before": BEFORE, "kl+sft": {"teachers": ["one", "one"]}}}, "arms.kl+sft.teachers: 'one' stands twice"),
        ({"arms": {"before": BEFORE, "kl+sft": {}, "y": BEFORE | {"yarn": float("inf")}}}, "arms.y.yarn: Input should be a finite number"),
        ({"sweep": SWEEP | {"shards": "{world}/shards"}}, "sweep.shards and asked.shards are both {world}/shards"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(world, tmp_path, changes, sentence):
    path = write_study(world, tmp_path, **changes)
    with pytest.raises(ValueError) as refused:
        read_study(path)
    assert f"{path}: {sentence}" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


ALL = Wanted()


def listed(world, folder: Path, lines=(), wanted=ALL, **changes):
    path = write_study(world, folder, **changes)
    study = read_study(path)
    return study, jobs(study, path, world.folder, folder / "out", lines, wanted)


def test_jobs_are_the_student_before_then_arms_by_seed_and_a_teacher_only_for_those_that_ask_it(world, tmp_path):
    _, found = listed(world, tmp_path, teachers={"one": "{world}/teacher", "two": "{world}/teacher"})
    assert [(job.role, job.arm, job.teacher, job.seed) for job in found] == [
        *(("before", "before", None, seed) for seed in (1, 2)),
        *(
            ("test", arm, teacher, seed)
            for seed in (1, 2)
            for arm, teacher in (("kl+sft", "one"), ("kl+sft", "two"), ("sft", None), ("align", "one"), ("align", "two"))
        ),
    ]
    assert len({job.folder for job in found}) == len(found)


def test_an_arm_may_have_some_of_the_seeds_and_teachers(world, tmp_path):
    arms = {"before": BEFORE, "kl+sft": {}, "align": {"seeds": [2], "teachers": ["two"]}}
    _, found = listed(world, tmp_path, teachers={"one": "{world}/teacher", "two": "{world}/teacher"}, arms=arms)
    assert [(job.teacher, job.seed) for job in found if job.arm == "align"] == [("two", 2)]


def test_a_part_of_a_study_always_has_the_student_before(world, tmp_path):
    _, found = listed(world, tmp_path, wanted=Wanted(arms=("sft",), seeds=(2,)))
    assert [(job.arm, job.seed) for job in found] == [("before", 2), ("sft", 2)]
    for wanted, sentence in (
        (Wanted(arms=("laid",)), "no arm 'laid'"),
        (Wanted(seeds=(3,)), "no seed 3"),
        (Wanted(teachers=("x",)), "'x'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            listed(world, tmp_path, wanted=wanted)


def test_a_job_is_the_recipe_with_the_changes_of_study_and_arm(world, tmp_path):
    _, found = listed(world, tmp_path)
    job = next(job for job in found if (job.arm, job.seed) == ("sft", 2))
    command = next_command(job)
    assert command[0] == "train"
    run = config.load(command[1], command[2 : command.index("--ranks")])
    assert (run.seed, run.losses.kl, run.losses.sft, run.gain.enabled) == (2, 0, 1, False)
    assert run.student.path == world.student
    assert run.output == job.run
    assert not any(str(world.folder) in text for text in made_with(job)["changes"])


def test_a_sweep_chooses_for_each_arm_by_mean_accuracy_and_arms_wait_for_it(world, tmp_path):
    study, found = listed(world, tmp_path, sweep=SWEEP)
    swept = [job for job in found if job.role == "sweep"]
    assert [(job.arm, job.value) for job in swept] == [(arm, value) for arm in ("kl+sft", "sft", "align") for value in (1e-3, 3e-3)]
    assert swept[0].changes[-2:] == ("optimizer.lr=0.001", "steps=2")
    assert all(job.value is None for job in found if job.role == "test")
    lines = [made_up("sft", 9, ends, role="sweep", value=value) for value, ends in ((1e-3, 8), (3e-3, 30))]
    assert chosen(study, lines, "sft", None) == 3e-3
    assert chosen(study, lines[:1], "sft", None) is None
    _, found = listed(world, tmp_path, lines, sweep=SWEEP)
    values = {job.arm: job.value for job in found if job.role == "test"}
    assert values == {"kl+sft": None, "sft": 3e-3, "align": None}
    _, found = listed(world, tmp_path, wanted=Wanted(unswept=True), sweep=SWEEP)
    assert {job.role: job.value for job in found} == {"before": None, "test": 1e-3}


def test_what_cannot_be_asked_so_is_said_before_anything_is_trained(world, tmp_path):
    """12 haystacks of 6 images, whether it is the report or the sweep that asks for more."""
    shutil.copytree(world.shards, tmp_path / "others")
    more = SWEEP | {"shards": str(tmp_path / "others")}
    check_asked(listed(world, tmp_path, sweep=more)[1])
    check_asked(listed(world, tmp_path, asked=ASKED | {"sizes": [1, 6], "haystacks": 12}, sweep=more)[1])
    for changes, sentence in (
        ({"asked": ASKED | {"haystacks": 13}}, f"13 haystacks asked for, the data set {world.shards} has 12"),
        ({"asked": ASKED | {"sizes": [1, 8]}}, f"{world.shards} cannot be asked as the study says: not measured at 8 images"),
        ({"sweep": more | {"haystacks": 13}}, f"13 haystacks asked for, the data set {tmp_path / 'others'} has"),
        ({"sweep": more | {"sizes": [8]}}, "nothing can be measured in .*others"),
    ):
        with pytest.raises(ValueError, match=sentence):
            check_asked(listed(world, tmp_path, **changes)[1])


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"sweep": SWEEP | {"values": [1e-3, 1.0000001e-3]}}, "'kl.sft, seed 9, one, 0.001 .sweep.*would work in one folder"),
        (
            {"arms": {"before": BEFORE, "kl+sft": {}, "a": {}, "a-b": {}}, "teachers": {"b-c": "{world}/teacher", "c": "{world}/teacher"}},
            "one folder",
        ),
    ],
)
def test_two_jobs_never_share_a_folder(world, tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        listed(world, tmp_path, **changes)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"sweep": SWEEP | {"keys": ["optimizer.lrr"]}}, "kl.sft, seed 9, one, 0.001 .sweep.: .*unknown key 'optimizer.lrr'"),
        ({"arms": {"before": BEFORE, "kl+sft": {"set": ["stepz=1"]}}}, "unknown key 'stepz'"),
        ({"teachers": {"one": "{world}/none"}}, "kl.sft, seed 1, one: no model at .*/none; --world must hold it"),
        ({"arms": {"before": BEFORE, "kl+sft": {"set": ["student.path={world}/none"]}}}, "no model at .*/none"),
        ({"arms": {"before": BEFORE, "kl+sft": {}, "y": {"model": "{world}/none", "yarn": 2.0}}}, "y, seed 1: no model at .*/none"),
        (
            {"arms": {"before": BEFORE, "kl+sft": {"set": ["data.shards=['nowhere']"]}}},
            "kl.sft, seed 1, one: nowhere is no finished data set",
        ),
    ],
)
def test_a_dry_run_refuses_what_a_jobs_first_command_would(world, tmp_path, changes, sentence):
    check_trained(listed(world, tmp_path)[1])
    with pytest.raises(ValueError, match=sentence):
        check_trained(listed(world, tmp_path, **changes)[1])


@pytest.mark.parametrize("changes", [{"set": ["steps=3"]}, {"asked": ASKED | {"questions": 3}}, {"sweep": SWEEP}])
def test_a_changed_study_never_finds_the_answers_of_what_it_was(world, tmp_path, changes):
    def job(**changes):
        found = listed(world, tmp_path, wanted=Wanted(unswept=True), **changes)[1]
        return next(job for job in found if (job.arm, job.seed) == ("sft", 1))

    answered = job()
    answered.results.parent.mkdir(parents=True)
    answered.results.write_text(json.dumps({"models": {"sft": {}}}))
    assert next_command(answered) is None
    assert next_command(job(**changes)) is not None
    watched = {"arms": {"before": BEFORE, "kl+sft": {}, "sft": {"set": [*answered.spec.set, "logging.every_steps=3"]}}}
    assert next_command(job(**watched)) is None, "watched otherwise, it is the same run"


def test_a_sweep_may_ask_less_than_the_report(world, tmp_path):
    _, found = listed(world, tmp_path, sweep=SWEEP | {"sizes": [1, 3], "haystacks": 4})
    asked = {job.role: (job.asked.shards, job.asked.sizes, job.asked.haystacks, job.asked.questions) for job in found}
    assert asked == {role: ("{world}/shards", (1, 2, 4), 6, 2) for role in ("before", "test")} | {"sweep": ("{world}/other", (1, 3), 4, 2)}


def test_a_line_that_was_made_otherwise_is_refused_by_name(world, tmp_path):
    _, found = listed(world, tmp_path)
    job = next(job for job in found if job.arm == "sft")
    line = made_up("sft", 1, 9) | made_with(job)
    assert results.is_done(job, [line])
    assert not results.is_done(job, [line | {"seed": 2}])
    with pytest.raises(ValueError, match=r"its line was made with other changes \(\['steps=9'\]\) than"):
        results.is_done(job, [line | {"changes": ["steps=9"]}])
    assert results.is_done(job, [line | {"changes": [*line["changes"], "evaluation.every_steps=7"]}])
    (tmp_path / "base.toml").write_text((tmp_path / "base.toml").read_text() + "\n# a remark\n")
    assert results.is_done(job, [line])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_arm_of_the_studies_that_come_along_is_a_recipe_that_loads(path, tmp_path):
    study = read_study(path)
    recipe_of(study, path)
    found = jobs(study, path, tmp_path / "w", tmp_path / "out", [], Wanted(unswept=True))
    assert {job.arm for job in found} == set(study.arms)
    unread = ["align.pairs=last", "align.heads=all", "align.probe=none"]  # a probe's file is made with the world
    runs = [config.load(words[0], [*words[1:], *unread]) for words in (job.words() for job in found if job.spec.model is None)]
    assert {(run.student.dtype, run.data.workers) for run in runs} == {("float32", 0)}
    assert len({(run.steps, run.optimizer.accumulation * run.data.micro_batch) for run in runs}) == 1, "equal steps of equally many samples"
