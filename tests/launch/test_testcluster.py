"""The test cluster itself: up in any shape, harmless to repeat, and nothing of it is left when it is down."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psutil
import pytest

from launch.testcluster import cluster as testcluster
from launch.testcluster.configuration import FREEZER, Shape, default_state
from tests.support.processes import HANG_SECONDS

pytestmark = pytest.mark.slurm


def traces() -> list[str]:
    """Everything that a cluster makes outside its processes' memory."""
    found = subprocess.run("ip link; ip netns", shell=True, capture_output=True, text=True).stdout
    links = [word for word in found.replace(":", " ").split() if word.startswith("laid")]
    groups = [str(path) for path in FREEZER.glob("slurm_n*")]
    lives = psutil.process_iter(["name", "cmdline", "status"])  # leaves out what ends while it is being looked at
    infos = [process.info for process in lives if process.info["status"] != psutil.STATUS_ZOMBIE]
    daemons = [info["name"] for info in infos if str(default_state()) in " ".join(info["cmdline"] or ())]
    return links + groups + daemons + ([str(default_state())] if default_state().exists() else [])


@pytest.mark.parametrize("shape", [Shape(gpus=2), Shape(namespaces=False, proctrack="linuxproc", nodes=3)], ids=["namespaces", "ports"])
def test_up_twice_is_up_once_and_down_leaves_nothing(shape):
    testcluster.down(default_state())
    assert traces() == []
    try:
        environ = testcluster.up(shape)
    except testcluster.Unavailable as reason:
        pytest.skip(f"no test cluster here: {reason}")
    daemon = (shape.state / "pid" / "slurmctld").read_text()
    assert testcluster.up(shape) == environ
    assert (shape.state / "pid" / "slurmctld").read_text() == daemon
    gpus = ["--gpus-per-node=2"] if shape.gpus else []
    command = ["srun", f"--nodes={shape.nodes}", *gpus, "bash", "-c", "echo $SLURMD_NODENAME ${CUDA_VISIBLE_DEVICES:-none}"]
    found = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert sorted(found.stdout.split("\n")[:-1]) == [f"{name} {'0,1' if shape.gpus else 'none'}" for name in shape.names], found.stderr
    assert traces()
    testcluster.down(default_state())
    testcluster.down(default_state())
    assert traces() == []


def test_the_reason_is_said_where_a_cluster_cannot_be(monkeypatch, tmp_path):
    monkeypatch.setattr(testcluster, "PROGRAMS", ("no-such-daemon",))
    with pytest.raises(testcluster.Unavailable, match="no-such-daemon not found: apt-get install"):
        testcluster.up(Shape(state=Path(tmp_path)))
