"""The job script: golden texts, valid bash, and words that arrive as they were written.

LAID_WRITE_GOLDEN=1 writes the golden texts anew; read the difference before it is committed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from launch import cli
from launch.job import Job, read_job
from launch.script import EVALUATION, Target, render

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).resolve().parents[2]
PLAIN = Target("demo laid", Path("runs/demo/laid"), Path("/project"), (), "/venv/bin/python")
ODD = Target(
    name="a 'b' \"c\" #1",
    output=Path('runs/50% o\'clock $HOME `x` "q" \\'),
    folder=Path("/project/a b"),
    words=('name=it\'s "so" $x `y` \\', "data.images=[1, 4]"),
    python="/ve nv/python",
)
ASKED = Target(
    name="eval e",
    output=Path("/scratch/e/e.job"),
    folder=Path("/project"),
    words=("shards/vhs", "qwen=models/it's", "--out", "/scratch/e/e.json"),
    python="/venv/bin/python",
    program=EVALUATION,
)
EVERYTHING = Job(
    launcher="torchrun",
    nodes=4,
    gpus_per_node=8,
    cpus_per_rank=12,
    mem="900G",
    time="2-00:00:00",
    account="vision",
    partition="gpu",
    qos="high",
    constraint="a100&nvlink",
    dependency="afterok:12",
    signal="USR2",
    lead_seconds=600,
    max_restarts=9,
    max_crashes=0,
    sweep=(("optimizer.lr=1e-5",), ("optimizer.lr=3e-5", "losses.kl=0")),
    parallel=1,
    container="apptainer",
    image="laid.sif",
    mount=("/data:/data",),
    setup=("module load cuda", "export NCCL_DEBUG=INFO"),
    extra=("--exclude=n3", "--comment=x y"),
)
CASES = {
    "srun": (Job(nodes=2, gpus_per_node=8), PLAIN),
    "torchrun": (Job(launcher="torchrun", nodes=2, gpus_per_node=8), PLAIN),
    "deepspeed": (Job(launcher="deepspeed", nodes=2, gpus_per_node=8), PLAIN),
    "pyxis": (Job(container="pyxis", image="me/laid:1", mount=("/data:/data",), chain=3, max_restarts=0), PLAIN),
    "everything": (EVERYTHING, PLAIN),
    "evaluation": (Job(nodes=2, gpus_per_node=8), ASKED),
    "evaluation-torchrun": (Job(launcher="torchrun", container="apptainer", image="laid.sif"), ASKED),
    "odd-names": (Job(sweep=(("x=it's",), ("y=$z",))), ODD),
}
scripts = pytest.mark.parametrize("case", CASES)


@scripts
def test_scripts_equal_their_golden_texts(case):
    path, text = GOLDEN / f"{case}.sh", render(*CASES[case])
    if os.environ.get("LAID_WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@scripts
def test_scripts_are_valid_bash_and_clean(case):
    text = render(*CASES[case])
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed (apt-get install shellcheck)")
    harmless = "SC2089,SC2090"  # a path that holds quotes is always used within quotes
    found = subprocess.run(["shellcheck", "--shell=bash", f"--exclude={harmless}", "-"], input=text, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_every_file_of_bash_is_clean_by_itself():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed (apt-get install shellcheck)")
    subprocess.run(["shellcheck", *map(str, ROOT.glob("launch/**/*.sh"))], check=True)


FAKE = """#!/bin/bash
case $(basename "$0") in
  srun) "$PYTHON" -c 'import json, os, sys; json.dump(sys.argv[1:], open(os.environ["SAID"], "w"))' "$@"; echo '{}' > "$RUN/done.json" ;;
  scontrol) echo n0; echo n1 ;;
esac
"""


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "deepspeed"])
def test_odd_names_and_overrides_arrive_as_they_were_written(tmp_path, launcher):
    target = Target(ODD.name, ODD.output, tmp_path, ODD.words, ODD.python)
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name in ("srun", "scontrol"):
        (bin_folder / name).write_text(FAKE)
        (bin_folder / name).chmod(0o755)
    known = {
        "SLURM_JOB_ID": "5",
        "SLURM_JOB_NODELIST": "n[0-1]",
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "PYTHON": shutil.which("python3"),
    }
    environ = known | {"SAID": str(tmp_path / "said.json"), "RUN": str(target.run)}
    found = subprocess.run(["bash"], input=render(Job(launcher=launcher, nodes=2), target), env=environ, text=True, capture_output=True)
    assert found.returncode == 0, found.stderr
    assert json.loads((target.launch / "state.json").read_text())["status"] == "done"
    said = json.loads((tmp_path / "said.json").read_text())
    assert said[-3:] == [str(target.launch / "recipe.toml"), *ODD.words]
    if launcher == "srun":
        assert ODD.python in said


@pytest.mark.parametrize(
    "change",
    [
        {"name": "two\nlines"},
        {"words": ("x=1\ny=2",)},
        {"output": Path("runs/a\tb")},
        {"words": (" x=1",)},
        {"words": ('data.shards=["https://me:hunter22@host/x"]',)},
    ],
)
def test_what_a_script_cannot_hold_is_refused(change):
    with pytest.raises(ValueError):
        render(Job(), Target(**(vars(PLAIN) | change)))


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"launcher": "mpirun"}, "launcher: Input should be 'srun', 'torchrun' or 'deepspeed'"),
        ({"nodes": 0}, "nodes: Input should be greater than or equal to 1"),
        ({"nodse": 2}, "unknown key 'nodse' in the site file; did you mean 'nodes'"),
        ({"image": "x.sif"}, "`container` and `image` go together"),
        ({"setup": ["export HF_TOKEN=hunter2"]}, "HF_TOKEN would be written into the job script"),
        ({"extra": ["exclude=n3"]}, "is not an option of sbatch"),
        ({"partition": "a\nb"}, "must be one line"),
    ],
)
def test_wrong_options_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_job(None, options)


@pytest.mark.parametrize("key, near", [("acount", "'account'"), ('"gpus-per-node"', "'gpus_per_node'"), ("zzz", None)])
def test_a_mistyped_key_of_a_site_file_is_answered_with_the_one_that_was_meant(tmp_path, key, near):
    (tmp_path / "site.toml").write_text(f'{key} = "vision"\n')
    with pytest.raises(ValueError, match=r"unknown key .* in the site file; ") as error:
        read_job(tmp_path / "site.toml", {})
    assert (f"did you mean {near}?" in str(error.value)) if near else ("did you mean" not in str(error.value))


def test_a_site_file_gives_what_is_not_given(tmp_path):
    site = tmp_path / "site.toml"
    site.write_text('account = "vision"\nnodes = 4\nsetup = ["module load cuda"]\n')
    job = read_job(site, {"nodes": 2, "qos": None})
    assert (job.account, job.nodes, job.setup, job.qos) == ("vision", 2, ("module load cuda",), None)


def test_a_dry_run_prints_the_script_and_nothing_else(capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as status:
        cli.main(["slurm", "recipes/demo.toml", "--nodes", "2", "--dry-run"])
    assert status.value.code == 0
    said = capfd.readouterr()
    assert said.err == ""
    assert said.out.startswith("#!/bin/bash\n#SBATCH --job-name=")
    assert "#SBATCH --nodes=2\n" in said.out
    subprocess.run(["bash", "-n"], input=said.out, text=True, check=True)
