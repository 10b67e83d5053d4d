"""On a real SLURM: whatever happens to a job, the run ends as if nothing had, and each fault costs no more than it must.

python -m pytest -m slurm tests/launch; LAID_SLURM_MATRIX=1 runs all of it under both ways of tracking processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from launch.testcluster import cluster as testcluster
from launch.testcluster.configuration import Shape
from tests.support.recipes import write_recipe
from tests.support.slurm import Evaluated, Submitted

pytestmark = pytest.mark.slurm

STEPS = {"steps": 40, "checkpoint": {"every_steps": 10}}
ALONE = {"steps": 80, "checkpoint": {"every_steps": 10}}
TWO_NODES = ["--nodes=2"]
LAUNCHERS = ["srun", "torchrun", "deepspeed"]
ASKED = "USR1: the ranks are asked to save and stop"


def warn(run: Evaluated | Submitted) -> None:
    """What SLURM does before a time limit, without waiting for it."""
    run.cluster.slurm("scancel", "--batch", "--signal=USR1", run.job)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_nodes_of_two_ranks_by_each_launcher(cluster, launcher):
    changes = {"steps": 8, "checkpoint": {"every_steps": 5}}
    run = Submitted(cluster, launcher, [*TWO_NODES, "--ranks-per-node=2", f"--launcher={launcher}"], slow=True, **changes)
    run.wait_for_step(3)
    places = [process.environ() for process in run.ranks(run.output / "launch" / "recipe.toml")]
    node_of = {int(place.get("RANK", place["SLURM_PROCID"])): int(place["SLURM_NODEID"]) for place in places}
    assert node_of == {0: 0, 1: 0, 2: 1, 3: 1}
    warn(run)
    run.be_slow(False)
    run.wait_for_attempt(1)
    run.wait_for_status("done")
    assert "saved and stopped" in run.log()
    run.check(f"warning, 2 nodes x 2 ranks, {launcher}, {cluster.shape.proctrack}", 4, **changes)
    logs = sorted(path.name for path in (run.output / "launch" / "logs").glob("rank-*"))
    assert logs == [f"rank-{rank:04d}.log" for rank in range(4)]


def test_time_limit(cluster):
    run = Submitted(cluster, "limit", ["--time=1", "--lead-seconds=20"], slow=True, **ALONE)
    run.wait_for_attempt(1)
    run.be_slow(False)
    run.wait_for_status("done")
    assert ASKED in run.log()
    run.check("time limit", 1, **ALONE)


@pytest.mark.parametrize("launcher", LAUNCHERS if os.environ.get("LAID_SLURM_MATRIX") else LAUNCHERS[:1])
@pytest.mark.parametrize("told", [True, False], ids=["told", "not-told"])
def test_preemption(clusters, proctrack, told, launcher):
    cluster = clusters(Shape(proctrack=proctrack, preempt_signal=told))
    run = Submitted(cluster, "preempted", ["--partition=low", *TWO_NODES, f"--launcher={launcher}"], **STEPS)
    run.wait_for_step(5)
    cluster.slurm("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    run.wait_for_attempt(1)
    run.wait_for_status("done")
    assert (ASKED in run.log()) == told
    assert "saved and stopped" in run.log()
    run.check(f"preemption, {'told' if told else 'not told'}, {launcher}, {proctrack}", 2, **STEPS)


def test_one_rank_is_killed(cluster):
    run = Submitted(cluster, "killed", TWO_NODES, **STEPS)
    run.wait_for_step(15)
    run.ranks(run.output / "launch" / "recipe.toml")[1].kill()
    run.wait_for_attempt(1)
    run.wait_for_status("done")
    run.check("kill -9 of one rank", 2, **STEPS)


def test_one_rank_leaves_with_a_bad_status(cluster):
    run = Submitted(cluster, "bad-status", TWO_NODES, **STEPS)
    run.wait_for_step(15)
    (run.faults / "exit-1").touch()
    run.wait_for_attempt(1)
    run.wait_for_status("done")
    run.check("bad exit status of one rank", 2, **STEPS)


def test_a_node_loses_its_power(cluster):
    run = Submitted(cluster, "power", TWO_NODES, **STEPS)
    run.wait_for_step(15)
    testcluster.kill_node(cluster.shape, 1)
    run.wait(run.is_waiting, "the requeue")
    testcluster.start_node(cluster.shape, 1)
    run.wait_for_attempt(1)
    run.wait_for_status("done")
    run.check("power loss of a node", 2, **STEPS)


def test_the_network_is_cut(cluster):
    run = Submitted(cluster, "cut", TWO_NODES, **STEPS)
    run.wait_for_step(15)
    testcluster.cut_node(cluster.shape, 1)
    run.wait(run.is_waiting, "the requeue")
    testcluster.cut_node(cluster.shape, 1, cut=False)
    run.wait_for_attempt(1)
    run.wait_for_status("done")
    run.check("network cut", 2, **STEPS)


def test_slurmd_dies(cluster):
    changes = {"steps": 40, "checkpoint": {"every_steps": 4}}  # nine slow saves: the ranks, which are well, train on until SLURM notices
    run = Submitted(cluster, "slurmd", TWO_NODES, slow=True, **changes)
    run.wait_for_step(6)
    testcluster.kill_slurmd(cluster.shape, 1)
    run.wait(run.is_waiting, "the requeue")
    run.be_slow(False)
    testcluster.start_slurmd(cluster.shape, 1)
    run.wait_for_attempt(1)
    run.wait_for_status("done")
    run.check("death of a slurmd", 2, **changes)


def test_signals_in_the_middle_of_a_save_and_after_the_end(cluster):
    run = Submitted(cluster, "saving", TWO_NODES, slow=True, **STEPS)
    run.wait(lambda: (run.output / "checkpoints" / "step_000010").is_dir(), "the first save")
    warn(run)
    cluster.slurm("scancel", "--signal=USR1", run.job)  # to the ranks themselves, too
    assert not (run.output / "checkpoints" / "latest").exists()
    run.wait_for_attempt(1)
    (run.faults / "linger").touch()
    run.be_slow(False)
    run.wait(lambda: (run.output / "done.json").is_file(), "the last save")
    warned = run.log().count(ASKED)
    warn(run)
    cluster.slurm("scancel", "--signal=TERM", run.job)
    run.wait(lambda: run.log().count(ASKED) > warned, "the warning")
    (run.faults / "linger").unlink()
    run.wait_for_status("done")
    run.wait_for_end()
    assert "JobState=COMPLETED" in cluster.slurm("scontrol", "show", "job", run.job)
    assert run.state()["attempt"] == 1
    run.check("signals in a save and after the end", 2, **STEPS)


def test_an_array_of_three(cluster):
    changes = {"steps": 8}
    run = Submitted(cluster, "sweep", ["--sweep=seed=1", "--sweep=seed=2 optimizer.lr=2e-3", "--sweep=seed=3", "--parallel=2"], **changes)
    elements = [run.element(number) for number in range(3)]
    run.wait(lambda: min([one.observe() for one in elements]) == changes["steps"], "the end of all elements")
    run.wait_for_end()
    for one, different in zip(elements, [{"seed": 1}, {"seed": 2, "optimizer": {"lr": 2e-3}}, {"seed": 3}], strict=True):
        one.check(f"array, element {one.output.name}", 1, **changes, **different)


def test_a_chain_of_three(cluster):
    run = Submitted(cluster, "chain", ["--chain=3", "--max-restarts=0"], slow=True, **ALONE)
    for job in run.jobs[:2]:
        run.wait(lambda job=job: run.state()["job"] == job and run.state()["status"] == "running", f"job {job}")
        run.wait_for_step(run.observe() + 20)
        cluster.slurm("scancel", "--batch", "--signal=USR1", job)
    run.be_slow(False)
    run.wait_for_status("done")
    assert run.state()["job"] == run.jobs[2]
    run.check("chain of three jobs", 1, **ALONE)


def test_a_cancelled_job_stays_cancelled_until_it_is_asked_for_again(cluster):
    run = Submitted(cluster, 'it\'s "odd" 50% $x', [], slow=True, **ALONE)
    run.wait_for_step(12)
    cluster.laid_launch("cancel", run.output)
    run.wait_for_end()
    run.be_slow(False)
    assert "JobState=CANCELLED" in cluster.slurm("scontrol", "show", "job", run.job)
    again = cluster.laid_launch("requeue", run.output)
    assert again.startswith("submitted job")
    run.wait_for_status("done")
    assert json.loads(cluster.laid_launch("status", run.output, "--json"))["runs"][0]["done"]
    run.check("scancel, and submitted again by hand", 1, **ALONE)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_an_evaluation_goes_on_after_a_kill_and_a_warning(cluster, tmp_path, launcher):
    world, folder = cluster.world, cluster.world.folder / f"evaluated-{launcher}-{cluster.shape.proctrack}"
    folder.mkdir()
    words = [str(world.shards), f"m={world.student}", "--mode=generate", "--sizes=1,2,4", "--haystacks=12", "--max-new-tokens=100"]
    words += ["--tokens-per-batch=1", "--workers=0"]
    run = Evaluated(cluster, folder / "e.json", words, [*TWO_NODES, f"--launcher={launcher}"])
    run.wait(lambda: run.answered() >= 4, "the first answers")
    run.ranks(run.out)[1].kill()
    run.wait_for_attempt(1)
    before = run.answered()
    run.wait(lambda: run.answered() > before, "further answers")
    warn(run)
    run.wait_for_attempt(2)
    run.wait_for_status("done")
    assert "without a further answer 1 of 2 times" in run.log()
    assert "saved and stopped" in run.log()
    assert 4 <= before < run.answered() == 36
    alone = tmp_path / "e.json"
    cluster.slurm(sys.executable, "-m", "laid_ds.cli", "eval", *words, "--out", str(alone))
    said, expected = (path.with_suffix(".answers.jsonl").read_text().splitlines()[1:] for path in (run.out, alone))
    assert said == expected
    assert len(said) == 36
    again = cluster.laid_launch("requeue", run.output)
    assert again.startswith("submitted job")
    run.wait_for_end()
    assert "already done" in run.log()


ALONE_EACH = "{python} -m torch.distributed.run --nproc-per-node=1 --master-port=2950$SLURM_NODEID -m laid_ds.train x.toml"


@pytest.mark.parametrize(
    "start, sentence",
    [
        ("srun --ntasks-per-node=1 bash -c '" + ALONE_EACH + "'", "the SLURM step has 2 tasks, but for this process its launcher counts 1"),
        ("RANK=0 WORLD_SIZE=1 srun {python} -m laid_ds.train x.toml", "for this process WORLD_SIZE is 1: they would train apart"),
        ("WORLD_SIZE=1 srun {python} -m laid_ds.train x.toml", "WORLD_SIZE is 1, but the SLURM step has 2 tasks"),
        ("{python} -m laid_ds.train x.toml", "this process alone would train, but the SLURM job has 2 nodes"),
    ],
)
def test_trainings_apart_are_refused(cluster, start, sentence):
    log = cluster.world.folder / "refused.log"
    script = "#!/bin/bash\n" + start.format(python=sys.executable)
    options = ["--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={log}", "--open-mode=truncate"]
    job = subprocess.run(["sbatch", *options], input=script, env=cluster.environ, capture_output=True, text=True, check=True).stdout.strip()
    while cluster.slurm("squeue", "--noheader", f"--jobs={job}").strip():
        time.sleep(0.2)
    assert "JobState=FAILED" in cluster.slurm("scontrol", "show", "job", job)
    assert sentence in log.read_text()


def test_slurm_judges_a_script_without_running_it(cluster):
    recipe = write_recipe(cluster.world.run(cluster.world.folder / "judged"), cluster.world.folder / "judged.toml")
    assert "to start at" in cluster.laid_launch("slurm", recipe, "--nodes=2", "--test-only")
    words = [sys.executable, "-m", "launch.cli", "slurm", str(recipe), "--nodes=3", "--test-only"]
    found = subprocess.run(words, env=cluster.environ, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("laid-launch: sbatch: ")
    assert not (cluster.world.folder / "judged").exists()
