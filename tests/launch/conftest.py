"""One test cluster for the whole session, of the shape that a test asks for; at the end, a table of what each fault cost."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.testcluster import cluster as testcluster
from launch.testcluster.configuration import Shape, default_state
from tests.support.slurm import Cluster
from tests.support.world import World, make_world

LOSSES = pytest.StashKey[list]()
PLAYED = """#!{python}
import json, pathlib, sys
folder, name = pathlib.Path({folder!r}), pathlib.Path(sys.argv[0]).name
with (folder / "said").open("a") as said:
    said.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
answer = folder / (name + ".answer")
sys.stdout.write(answer.read_text() if answer.exists() else "")
sys.exit(0 if answer.exists() else 1)
"""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LOSSES] = []


@pytest.fixture(scope="session")
def shared_world() -> Iterator[World]:
    """Where all nodes see it: their /tmp is their own."""
    folder = Path(f"/var/tmp/laid-test-shared-{os.getuid()}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield make_world(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def clusters(shared_world, pytestconfig: pytest.Config) -> Iterator[Callable[[Shape], Cluster]]:
    """A function that brings up a cluster of a shape, in the place of the one before."""
    references: dict[str, list] = {}

    def bring_up(shape: Shape) -> Cluster:
        try:
            environ = testcluster.up(shape)
        except testcluster.Unavailable as reason:
            pytest.skip(f"no test cluster here: {reason}")
        return Cluster(shape, environ, shared_world, references, pytestconfig.stash[LOSSES])

    yield bring_up
    testcluster.down(default_state())


def proctracks() -> list[str]:
    """CI takes what real clusters have; LAID_SLURM_MATRIX=1 both."""
    if os.environ.get("LAID_SLURM_MATRIX"):
        return ["cgroup", "linuxproc"]
    return ["linuxproc" if testcluster.cgroup_tracking() else "cgroup"]


@pytest.fixture(scope="session", params=proctracks())
def proctrack(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def cluster(clusters, proctrack) -> Cluster:
    return clusters(Shape(proctrack=proctrack))


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    rows = config.stash[LOSSES]
    if rows:
        terminalreporter.write_line(f"{'fault':<44}  steps lost  seconds lost  longest pause (s)")
    for row in rows:
        terminalreporter.write_line(f"{row['fault']:<44}  {row['steps']:>10}  {row['seconds']:>12}  {row['pause']:>17}")


@pytest.fixture
def played(tmp_path, monkeypatch):
    """A folder of commands; `NAME.answer` in it is what that command prints, without it the command fails."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("squeue", "scontrol", "sacct", "scancel", "sbatch"):
        (folder / name).write_text(PLAYED.format(python=sys.executable, folder=str(folder)))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder
