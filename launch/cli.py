"""`laid-launch`: start runs on this machine or on a SLURM cluster, and look after them.

One sentence and status 2 when something is wrong.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from laid_ds.files import own_or_shipped
from laid_ds.runtime.stop import DONE
from laid_ds.terminal import print_json, run_app, with_version, working
from launch import options

if TYPE_CHECKING:
    from laid_ds.config import Run
    from launch.job import Job
    from launch.script import Target

app = typer.Typer(name="laid-launch", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__)
app.callback()(with_version)

Recipe = Annotated[Path, typer.Argument(help="TOML file of the run.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value; section=none removes a section.", show_default=False)]
RunFolder = Annotated[Path, typer.Argument(help="Folder of a run (its recipe's `output`), or of a sweep.", show_default=False)]
OF_A_RUN = ("launch", "run.json", "metrics.jsonl", "checkpoints")
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command(epilog="Example: laid-launch local recipes/demo.toml --ranks 2 --launcher torchrun")
def local(
    recipe: Recipe,
    overrides: Overrides = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes; default: one per GPU, or 1.", show_default=False)] = None,
    launcher: Annotated[Literal["deepspeed", "torchrun"], typer.Option(help="What starts the ranks.")] = "deepspeed",
    port: Annotated[int, typer.Option(help="Port for the ranks to meet; 0 takes a free one.")] = 0,
) -> None:
    """Run a recipe on this machine, from its latest checkpoint if it has one. Ctrl-C saves and stops."""
    from laid_ds import config

    run = config.load(recipe, overrides or [])
    print(f"{run}; first a look at its models, data and disk", flush=True)
    _check(run)
    import torch

    run.groups(ranks or torch.cuda.device_count() or 1)
    print("nothing speaks against it; the ranks start", flush=True)
    from laid_ds.runtime.local import launch

    raise typer.Exit(launch([str(recipe), *(overrides or [])], ranks, port, launcher))


@app.command(epilog="Example: laid-launch slurm recipes/demo.toml --nodes 2 --gpus-per-node 8 --time 24:00:00 --dry-run")
def slurm(
    recipe: Recipe,
    overrides: Overrides = None,
    site: options.Site = None,
    launcher: options.Launcher = None,
    nodes: options.Nodes = None,
    gpus_per_node: options.GpusPerNode = None,
    ranks_per_node: options.RanksPerNode = None,
    cpus_per_rank: options.CpusPerRank = None,
    mem: options.Mem = None,
    time: options.Time = None,
    account: options.Account = None,
    partition: options.Partition = None,
    qos: options.Qos = None,
    constraint: options.Constraint = None,
    dependency: options.Dependency = None,
    signal: options.Signal = None,
    lead_seconds: options.LeadSeconds = None,
    max_restarts: options.MaxRestarts = None,
    max_crashes: options.MaxCrashes = None,
    sweep: Annotated[list[str] | None, options.option("Overrides of one element of a job array; give it once for each.")] = None,
    parallel: Annotated[int | None, options.option("Elements of the array that run at a time.")] = None,
    chain: options.Chain = None,
    container: options.Container = None,
    image: options.Image = None,
    mount: options.Mount = None,
    python: options.Python = None,
    setup: options.Setup = None,
    extra: options.Extra = None,
    dry_run: options.DryRun = False,
    test_only: options.TestOnly = False,
    check: options.Check = True,
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
    if parallel is not None and not job.sweep:
        raise ValueError(f"--parallel {parallel} counts elements of a --sweep, and there is none: leave it out, or give --sweep")
    run = config.load(recipe, overrides or [])
    run.groups(job.nodes * job.ranks)
    elements = [(*element, f"output={run.output}/{i}") for i, element in enumerate(job.sweep)] or [()]
    runs = [config.load(recipe, [*(overrides or []), *element]) for element in elements]
    for one in runs:
        one.groups(job.nodes * job.ranks)
    target = _target(run, recipe, overrides or [], job)
    script = render(job, target)
    if dry_run:
        sys.stdout.write(script)
        return
    if test_only:
        print(commands.test_only(script))
        return
    commands.check_free(target.run)
    for one in runs if check else ():
        _check(one)
    write_record(target, recipe, config.as_tree(run), script, os.environ)
    for one in runs:
        reopen(one)
    jobs = commands.submit(target.run, job.chain)
    print(f"submitted job {', '.join(jobs)}; next: laid-launch status {shlex.quote(str(run.output))}")


@app.command(
    "eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="TASKS... NAME=FOLDER... [OPTIONS]",
    epilog="Example: laid-launch eval shards/vhs qwen=models/qwen --out runs/e/e.json --dtype bfloat16 --nodes 2 --gpus-per-node 8",
)
def evaluate(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Results file of `laid eval`; the job's folder lies beside it (.job).")],
    launcher: options.Launcher = None,
    site: options.Site = None,
    nodes: options.Nodes = None,
    gpus_per_node: options.GpusPerNode = None,
    ranks_per_node: options.RanksPerNode = None,
    cpus_per_rank: options.CpusPerRank = None,
    mem: options.Mem = None,
    time: options.Time = None,
    account: options.Account = None,
    partition: options.Partition = None,
    qos: options.Qos = None,
    constraint: options.Constraint = None,
    dependency: options.Dependency = None,
    signal: options.Signal = None,
    lead_seconds: options.LeadSeconds = None,
    max_restarts: options.MaxRestarts = None,
    max_crashes: options.MaxCrashes = None,
    chain: options.Chain = None,
    container: options.Container = None,
    image: options.Image = None,
    mount: options.Mount = None,
    python: options.Python = None,
    setup: options.Setup = None,
    extra: options.Extra = None,
    dry_run: options.DryRun = False,
    test_only: options.TestOnly = False,
    check: options.Check = True,
) -> None:
    """Submit `laid eval` as a SLURM job, which goes on with what is not answered yet after preemption, time limit and failure.

    Tasks, models and all options of `laid eval` are given as there; their number of ranks is the job's.
    """
    given = dict(locals())
    from launch import slurm as commands
    from launch.job import Job, read_job
    from launch.record import write_evaluation
    from launch.script import EVALUATION, Target, render

    job = read_job(site, {name: value for name, value in given.items() if name in Job.model_fields})
    refused = next((word for word in context.args if word.partition("=")[0] in ("--ranks", "--port")), None)
    if refused or job.sweep:
        raise ValueError(
            f"{refused or '`sweep` of the site file'} is not for an evaluation: its ranks are those of the job, one for each task"
        )
    words = (*context.args, "--out", str(out))
    folder = out.with_name(out.name.removesuffix(".json") + ".job")
    target = Target(f"eval {out.stem}", folder, Path.cwd(), words, _python(job), EVALUATION)
    script = render(job, target)
    if dry_run or test_only or not check:
        _check_words(words)
    if dry_run:
        sys.stdout.write(script)
        return
    if test_only:
        print(commands.test_only(script))
        return
    commands.check_free(target.run)
    if check:
        _check_evaluation((*words, "--ranks", str(job.nodes * job.ranks)))
    write_evaluation(target, script, os.environ)
    (target.run / DONE).unlink(missing_ok=True)
    jobs = commands.submit(target.run, job.chain)
    print(f"submitted job {', '.join(jobs)}; next: laid-launch status {shlex.quote(str(folder))}")


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
        if "answers" in row:
            print(f"{row['run']}  {row['answers']} answers{'  done' if row['done'] else ''}")
            continue
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
    return Target(run.name, run.output, Path.cwd(), tuple(overrides), _python(job))


def _python(job: Job) -> str:
    return job.python or (sys.executable if job.container == "none" else "python3")


def _check_words(words: Sequence[str]) -> None:
    """Whether `laid eval` understands its words, shards and models unseen: they may be on the cluster alone."""
    from typer.main import get_command

    from laid_ds.cli import app as laid
    from laid_ds.cli import tasks_and_models

    command = get_command(laid).commands["eval"]
    tasks_and_models(command.make_context("laid eval", list(words)).params["what"])


def _check_evaluation(words: Sequence[str]) -> None:
    """What `laid eval` refuses, with its own sentence and status, before any job waits in a queue."""
    with working("looking at tasks and models"):
        found = subprocess.run([sys.executable, "-m", "laid_ds.cli", "eval", *words, "--dry-run"], stdout=subprocess.DEVNULL)
    if found.returncode:
        raise typer.Exit(found.returncode)


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
    from launch.slurm import runs_of

    if not run.is_dir():
        raise ValueError(f"no run folder at {run}")
    if not any((folder / name).exists() for folder in (run, *runs_of(run)) for name in OF_A_RUN):
        raise ValueError(f"{run} is no folder of a run: it holds none of {', '.join(OF_A_RUN)}; give its recipe's `output`")


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    run_app(app, "laid-launch", arguments)


if __name__ == "__main__":
    main()
