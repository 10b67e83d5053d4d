"""The kernels and their GPU tests need torch, triton and numpy alone, so that they can be tried on a bare GPU image."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import IN_INTERPRETER

ROOT = Path(__file__).resolve().parents[2]
BARE = """
import sys
ALLOWED = set(sys.stdlib_module_names) | set(sys.builtin_module_names) | {
    "torch", "torchgen", "functorch", "triton", "numpy", "laid_ds", "benchmarks",
    "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "filelock", "typing_extensions", "setuptools",  # torch's own
    "pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "py",  # and pytest's
    "conftest", "gpu_device", "kernel_cases", "test_gpu_kernels", "test_gpu_backends", "test_gpu_runs", "tests", "__main__",
}

class Bare:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        is_there = name.partition(".")[0] in ALLOWED or name.startswith("_sysconfigdata")
        return self.finder.find_spec(name, path, target) if is_there else None

sys.meta_path[:] = map(Bare, sys.meta_path)
"""


def bare(code: str, **environment: str) -> str:
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([sys.executable, "-c", BARE + code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def pytest_of(*words: str) -> str:
    return f"import pytest; sys.exit(pytest.main({list(words)!r}))"


def test_what_is_not_on_a_bare_image_cannot_be_imported_there():
    for name in ("deepspeed", "transformers", "pydantic", "webdataset", "hypothesis"):
        code = f"try:\n    import {name}\nexcept ModuleNotFoundError as error:\n    print(error)"
        assert bare(code) == f"No module named '{name}'\n"


def test_the_gpu_tests_of_kernels_and_backends_are_collected_there():
    said = bare(pytest_of("-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/gpu"))
    collected = {name: int(number) for name, number in re.findall(r"(test_gpu_\w+)\.py: (\d+)", said)}
    assert collected["test_gpu_kernels"] >= 40
    assert collected["test_gpu_backends"] >= 20


@IN_INTERPRETER
def test_the_gpu_tests_of_kernels_run_there():
    chosen = ["fused_matching_is_the_definition[one hot-torch.float16]", "the_profile_is_the_definition[fused-torch.float16]"]
    chosen += ["no_counted_row_is_zero[causal]", "strides_of_the_inputs_change_nothing[one hot]"]
    places = [f"tests/gpu/test_gpu_kernels.py::test_{one}" for one in chosen]
    said = bare(pytest_of("-m", "gpu", "-p", "no:cacheprovider", "-vv", *places), LAID_GPU_STAND_IN="cpu")
    assert len(re.findall("PASSED", said)) == len(chosen), said


def test_the_benchmark_of_the_kernels_imports_nothing_else():
    bare("import benchmarks.gpu")


def test_without_a_gpu_the_gpu_benchmark_is_refused_in_one_sentence_and_can_be_rehearsed():
    command = [sys.executable, "-m", "benchmarks.gpu", "--json", "--only", "matching", "attention"]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    refused = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=hidden)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].endswith("no CUDA GPU can be used here; --rehearse tries the script on the CPU")
    before = (ROOT / "benchmarks" / "results.csv").read_bytes()
    found = subprocess.run([*command, "--rehearse", "--tokens", "32"], capture_output=True, text=True, cwd=ROOT, env=hidden)
    report = json.loads(found.stdout)
    assert report["matching"].keys() == {"tokens=32 forward", "tokens=32 forward+backward"}
    assert all(figures["eager_ms_p50"] > 0 for figures in report["matching"].values())
    assert (ROOT / "benchmarks" / "results.csv").read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: they run")
def test_without_a_gpu_all_gpu_tests_are_skipped_for_one_reason():
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "-p", "no:cacheprovider", "tests/gpu"]
    environment = {name: value for name, value in os.environ.items() if name != "LAID_GPU_STAND_IN"}
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment).stdout
    skipped = [line.split(": ", 1) for line in said.splitlines() if line.startswith("SKIPPED")]
    assert {reason for _, reason in skipped} == {"no CUDA GPU can be used here (torch.cuda.is_available() is False)"}
    assert sum(int(re.search(r"\[(\d+)\]", place)[1]) for place, _ in skipped) >= 40
    assert not re.search("passed|failed|error", said)
