"""The shape of a test cluster and the configuration files that follow from it. Pure text; nothing is started here."""

from __future__ import annotations

import getpass
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

SUBNET = "10.77.0"
BRIDGE = "laidbr"
CONTROLLER_PORT, NODE_PORT = 16817, 16818
FREEZER = Path("/sys/fs/cgroup/freezer")


def default_state() -> Path:
    """Below /var/tmp: munged refuses a socket in a folder that others cannot enter, and /tmp is each node's own."""
    return Path(f"/var/tmp/laid-testcluster-{os.getuid()}")


@dataclass(frozen=True)
class Shape:
    """What a test may vary."""

    nodes: int = 2
    cpus: int = 8
    """CPUs that each node claims; they need not exist."""
    gpus: int = 0
    """Pretended GPUs of each node: SLURM hands them out, nothing computes on them."""
    namespaces: bool = True
    proctrack: str = "cgroup"
    """How slurmd tracks a job's processes. Signals reach only the tasks under `cgroup`, as on real clusters, and all under `linuxproc`."""
    preempt_signal: bool = True
    """Whether the administrator set `preempt_send_user_signal`."""
    state: Path = field(default_factory=default_state)

    @property
    def names(self) -> list[str]:
        return [f"n{i}" for i in range(self.nodes)]

    def address(self, node: int) -> str:
        return f"{SUBNET}.{11 + node}" if self.namespaces else "127.0.0.1"


def hosts(shape: Shape) -> str:
    """/etc/hosts of the nodes."""
    lines = ["127.0.0.1 localhost", f"{SUBNET}.1 {_here()}", *(f"{shape.address(i)} {name}" for i, name in enumerate(shape.names))]
    return "\n".join(lines) + "\n"


def slurm_conf(shape: Shape) -> str:
    """Timeouts are a tenth of a real cluster's, so that faults are noticed within a test."""
    state, user = shape.state, getpass.getuser()
    optional = ["SlurmctldParameters=preempt_send_user_signal"] if shape.preempt_signal else []
    optional += ["GresTypes=gpu"] if shape.gpus else []
    return "\n".join([_CONF.format(state=state, user=user, here=_here(), **_numbers(shape)), *optional, *_nodes(shape), _PARTITIONS, ""])


def cgroup_conf() -> str:
    return "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\n"


def gres_conf(shape: Shape) -> str:
    return f"Name=gpu File=/dev/tty[1-{shape.gpus}]\n"


def _here() -> str:
    return socket.gethostname().split(".")[0]


def _numbers(shape: Shape) -> dict[str, object]:
    return {
        "controller": f"{SUBNET}.1" if shape.namespaces else "127.0.0.1",
        "controller_port": CONTROLLER_PORT,
        "node_port": NODE_PORT,
        "proctrack": shape.proctrack,
    }


def _nodes(shape: Shape) -> list[str]:
    gres = f" Gres=gpu:{shape.gpus}" if shape.gpus else ""
    lines = []
    for i, name in enumerate(shape.names):
        place = f"NodeHostname={name}" if shape.namespaces else f"NodeHostname={_here()} Port={NODE_PORT + i}"
        size = f"CPUs={shape.cpus} Sockets=1 CoresPerSocket={shape.cpus} ThreadsPerCore=1 RealMemory={shape.cpus * 4000}{gres}"
        lines.append(f"NodeName={name} NodeAddr={shape.address(i)} {place} {size} State=UNKNOWN")
    return lines


# cred_expire is also the wait before a requeued job starts again (120 s by default).
_CONF = """\
ClusterName=laid
SlurmctldHost={here}({controller})
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={state}/munge/socket,cred_expire=5
StateSaveLocation={state}/controller
SlurmdSpoolDir={state}/spool/%n
SlurmctldPidFile={state}/pid/slurmctld
SlurmdPidFile={state}/pid/slurmd.%n
SlurmctldLogFile={state}/log/slurmctld.log
SlurmdLogFile={state}/log/slurmd.%n.log
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
SlurmdParameters=config_overrides
SlurmdTimeout=10
SlurmctldTimeout=30
KillWait=10
MessageTimeout=10
BatchStartTimeout=30
UnkillableStepTimeout=30
MinJobAge=600
ReturnToService=2
TCPTimeout=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,batch_sched_delay=1,sched_interval=2
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PropagateResourceLimits=NONE
MailProg=/bin/true"""

_PARTITIONS = """\
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=30 State=UP PriorityTier=5 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE DefaultTime=30 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL MaxTime=INFINITE DefaultTime=30 State=UP PriorityTier=10 PreemptMode=OFF"""
