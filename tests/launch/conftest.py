"""One test cluster for the whole session, of the shape that a test asks for; at the end, a table of what each fault cost."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator

import pytest

from launch.testcluster import cluster as testcluster
from launch.testcluster.configuration import Shape
from tests.support.slurm import Cluster
from tests.support.world import make_world

LOSSES = pytest.StashKey[list]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LOSSES] = []


@pytest.fixture(scope="session")
def clusters(pytestconfig: pytest.Config) -> Iterator[Callable[[Shape], Cluster]]:
    """A function that brings up a cluster of a shape. Its runs and references live as long as its shape."""
    found: dict[Shape, Cluster] = {}

    def bring_up(shape: Shape) -> Cluster:
        if shape not in found or not found[shape].world.folder.is_dir():
            try:
                environ = testcluster.up(shape)
            except testcluster.Unavailable as reason:
                pytest.skip(f"no test cluster here: {reason}")
            folder = shape.state / "shared"
            shutil.rmtree(folder)
            folder.mkdir()
            found[shape] = Cluster(shape, environ, make_world(folder), losses=pytestconfig.stash[LOSSES])
        testcluster.up(shape)
        return found[shape]

    yield bring_up
    for shape in found:
        testcluster.down(shape.state)


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
