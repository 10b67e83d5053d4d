"""A model card's lines that ask the model: with the pixel limits of the processor that is exported, and a word on numbered images."""

from __future__ import annotations

import pytest

from laid_ds.commands import asking_lines, pixel_limits
from laid_ds.files import read_json

OLD = {"min_pixels": 3136, "max_pixels": 50176, "patch_size": 14, "merge_size": 2}
NEW = {"image_processor": {"size": {"shortest_edge": 1024, "longest_edge": 4096}, "merge_size": 2}}


@pytest.mark.parametrize(
    "processor, limits", [(OLD, (3136, 50176)), (NEW, (1024, 4096)), ({"size": {"shortest_edge": 32}}, None), ({}, None)]
)
def test_limits_are_those_of_the_processor(processor, limits):
    assert pixel_limits(processor) == limits


def test_every_harness_is_told_the_limits():
    text = asking_lines("qwen2_5_vl", (3136, 50176), numbered=False)
    assert text.count("3136") == text.count("50176") == 4  # the sentence, lmms-eval, vLLM, VLMEvalKit
    assert "--model qwen2_5_vl --model_args pretrained=FOLDER,min_pixels=3136,max_pixels=50176" in text
    assert 'partial(Qwen2VLChat, model_path="FOLDER", min_pixels=3136, max_pixels=50176, use_custom_prompt=False)' in text
    assert """--mm-processor-kwargs '{"min_pixels": 3136, "max_pixels": 50176}'""" in text
    assert "laid eval TASK model=FOLDER" in text
    assert "numbered" not in text
    assert "trained with numbered images" in asking_lines("qwen2_5_vl", (3136, 50176), numbered=True)


def test_a_family_without_limits_is_told_none():
    text = asking_lines("internvl", None, numbered=False)
    assert "no limits of pixels" in text
    assert "min_pixels" not in text
    assert "no class for strange is known" in asking_lines("strange", None, numbered=False)


def test_a_stand_in_s_folder_is_read(world):
    limits = pixel_limits(read_json(world.student / "processor_config.json"))
    assert limits is not None
    assert limits[0] <= limits[1]
