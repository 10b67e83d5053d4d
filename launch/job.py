"""What a SLURM job is asked for: the options of `laid-launch slurm`, and of a site file that holds a cluster's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from laid_ds.files import read_toml
from laid_ds.keys import meant
from launch.secrets import names_of_secrets


class Job(BaseModel):
    """Resources, launcher, restarts. Texts go to SLURM as they are; None leaves the cluster's default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    launcher: Literal["srun", "torchrun", "deepspeed"] = "srun"
    nodes: int = Field(1, ge=1)
    gpus_per_node: int = Field(0, ge=0)
    ranks_per_node: int | None = Field(None, ge=1)
    """Default: one per GPU, or 1."""
    cpus_per_rank: int | None = Field(None, ge=1)
    mem: str | None = None
    """Of each node, such as 200G."""
    time: str | None = None
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    dependency: str | None = None
    signal: Literal["USR1", "USR2"] = "USR1"
    lead_seconds: int = Field(180, ge=1)
    """The warning comes this long before the time limit (SLURM may be a minute early): more than the longest step and a save."""
    max_restarts: int = Field(50, ge=0)
    max_crashes: int = Field(2, ge=0)
    """Restarts in a row after failures without a warning, while no newer checkpoint appears."""
    sweep: tuple[tuple[str, ...], ...] = ()
    """Overrides of each element of a job array."""
    parallel: int | None = Field(None, ge=1)
    """Elements of the array that run at a time."""
    chain: int = Field(1, ge=1)
    """Submit as many times, one after the other: each job goes on from the last. For clusters that forbid requeueing."""
    container: Literal["none", "pyxis", "apptainer"] = "none"
    image: str | None = None
    mount: tuple[str, ...] = ()
    python: str | None = None
    """Interpreter of the ranks; default: the one that submits, or `python3` of the container."""
    setup: tuple[str, ...] = ()
    """Lines of bash before the ranks start, such as `module load cuda`."""
    extra: tuple[str, ...] = ()
    """Further #SBATCH options, such as --exclude=n3."""

    @property
    def ranks(self) -> int:
        """On each node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def tasks(self) -> int:
        """On each node: ranks, or the one launcher that starts them."""
        return self.ranks if self.launcher == "srun" else 1

    @field_validator("mem", "time", "account", "partition", "qos", "constraint", "dependency", "image", "python")
    @classmethod
    def _one_line(cls, text: str | None) -> str | None:
        if text is not None and not is_one_line(text):
            raise ValueError("must be one line of printable text")
        return text

    @field_validator("extra")
    @classmethod
    def _is_option(cls, lines: tuple[str, ...]) -> tuple[str, ...]:
        for line in lines:
            if not is_one_line(line) or not re.match(r"--?[a-zA-Z]", line):
                raise ValueError(f"{line!r} is not an option of sbatch on one line")
        return lines

    @model_validator(mode="after")
    def _fits(self) -> Job:
        if (self.container == "none") != (self.image is None):
            raise ValueError("`container` and `image` go together")
        if self.mount and self.container == "none":
            raise ValueError("`mount` needs a container")
        if self.chain > 1 and (self.sweep or self.dependency):
            raise ValueError("`chain` orders its jobs itself: leave out `sweep` and `dependency`")
        if () in self.sweep:
            raise ValueError("`sweep` has an element without a word: give each at least one section.key=value")
        if named := [word for element in self.sweep for word in element if word.partition("=")[0].strip() == "output"]:
            raise ValueError(f"`sweep` gives each element an output of its own, under that of the recipe: leave out {named[0]!r}")
        found = names_of_secrets("\n".join([*self.setup, *self.extra]))
        if found:
            raise ValueError(f"{found[0]} would be written into the job script; export it where you submit, SLURM passes it on")
        return self


def is_one_line(text: str) -> bool:
    return text.isprintable() and bool(text.strip())


def read_job(site: Path | None, options: dict[str, Any]) -> Job:
    """The site file's values, and over them the given options (None: not given). Raises ValueError, one line per wrong value."""
    tree = _read_site(site) if site else {}
    tree |= {name: value for name, value in options.items() if value is not None}
    try:
        return Job.model_validate(tree)
    except ValidationError as error:
        raise ValueError("\n".join(_sentence(item) for item in error.errors())) from None


def _read_site(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"no site file at {path}")
    return read_toml(path)


def _sentence(item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        near = meant(Job, place)
        hint = f"did you mean {near!r}? " if near else ""
        return f"unknown key {place!r} in the site file; {hint}its keys are the options of `laid-launch slurm`, with _ for -"
    text = item["msg"].removeprefix("Value error, ")
    return f"{place}: {text} (value: {item['input']!r})" if place else text
