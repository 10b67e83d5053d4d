"""A data set as a task of lmms-eval: a folder for its --include_path, with a YAML file, a utils.py that stands alone, lines and images.

Images stand among the words where the record has them (lmms-eval's own way puts all first), each question after the true answers to those
before it. A sample is a cluster: its questions are no independent draws.
"""

import json
import re
from pathlib import Path
from typing import Any

from data_tools.console import track
from data_tools.formats.visual_haystacks import write_images
from laid_ds.data.dataset import Dataset
from laid_ds.data.record import DataError, Sample
from laid_ds.evaluation.harness import FACTS
from laid_ds.evaluation.mmlongbench_rule import accepted_answers
from laid_ds.evaluation.rules import benchmark_of, kept

MAX_NEW_TOKENS = 64
YAML = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {lines}
test_split: test
output_type: generate_until
doc_to_messages: !function utils.messages
doc_to_visual: !function utils.images
doc_to_text: !function utils.text
doc_to_target: answer
process_results: !function utils.results
generation_kwargs:
  max_new_tokens: {max_new_tokens}
  temperature: 0
  do_sample: false
cluster_key: cluster
metric_list:
  - metric: exact_match
    aggregation: !function utils.mean
    higher_is_better: true
metadata:
  version: 1
"""
UTILS = '''\
"""What lmms-eval calls for the task beside this file. Written by `laid-data export lmms-eval`; it needs Pillow and nothing else."""

import json
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).resolve().parent


def messages(doc, lmms_eval_specific_kwargs=None):
    """The turns up to the question, images among the words where the record has them."""
    return [
        {"role": turn["role"], "content": [_content(part) for part in turn["content"]]}
        for turn in json.loads(doc["turns"])
    ]


def _content(part):
    if "text" in part:
        return {"type": "text", "text": part["text"]}
    return {"type": "image", "url": _open(part["image"])}


def _open(name):
    with Image.open(FOLDER / "images" / name) as image:
        return image.convert("RGB")


def images(doc):
    """All images, for models that cannot be asked by messages."""
    return [_open(part["image"]) for turn in json.loads(doc["turns"]) for part in turn["content"] if "image" in part]


def text(doc, lmms_eval_specific_kwargs=None):
    """The words alone, for models that cannot be asked by messages."""
    return "".join(part["text"] for turn in json.loads(doc["turns"]) for part in turn["content"] if "text" in part)


def results(doc, said):
    """Whether the response is a right answer but for case, quotes and a final stop; and what `laid report` needs of the question."""
    facts = json.loads(doc["facts"])
    right = plain(said[0]) in [plain(expected) for expected in facts["expected"]]
    return {"exact_match": {"score": float(right), "cluster": doc["cluster"]}, "FACTS": facts}


def mean(items):
    """Over all questions."""
    return sum(item["score"] for item in items) / len(items)


def plain(response):
    return response.strip().strip("\\"'`*").rstrip(".!").strip().lower()
'''


def export_task(dataset: Dataset, place: Path, out: Path) -> dict[str, Any]:
    """Write the task folder `out` to `place`, from where it will be moved; its task is called laid_ and its name (lmms-eval takes a name
    for a folder where there is one of that name). Raises DataError for a sample without a question that has an answer."""
    task = "laid_" + re.sub(r"\W", "_", out.resolve().name)
    lines = []
    for sample in track(dataset, "export", len(dataset)):
        lines += _lines(sample, write_images(sample, place / "images"), task)
    (place / "data.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    filled = YAML.format(task=task, lines=json.dumps(str((out / "data.jsonl").resolve())), max_new_tokens=MAX_NEW_TOKENS)
    (place / f"{task}.yaml").write_text(filled, encoding="utf-8")
    (place / "utils.py").write_text(UTILS.replace("FACTS", FACTS), encoding="utf-8")
    command = f"lmms-eval --model MODEL --model_args pretrained=FOLDER --include_path {out} --tasks {task} --log_samples --output_path LOGS"
    return {"task": task, "questions": len(lines), "next": command}


def _lines(sample: Sample, names: list[str], task: str) -> list[dict[str, str]]:
    asked = [
        number for number, turn in enumerate(sample.turns[:-1]) if turn.role == "user" and sample.turns[number + 1].role == "assistant"
    ]
    if not asked:
        raise DataError("holds no question that has an answer", key=sample.key).at(sample.origin)
    if unknown := {turn.role for turn in sample.turns} - {"system", "user", "assistant"}:
        raise DataError(f"holds a {unknown.pop()} turn, which lmms-eval does not know", key=sample.key).at(sample.origin)
    return [_line(sample, names, task, number, index) for index, number in enumerate(asked)]


def _line(sample: Sample, names: list[str], task: str, turn: int, index: int) -> dict[str, str]:
    question, answer = sample.turns[turn], sample.turns[turn + 1].text
    shown = [segment for said in sample.turns[: turn + 1] for segment in said.segments if isinstance(segment, int)]
    turns = [{"role": said.role, "content": [_part(part, names) for part in said.segments]} for said in sample.turns[: turn + 1]]
    depth = shown.index(question.needles[0]) / len(shown) if len(question.needles) == 1 and question.needles[0] in shown else None
    facts = {
        "task": task,
        "benchmark": benchmark_of(sample.meta),
        "key": sample.key,
        "cluster": sample.key,
        "question_index": index,
        "size": len(shown),
        "depth": depth,
        "question": question.text[-1000:],
        "shown": [names[image] for image in shown],
        "expected": _expected(sample, answer),
        "choices": list(question.choices) or None,
        "meta": kept(sample.meta),
    }
    told = {name: json.dumps(value, ensure_ascii=False) for name, value in (("turns", turns), ("facts", facts))}
    return {"id": f"{sample.key}-{index}", "cluster": sample.key, "answer": answer} | told


def _part(segment: str | int, names: list[str]) -> dict[str, str]:
    return {"text": segment} if isinstance(segment, str) else {"image": names[segment]}


def _expected(sample: Sample, answer: str) -> list[str]:
    entry = sample.meta.get("mmlongbench") or {}
    accepted = accepted_answers(entry.get("answer", answer))
    return accepted if "answer_format" not in entry and all(isinstance(one, str) for one in accepted) else [answer]
