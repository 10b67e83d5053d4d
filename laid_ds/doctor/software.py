"""The Python packages that are installed, against the ranges that this project declares; nothing that may be missing is imported."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from laid_ds.doctor.line import ABSENT, OK, WRONG, Line, Room

NOT_TO_RUN = ("dev", "bench", "demo")  # extras that no run needs


def software() -> Room:
    """Python packages, of this project's own declaration."""
    required, extras = declared()
    outside, versions = [], {}
    for requirement in required:
        line = package(requirement)
        versions |= line.numbers
        if line.verdict != OK:
            outside.append(line)
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "deepspeed") if versions.get(name))
    yield from outside
    if len(outside) < len(required):
        yield Line("packages", OK, f"{len(required) - len(outside)} of {len(required)} inside their tested ranges ({named})", "", versions)
    for extra, requirements in extras.items():
        for requirement in requirements:
            yield package(requirement, extra)


def missing() -> list[str]:
    """Required packages that are not there at all."""
    return [requirement.name for requirement in declared()[0] if version(requirement.name) is None]


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def declared() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """(what every run needs, what a run may use by extra), with ranges: pyproject.toml's in a clone, else the installed package's."""
    pyproject = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text())["project"]
        required = [Requirement(text) for text in project["dependencies"]]
        extras = {name: [Requirement(text) for text in texts] for name, texts in project["optional-dependencies"].items()}
    else:
        found = [Requirement(text) for text in metadata.requires("laid-ds") or []]
        names = metadata.metadata("laid-ds").get_all("Provides-Extra") or []
        required = [requirement for requirement in found if requirement.marker is None or requirement.marker.evaluate({"extra": ""})]
        extras = {name: [r for r in found if r not in required and r.marker.evaluate({"extra": name})] for name in names}
    return required, {name: requirements for name, requirements in extras.items() if name not in NOT_TO_RUN}


def package(requirement: Requirement, extra: str = "") -> Line:
    """An installed version against its range; a package that only an extra asks for may be absent."""
    name, wanted, found = requirement.name, str(requirement.specifier), version(requirement.name)
    if found is None:
        if extra:
            return Line(name, ABSENT, "not installed", f"pip install 'laid-ds[{extra}]' where a run is to use it")
        return Line(name, WRONG, f"not installed, {wanted or 'any version'} is needed", f"pip install '{name}{wanted}'")
    numbers = {name: found}
    if not requirement.specifier.contains(found, prereleases=True):
        return Line(name, WRONG, f"{found}, tested is {wanted}", f"pip install '{name}{wanted}'", numbers)
    return Line(name, OK, f"{found} (tested: {wanted})", "", numbers)
