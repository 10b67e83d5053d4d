"""Numbered images: the text is the chat template's own of the numbered turns, what is learned stays as it is, and asking knows of it."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO

import pytest
from PIL import Image

from laid_ds.data.images import Pixels
from laid_ds.data.record import ImageInfo, Record, Sample, Turn
from laid_ds.evaluation.evaluate import How, evaluate_models
from laid_ds.evaluation.tasks import Wish
from laid_ds.export import export_run
from laid_ds.models.chat import learn_template, say
from laid_ds.models.numbering import numbered, numbering_note, numbers_images, record_numbering
from laid_ds.models.processor import Renderer, load_processor
from laid_ds.run.loop import train
from laid_ds.runtime import engine
from laid_ds.runtime.stop import StopRequest
from tests.support.processes import run_ranks

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "internvl", "llava")


def picture(shade: int) -> bytes:
    data = BytesIO()
    Image.new("RGB", (56, 56), (shade, 0, 0)).save(data, "PNG")
    return data.getvalue()


TURNS = (
    Turn("system", ("Be brief.",)),
    Turn("user", (1, 0, "which?"), (0,)),
    Turn("assistant", ("the second",)),
    Turn("user", ("and", 2, "now?")),
    Turn("assistant", ("none",)),
)
SAMPLE = Sample("k", TURNS, tuple(map(picture, (10, 120, 240))))


def test_numbers_follow_the_order_of_showing_and_are_part_of_the_text_before():
    found = numbered(TURNS)
    assert [turn.segments for turn in found] == [
        ("Be brief.",),
        ("Image 1: ", 1, "Image 2: ", 0, "which?"),
        ("the second",),
        ("andImage 3: ", 2, "now?"),
        ("none",),
    ]
    assert found[1].needles == (0,)
    drawn = (Turn("user", ("a", 0)), Turn("assistant", (1, "b")), Turn("user", (2,)))
    assert [turn.segments for turn in numbered(drawn)] == [("aImage 1: ", 0), (1, "b"), ("Image 3: ", 2)]
    assert numbered((Turn("user", ("no image",)),)) == (Turn("user", ("no image",)),)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_the_template_s_and_what_is_learned_is_unchanged(family, worlds):
    processor = load_processor(worlds(family).student)
    template = learn_template(processor)
    plain, told = say(template, TURNS), say(template, numbered(TURNS))
    learned = [[said.text[slice(*span)] for span in said.spans] for said in (plain, told)]
    assert learned[0] == learned[1]
    stripped = told.text
    for number in (1, 2, 3):
        assert stripped.count(f"Image {number}: ") == 1
        stripped = stripped.replace(f"Image {number}: ", "")
    assert stripped == plain.text
    one, other = Renderer(processor, Pixels()), Renderer(processor, Pixels(), number_images=True)
    rows = one(SAMPLE), other(SAMPLE)
    answers = [row.tokens["input_ids"][row.supervised].tolist() for row in rows]
    assert answers[0] == answers[1]
    assert other(replace(SAMPLE, turns=numbered(TURNS))).tokens["input_ids"].tolist() != rows[1].tokens["input_ids"].tolist()
    assert one(replace(SAMPLE, turns=numbered(TURNS))).tokens["input_ids"].tolist() == rows[1].tokens["input_ids"].tolist()
    record = Record(TURNS, (ImageInfo(56, 56, "png", 1, 0),) * 3, "", "", {}, {})
    assert other.count(record) == len(rows[1].supervised) > one.count(record)


def test_a_folder_says_how_its_model_was_trained(tmp_path):
    assert not numbers_images(tmp_path)
    record_numbering(tmp_path, True)
    assert numbers_images(tmp_path)
    record_numbering(tmp_path, False)
    assert not numbers_images(tmp_path)
    assert numbering_note("m", True, True) == ""
    assert numbering_note("m", True, False) == "m was trained with numbered images and is asked without: its answers may suffer"
    assert numbering_note("m", False, True).startswith("m was trained without numbered images and is asked with them")


def whole_run(run):
    engine.start_processes()
    train(run, StopRequest())


def test_a_run_with_numbers_exports_a_model_that_is_asked_with_them(world, tmp_path, capsys):
    run = world.run(tmp_path / "run", steps=2, data={"shards": [str(world.shards)], "number_images": True})
    run_ranks(1, whole_run, run)
    export_run(run.output, tmp_path / "model")
    assert numbers_images(tmp_path / "model")
    assert "trained with numbered images" in (tmp_path / "model" / "README.md").read_text()
    models, wish = {"m": tmp_path / "model"}, Wish(sizes=[2], haystacks=3)
    evaluate_models([world.shards], models, tmp_path / "a.json", wish)
    assert "numbered" not in capsys.readouterr().err
    evaluate_models([world.shards], models, tmp_path / "b.json", wish, How(number_images=False))
    assert "m was trained with numbered images and is asked without" in capsys.readouterr().err
    with pytest.raises(ValueError, match="other number_images"):
        evaluate_models([world.shards], models, tmp_path / "a.json", wish, How(number_images=False))
