"""Limits of area: every picture that a model is shown keeps within them, stock transformers makes the same of the folder that says them,
and what a family cannot keep is refused."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil

from laid_ds.config import as_tree
from laid_ds.data.dataset import Dataset
from laid_ds.data.images import Pixels
from laid_ds.data.record import Sample, Turn, record_of
from laid_ds.data.writer import ShardWriter
from laid_ds.evaluation.evaluate import How, evaluate_models
from laid_ds.evaluation.retrieval import measure
from laid_ds.evaluation.tasks import Wish
from laid_ds.models.export import write_student
from laid_ds.models.image_pixels import RULES, limit_pixels, write_limits
from laid_ds.models.processor import Renderer, load_processor
from laid_ds.run.build import build_renderer
from laid_ds.run.check import check
from laid_ds.run.folder import check_output

SIZES = ((640, 480), (480, 640), (37, 41), (1500, 500), (300, 900), (64, 64), (1025, 767))  # width, height


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8))


def shown_area(processor, image: Image.Image) -> int:
    """Pixels of the picture as the model gets them, without a thumbnail, from what the stock image processor makes of it."""
    images = processor.image_processor
    made = images(images=[image], return_tensors="pt")
    if "image_grid_thw" in made:
        return int(made["image_grid_thw"][0].prod()) * images.patch_size**2
    if "image_sizes" in made:
        return int(torch.as_tensor(made["image_sizes"])[0].prod())
    values = made["pixel_values"]
    tiles = values.shape[-4] if values.ndim == 5 else len(values)
    return (tiles - (tiles > 1)) * values.shape[-1] * values.shape[-2]


def around(image_processor, **more):
    return SimpleNamespace(image_processor=image_processor, **more)


TILES = dict(tokenizer=SimpleNamespace(init_kwargs={}), _merge_kwargs=lambda **_: {"images_kwargs": {"crop_to_patches": True}})
FAMILIES = {
    "Qwen2-VL and after": (lambda: around(Qwen2VLImageProcessorPil(max_pixels=28 * 28 * 4000)), (28 * 28 * 16, 28 * 28 * 64)),
    "Qwen3-VL": (lambda: around(Qwen2VLImageProcessorPil(patch_size=16)), (32 * 32 * 9, 32 * 32 * 50)),
    "VideoLLaMA3": (lambda: around(VideoLlama3ImageProcessorPil()), (40_000, 160_000)),
    "PaddleOCR-VL": (lambda: around(PaddleOCRVLImageProcessorPil()), (40_000, 160_000)),
    "Ernie": (lambda: around(Ernie4_5_VLMoeImageProcessorPil()), (40_000, 160_000)),
    "GLM-4.1V": (lambda: around(Glm4vImageProcessorPil()), (40_000, 160_000)),
    "GLM-4.6V": (lambda: around(Glm46VImageProcessorPil()), (40_000, 160_000)),
    "Idefics3": (lambda: around(Idefics3ImageProcessorPil()), (2 * 364**2, 4 * 364**2)),
    "SmolVLM": (lambda: around(SmolVLMImageProcessorPil()), (300_000, 10 * 364**2)),
    "Idefics3 whole": (lambda: around(Idefics3ImageProcessorPil(do_image_splitting=False)), (364**2, 364**2)),
    "Pixtral": (lambda: around(PixtralImageProcessorPil(), patch_size=16, spatial_merge_size=2), (32 * 32, 200_000)),
    "CLIP": (lambda: around(CLIPImageProcessorPil()), (224 * 224, 60_000)),
    "SigLIP": (lambda: around(SiglipImageProcessorPil()), (1, 60_000)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_picture_keeps_within_the_limits(name):
    make, limits = FAMILIES[name]
    processor = limit_pixels(make(), limits)
    if name == "Pixtral":  # its processor tells this in each call
        processor.image_processor.patch_size = 32
    areas = [shown_area(processor, picture(*size)) for size in SIZES]
    assert all(limits[0] <= area <= limits[1] for area in areas), areas


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("Idefics3 whole", "CLIP", "SigLIP")])
def test_the_limits_are_what_does_it(name):
    """Pictures as the family's own settings show them go beyond."""
    make, limits = FAMILIES[name]
    areas = [shown_area(make(), picture(*size)) for size in SIZES]
    assert not all(limits[0] <= area <= limits[1] for area in areas), areas


def test_every_rule_is_tried():
    tried = {type(make().image_processor).__name__.removesuffix("Pil") for make, _ in FAMILIES.values()}
    assert RULES.keys() - tried == {"GotOcr2ImageProcessor", "Ernie4_5_VL_MoeImageProcessor"}  # below; and an older name of another


SIDE = 32
WORLDS = {
    "qwen2_5_vl": (4 * SIDE**2, 12 * SIDE**2),
    "qwen3_vl": (4 * SIDE**2, 12 * SIDE**2),
    "internvl": (2 * SIDE**2, 5 * SIDE**2),
    "llava": (SIDE**2, 2 * SIDE**2),
    "idefics3": (4 * SIDE**2, 20 * SIDE**2),
}


def folder_of(worlds, family, who, tmp_path):
    """A model folder of the family; Idefics3's cuts its pictures."""
    folder = shutil.copytree(getattr(worlds(family), who), tmp_path / who)
    if family == "idefics3":
        tree = json.loads((folder / "processor_config.json").read_text())
        tree["image_processor"] |= {"do_image_splitting": True, "size": {"longest_edge": 6 * SIDE}}
        (folder / "processor_config.json").write_text(json.dumps(tree))
    return folder


def sample_of(sizes) -> Sample:
    files = []
    for size in sizes:
        file = io.BytesIO()
        picture(*size).save(file, "PNG")
        files.append(file.getvalue())
    return Sample("k", (Turn("user", (*range(len(files)), "which?")), Turn("assistant", ("red",))), images=tuple(files))


@pytest.mark.parametrize("family", WORLDS)
def test_a_run_shows_both_models_pictures_within_the_limits_and_its_export_says_so(worlds, tmp_path, family):
    """From the recipe's key to what the exported folder's own processor makes: same tokens, same pixels."""
    limits, world = WORLDS[family], worlds(family)
    folders = {who: {"path": folder_of(worlds, family, who, tmp_path)} for who in ("student", "teacher")}
    run = world.run(tmp_path / "run", data={"image_pixels": list(limits)}, **folders)
    check(run)
    renderers = [build_renderer(run, load_processor(run.student.path)), build_renderer(run, load_processor(run.teacher.path))]
    sample = sample_of(SIZES)
    student, teacher = (renderer(sample) for renderer in renderers)
    assert torch.equal(student.tokens["input_ids"], teacher.tokens["input_ids"])
    plain = Renderer(load_processor(run.student.path), Pixels())(sample)
    assert (len(plain.tokens["input_ids"]) != len(student.tokens["input_ids"])) == (family != "llava")  # which has one size
    for number in range(len(SIZES)):
        tiles = int((student.shows == number).sum()) // (4 if family == "llava" else 1)  # a token for each 16 or 32 pixels
        tiles -= family in ("internvl", "idefics3") and tiles > 1  # the thumbnail
        assert limits[0] <= tiles * SIDE**2 <= limits[1]
    write_student(run.student.path, {}, {}, "float32", tmp_path / "out", "card", image_pixels=run.data.image_pixels)
    again = Renderer(load_processor(tmp_path / "out"), Pixels())(sample)
    assert torch.equal(again.tokens["input_ids"], student.tokens["input_ids"])
    stock = AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil")
    cut = {"crop_to_patches": True} if family == "internvl" else {}  # as its processor asks in each call
    for size, ours in zip(SIZES, student.images, strict=True):
        made = stock(images=[picture(*size)], return_tensors="pt", **cut)
        assert all(torch.equal(made[name], tensor) for name, tensor in ours.items() if name in made)


def test_a_folder_says_it_wherever_it_says_how_images_are_processed(world, tmp_path):
    """Older files and older names, which other programs read: none of them says something else, and nothing else changes."""
    folder = shutil.copytree(world.student, tmp_path / "model")
    older = {"min_pixels": 3136, "max_pixels": 12845056, "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 16, "merge_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(older))
    before = json.loads((folder / "processor_config.json").read_text())
    write_limits(folder, load_processor(folder), (2048, 8192))
    said = {"size": {"shortest_edge": 2048, "longest_edge": 8192}}
    assert json.loads((folder / "preprocessor_config.json").read_text()) == older | said | {"min_pixels": 2048, "max_pixels": 8192}
    after = json.loads((folder / "processor_config.json").read_text())
    assert after == before | {"image_processor": before["image_processor"] | said}


def test_limits_that_a_family_cannot_keep_are_refused_with_what_can_be_had(worlds, tmp_path):
    for family, limits, sentence in (
        (
            "llava",
            (2048, 4096),
            r"CLIPImageProcessor would show the model 1,024 pixels of an image at the nearest; give limits .* \[1024, 1024\]",
        ),
        ("internvl", (100, 1000), r"GotOcr2ImageProcessor would show the model 1,024 pixels"),
        ("qwen2_5_vl", (100, 1000), r"Qwen2VLImageProcessor would show the model 1,024 pixels"),
        ("idefics3", (2048, 4096), r"Idefics3ImageProcessor would show the model 1,024 pixels"),
    ):
        with pytest.raises(ValueError, match=sentence):
            check(worlds(family).run(tmp_path / "run", data={"image_pixels": list(limits)}))
    cut = around(Idefics3ImageProcessorPil())
    with pytest.raises(ValueError, match=r"show the model 132,496 pixels of an image"):
        limit_pixels(cut, (200_000, 300_000))
    with pytest.raises(ValueError, match=r"264,992 to 529,984 pixels .* \[264992, 529984\]"):
        limit_pixels(cut, (300_000, 600_000))
    with pytest.raises(ValueError, match=r"how LlavaOnevisionImageProcessor sizes images cannot be limited here; leave it out"):
        limit_pixels(around(LlavaOnevisionImageProcessorPil()), (1, 10**6))


def test_counts_recorded_for_smaller_pictures_plan_no_packs(world, tmp_path):
    """Exact counts under a name of the user's, made without the run's limits, would let packs grow beyond what was allowed."""
    samples = list(Dataset.open(world.shards))
    plain, larger = Renderer(load_processor(world.student), Pixels()), [4 * SIDE**2, 4 * SIDE**2]
    with ShardWriter(tmp_path / "shards", samples_per_shard=5) as writer:
        for sample in samples:
            writer.write(replace(sample, tokens={"mine": plain.count(record_of(sample))}))
    data = {"shards": [str(tmp_path / "shards")], "micro_batch": 1, "tokens_per_pack": 2000, "count_tokens": "mine"}
    check(world.run(tmp_path / "run", data=data))
    with pytest.raises(ValueError, match=r"makes \d+ tokens of it, its record under 'mine' says \d+: leave out .*shard-00000"):
        check(world.run(tmp_path / "run", data=data | {"image_pixels": larger}))


def test_a_run_goes_on_with_the_limits_that_it_began_with(world, tmp_path):
    run = world.run(tmp_path / "run", data={"image_pixels": [1024, 4096]})
    run.output.mkdir()
    (run.output / "run.json").write_text(json.dumps({"run": as_tree(run), "world_size": 1}))
    check_output(run)
    for other in (None, [1024, 8192]):
        with pytest.raises(ValueError, match=r"holds another run \(it differs in data.image_pixels\)"):
            check_output(world.run(run.output, data={"image_pixels": other}))


def test_no_limits_leave_the_processor_as_it_is(world):
    processor = load_processor(world.student)
    before = processor.image_processor
    assert limit_pixels(processor, None).image_processor is before


def test_models_are_asked_and_probed_within_limits_of_the_command(world, tmp_path, capsys):
    """As if their folders said so; a folder that says otherwise than another is told of."""
    limits, limited = (4 * 28 * 28, 9 * 28 * 28), tmp_path / "limited"
    shutil.copytree(world.student, limited)
    write_limits(limited, load_processor(limited), limits)
    models, wish = {"plain": world.student, "limited": limited}, Wish(sizes=[1, 2], haystacks=3)
    there = evaluate_models([world.shards], models, tmp_path / "a.json", wish)["models"]
    assert "plain and limited see pictures at different sizes" in capsys.readouterr().err
    asked = evaluate_models([world.shards], models, tmp_path / "b.json", wish, How(image_pixels=limits))["models"]
    assert "different sizes" not in capsys.readouterr().err
    said = [
        (path.with_suffix(".answers.jsonl").read_text(), name)
        for path, name in ((tmp_path / "a.json", "limited"), (tmp_path / "b.json", "plain"))
    ]
    of = [[record["said"] for record in map(json.loads, text.splitlines()) if record.get("model") == name] for text, name in said]
    assert of[0] == of[1]
    assert asked["plain"]["answers"] == asked["limited"]["answers"] == there["limited"]["answers"]
    with pytest.raises(ValueError, match="other image_pixels"):
        evaluate_models([world.shards], models, tmp_path / "a.json", wish, How(image_pixels=limits))
    with pytest.raises(ValueError, match=r"--image-pixels 1,2: .* would show"):
        evaluate_models([world.shards], models, tmp_path / "c.json", wish, How(image_pixels=(1, 2)))
    within, without = (measure(world.student, world.shards, 2, 3, "float32", these) for these in (limits, None))
    assert within.looks.mass == measure(limited, world.shards, 2, 3, "float32").looks.mass != without.looks.mass
