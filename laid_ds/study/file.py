"""A study as one TOML file: a base recipe, arms that change it, seeds, and what every arm is asked. Unknown keys are errors.

In texts, {world} is the folder of models and shards that is given on the command line, {teacher} the folder of the teacher in turn and
{seed} the seed in turn, so that the file names no place of a machine.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, model_validator

from laid_ds.config import Count, Positive, Section
from laid_ds.files import own_or_shipped, read_toml

PLACES = ("world", "teacher", "seed")
NAME = re.compile(r"[\w.+-]+")


def _each_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """What is run or asked for each of its values."""
    if not values:
        raise ValueError("the list is empty; give at least one")
    twice = next((value for i, value in enumerate(values) if value in values[:i]), None)
    if twice is not None:
        raise ValueError(f"{twice!r} stands twice; give each once")
    return values


EachOnce = AfterValidator(_each_once)
Seeds = Annotated[tuple[int, ...], EachOnce]
Sizes = Annotated[tuple[Count, ...], EachOnce]
Names = Annotated[tuple[str, ...], EachOnce]


class Arm(Section):
    """One way to make a student: the base recipe with changes, or a model as it is."""

    about: str = ""
    """What it is, in some words for the page."""
    set: tuple[str, ...] = ()
    """section.key=value, as `laid train RECIPE section.key=value` takes them; they come after those of the study."""
    model: str | None = None
    """A model folder that is asked as it is; nothing is trained."""
    yarn: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """Ask that model with its positions stretched by YaRN."""
    self_extend: tuple[Count, Count] | None = None
    """(group, window): ask that model with SelfExtend."""
    teachers: Names | None = None
    """Some of the study's teachers; without it all."""
    seeds: Seeds | None = None
    """Some of the study's seeds; without it all."""
    swept: bool = True
    """Whether [sweep] chooses its rate; false where `set` names it."""
    against: str | None = None
    """Another arm that it is divided by, besides the two that all are."""

    @model_validator(mode="after")
    def _is_one_of_both(self) -> Arm:
        if self.model is None and (self.yarn or self.self_extend):
            raise ValueError("yarn and self_extend are for an arm with a model; give model = ..., or leave them out")
        if self.model is not None and self.set:
            raise ValueError("an arm with a model trains nothing, so that set has no effect; leave out one of the two")
        return self


class Asked(Section):
    """What every arm is asked in the end, all alike; teacher-forced, in float32."""

    shards: str
    """Test haystacks, which nothing was chosen by."""
    sizes: Sizes
    """Numbers of images (or of whatever a haystack consists of), the least first."""
    haystacks: Count = 64
    """Haystacks at each size; they are what the intervals are drawn from."""
    questions: Count = 1
    """Questions about each; answers of one haystack are one observation."""


class Sweep(Section):
    """Choose a rate for every arm alike, by other seeds and other haystacks than those that are reported."""

    keys: Names = ("optimizer.lr",)
    """Keys of the recipe that are all set to the value in turn."""
    values: Annotated[tuple[Positive, ...], EachOnce]
    """Values to try. The one with the highest accuracy, as a mean over sizes and seeds, is taken; the first by `--unswept`."""
    seeds: Seeds
    """None of the seeds of the study."""
    shards: str
    """Haystacks to choose by, not those of [asked]."""
    sizes: Sizes | None = None
    """Numbers of images to choose by; without it those of [asked]."""
    haystacks: Count | None = None
    """Haystacks at each size to choose by; without it as many as in [asked]."""
    set: tuple[str, ...] = ()
    """Changes of the sweep's runs alone, such as fewer steps; they come last."""


class Study(Section):
    """Arms x teachers x seeds."""

    title: str
    """The heading of its part of the page."""
    about: str = ""
    """What the world is, for the page."""
    recipe: str
    """The base recipe, beside this file, or one that comes with the package (recipes/NAME)."""
    unit: str = "images"
    """What sizes and windows count, in the plural."""
    seeds: Seeds
    """Each is the run's `seed`, and {seed} in the texts."""
    teachers: dict[str, str] = Field(default={})
    """Name -> folder; arms that ask no teacher run once for all of them."""
    before: str = "before"
    """The arm whose one-image skill sets the threshold of each seed's windows; it must have a model."""
    baseline: str = "kl+sft"
    """The arm that the others are divided by."""
    keep: bool = False
    """Keep the checkpoints and exported models of arms that are finished."""
    set: tuple[str, ...] = ()
    """Changes of the base recipe that all arms share."""
    asked: Asked
    sweep: Sweep | None = None
    arms: Annotated[dict[str, Arm], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_fit(self) -> Study:
        for what, names in (("arm", self.arms), ("teacher", self.teachers)):
            wrong = [name for name in names if not NAME.fullmatch(name)]
            if wrong:
                raise ValueError(f"the {what} {wrong[0]!r} becomes the name of a folder: letters, digits and + - _ . only")
        for name, arm in self.arms.items():
            for key, some, known in (("teachers", arm.teachers, self.teachers), ("seeds", arm.seeds, self.seeds)):
                if unknown := [one for one in some or () if one not in known]:
                    raise ValueError(
                        f"arms.{name}.{key} names {unknown[0]!r}; the study's {key} are {', '.join(map(str, known)) or 'none'}"
                    )
            others = [other for other in self.arms if other != name]
            if arm.against is not None and arm.against not in others:
                raise ValueError(f"arms.{name}.against names {arm.against!r}; the other arms are {', '.join(others)}")
        if self.arms.get(self.before, Arm()).seeds is not None:
            raise ValueError(f"arms.{self.before}.seeds: every seed needs its student before; leave it out")
        missing = [name for name in (self.before, self.baseline) if name not in self.arms]
        if missing:
            raise ValueError(f"no arm {missing[0]!r}, which `before` or `baseline` names; the arms are {', '.join(self.arms)}")
        if self.arms[self.before].model is None:
            raise ValueError(f"the arm {self.before!r} is the student before: give it a model")
        return self

    @property
    def chosen_by(self) -> Asked:
        """What the models of the sweep are asked."""
        assert self.sweep is not None
        own = {name: value for name in ("sizes", "haystacks") if (value := getattr(self.sweep, name)) is not None}
        return self.asked.model_copy(update={"shards": self.sweep.shards, **own})

    @model_validator(mode="after")
    def _chooses_elsewhere(self) -> Study:
        both = sorted({*self.seeds} & {*self.sweep.seeds}) if self.sweep else []
        if both:
            raise ValueError(f"seed {both[0]} is in seeds and in sweep.seeds: what is chosen by a seed must not be reported for it")
        if self.sweep and self.sweep.shards == self.asked.shards:
            raise ValueError(f"sweep.shards and asked.shards are both {self.asked.shards}: choose by other haystacks than you report")
        return self


def read_study(path: Path) -> Study:
    """Raises ValueError with a line for each key or value that is wrong, with its place in the file."""
    path = own_or_shipped(path)
    if not path.is_file():
        raise ValueError(f"no study at {path}")
    try:
        study = Study.model_validate(read_toml(path))
    except ValidationError as error:
        raise ValueError("\n".join(f"{path}: {_sentence(item)}" for item in error.errors())) from None
    for where, text in _texts(study):
        unknown = [name for name in re.findall(r"\{(\w+)\}", text) if name not in PLACES]
        if unknown:
            raise ValueError(
                f"{path}: {where}: {{{unknown[0]}}} in {text!r} stands for nothing; there are {{world}}, {{teacher}} and {{seed}}"
            )
        if "{teacher}" in text and not study.teachers:
            raise ValueError(f"{path}: {where}: {{teacher}} in {text!r}, and [teachers] names none")
    return study


def recipe_of(study: Study, path: Path) -> Path:
    """The base recipe: beside the study's file, else as it is named. Raises ValueError where there is none."""
    beside = own_or_shipped(path).parent / study.recipe
    found = beside if beside.is_file() else own_or_shipped(Path(study.recipe))
    if not found.is_file():
        raise ValueError(f"{path}: no recipe at {beside} or {study.recipe}")
    return found


def _texts(study: Study) -> list[tuple[str, str]]:
    """(key, text) of all that may hold a place."""
    of_arms = [(f"arms.{name}", text) for name, arm in study.arms.items() for text in (*arm.set, arm.model or "")]
    swept = [("sweep", text) for text in (study.sweep.shards, *study.sweep.set)] if study.sweep else []
    shared = [("set", text) for text in study.set]
    return [*of_arms, *swept, *shared, ("asked.shards", study.asked.shards), *((f"teachers.{n}", t) for n, t in study.teachers.items())]


def _sentence(item: Any) -> str:
    *sections, key = map(str, item["loc"]) if item["loc"] else ("",)
    place = ".".join([*sections, key])
    if item["type"] == "extra_forbidden":
        known = {"asked": Asked, "sweep": Sweep, "arms": Arm}.get(sections[0] if sections else "", Study).model_fields
        near = get_close_matches(key, known, n=1)
        return f"unknown key {place!r}; {f'did you mean {near[0]!r}? ' if near else ''}there are {', '.join(known)} (docs/study.md)"
    if item["type"] == "missing":
        return f"{place!r} is missing"
    reason = item["msg"].removeprefix("Value error, ")
    return f"{place}: {reason}" if place else reason
