"""A new tower learns words: what it makes of an image it never saw lies at the words of its caption, and nothing else is changed."""

from __future__ import annotations

import io
import json
import random
from itertools import product

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from laid_ds import cli
from laid_ds.data.images import Pixels
from laid_ds.data.record import Sample, Turn
from laid_ds.data.writer import ShardWriter
from laid_ds.models.load import load_model
from laid_ds.models.new_tower import word_embeddings, write_with_words
from laid_ds.models.processor import Renderer, load_processor
from tests.support.world import tiny_config

COLOURS = {"red": (220, 40, 40), "green": (30, 180, 60), "blue": (50, 70, 220), "white": (240, 240, 240)}
PATCHES = {"idefics3": 8, "llava": 16, "internvl": [8, 8]}
"""Of images of 32 pixels: four tokens each. Qwen's grow with the picture."""


def picture(words: list[str]) -> bytes:
    """Four squares of these colours, by rows."""
    image = Image.new("RGB", (64, 64))
    for place, word in enumerate(words):
        left, top = 32 * (place % 2), 32 * (place // 2)
        image.paste(COLOURS[word], (left, top, left + 32, top + 32))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def caption(key: str, words: list[str], answer: str | None = None) -> Sample:
    turns = (Turn("user", (0, "What is in the image?")), Turn("assistant", (answer or " ".join(words),)))
    return Sample(key, turns, (picture(words),), source="test", licence="MIT")


def captions() -> list[Sample]:
    """Of each four colours one, in an order without meaning."""
    every = list(product(COLOURS, repeat=4))
    random.Random(0).shuffle(every)
    return [caption(f"c{i:03d}", list(words)) for i, words in enumerate(every)]


def shards(samples: list[Sample], folder) -> str:
    folder.mkdir()
    with ShardWriter(folder, samples_per_shard=64) as writer:
        for sample in samples:
            writer.write(sample)
    return str(folder)


def said(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["init", *map(str, arguments)])
    return stopped.value.code


@pytest.fixture(scope="module", params=["idefics3", "qwen2_5_vl", "internvl", "llava"])
def stock(request, tmp_path_factory):
    """A model of random weights whose images take four tokens, and captions of four words."""
    folder = tmp_path_factory.mktemp(request.param)
    tree = tiny_config("student", request.param)
    if request.param in PATCHES:
        tree["vision_config"]["patch_size"] = PATCHES[request.param]
    (folder / "model.json").write_text(json.dumps(tree))
    shards(captions(), folder / "captions")
    assert said(folder / "model.json", folder / "stock", "--corpus", folder / "captions", "--image-tokens=4") == 0
    return folder


def test_an_image_it_never_saw_lies_at_its_words_and_all_else_is_the_stock(stock, capsys):
    capsys.readouterr()
    assert said(stock / "stock", stock / "out", "--captions", stock / "captions", "--steps=250") == 0
    share = float(capsys.readouterr().out.split("the tower says ")[1].split("%")[0])
    model = AutoModelForImageTextToText.from_pretrained(stock / "out", dtype=torch.float32)
    before = AutoModelForImageTextToText.from_pretrained(stock / "stock", dtype=torch.float32).state_dict()
    changed = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert changed
    assert not [name for name in changed if "language_model" in name or "text_model" in name or "lm_head" in name], changed

    processor = load_processor(stock / "out")
    renderer, table = Renderer(processor, Pixels()), model.get_input_embeddings().weight
    targets = torch.stack([table[processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]].mean(0) for word in COLOURS])
    right = total = 0
    for sample in captions()[::10]:  # every tenth, beginning with the first, was held out
        with torch.no_grad():
            (found,) = model.model.get_image_features(**renderer(sample).images[0]).pooler_output
        nearest = torch.cdist(found.flatten(0, -2), targets).argmin(-1)
        names = [list(COLOURS)[i] for i in nearest.tolist()]
        right, total = right + sum(a == b for a, b in zip(names, sample.turns[1].segments[0].split(), strict=True)), total + 4
    assert share == pytest.approx(100 * right / total, abs=0.06)
    assert share > 90
    assert (stock / "out" / "tokenizer.json").read_bytes() == (stock / "stock" / "tokenizer.json").read_bytes()


def test_the_same_seed_learns_the_same(stock, tmp_path):
    made = {}
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        write_with_words(stock / "stock", tmp_path / name, captions()[:20], Pixels(), 2, seed)
        made[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert made["one"] == made["again"] != made["other"]


def test_a_decoder_that_gets_more_than_tokens_is_refused(tmp_path):
    """Qwen3-VL's decoder adds features of lower layers of the tower, which would stay random."""
    (tmp_path / "model.json").write_text(json.dumps(tiny_config("student", "qwen3_vl")))
    assert said(tmp_path / "model.json", tmp_path / "stock", "--corpus", shards(captions(), tmp_path / "set"), "--image-tokens=4") == 0
    with pytest.raises(ValueError, match="Qwen3VLForConditionalGeneration hands its decoder more than tokens of images"):
        write_with_words(tmp_path / "stock", tmp_path / "out", captions()[:20], Pixels(), 1, 0)
    assert not (tmp_path / "out").exists()


class Reads:
    """A tokenizer of these words alone; None: no token at all, 9: a mark."""

    all_special_ids = (9,)

    def __init__(self, **ids: int | None):
        self.ids = ids

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        found = self.ids.get(text.strip(), 0)  # 0 stands for a word that it does not know
        return {"input_ids": [] if found is None else [found]}


@pytest.mark.parametrize(
    "reads, sentence",
    [
        (Reads(red=1), "reads the words 'blue' and 'green' of the captions alike"),
        (Reads(red=1, blue=2, green=9), "reads the word 'green' of the captions as a mark of the model, or does not know it"),
        (Reads(red=1, blue=2, green=None), "has no token for the word 'green' of the captions"),
    ],
)
def test_words_that_a_tokenizer_does_not_tell_are_refused(stock, reads, sentence):
    with pytest.raises(ValueError, match=sentence):
        word_embeddings(load_model(stock / "stock"), reads, ["blue", "green", "red"])


def test_what_cannot_be_learned_is_one_sentence(stock, tmp_path, capsys):
    good = captions()[:12]
    two = Sample("two", (Turn("user", (0, 1, "What?")), good[0].turns[1]), good[0].images * 2, source="test", licence="MIT")
    cases = {
        "c has 1 answers of 3 words in all ('red red red'), and its image takes 4 tokens": [
            *good,
            caption("c", ["red"] * 4, "red red red"),
        ],
        "two shows 2 images; a caption is a sample of one image": [*good, two],
        "9 captions are too few to learn from; give at least 10": good[:9],
    }
    cases |= {"reads the word '<|im_end|>' of the captions as a mark": [*good, caption("m", ["red"] * 4, "red red red <|im_end|>")]}
    cases |= {"all captions say ['red']; there is nothing to tell apart": [caption(f"r{i}", ["red"] * 4) for i in range(10)]}
    for number, (sentence, samples) in enumerate(cases.items()):
        where = shards(samples, tmp_path / f"set{number}")
        assert said(stock / "stock", tmp_path / "out", "--captions", where) == 2
        error = capsys.readouterr().err
        assert sentence in error, error
        assert "Traceback" not in error
        assert not (tmp_path / "out").exists()
    assert said(stock / "stock", stock / "stock", "--captions", where) == 2
    assert "exists; choose another folder" in capsys.readouterr().err
