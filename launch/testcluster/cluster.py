"""Start, stop and harm a test cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launch.testcluster import configuration
from launch.testcluster.configuration import BRIDGE, FREEZER, SUBNET, Shape

PROGRAMS = ("munged", "slurmctld", "slurmd", "sinfo", "scancel")
PACKAGES = "slurmctld slurmd slurm-client munge iproute2"
NODE_INIT = Path(__file__).with_name("node_init.sh")


class Unavailable(RuntimeError):
    """This machine cannot hold the cluster that was asked for; the text says why."""


def up(shape: Shape) -> dict[str, str]:
    """Start the cluster unless one of this very shape is up; returns the environment that SLURM's commands need. Raises Unavailable."""
    _check(shape)
    if recorded(shape.state) == shape and _idle_or_busy(shape) == shape.nodes:
        return environment(shape.state)
    down(shape.state)
    for name in ("munge", "controller", "log", "pid", "shared", *(f"{kind}/{node}" for kind in ("spool", "tmp") for node in shape.names)):
        (shape.state / name).mkdir(parents=True, exist_ok=True)
    shape.state.chmod(0o755)
    _write_files(shape)
    _start_munge(shape.state)
    if shape.namespaces:
        _wire(shape)
    _run("slurmctld", "-c", "-f", shape.state / "slurm.conf")
    for node in range(shape.nodes):
        start_node(shape, node)
    if not _until(lambda: _idle_or_busy(shape) == shape.nodes, seconds=120):
        raise Unavailable(f"the nodes did not come up; see {shape.state / 'log'}")
    return environment(shape.state)


def environment(state: Path) -> dict[str, str]:
    return dict(os.environ) | {"SLURM_CONF": str(state / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}


def down(state: Path) -> None:
    """End every process of the cluster, by recorded id, and remove its network, cgroups and files. Safe to repeat."""
    shape = recorded(state)
    if shape is None:
        return
    with contextlib.suppress(subprocess.SubprocessError):
        subprocess.run(["scancel", "--full", "--user", str(os.getuid())], env=environment(state), timeout=5, capture_output=True)
    for node in range(shape.nodes):
        if shape.namespaces:
            kill_node(shape, node)
        else:
            _end(state / "pid" / f"slurmd.{shape.names[node]}", "slurmd")
    _end(state / "pid" / "slurmctld", "slurmctld")
    _end(state / "pid" / "munged", "munged")
    if shape.namespaces:
        _unwire(shape)
    for name in shape.names:
        _remove_cgroups(FREEZER / f"slurm_{name}")
    shutil.rmtree(state)


def start_node(shape: Shape, node: int) -> None:
    """Switch a node on."""
    name = shape.names[node]
    if not shape.namespaces:
        _run("slurmd", "-f", shape.state / "slurm.conf", "-N", name)
        return
    namespace = [
        "nsenter",
        f"--net=/var/run/netns/laid-{name}",
        "unshare",
        "--uts",
        "--mount",
        "--pid",
        "--fork",
        "--mount-proc",
        "--kill-child",
    ]
    with (shape.state / "log" / f"node.{name}.log").open("ab") as log:
        process = subprocess.Popen(
            [*namespace, "bash", NODE_INIT, name, shape.state, *_software_under_tmp()],
            env=environment(shape.state),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    (shape.state / "pid" / f"node.{name}").write_text(str(process.pid))


def _software_under_tmp() -> list[Path]:
    """The checkout and the virtual environment, where a node's own /tmp would hide them."""
    folders = {Path(__file__).resolve().parents[2], Path(sys.prefix).resolve()}
    return sorted(folder for folder in folders if folder.is_relative_to("/tmp"))


def kill_node(shape: Shape, node: int) -> None:
    """The node loses its power: every process on it is gone at once."""
    _end(shape.state / "pid" / f"node.{shape.names[node]}", "unshare", signal.SIGKILL)


def cut_node(shape: Shape, node: int, cut: bool = True) -> None:
    """Pull the node's network cable (no connection is told), or put it back."""
    _run("ip", "link", "set", f"laidv{node}", "down" if cut else "up")


def kill_slurmd(shape: Shape, node: int) -> None:
    """Only the daemon dies; the job's processes go on."""
    pid = next(pid for pid in _processes() if _cmdline(pid)[:1] == ["slurmd"] and shape.names[node] in _cmdline(pid))
    os.kill(pid, signal.SIGKILL)


def start_slurmd(shape: Shape, node: int) -> None:
    """Start the daemon again on a node that is on."""
    name = shape.names[node]
    inside = _children(int((shape.state / "pid" / f"node.{name}").read_text()))[0]
    _run("nsenter", f"--target={inside}", "--all", "slurmd", "-f", shape.state / "slurm.conf", "-N", name)


def cgroup_tracking() -> str | None:
    """Why slurmd cannot track processes by cgroup here, or None where it can."""
    if not FREEZER.is_dir():
        return f"no cgroup v1 freezer at {FREEZER}"
    return None if os.access(FREEZER, os.W_OK) and os.getuid() == 0 else f"{FREEZER} is not writable"


def namespaces() -> str | None:
    """Why nodes cannot have namespaces of their own here, or None where they can."""
    found = subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    if found.returncode:
        return found.stderr.strip()
    return None if shutil.which("ip", path=environment(Path())["PATH"]) else "no `ip`: install iproute2"


def _check(shape: Shape) -> None:
    missing = [name for name in PROGRAMS if not shutil.which(name, path=environment(shape.state)["PATH"])]
    if missing:
        raise Unavailable(f"{', '.join(missing)} not found: apt-get install --no-install-recommends {PACKAGES}")
    reason = (shape.namespaces and namespaces()) or (shape.proctrack == "cgroup" and cgroup_tracking())
    if reason:
        raise Unavailable(reason)


def _write_files(shape: Shape) -> None:
    state = shape.state
    record = dataclasses.asdict(shape) | {"state": str(state)}
    (state / "shape.json").write_text(json.dumps(record))
    (state / "hosts").write_text(configuration.hosts(shape))
    (state / "slurm.conf").write_text(configuration.slurm_conf(shape))
    if shape.proctrack == "cgroup":
        (state / "cgroup.conf").write_text(configuration.cgroup_conf())
    if shape.gpus:
        (state / "gres.conf").write_text(configuration.gres_conf(shape))


def recorded(state: Path) -> Shape | None:
    path = state / "shape.json"
    return Shape(**json.loads(path.read_text()) | {"state": state}) if path.is_file() else None


def _start_munge(state: Path) -> None:
    key = state / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    files = {"key-file": key, "socket": state / "munge/socket", "pid-file": state / "pid/munged", "log-file": state / "log/munged.log"}
    _run("munged", *(f"--{name}={path}" for name, path in files.items()), f"--seed-file={state / 'munge/seed'}")


def _wire(shape: Shape) -> None:
    """One bridge; one network namespace per node with a cable to it."""
    _run("ip", "link", "add", BRIDGE, "type", "bridge")
    _run("ip", "addr", "add", f"{SUBNET}.1/24", "dev", BRIDGE)
    _run("ip", "link", "set", BRIDGE, "up")
    for node, name in enumerate(shape.names):
        namespace, cable = f"laid-{name}", f"laidv{node}"
        _run("ip", "netns", "add", namespace)
        _run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _run("ip", "link", "set", cable, "master", BRIDGE, "up")
        _run("ip", "-n", namespace, "addr", "add", f"{shape.address(node)}/24", "dev", "eth0")
        _run("ip", "-n", namespace, "link", "set", "eth0", "up")
        _run("ip", "-n", namespace, "link", "set", "lo", "up")


def _unwire(shape: Shape) -> None:
    cables = [("link", "del", f"laidv{node}") for node in range(shape.nodes)]  # would follow their namespaces, but later
    spaces = [("netns", "del", f"laid-{name}") for name in shape.names]
    for command in (*cables, *spaces, ("link", "del", BRIDGE)):
        subprocess.run(["ip", *command], capture_output=True, env=environment(shape.state))


def _idle_or_busy(shape: Shape) -> int:
    """Number of nodes that can take work or have some."""
    command = ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%T"]
    try:
        found = subprocess.run(command, env=environment(shape.state), capture_output=True, text=True, timeout=5)
    except subprocess.TimeoutExpired:
        return 0
    return sum(state in ("idle", "mixed", "allocated", "completing") for state in found.stdout.split())


def _end(pid_file: Path, name: str, number: int = signal.SIGTERM) -> None:
    """End the process of a pid file, if it still is the program of that name."""
    if not pid_file.is_file():
        return
    pid = int(pid_file.read_text())
    pid_file.unlink(missing_ok=True)
    if not _is(pid, name):
        return
    os.kill(pid, number)
    if not _until(lambda: not _is(pid, name), seconds=5):
        os.kill(pid, signal.SIGKILL)


def _is(pid: int, name: str) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # where it was our child
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return f"({name})" in stat and ") Z" not in stat


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _cmdline(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
    except OSError:
        return []


def _remove_cgroups(top: Path) -> None:
    def remove() -> bool:
        for path in sorted(top.rglob("*/"), reverse=True):
            with contextlib.suppress(OSError):
                path.rmdir()
        with contextlib.suppress(OSError):
            top.rmdir()
        return not top.exists()

    _until(remove, seconds=3)  # a group stays busy until its last process is reaped


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _run(*command: str | Path) -> None:
    environ = environment(Path())
    environ.pop("SLURM_CONF")
    found = subprocess.run([str(word) for word in command], env=environ, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if found.returncode:
        raise Unavailable(f"`{' '.join(map(str, command))}` failed: {found.stderr.strip()}")
