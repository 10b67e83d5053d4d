"""Every way to start ranks under SLURM gives one world of the right size, or one sentence."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laid_ds.runtime.environment import bridge, open_rank_log

FIRST = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
JOB = {"SLURM_JOB_ID": "41", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "5"} | FIRST
STEP = JOB | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "3,2",
    "SLURM_STEP_NODELIST": "n[4-5]",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
LAUNCHERS = STEP | {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


def two_nodes(node_list):
    assert node_list == "n[4-5]"
    return ["n4", "n5"]


def refused(environ) -> str:
    with pytest.raises(ValueError) as error:
        bridge(environ, two_nodes)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_without_slurm_nothing_is_added():
    assert bridge({"RANK": "0", "WORLD_SIZE": "1"}) == bridge({}) == {}


def test_a_task_of_srun_becomes_a_rank():
    found = bridge(STEP, two_nodes)
    assert 10000 <= int(found.pop("MASTER_PORT")) < 30000
    assert found == {
        "RANK": "4",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "LOCAL_SIZE": "2",
        "MASTER_ADDR": "n4",
    }
    assert bridge(STEP | FIRST, two_nodes)["LOCAL_SIZE"] == "3"


def test_all_ranks_take_the_same_port_and_another_attempt_another():
    ports = [bridge(STEP | {"SLURM_PROCID": str(rank)}, two_nodes)["MASTER_PORT"] for rank in range(5)]
    assert len(set(ports)) == 1
    assert bridge(STEP | {"SLURM_RESTART_COUNT": "1"}, two_nodes)["MASTER_PORT"] != ports[0]


def test_a_given_meeting_place_is_kept():
    found = bridge(STEP | {"MASTER_ADDR": "head", "MASTER_PORT": "29501"}, two_nodes)
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("head", "29501")


@pytest.mark.parametrize("counted", [{"GROUP_WORLD_SIZE": "2", "WORLD_SIZE": "4"}, {"CROSS_SIZE": "2", "WORLD_SIZE": "16"}])
def test_launchers_that_count_all_nodes_are_left_alone(counted):
    assert bridge(LAUNCHERS | {"RANK": "3"} | counted) == {}


def test_ranks_named_by_the_job_script_are_left_alone():
    assert bridge(STEP | {"RANK": "4", "WORLD_SIZE": "5"}) == {}


@pytest.mark.parametrize(
    "environ, sentence",
    [
        (
            LAUNCHERS | {"RANK": "0", "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"},
            "has 2 tasks, but for this process its launcher",
        ),
        (LAUNCHERS | {"RANK": "0", "WORLD_SIZE": "2", "CROSS_SIZE": "1"}, "they would train apart"),
        (STEP | {"RANK": "0", "WORLD_SIZE": "1"}, "has 5 tasks, but for this process WORLD_SIZE is 1"),
        (STEP | {"RANK": "0"}, "WORLD_SIZE is not set"),
        (STEP | {"WORLD_SIZE": "1"}, "WORLD_SIZE is 1, but the SLURM step has 5 tasks"),
        (JOB, "this process alone would train, but the SLURM job has 2 nodes and 5 tasks"),
        (STEP | {"CUDA_VISIBLE_DEVICES": "0"}, "ask SLURM for --gpus-per-node"),
        (STEP | {"ROCR_VISIBLE_DEVICES": "0"}, "ask SLURM for --gpus-per-node"),
        (STEP | {"SLURM_NODEID": "2"}, "SLURM contradicts itself: task 4 of 5, the 1. of node 2, in a step of [3, 2] tasks per node"),
        (STEP | {"SLURM_NODEID": "one"}, "SLURM_NODEID is 'one', not a whole number; start the ranks with srun, or"),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "3;2"}, "SLURM_STEP_TASKS_PER_NODE is '3;2', not a list such as 2(x3),1"),
        (STEP | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http', not a whole number"),
        (STEP | {"MASTER_PORT": "70000"}, "ports end at 65535"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        ({"RANK": "-1"}, "RANK is '-1', not a whole number"),
    ],
)
def test_a_wrong_world_is_refused_in_one_sentence(environ, sentence):
    assert sentence in refused(environ)


@pytest.mark.parametrize("name", sorted(STEP.keys() - {"SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "SLURM_STEP_ID"}))
def test_a_part_of_slurm_is_refused_by_the_name_of_what_is_missing(name):
    said = refused({key: value for key, value in STEP.items() if key != name})
    assert said.startswith(f"{name} is not set, but SLURM_")


def test_a_job_without_gpus_may_have_several_ranks():
    assert bridge(STEP | {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, two_nodes)["RANK"] == "4"


VALUES = st.sampled_from(["", "0", "1", "2", "5", "41", "4294967290", "-1", "2(x3)", "3,2", "1(x2)", "\u00b2", " 1", "n[4-5]", "9" * 30])
NAMES = sorted(STEP.keys() | {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"})
OTHERS = ["GROUP_WORLD_SIZE", "CROSS_SIZE", "SLURM_RESTART_COUNT", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"]


@given(kept=st.sets(st.sampled_from(sorted(STEP))), changed=st.dictionaries(st.sampled_from(NAMES + OTHERS), VALUES), nodes=st.booleans())
@settings(max_examples=1500, deadline=None)
def test_any_environment_gives_a_whole_world_or_one_sentence(kept, changed, nodes):
    environ = {name: STEP[name] for name in kept} | changed
    try:
        found = bridge(environ, lambda node_list: ["n4", "n5"] if nodes else [])
    except ValueError as error:
        found, said = {}, str(error)
    else:
        said = "nothing"
    assert len(said.splitlines()) == 1
    if found:
        assert int(found["RANK"]) < int(found["WORLD_SIZE"])
        assert int(found["LOCAL_RANK"]) < int(found["LOCAL_WORLD_SIZE"]) == int(found["LOCAL_SIZE"])
        assert 0 <= int(found["MASTER_PORT"]) < 65536
        assert found["MASTER_ADDR"]


def test_a_folder_of_logs_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"LAID_RANK_LOGS names a folder .*, but .*none/rank-0003\.log cannot be made"):
        open_rank_log({"LAID_RANK_LOGS": str(tmp_path / "none"), "RANK": "3"})


def test_without_the_names_of_the_nodes_the_way_out_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="set MASTER_ADDR"):
        bridge(STEP)


def test_a_rank_leaves_before_it_imports_torch():
    script = "import sys; from laid_ds.train import main; status = main(['x.toml']); assert 'torch' not in sys.modules; sys.exit(status)"
    found = subprocess.run([sys.executable, "-c", script], env=JOB, capture_output=True, text=True)
    assert found.returncode == 2, found.stderr
    assert found.stderr.startswith("laid: this process alone would train")
    assert found.stderr.count("\n") == 1
