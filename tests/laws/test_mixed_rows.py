"""A set that mixes every kind of row is built, trained on and learned as it was meant, under the chat templates of four families."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_tools.build import Build, build
from laid_ds.config import Run
from laid_ds.data.dataset import Dataset
from laid_ds.data.images import Pixels
from laid_ds.models.processor import Renderer, load_processor
from laid_ds.run.check import check
from laid_ds.run.loop import train
from laid_ds.runtime import engine
from laid_ds.runtime.stop import StopRequest
from tests.models.templates import STOCKS
from tests.support.processes import run_ranks

THOUGHT = "<think>\nit has long ears\n</think>\n\nA rabbit."


def talk(*said: tuple[str, str], **more) -> dict:
    return {"messages": [{"role": role, "content": text} for role, text in said], **more}


ROWS = [  # an entry, and the answers that are to be learned of it
    (talk(("user", "What is two and two?"), ("assistant", "Four.")), ["Four."]),
    (talk(("user", "<image>One. <image>Two. Which is red?"), ("assistant", "The first."), images=["red.png", "blue.png"]), ["The first."]),
    (talk(("system", "Be brief."), ("user", "<image>What?"), ("assistant", "Red."), ("user", "Sure?"), ("assistant", "Yes."),
          images=["red.png"]), ["Red.", "Yes."]),
    (talk(("user", "Is it late?"), ("assistant", "clock()"), ("tool", "ten to nine"), ("assistant", "Not yet.")), ["clock()", "Not yet."]),
    (talk(("user", "<image>What is it?"), ("assistant", THOUGHT), images=["blue.png"]), [THOUGHT]),
    (talk(("user", "Guess."), ("assistant", "A draft."), ("user", "Again."), ("assistant", "A cat.")), ["A cat."]),
    (talk(("assistant", "<image>A red square.<image>A blue one."), images=["red.png", "blue.png"]), ["A red square.A blue one."]),
]  # fmt: skip
ROWS[5][0]["messages"][1]["train"] = False
FAMILIES = {"qwen2_5_vl": "qwen2_5_vl", "internvl": "internvl", "llava": "llava_1_5", "idefics3": "idefics3"}
OF_IMAGES = re.compile(r"<\|vision_(?:start|end)\|>|</?img>|<fake_token_around_image>|<global-img>|<row_\d+_col_\d+>")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    for name in ("red", "blue"):
        Image.new("RGB", (32, 32), name).save(folder / f"{name}.png")
    (folder / "rows.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry, _ in ROWS))
    plan = Build("llava", folder / "rows.jsonl", folder, "row")
    assert build(plan, folder / "shards", resume=False, jobs=1)["rejected"] == 0
    return folder / "shards"


def with_stock_template(student: Path, family: str, out: Path) -> tuple[Path, str]:
    """The student's folder with a public template, and the mark that it writes after an answer."""
    shutil.copytree(student, out)
    own = (student / "chat_template.jinja").read_text()
    image = re.search(r"'image' %}(.*?){% else %}", own)[1]
    stock = STOCKS[FAMILIES[family]]
    end = "<|im_end|>" if stock.end else ""
    text = stock.template.replace("IMAGE", image)
    (out / "chat_template.jinja").write_text(text.replace(stock.end, end) if stock.end else text)
    return out, end


def compact(text: str) -> str:
    return "".join(OF_IMAGES.sub("", text).split())


def train_it(run: Run) -> None:
    engine.start_processes()
    train(run, StopRequest())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_learned_of_each_row_is_what_was_meant(worlds, mixed, tmp_path, family):
    student, end = with_stock_template(worlds(family).student, family, tmp_path / "student")
    run = worlds(family).run(
        tmp_path / "run",
        steps=5,
        student={"path": student},
        teacher=None,
        losses={"align": 0.0, "match": 0.0, "kl": 0.0},
        data={"shards": [str(mixed)], "images": None, "questions": None, "micro_batch": 2},
        checkpoint={"every_steps": 5},
    )
    check(run)
    processor = load_processor(student)
    render, dataset = Renderer(processor, Pixels()), Dataset.open(mixed)
    for sample, (_, answers) in zip(dataset, ROWS, strict=True):
        rendered = render(sample)
        ids = rendered.tokens["input_ids"][rendered.supervised]
        learned = processor.tokenizer.decode(ids[ids != processor.image_token_id])
        print(family, sample.key, repr(learned))
        assert compact(learned) == compact("".join(answer + end for answer in answers))
    run_ranks(1, train_it, run)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 5
    assert {key for record in records for key in record["keys"]} == set(dataset.keys.astype(str))
    assert torch.tensor([[record["loss"], record["gradient_norm"]] for record in records]).isfinite().all()
