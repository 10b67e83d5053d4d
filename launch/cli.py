"""`laid-launch`: start runs on this machine or on a SLURM cluster, and look after them.

One sentence and status 2 when something is wrong.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laid_ds.files import own_or_shipped
from laid_ds.terminal import print_json, run_app, with_version, working

if TYPE_CHECKING:
    from laid_ds.config import Run
    from launch.job import Job
    from launch.script import Target

app = typer.Typer(name="laid-launch", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__)
app.callback()(with_version)

Recipe = Annotated[Path, typer.Argument(help="TOML file of the run.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value; section=none removes a section.", show_default=False)]
RunFolder = Annotated[Path, typer.Argument(help="Folder of a run (its recipe's `output`), or of a sweep.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _option(text: str) -> Any:
    return typer.Option(help=text, show_default=False)


@app.command(epilog="Example: laid-launch local recipes/demo.toml --ranks 2 --launcher torchrun")
def local(
    recipe: Recipe,
    overrides: Overrides = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes; default: one per GPU, or 1.", show_default=False)] = None,
    launcher: Annotated[str, typer.Option(help="deepspeed or torchrun.")] = "deepspeed",
    port: Annotated[int, typer.Option(help="Port for the ranks to meet; 0 takes a free one.")] = 0,
) -> None:
    """Run a recipe on this machine, from its latest checkpoint if it has one. Ctrl-C saves and stops."""
    from laid_ds import config

    run = config.load(recipe, overrides or [])
    print(f"{run.name}: {run.steps} steps into {run.output}; first a look at its models, data and disk", flush=True)
    _check(run)
    print("nothing speaks against it; the ranks start", flush=True)
    from laid_ds.runtime.local import launch

    raise typer.Exit(launch([str(recipe), *(overrides or [])], ranks, port, launcher))


@app.command(epilog="Example: laid-launch slurm recipes/demo.toml --nodes 2 --gpus-per-node 8 --time 24:00:00 --dry-run")
def slurm(
    recipe: Recipe,
    overrides: Overrides = None,
    site: Annotated[Path | None, _option("TOML file with this cluster's values of the options below (names with _).")] = None,
    launcher: Annotated[str | None, _option("srun (default: one task per rank), torchrun or deepspeed (one task per node).")] = None,
    nodes: Annotated[int | None, _option("Nodes; default 1.")] = None,
    gpus_per_node: Annotated[int | None, _option("GPUs of each node, one rank each.")] = None,
    ranks_per_node: Annotated[int | None, _option("Ranks of each node, where it has no GPUs.")] = None,
    cpus_per_rank: Annotated[int | None, _option("CPUs of each rank.")] = None,
    mem: Annotated[str | None, _option("Memory of each node, such as 200G.")] = None,
    time: Annotated[str | None, _option("Time limit, such as 24:00:00.")] = None,
    account: Annotated[str | None, _option("Account.")] = None,
    partition: Annotated[str | None, _option("Partition.")] = None,
    qos: Annotated[str | None, _option("Quality of service.")] = None,
    constraint: Annotated[str | None, _option("Features that nodes must have.")] = None,
    dependency: Annotated[str | None, _option("singleton, afterok:123, ...")] = None,
    signal: Annotated[str | None, _option("Warning signal: USR1 (default) or USR2.")] = None,
    lead_seconds: Annotated[int | None, _option("Seconds from the warning to the time limit; default 180.")] = None,
    max_restarts: Annotated[int | None, _option("Restarts in all; default 50.")] = None,
    max_crashes: Annotated[int | None, _option("Restarts in a row after failures, without a newer checkpoint; default 2.")] = None,
    sweep: Annotated[list[str] | None, _option("Overrides of one element of a job array; give it once for each.")] = None,
    parallel: Annotated[int | None, _option("Elements of the array that run at a time.")] = None,
    chain: Annotated[int | None, _option("Submit so many times, each going on from the last; for clusters that never requeue.")] = None,
    container: Annotated[str | None, _option("none, pyxis or apptainer.")] = None,
    image: Annotated[str | None, _option("Image of the container.")] = None,
    mount: Annotated[list[str] | None, _option("SOURCE:TARGET to mount beside the run and this folder.")] = None,
    python: Annotated[str | None, _option("Interpreter of the ranks; default: this one, or the container's python3.")] = None,
    setup: Annotated[list[str] | None, _option("Line of bash before the ranks start; may be given more than once.")] = None,
    extra: Annotated[list[str] | None, _option("Further option of sbatch, such as --extra=--exclude=n3.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script and do nothing.")] = False,
    test_only: Annotated[bool, typer.Option("--test-only", help="Ask SLURM whether it would take the script.")] = False,
    check: Annotated[bool, typer.Option(help="Look at shards and models before submitting.")] = True,
) -> None:
    """Submit a recipe as a SLURM job that saves when warned and goes on after preemption, time limit and failure."""
    given = dict(locals())
    from laid_ds import config
    from laid_ds.run.folder import reopen
    from launch import slurm as commands
    from launch.job import Job, read_job
    from launch.record import write_record
    from launch.script import render

    given["sweep"] = [_words(text) for text in sweep] if sweep else None
    recipe = own_or_shipped(recipe)
    job = read_job(site, {name: value for name, value in given.items() if name in Job.model_fields})
    run = config.load(recipe, overrides or [])
    target = _target(run, recipe, overrides or [], job)
    script = render(job, target)
    if dry_run:
        sys.stdout.write(script)
        return
    if test_only:
        print(commands.test_only(script))
        return
    elements = [(*element, f"output={run.output}/{i}") for i, element in enumerate(job.sweep)] or [()]
    runs = [config.load(recipe, [*(overrides or []), *element]) for element in elements]
    commands.check_free(target.run)
    for one in runs if check else ():
        _check(one)
    write_record(target, recipe, config.as_tree(run), script, os.environ)
    for one in runs:
        reopen(one)
    jobs = commands.submit(target.run, job.chain)
    print(f"submitted job {', '.join(jobs)}; next: laid-launch status {shlex.quote(str(run.output))}")


@app.command(epilog="Example: laid-launch status runs/demo/laid")
def status(run: RunFolder, as_json: AsJson = False) -> None:
    """Tell how a run's jobs stand and how far it came."""
    from launch import slurm as commands

    _must_exist(run)
    jobs, runs = commands.find(run), [commands.progress(path) for path in commands.runs_of(run)]
    if as_json:
        print_json({"jobs": jobs, "runs": runs})
        return
    for row in jobs:
        details = "  ".join(f"{name} {row[name]}" for name in ("nodes", "reason", "elapsed", "left", "exit", "restarts") if row.get(name))
        print(f"job {row['job']}  {row['state']}  {details}  ({row['source']})")
    for row in runs:
        print(f"{row['run']}  step {row['step']}  {row['checkpoint'] or 'no checkpoint'}{'  done' if row['done'] else ''}")


@app.command(epilog="Example: laid-launch cancel runs/demo/laid")
def cancel(run: RunFolder) -> None:
    """End a run's jobs. What is not saved within SLURM's KillWait is lost; the run can go on later."""
    from launch import slurm as commands

    _must_exist(run)
    print(f"cancelled job {', '.join(commands.cancel(run))}")


@app.command(epilog="Example: laid-launch requeue runs/demo/laid")
def requeue(run: RunFolder, now: Annotated[bool, typer.Option("--now", help="Do not save first.")] = False) -> None:
    """Start a run's job again: a running one saves first; one that ended is submitted as it was."""
    from launch import slurm as commands

    _must_exist(run)
    print(commands.requeue(run, now))


@app.command(epilog="Example: laid-launch logs runs/demo/laid -f")
def logs(
    run: RunFolder,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as the files grow.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Last lines of each file.")] = 20,
    rank: Annotated[int, typer.Option(min=0, help="Whose log, beside the job's own.")] = 0,
    every: Annotated[bool, typer.Option("--all", help="The logs of all ranks.")] = False,
) -> None:
    """Show the job's log and a rank's."""
    _must_exist(run)
    folder = run / "launch" / "logs"
    files = sorted(folder.glob("job*.log")) + sorted(folder.glob("rank-*.log" if every else f"rank-{rank:04d}.log"))
    if not files:
        raise ValueError(f"no log in {folder} yet")
    sys.stdout.flush()
    os.execvp("tail", ["tail", f"--lines={lines}", *(["-F"] if follow else []), "--", *map(str, files)])


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"--sweep {text!r}: {str(error).lower()}") from None


def _target(run: Run, recipe: Path, overrides: list[str], job: Job) -> Target:
    from laid_ds.files import read_text
    from launch.script import Target
    from launch.secrets import forms_of_secrets

    if not recipe.is_file():
        raise ValueError(f"no recipe at {recipe}")
    found = forms_of_secrets(read_text(recipe))
    if found:
        raise ValueError(f"{recipe} holds {found[0]}, which would be copied into files; give it by an environment variable or a file")
    python = job.python or (sys.executable if job.container == "none" else "python3")
    return Target(run.name, run.output, Path.cwd(), tuple(overrides), python)


def _check(run: Run) -> None:
    """What `laid train` refuses, too, before any process starts."""
    with working("looking at models, data and disk"):  # the imports among it
        from laid_ds.run.check import check
        from laid_ds.run.folder import check_output
        from laid_ds.runtime import lock

        check_output(run)
        lock.wait_until_free(run.output)
        check(run)


def _must_exist(run: Path) -> None:
    if not run.is_dir():
        raise ValueError(f"no run folder at {run}")


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    run_app(app, "laid-launch", arguments)


if __name__ == "__main__":
    main()
