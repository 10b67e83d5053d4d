"""Runs on a test cluster: submit with laid-launch, watch what they write, harm them, and compare with an uninterrupted run."""

from __future__ import annotations

import copy
import itertools
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from laid_ds.config import Run
from launch import cli
from launch.testcluster.configuration import Shape
from tests.support.processes import HANG_SECONDS, run_ranks
from tests.support.recipes import write_recipe
from tests.support.world import World

ROOT = Path(__file__).resolve().parents[2]
EXACT = ("step", "loss", "sft", "kl", "align", "match", "gradient_norm", "lr", "keys")
NUMBERS = itertools.count()


def said(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "said").read_text().splitlines()]


def ask(capsys, *words) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as status:
        cli.main([str(word) for word in words])
    found = capsys.readouterr()
    assert "Traceback" not in found.err
    return status.value.code, found.out, found.err


@dataclass
class Cluster:
    """A test cluster that is up, a world on its shared disk, and what was seen on it."""

    shape: Shape
    environ: dict[str, str]
    world: World
    references: dict[str, list]
    losses: list[dict]

    def slurm(self, *words: str) -> str:
        found = subprocess.run([str(word) for word in words], env=self.environ, capture_output=True, text=True, timeout=HANG_SECONDS)
        assert found.returncode == 0, found.stderr
        return found.stdout

    def laid_launch(self, *words: str) -> str:
        return self.slurm(sys.executable, "-m", "launch.cli", *words)

    def reference(self, ranks: int, **changes) -> list:
        """The lines of an uninterrupted run, made once without SLURM."""
        changes.pop("checkpoint", None)  # when a run is saved changes no number
        key = json.dumps([ranks, changes])
        if key not in self.references:
            run = self.world.run(self.world.folder / f"reference-{len(self.references)}", **changes)
            run_ranks(ranks, train_from_recipe, write_recipe(run, run.output.with_suffix(".toml")))
            self.references[key] = lines(run.output)
        return self.references[key]


def train_from_recipe(recipe: Path) -> None:
    from laid_ds.train import main

    assert main([str(recipe)]) == 0


def lines(output: Path) -> list:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: record[name] for name in EXACT} for record in records]


def setup_lines(*more: str) -> list[str]:
    """So that the ranks of a job run this code."""
    lines = (f"export PYTHONPATH={ROOT / 'tests/launch/faults'}:{ROOT}", *more, "export OMP_NUM_THREADS=1")
    return [f"--setup={line}" for line in lines]


class Followed:
    """What a submitted job writes into its folder."""

    cluster: Cluster
    output: Path
    module: str

    @property
    def jobs(self) -> list[str]:
        return json.loads((self.output / "launch" / "jobs.json").read_text())

    @property
    def job(self) -> str:
        return self.jobs[0]

    def observe(self) -> int:
        return 0

    def is_waiting(self) -> bool:
        return "PENDING" in self.cluster.slurm("squeue", "--noheader", "--format=%T", f"--jobs={self.job}")

    def state(self) -> dict:
        return json.loads((self.output / "launch" / "state.json").read_text())

    def has_failed(self) -> bool:
        return (self.output / "launch" / "state.json").is_file() and self.state()["status"] == "failed"

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted((self.output / "launch" / "logs").glob("job*.log")))

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = HANG_SECONDS) -> None:
        end = time.monotonic() + seconds
        while not condition():
            self.observe()
            assert not self.has_failed() or condition(), f"the job failed instead of {what}\n{self.everything()}"
            assert time.monotonic() < end, f"waited {seconds} s for {what}\n{self.everything()}"
            time.sleep(0.1)
        self.observe()

    def wait_for_status(self, *status: str) -> None:
        self.wait(lambda: self.state()["status"] in status, f"status {status}")

    def wait_for_attempt(self, attempt: int) -> None:
        self.wait(lambda: self.state()["attempt"] >= attempt, f"attempt {attempt}")

    def wait_for_end(self) -> None:
        """Until SLURM, too, has ended the job."""
        self.wait(lambda: not self.cluster.slurm("squeue", "--noheader", f"--jobs={self.job}").strip(), "the end of the job")

    def everything(self) -> str:
        """For a failing test."""
        files = sorted((self.output / "launch" / "logs").glob("*.log"))
        texts = [f"--- {path.name}\n{path.read_text()[-3000:]}" for path in files]
        return "\n".join([self.cluster.slurm("scontrol", "show", "job", self.job), *texts])

    def ranks(self, named: Path) -> list[psutil.Process]:
        """The processes of the program whose command names a file."""
        found = [p for p in psutil.process_iter(["cmdline"]) if str(named) in (p.info["cmdline"] or ())]
        return [p for p in found if p.info["cmdline"][2:4] == ["-m", self.module]]


class Evaluated(Followed):
    """One submitted evaluation, with results at `out`."""

    module = "laid_ds.cli"

    def __init__(self, cluster: Cluster, out: Path, words: list[str], options: list[str]) -> None:
        self.cluster, self.out, self.output = cluster, out, out.with_suffix(".job")
        cluster.laid_launch("eval", *words, "--out", str(out), "--mem=2000", "--time=30", *setup_lines(), *options)

    def answered(self) -> int:
        return json.loads(self.cluster.laid_launch("status", self.output, "--json"))["runs"][0]["answers"]


class Submitted(Followed):
    """One submitted run, and the steps that it was seen to do: those done twice are work that was lost."""

    module = "laid_ds.train"

    def __init__(self, cluster: Cluster, name: str, options: list[str], slow: bool = False, **changes) -> None:
        self.cluster = cluster
        name = f"{name}-{next(NUMBERS)}"
        self.run: Run = cluster.world.run(cluster.world.folder / name, **changes)
        self.output = self.run.output
        recipe = write_recipe(self.run, self.output.with_suffix(".toml"))
        self.faults = cluster.world.folder / f"faults-{name}"
        self.faults.mkdir()
        self.be_slow(slow)
        lines = setup_lines(f"export LAID_TEST_FAULTS={shlex.quote(str(self.faults))}")
        cluster.laid_launch("slurm", str(recipe), "--no-check", "--mem=2000", "--time=30", *lines, *options)
        self.seen: dict[tuple[int, float], float] = {}

    def element(self, number: int) -> Submitted:
        """One run of a sweep."""
        one = copy.copy(self)
        one.output, one.seen = self.output / str(number), {}
        return one

    def be_slow(self, slow: bool) -> None:
        """From now on saves take seconds, or no longer."""
        (self.faults / "slow").touch() if slow else (self.faults / "slow").unlink(missing_ok=True)

    def observe(self) -> int:
        """Note the steps in metrics.jsonl, each by its number and the seconds it took; returns the last."""
        path = self.output / "metrics.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.is_file() else []
        for record in records:
            self.seen.setdefault((record["step"], record["seconds"]), time.time())
        return records[-1]["step"] if records else 0

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: self.observe() >= step, f"step {step}")

    def lost(self) -> dict[str, float]:
        """Steps that were done again and their seconds, and the longest pause between two steps."""
        kept = [json.loads(line)["seconds"] for line in (self.output / "metrics.jsonl").read_text().splitlines()]
        times = sorted(self.seen.values())
        return {
            "steps": len(self.seen) - len(kept),
            "seconds": round(sum(seconds for _, seconds in self.seen) - sum(kept), 1),
            "pause": round(max((b - a for a, b in itertools.pairwise(times)), default=0.0), 1),
        }

    def check(self, title: str, ranks: int, **changes) -> None:
        """It is done, and its numbers and the order of its samples are those of an uninterrupted run."""
        assert (self.output / "done.json").is_file(), self.everything()
        assert lines(self.output) == self.cluster.reference(ranks, **changes)
        if self.seen:
            self.cluster.losses.append({"fault": title, **self.lost()})
