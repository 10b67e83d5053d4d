"""python -m launch.testcluster up | down | env | kill n1 | start n1 | cut n1 | heal n1 | slurmd n1."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from launch.testcluster import cluster
from launch.testcluster.configuration import Shape, default_state

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
Node = Annotated[str, typer.Argument(help="Name of a node: n0, n1, ...")]


@app.command()
def up(
    nodes: int = 2,
    gpus: Annotated[int, typer.Option(help="Pretended GPUs of each node.")] = 0,
    ports: Annotated[bool, typer.Option("--ports", help="No namespaces: nodes are ports of this machine.")] = False,
    proctrack: Annotated[str, typer.Option(help="cgroup or linuxproc.")] = "cgroup",
    preempt_signal: Annotated[bool, typer.Option(help="Whether preemption sends a job's warning signal.")] = True,
) -> None:
    """Start the cluster, unless it is up; prints the line that points SLURM's commands to it."""
    shape = Shape(nodes=nodes, gpus=gpus, namespaces=not ports, proctrack=proctrack, preempt_signal=preempt_signal)
    try:
        found = cluster.up(shape)
    except cluster.Unavailable as reason:
        print(f"no test cluster here: {reason}", file=sys.stderr)
        raise typer.Exit(2) from None
    print(f"export SLURM_CONF={found['SLURM_CONF']}")


@app.command()
def down() -> None:
    """End it and remove everything of it."""
    cluster.down(default_state())


def _harm(name: str, action) -> None:
    shape = cluster.recorded(default_state())
    if shape is None or name not in shape.names:
        raise typer.BadParameter(f"no node {name!r} in a cluster that is up")
    action(shape, shape.names.index(name))


@app.command()
def kill(node: Node) -> None:
    """Power loss."""
    _harm(node, cluster.kill_node)


@app.command()
def start(node: Node) -> None:
    """Power back."""
    _harm(node, cluster.start_node)


@app.command()
def cut(node: Node) -> None:
    """Network cut: packets vanish."""
    _harm(node, cluster.cut_node)


@app.command()
def heal(node: Node) -> None:
    """Network back."""
    _harm(node, lambda shape, i: cluster.cut_node(shape, i, cut=False))


@app.command()
def slurmd(node: Node) -> None:
    """Only the node's slurmd dies."""
    _harm(node, cluster.kill_slurmd)


if __name__ == "__main__":
    app()
