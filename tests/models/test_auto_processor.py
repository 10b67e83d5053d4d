"""The folders that we write open with stock `AutoProcessor` and answer through stock `pipeline`, in a process where laid_ds cannot be
imported; what stock makes of pictures there is what we made of them in training.

Families with a video processor need torchvision for that, which is no dependency of ours. `make test-processors` fetches it and runs these
tests: its wheels are built for the CUDA build of torch, beside another one its compiled operators (nms and its like, which no processor
uses) do not load, so two of them are declared by name, without an implementation, and the rest of it runs as it is.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from laid_ds.data.images import Pixels
from laid_ds.models.export import write_student
from laid_ds.models.extension import write_yarn
from laid_ds.models.new_model import KINDS
from laid_ds.models.processor import Renderer, load_processor
from tests.models.test_image_pixels import SIDE, WORLDS, sample_of

ELSEWHERE = os.environ.get("LAID_TORCHVISION")  # where it lies, out of the way of this process
SIZES = ((96, 64), (37, 41), (200, 100))  # width, height
LIMITS = WORLDS | {"idefics3": (SIDE**2, SIDE**2)}  # whose pictures stay whole here
STOCK = """
import sys
sys.modules["laid_ds"] = None  # importing it now fails
import json
import torch
folders, sizes, declare, output = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3] == "declare", sys.argv[4]
if declare:
    from torch import library as operators
    for name in ("nms", "qnms"):
        operators.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import numpy as np
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
images = [Image.fromarray(np.random.default_rng(w * h).integers(0, 256, (h, w, 3), np.uint8)) for w, h in sizes]
asked = [{"role": "user", "content": [{"type": "image"} for _ in images] + [{"type": "text", "text": "which?"}]}]
spoken = [{"role": "user", "content": [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": "which?"}]}]
results = []
for folder in folders:
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(asked, add_generation_prompt=True)
    made = dict(processor(text=[text], images=images, return_tensors="pt"))
    model = AutoModelForImageTextToText.from_pretrained(folder)
    written = model.generate(**made, max_new_tokens=3, do_sample=False)[0, made["input_ids"].shape[1]:]
    answer = processor.decode(written, skip_special_tokens=True)
    (said,) = pipeline("image-text-to-text", model=folder)(text=spoken, max_new_tokens=3, do_sample=False, return_full_text=False)
    results.append((type(processor).__name__, made, answer, said["generated_text"]))
torch.save(results, output)
"""


def needs_torchvision(family: str) -> bool:
    return KINDS[family].videos is not None


def opened(folders: list[Path], family: str, tmp_path: Path) -> list:
    """Of each folder, in a stock process: its processor's class, the tensors of the pictures, what the model says, and what by pipeline."""
    elsewhere = ELSEWHERE if needs_torchvision(family) else None
    arguments = [json.dumps([str(folder) for folder in folders]), json.dumps(SIZES), "declare" if elsewhere else "as it is"]
    environment = os.environ | ({"PYTHONPATH": str(Path(elsewhere).resolve())} if elsewhere else {})
    command = [sys.executable, "-c", STOCK, *arguments, str(tmp_path / "made.pt")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(tmp_path / "made.pt")


@pytest.mark.parametrize("family", KINDS)
def test_folders_that_we_write_open_where_laid_ds_is_not(worlds, tmp_path, family):
    """As `laid init` leaves them, exported within limits, and stretched by `laid yarn`."""
    if needs_torchvision(family) and not (ELSEWHERE or importlib.util.find_spec("torchvision")):
        pytest.skip("transformers' video processors need torchvision: make test-processors")
    stock, (least, most) = worlds(family).student, LIMITS.get(family, LIMITS["qwen2_5_vl"])
    write_student(stock, {}, {}, "float32", tmp_path / "exported", "card", image_pixels=(least, most))
    write_yarn(stock, tmp_path / "yarn", 2)
    folders = [stock, tmp_path / "exported", tmp_path / "yarn"]
    for folder, (name, made, answer, said) in zip(folders, opened(folders, family, tmp_path), strict=True):
        assert name == type(load_processor(folder)).__name__
        assert said == answer
        ours = Renderer(load_processor(folder), Pixels())(sample_of(SIZES))
        length = made["input_ids"].shape[1]
        assert torch.equal(made["input_ids"][0], ours.tokens["input_ids"][:length])
        assert all(torch.equal(made[key], torch.cat([image[key] for image in ours.images])) for key in made if key == "image_grid_thw")
        pixels = torch.cat([image["pixel_values"] for image in ours.images], ours.image_axis)
        assert made["pixel_values"].shape == pixels.shape
        difference = (made["pixel_values"] - pixels).abs()
        assert difference.mean() < 0.05 if needs_torchvision(family) else not difference.any()  # torchvision resizes in its own way


@pytest.mark.parametrize("family", KINDS)
def test_a_folder_describes_its_videos_where_its_family_sees_them(worlds, family):
    tree = json.loads((worlds(family).student / "processor_config.json").read_text())
    if KINDS[family].videos is None:
        assert "video_processor" not in tree
        return
    assert tree["video_processor"]["video_processor_type"] == KINDS[family].videos
    assert tree["video_processor"]["image_mean"] == tree["image_processor"]["image_mean"]


def test_an_exported_folder_generates_as_the_stock_one_does(world, tmp_path):
    settings = {"max_new_tokens": 7, "repetition_penalty": 1.05}
    path = world.student / "generation_config.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(before) | settings))
        write_student(world.student, {}, {}, "float32", tmp_path / "out", "card")
        found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    finally:
        path.write_text(before)
    assert found.items() >= settings.items()
    assert {name: found.get(name) for name in ("eos_token_id", "pad_token_id")} == {
        name: json.loads(before).get(name) for name in ("eos_token_id", "pad_token_id")
    }
