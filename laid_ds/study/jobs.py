"""What a study has to run: a job for each arm, teacher and seed, and the next command of a job, which follows from what is on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from laid_ds import config
from laid_ds.data.dataset import Dataset
from laid_ds.evaluation.haystack import survey
from laid_ds.evaluation.window import notes_on
from laid_ds.files import read_toml
from laid_ds.study.file import Arm, Asked, Study, recipe_of

Line = dict[str, Any]
BEFORE, SWEEP, TEST = "before", "sweep", "test"
WATCHING = ("evaluation", "logging.", "checkpoint.", "data.workers")


@dataclass(frozen=True)
class Job:
    role: str
    """`before` and `test` are reported; `sweep` is to choose by."""
    arm: str
    teacher: str | None
    seed: int
    value: float | None
    """Of the swept keys."""
    changes: tuple[str, ...]
    """section.key=value with {world} and the like as they stand in the study."""
    recipe: Path
    places: Mapping[str, str]
    """What stands for {world}, {teacher} and {seed}."""
    spec: Arm
    asked: Asked
    place: Path
    """Where its folder lies, beside those of what was made otherwise under this name."""

    @cached_property
    def folder(self) -> Path:
        """Named by how it is made: a study that is changed never finds the answers of what it was."""
        deciding = json.dumps(what_decides(made_with(self)), sort_keys=True)
        return self.place / hashlib.sha256(deciding.encode()).hexdigest()[:8]

    @property
    def name(self) -> str:
        value = "" if self.value is None else f", {self.value:g}"
        return f"{self.arm}, seed {self.seed}{f', {self.teacher}' if self.teacher else ''}{value}{' (sweep)' if self.role == SWEEP else ''}"

    @property
    def key(self) -> tuple[Any, ...]:
        """What names its line among those of one study and world. A line of an arm that is reported tells which value it was made with."""
        return ("sweep" if self.role == SWEEP else "test", self.arm, self.teacher, self.seed, self.value if self.role == SWEEP else None)

    @property
    def model(self) -> Path:
        """The folder that is asked."""
        made = self.spec.model is None or self.spec.yarn is not None
        return self.folder / "model" if made else Path(self.placed(self.spec.model))

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def results(self) -> Path:
        return self.folder / "evaluation.json"

    def placed(self, text: str) -> str:
        return _placed(text, self.places)

    def words(self) -> list[str]:
        """What `laid train` gets: the recipe and its changes."""
        named = [f"seed={self.seed}", f'name="study {self.arm}, seed {self.seed}"', f"output={json.dumps(str(self.run))}"]
        return [str(self.recipe), *map(self.placed, self.changes), *named]


def key_of(line: Line) -> tuple[Any, ...]:
    value = line["value"] if line["role"] == "sweep" else None
    return (line["role"], line["arm"], line["teacher"], line["seed"], value)


def made_with(job: Job) -> dict[str, Any]:
    """What must be the same for a line to stand for a job: not where anything lies."""
    how = {"model": job.spec.model, "yarn": job.spec.yarn, "self_extend": job.spec.self_extend and list(job.spec.self_extend)}
    base = json.dumps(read_toml(job.recipe), sort_keys=True, default=str).encode()  # what it says, not how it is written
    trained = {"recipe": hashlib.sha256(base).hexdigest()[:12], "changes": list(job.changes)}
    made = trained if job.spec.model is None else {name: value for name, value in how.items() if value is not None}
    return {"asked": job.asked.model_dump(mode="json"), **made}


def what_decides(made: Mapping[str, Any]) -> dict[str, Any]:
    """Of how something was made, what decides what comes out: a run may be watched otherwise."""
    changes = [word for word in (made.get("changes") or ()) if not word.startswith(WATCHING)]
    return {**made, "changes": changes}


def next_command(job: Job) -> list[str] | None:
    """The words behind `laid` of what is to be done next; None when the answers are there."""
    asked = job.asked
    if job.results.is_file() and job.arm in json.loads(job.results.read_text())["models"]:
        return None
    if not (job.model / "config.json").is_file():
        if job.spec.yarn is not None:
            return ["yarn", job.placed(job.spec.model), str(job.model), "--factor", str(job.spec.yarn)]
        if job.spec.model is not None:
            raise ValueError(f"{job.name}: no model at {job.model}; --world must hold it")
        if not (job.run / "done.json").is_file():
            return ["train", *job.words(), "--ranks", "1"]
        return ["export", str(job.run), str(job.model)]
    extended = ["--self-extend", f"{job.arm}={job.spec.self_extend[0]},{job.spec.self_extend[1]}"] if job.spec.self_extend else []
    sizes = ["--sizes", ",".join(map(str, asked.sizes)), "--haystacks", str(asked.haystacks), "--questions", str(asked.questions)]
    how = ["--dtype", "float32", "--workers", "0", *extended]
    return ["eval", job.placed(asked.shards), f"{job.arm}={job.model}", "--out", str(job.results), *sizes, *how]


def check_asked(jobs: Iterable[Job]) -> None:
    """Raises ValueError where haystacks that will be asked are too few or too small for it: before anything is trained."""
    for place, asked in {job.placed(job.asked.shards): job.asked for job in jobs}.items():
        left_out = survey(Dataset.open(place), asked.haystacks, asked.sizes).left_out
        if left_out:
            raise ValueError(f"{place} cannot be asked as the study says: {'; '.join(notes_on(left_out))}")


def check_trained(jobs: Iterable[Job]) -> None:
    """Raises ValueError for a job whose recipe does not load with its changes, and whose models or shards are not there: each would fail
    with its first command. What `laid train` refuses beside that, it says when the job is run."""
    models: dict[Path, Job] = {}
    shards: dict[tuple[str, ...], Job] = {}
    for job in jobs:
        if job.spec.model is not None:
            models.setdefault(Path(job.placed(job.spec.model)), job)
            continue
        recipe, *changes = job.words()
        with _told_of(job):
            run = config.load(recipe, changes)
        for model in (run.student, *([run.teacher] if run.taught else [])):
            models.setdefault(model.path, job)
        for places in (run.data.shards, *([(run.evaluation.shards,)] if run.evaluation else [])):
            shards.setdefault(places, job)
    for model, job in models.items():
        if not (model / "config.json").is_file():
            raise ValueError(f"{job.name}: no model at {model}; --world must hold it")
    for places, job in shards.items():
        with _told_of(job):
            Dataset.open(places)


@contextmanager
def _told_of(job: Job) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{job.name}: {error}") from None


def let_go(job: Job) -> None:
    """Remove what takes room, of a job whose answers are there: checkpoints and the model that was made."""
    shutil.rmtree(job.run / "checkpoints", ignore_errors=True)
    if job.model.is_relative_to(job.folder):
        shutil.rmtree(job.model, ignore_errors=True)


@dataclass(frozen=True)
class Wanted:
    """A part of a study; empty: all of it. The student before is always in it."""

    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    teachers: tuple[str, ...] = ()
    unswept: bool = False
    """Leave out the sweep: what it would choose is its first value."""


def jobs(study: Study, path: Path, world: Path, out: Path, lines: Sequence[Line], wanted: Wanted) -> list[Job]:
    """All jobs in the order in which they may start: the student before, the sweep, the arms. An arm whose sweep is not finished stands
    there without a value. Raises ValueError for an arm, seed or teacher that the study has not."""
    recipe = recipe_of(study, path)
    of_study = (study.arms, study.seeds, study.teachers)
    for what, asked, known in zip(("arm", "seed", "teacher"), (wanted.arms, wanted.seeds, wanted.teachers), of_study, strict=True):
        if unknown := [one for one in asked if one not in known]:
            raise ValueError(f"{path} has no {what} {unknown[0]!r}; there are {', '.join(map(str, known))}")
    arms = {name: arm for name, arm in study.arms.items() if not wanted.arms or name in wanted.arms or name == study.before}
    found: dict[str, list[Job]] = {BEFORE: [], SWEEP: [], TEST: []}
    for name, arm in arms.items():
        for teacher in _teachers(study, arm, recipe, world, wanted.teachers):
            swept, value = study.sweep if _swept(study, arm) else None, None
            if swept is not None:
                value = chosen(study, lines, name, teacher) or (swept.values[0] if wanted.unswept else None)
            for seed in [seed for seed in wanted.seeds or study.seeds if seed in (arm.seeds or study.seeds)]:
                role = BEFORE if name == study.before else TEST
                found[role].append(_job(study, role, name, arm, teacher, seed, value, recipe, world, out))
            for seed in swept.seeds if swept is not None and not wanted.unswept else ():
                found[SWEEP] += [_job(study, SWEEP, name, arm, teacher, seed, trial, recipe, world, out) for trial in swept.values]
    ordered = [job for role in found.values() for job in sorted(role, key=lambda job: job.seed)]
    places: dict[Path, Job] = {}
    for job in ordered:
        other = places.setdefault(job.place, job)
        if other is not job:
            raise ValueError(f"{path}: {other.name!r} and {job.name!r} would work in one folder, {job.place}; name or number them apart")
    return ordered


def _swept(study: Study, arm: Arm) -> bool:
    return study.sweep is not None and arm.model is None and arm.swept


def chosen(study: Study, lines: Sequence[Line], arm: str, teacher: str | None) -> float | None:
    """The value with the highest accuracy of an arm's sweep, as a mean over sizes and seeds (of equals the first); None until all of the
    sweep is there."""
    those = [line for line in lines if (line["role"], line["arm"], line["teacher"]) == ("sweep", arm, teacher)]
    worth = {
        value: [mean(line["accuracy"].values()) for line in those if line["value"] == value and line["seed"] in study.sweep.seeds]
        for value in study.sweep.values
    }
    if any(len(found) < len(study.sweep.seeds) for found in worth.values()):
        return None
    return max(worth, key=lambda value: mean(worth[value]))


def waits_for_sweep(study: Study, job: Job) -> bool:
    return job.role == TEST and job.value is None and _swept(study, job.spec)


def _teachers(study: Study, arm: Arm, recipe: Path, world: Path, only: Sequence[str]) -> list[str | None]:
    """Those that an arm runs with: none where it asks none."""
    if arm.model is not None or not study.teachers:
        return [None]
    places = {"world": str(world), "teacher": next(iter(study.teachers.values())), "seed": "0"}
    unread = (
        "align.pairs=last",
        "align.heads=all",
        "align.start=one_hot",
        "align.probe=none",
    )  # a probe's file, which decides nothing here
    words = [*(_placed(text, places) for text in (*study.set, *arm.set)), *unread]
    if not config.load(recipe, words).taught:
        return [None]
    return [name for name in arm.teachers or study.teachers if not only or name in only]


def _placed(text: str, places: Mapping[str, str]) -> str:
    for name, value in places.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def _job(
    study: Study, role: str, name: str, arm: Arm, teacher: str | None, seed: int, value: float | None, recipe: Path, world: Path, out: Path
) -> Job:
    places = {"world": str(world), "seed": str(seed)}
    folder = study.teachers[teacher] if teacher else next(iter(study.teachers.values()), "")
    places["teacher"] = _placed(folder, places)
    rates = [f"{key}={value!r}" for key in study.sweep.keys] if value is not None else []
    asked = study.chosen_by if role == SWEEP else study.asked
    place = "-".join(filter(None, [name, teacher, f"seed{seed}", f"value{value:g}" if role == SWEEP else ""]))
    changes = (*study.set, *arm.set, *rates, *(study.sweep.set if role == SWEEP else ())) if arm.model is None else ()
    return Job(role, name, teacher, seed, value, changes, recipe, places, arm, asked, out / ("sweep" if role == SWEEP else "arms") / place)
