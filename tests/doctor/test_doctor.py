"""What is wrong on a machine is a line that names it and says what to do; the status says whether there is one."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import torch

from laid_ds.doctor import attention, examine, kernels, line, machine, ranks, software, step
from laid_ds.doctor.line import ABSENT, OK, SLOW, WRONG, Line
from laid_ds.kernels.attention_matching import fused
from laid_ds.models import backends
from laid_ds.runtime import distributed
from tests.support.processes import HANG_SECONDS, free_port, run_ranks, wait_until

CPU = torch.device("cpu")
DOCTOR = [sys.executable, "-m", "laid_ds.cli", "doctor"]
SOUND = (
    "attention, CPU",
    "attention, SDPA",
    "matching, chunked",
    "profile, chunked",
    "a LAid step",
    "matrix products",
    "messages",
    "ranks",
)


def examined(*words: str, code: str = "", **environment: str) -> tuple[int, dict]:
    """(status, report) of a whole examination in a process of its own; `code` breaks something first."""
    command = [sys.executable, "-c", f"import sys\n{code}\nfrom laid_ds.cli import main\nmain(['doctor', '--json', *sys.argv[1:]])", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_on_a_cpu_machine_every_line_of_the_cpu_is_measured(tmp_path):
    status, report = examined("--run", str(tmp_path))
    assert status == report["status"] == 0, report
    lines = {found["check"]: found for found in report["lines"]}
    for sound in SOUND:
        found = [lines[check] for check in lines if check.startswith(sound)]
        assert found
        assert all(one["verdict"] in (OK, SLOW) and one["numbers"] for one in found), found
    for kernel in ("attention", "matching"):
        for tokens in (512, 1024, 2048):
            assert lines[f"{kernel}, {tokens} tokens"]["numbers"]["share_of_products"] > 0
    assert not list(tmp_path.iterdir())


BREAK = """
from laid_ds.kernels.attention_matching import chunked
real = chunked.attention_matching
def wrong(problem, query, key, mixing, chunk_size=None):
    if problem.teacher_alone is not None:
        key.register_hook(lambda gradient: gradient * 1.2)
    return real(problem, query, key, mixing, chunk_size)
chunked.attention_matching = wrong
"""


def test_a_kernel_made_wrong_is_named_by_the_whole_examination(tmp_path):
    status, report = examined("--run", str(tmp_path), code=BREAK)
    assert status == report["status"] == 1
    wrong = [found for found in report["lines"] if found["verdict"] == WRONG]
    assert [found["check"] for found in wrong] == [f"matching, chunked, narrow student, {kind}" for kind in ("float32", "bfloat16")]
    assert all("(d student_key)" in found["found"] and found["advice"] for found in wrong)


def test_two_ranks_are_examined_together(tmp_path):
    status, report = examined("--run", str(tmp_path), "--ranks", "2", OMP_NUM_THREADS="1")
    lines = {found["check"]: found for found in report["lines"]}
    assert status == 0, report
    assert lines["ranks"]["found"] == "2 of 2 met"
    assert lines["messages"]["numbers"]["ranks"] == 2
    assert lines["a LAid step under ZeRO-3, float32"]["verdict"] == OK


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_waits_in_vain_says_so(tmp_path, rank):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "laid_ds.doctor", "--wait", "2", "--run", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | place)
    assert done.returncode == 1, done.stderr
    (said,) = (text for text in (done.stdout if rank == "0" else done.stderr).splitlines() if text.startswith("wrong"))
    assert "ranks" in said
    assert "the 2 ranks cannot meet at 127.0.0.1" in said
    assert "were fewer ranks started?" in said
    assert "Traceback" not in done.stdout + done.stderr


def test_ranks_that_slurm_counts_otherwise_are_refused(capsys, monkeypatch):
    for name, value in {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert examine.main([]) == 2
    assert "they would train apart" in capsys.readouterr().err


@pytest.mark.parametrize("command", [DOCTOR, [*DOCTOR, "--ranks", "2"]], ids=["alone", "two ranks"])
def test_ctrl_c_leaves_nothing_behind(tmp_path, command):
    words = [*command, "--run", str(tmp_path)]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    wait_until(lambda: "messages" in (tmp_path / "log").read_text() or process.poll() is not None, "the first lines")
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(HANG_SECONDS) == 130, (tmp_path / "log").read_text()
    assert not psutil.wait_procs(children, timeout=HANG_SECONDS)[1]
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_missing_package_is_a_line_and_nothing_is_imported_for_it(monkeypatch, capfd):
    real = software.version
    monkeypatch.setattr(software, "version", lambda name: None if name in ("deepspeed", "triton") else real(name))
    assert examine.main([]) == 1
    said = capfd.readouterr().out.splitlines()
    assert [text.split()[:2] for text in said if text.startswith("wrong")] == [["wrong", "deepspeed"]]
    assert any("pip install 'deepspeed<0.20,>=0.19.8'" in text for text in said)
    assert any(text.startswith("absent triton") for text in said)
    assert any("cannot be looked at without deepspeed" in text for text in said)


def test_a_version_outside_its_range_is_named_with_the_range(monkeypatch):
    real = software.version
    monkeypatch.setattr(software, "version", lambda name: "5.99.0" if name == "transformers" else real(name))
    (wrong,) = (found for found in software.software() if found.verdict == WRONG)
    assert (wrong.check, wrong.advice) == ("transformers", "pip install 'transformers<5.24,>=5.23'")
    assert wrong.found == "5.99.0, tested is <5.24,>=5.23"


def test_ranges_are_those_of_the_project_and_of_an_installed_package_alike(monkeypatch):
    """Both ways to know them give the same, so that neither is written twice."""
    in_clone, extras = software.declared()
    texts = [str(one) for one in in_clone] + [f'{one}; extra == "{name}"' for name, of in extras.items() for one in of if not one.marker]
    texts += [f'{one} and extra == "{name}"' for name, of in extras.items() for one in of if one.marker] + ['pytest>=9; extra == "dev"']
    monkeypatch.setattr(software.metadata, "requires", lambda name: texts)
    monkeypatch.setattr(software.metadata, "metadata", lambda name: namedtuple("M", "get_all")(lambda key: [*extras, "dev"]))
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    installed, of_installed = software.declared()

    def names(requirements):
        return [(one.name, str(one.specifier)) for one in requirements]

    assert names(installed) == names(in_clone)
    assert {name: names(of) for name, of in of_installed.items()} == {name: names(of) for name, of in extras.items()}


def test_a_full_disk_is_a_line(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for found in (machine.disk(tmp_path / "runs"), machine.shared_memory(tmp_path)):
        assert found.verdict == WRONG
        assert found.found.startswith("a trial file (67.1 MB) cannot be written to")
        assert " is full, " in found.found
        assert found.advice
    assert not list(tmp_path.iterdir())


def test_a_disk_that_may_not_be_written_to_is_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EACCES, "Permission denied", str(tmp_path))))
    found = machine.disk(tmp_path)
    assert (found.verdict, found.found) == (WRONG, f"{tmp_path}: Permission denied")


def test_dockers_small_shared_memory_is_wrong(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage(64 << 20, 0, 64 << 20))
    found = machine.shared_memory(tmp_path)
    assert (found.verdict, found.advice) == (WRONG, "in docker: --shm-size=16g (or --ipc=host)")
    assert machine.shared_memory(tmp_path / "none").verdict == WRONG


def test_a_stale_lock_is_named_and_one_of_a_running_build_is_not(tmp_path, monkeypatch):
    folder = tmp_path / "py311_cpu" / "async_io"
    folder.mkdir(parents=True)
    assert machine.locks(tmp_path).verdict == OK
    (folder / "lock").touch()
    found = machine.locks(tmp_path)
    assert found.verdict == WRONG
    assert found.advice == f"rm {folder / 'lock'}"
    with subprocess.Popen(["sleep", "600"], cwd=folder) as build:
        assert machine.locks(tmp_path).verdict == SLOW
        build.kill()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert machine.locks(machine.build_folder()).verdict == WRONG


@pytest.mark.parametrize("state, verdict", [("built", OK), ("could be", ABSENT), ("could not", ABSENT)])
def test_what_would_be_compiled_is_said(monkeypatch, state, verdict):
    from laid_ds.runtime import engine

    monkeypatch.setattr(engine, "compiled_on_use", lambda: {"async_io": state})
    found = machine.operations()
    assert found.verdict == verdict
    assert bool(found.advice) == (state != "built")


def stand_in_smi(folder: Path, text: str, status: int = 0) -> str:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\necho '{text}'\nexit {status}\n")
    (folder / "nvidia-smi").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_a_torch_for_cpus_beside_a_gpu_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", stand_in_smi(tmp_path, "580.65.06"))
    found = {one.check: one for one in machine.cards()}
    assert found["driver"].numbers == {"driver": "580.65.06", "gpus": 1}
    assert found["torch's build"].verdict == WRONG
    assert "README" in found["torch's build"].advice


def test_a_broken_driver_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", stand_in_smi(tmp_path, "NVIDIA-SMI has failed because it could not communicate", 9))
    (driver, *_) = machine.cards()
    assert driver.verdict == WRONG
    assert "could not communicate" in driver.found


@pytest.mark.parametrize(
    "capability, free, verdict", [((9, 0), 0.99, OK), ((7, 5), 0.99, WRONG), ((8, 0), 0.5, SLOW)], ids=["free", "old", "shared"]
)
def test_cards_are_named(monkeypatch, capability, free, verdict):
    properties = namedtuple("properties", "name major minor")("NVIDIA H100", *capability)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (int(free * 2**36), 2**36))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = {one.check: one for one in machine.cards()}
    assert found["GPU 0"].verdict == verdict
    assert "NVIDIA H100" in found["GPU 0"].found


def test_a_wrong_branch_of_attention_is_named(monkeypatch):
    real = backends._flash_cpu

    def wrong(query, key, value, mask, scale, causal=True):
        out, lse = real(query, key, value, mask, scale, causal)
        return out, lse + 0.5 * (query.shape[2] == 129)  # the last of the packed samples

    monkeypatch.setattr(backends, "_flash_cpu", wrong)
    found = [one for one in attention.attention(CPU) if one.verdict == WRONG]
    assert [one.check for one in found] == ["attention, CPU, float32", "attention, CPU, bfloat16"]
    assert all("(log-sum-exp, packed" in one.found or "(log-sum-exp, shared" in one.found for one in found)


def test_a_package_of_attention_that_does_not_load_is_a_line(monkeypatch):
    """As flash-attn built for another torch; the GPU is a name here, the work is on the CPU."""

    def broken(*_):
        raise ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEa")

    found = line.looked("attention", lambda: attention.compared("attention", lambda *a, **k: broken(), CPU, torch.bfloat16))
    assert found.verdict == WRONG
    assert "undefined symbol" in found.found


@pytest.mark.parametrize("case", ["one head", "narrow student"])
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET=1 is not set")
def test_a_wrong_fused_kernel_is_named(monkeypatch, case):
    real = fused.attention_matching

    def wrong(problem, query, key, mixing, chunk_size=None):
        broken = (problem.teacher_heads is not None and problem.teacher_heads.shape[1] == 1) == (case == "one head")
        broken &= case == "one head" or problem.teacher_alone is not None
        return real(problem, query * 1.1 if broken else query, key, mixing, chunk_size)

    monkeypatch.setattr(fused, "attention_matching", wrong)
    monkeypatch.setattr(fused, "_chip", lambda device: 90)
    monkeypatch.setattr(
        kernels, "CASES", {name: kernels.CASES[name] for name in (case, "few heads" if case == "one head" else "all heads")}
    )
    monkeypatch.setattr(kernels, "TOKENS", 90)
    found = [one for one in kernels._lines("fused", CPU, torch.float16, 16)]
    assert [one.check for one in found if one.verdict == WRONG] == [f"matching, fused, {case}, float16"]
    assert line.status(found) == 1


def rank_steps(wrong: bool) -> Line:
    from laid_ds.runtime import engine

    engine.start_processes()
    if wrong:
        step.MECHANICS["zero_optimization"]["stage"] = 3
        step.engine.training_engine = _with_another_rate(step.engine.training_engine)
    return step.zero3_step(CPU)


def _with_another_rate(real):
    def made(*arguments):
        found = real(*arguments)
        for group in found.optimizer.param_groups:
            group["lr"] *= 3
        return found

    return made


@pytest.mark.parametrize("wrong", [False, True])
def test_an_engine_that_steps_otherwise_is_found(wrong):
    for found in run_ranks(2, rank_steps, wrong):
        assert found.verdict == (WRONG if wrong else OK), found
        assert not wrong or "of step 2" in found.found


def rank_exchanges() -> distributed.Exchange:
    from laid_ds.runtime import engine

    engine.start_processes()
    return distributed.exchange(1 << 16)


def test_messages_are_checked(monkeypatch):
    for found in run_ranks(3, rank_exchanges):
        assert found.is_right
        assert found.backend == "gloo"
        assert min(found[1:3]) > 0
    monkeypatch.setattr(distributed, "exchange", lambda _: distributed.Exchange("nccl", 1e9, 1e9, False))
    assert ranks.messages(CPU).verdict == WRONG


def test_several_ranks_say_the_worst_and_who_says_it():
    good, bad = Line("a", OK, "fine"), Line("a", WRONG, "broken", "mend it")
    assert line.merged([[good], [good]]) == [good]
    assert line.merged([[good, Line("b", ABSENT, "no")], [bad], [bad]]) == [
        Line("a", WRONG, "rank 1, 2: broken", "mend it"),
        Line("b", ABSENT, "no"),
    ]


def test_after_a_lost_gpu_nothing_is_blamed_on_what_comes_later(monkeypatch):
    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    cuda = torch.device("cuda")
    assert examine._lost(cuda, [Line("a", OK, "")]) == ""
    assert "lost at 'b'" in examine._lost(cuda, [Line("a", OK, ""), Line("b", WRONG, "")])


def test_a_gpu_that_a_rank_has_not_is_refused(monkeypatch):
    from laid_ds.runtime import engine

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    engine._take_gpu(1)
    assert chosen == [1]
    with pytest.raises(ValueError, match=r"LOCAL_RANK is 2, but 2 GPU\(s\) can be used here: start at most 2 ranks"):
        engine._take_gpu(2)


def test_what_json_has_no_word_for_is_null():
    found = examine.summary([Line("a", WRONG, "is off by inf", "", {"largest_difference": float("inf")})], 1.0, in_json=True)
    assert json.loads(found)["lines"][0]["numbers"] == {"largest_difference": None}


def test_a_rank_takes_its_gpu_before_any_message(monkeypatch):
    from laid_ds.runtime import engine

    class Taken(Exception):
        pass

    def take(local_rank):
        raise Taken(local_rank)

    monkeypatch.setattr(engine, "_take_gpu", take)
    for name, value in examine.ALONE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(Taken, match="3"):
        engine.start_processes()


BREAK_ON_RANK_1 = """
import os
if os.environ.get("RANK") == "1":
    from laid_ds.models import load
    def fails(*_):
        raise RuntimeError("no such luck")
    load.load_model = fails
"""


def test_a_rank_that_falls_out_of_step_is_told_of_and_the_status_is_1(tmp_path):
    """Launched, with an error on one rank amid what both do together; what is said stays one JSON object."""
    (tmp_path / "sitecustomize.py").write_text(BREAK_ON_RANK_1)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", str(Path(__file__).parents[2]))])
    status, report = examined("--run", str(tmp_path), "--ranks", "2", "--wait", "20", OMP_NUM_THREADS="1", PYTHONPATH=path)
    assert status == report["status"] == 1
    (wrong,) = (found for found in report["lines"] if found["verdict"] == WRONG)
    assert wrong["check"] == examine.OUT_OF_STEP
    assert "rank 0, in 'a LAid step under ZeRO-3'" in wrong["found"]


def test_two_ranks_with_something_wrong_give_one_json_object_and_status_1(tmp_path):
    (tmp_path / "extensions" / "py" / "async_io").mkdir(parents=True)
    (tmp_path / "extensions" / "py" / "async_io" / "lock").touch()
    extensions = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "OMP_NUM_THREADS": "1"}
    status, report = examined("--run", str(tmp_path), "--ranks", "2", **extensions)
    assert status == report["status"] == 1
    assert [found["check"] for found in report["lines"] if found["verdict"] == WRONG] == ["build locks"]
