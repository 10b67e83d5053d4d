"""A data set as a task of lmms-eval: what its files say, that they stand alone, and lmms-eval itself on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from io import BytesIO

import pytest
from PIL import Image, ImageChops

from data_tools.benchmark_files import export
from data_tools.synth import haystacks
from laid_ds.data.dataset import Dataset
from laid_ds.data.record import DataError, Sample, Turn
from laid_ds.data.writer import ShardWriter
from laid_ds.evaluation.harness import read_samples
from laid_ds.models.new_model import write_new_model
from laid_ds.report.write import write_report

LLAVA = {
    "model_type": "llava",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -1,
    "image_seq_length": 4,
    "text_config": {
        **{"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096},
    },
    "vision_config": {
        **{"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "image_size": 32, "patch_size": 16, "projection_dim": 32},
    },
}


def written(folder, samples):
    with ShardWriter(folder) as writer:
        for sample in samples:
            writer.write(sample)
    return Dataset.open(folder)


@pytest.fixture
def shards(tmp_path):
    """Two haystacks, and one whose images stand among the words."""
    samples = list(haystacks("test", 3, 4, 2, ("yes-no",), seed=5, num_scenes=576))
    turns = (Turn("user", ("first ", 1, " then ", 0, " which?"), (0,)), Turn("assistant", ("blue",)))
    mixed = Sample("mixed", turns, samples[2].images[:2])
    return written(tmp_path / "set", [*samples[:2], mixed])


def load_utils(folder):
    spec = importlib.util.spec_from_file_location("task_utils", folder / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_messages_are_the_record_in_its_order_and_answers_before_are_true(tmp_path, shards):
    report = export("lmms-eval", str(tmp_path / "set"), tmp_path / "my-task")
    assert (report["task"], report["questions"]) == ("laid_my_task", 5)
    utils, lines = load_utils(tmp_path / "my-task"), [json.loads(line) for line in (tmp_path / "my-task" / "data.jsonl").open()]
    samples = {sample.key: sample for sample in shards}
    for line in lines:
        sample, index = samples[line["cluster"]], int(line["id"].rpartition("-")[2])
        messages, turns = utils.messages(line), sample.turns[: 2 * index + 1]
        assert [message["role"] for message in messages] == [turn.role for turn in turns]
        for message, turn in zip(messages, turns, strict=True):
            for part, segment in zip(message["content"], turn.segments, strict=True):
                if isinstance(segment, str):
                    assert part == {"type": "text", "text": segment}
                else:
                    true = Image.open(BytesIO(sample.images[segment])).convert("RGB")
                    assert ImageChops.difference(part["url"], true).getbbox() is None
        assert line["answer"] == sample.turns[2 * index + 1].text
        assert len(utils.images(line)) == len(sample.images)


def test_results_hold_the_cluster_and_what_a_report_needs(tmp_path, shards):
    export("lmms-eval", str(tmp_path / "set"), tmp_path / "task")
    utils, lines = load_utils(tmp_path / "task"), [json.loads(line) for line in (tmp_path / "task" / "data.jsonl").open()]
    logs = tmp_path / "logs" / "some__model"
    logs.mkdir(parents=True)
    told = []
    for number, line in enumerate(lines):
        said = line["answer"].upper() + "." if number % 2 == 0 else "I think so"
        found = utils.results(line, [said])
        assert found["exact_match"] == {"score": float(number % 2 == 0), "cluster": line["cluster"]}
        told.append({"doc_id": number, "target": line["answer"], "filtered_resps": said} | found)
    assert utils.mean([one["exact_match"] for one in told]) == pytest.approx(3 / 5)
    (logs / "20260101_000000_samples_laid_task.jsonl").write_text("".join(json.dumps(one) + "\n" for one in told))
    (logs / "20260101_000000_samples_mmmu.jsonl").write_text('{"doc_id": 0, "target": "A", "filtered_resps": "A"}\n')
    worth = write_report(tmp_path / "logs", "student").as_json()["scores"]["laid_task"]["some__model"]
    assert (worth["answers"], worth["clusters"], worth["official"]["mean"]) == (5, 3, pytest.approx(3 / 5))
    assert set(worth["by_size"]) == {"2", "4"}
    assert worth["curve"]["why_not"] == "the baseline student has not answered this task"


def test_what_lmms_eval_cannot_ask_is_refused_by_key(tmp_path):
    talks = {"unanswered": (Turn("user", ("a?",)),), "tooled": (Turn("user", ("a?",)), Turn("assistant", ("b",)), Turn("tool", ("c",)))}
    for key, message in (("unanswered", "holds no question that has an answer"), ("tooled", "holds a tool turn")):
        written(tmp_path / key, [Sample(key, talks[key])])
        with pytest.raises(DataError, match=f"{message}.*{key}"):
            export("lmms-eval", str(tmp_path / key), tmp_path / f"{key}-task")


@pytest.mark.lmms_eval
@pytest.mark.skipif("LAID_LMMS_EVAL" not in os.environ, reason="LAID_LMMS_EVAL names no python that has lmms-eval (make test-lmms-eval)")
def test_lmms_eval_itself_asks_a_tiny_model(tmp_path, shards):
    export("lmms-eval", str(tmp_path / "set"), tmp_path / "task")
    (tmp_path / "tiny.json").write_text(json.dumps(LLAVA))
    write_new_model(tmp_path / "tiny.json", tmp_path / "tiny", list(shards), vocabulary=300, image_tokens=4, seed=0)
    words = ["--model", "llava_hf", "--model_args", f"pretrained={tmp_path / 'tiny'},device=cpu,device_map=cpu,dtype=float32"]
    words += ["--include_path", tmp_path / "task", "--tasks", "laid_task", "--log_samples", "--output_path", tmp_path / "logs"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    command = [os.environ["LAID_LMMS_EVAL"], "-m", "lmms_eval", *map(str, words), "--batch_size", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ERROR" not in done.stdout + done.stderr
    answers = read_samples(tmp_path / "logs")
    assert sorted((answer["key"], answer["question_index"]) for answer in answers) == sorted(
        (sample.key, index) for sample in shards for index in range(len(sample.turns) // 2)
    )
    assert all(answer["said"] for answer in answers)
    (results,) = (tmp_path / "logs").glob("*/*_results.json")
    assert "exact_match_stderr_clustered,none" in json.loads(results.read_text())["results"]["laid_task"]
