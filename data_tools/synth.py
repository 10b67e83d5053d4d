"""`laid-data synth haystack`: a source of `compose` that makes its own pictures, from those of the easy-vqa package (MIT).

An image is a scene of two objects, cut out of two pictures: the one that names the image (the anchor, upper left) and the other one (the
target, lower right). An object is a shape in a colour: 3 x 8 = 24 kinds. A question names an anchor that stands in exactly one image of the
haystack; no other object of the haystack is of that kind.

    colour   "What colour is the other shape in the image with the red circle?"   8 answers, chance 12.5 %
    terse    the same as a line to go on with, "red circle:": for a decoder that completes texts rather than obeys them
    yes-no   "For the image with the red circle, is there a blue triangle?"       chance 50 %; a "no" asks for an object of another image
    caption  "What is in the image?"  "red circle and blue triangle": for samples of one image, to learn to read before learning to find
    words    the same in four words, "red circle blue triangle": for a tower whose images take four tokens (`laid init --captions`)
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
import typer
from PIL import Image

from data_tools.compose.check import refuse_leaks, shortcuts
from data_tools.compose.draw import Draft, Question
from data_tools.compose.pool import Picture
from data_tools.compose.writing import sample_of, write
from data_tools.console import show, track
from laid_ds.data.record import Sample, describe
from laid_ds.disk import whole_folder
from laid_ds.terminal import next_step

COLOURS = ("black", "gray", "red", "green", "blue", "brown", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
KINDS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
CELL = 32  # pixels; a scene is 2 x 2 cells
MARGIN = 1.15  # of a cut-out around its object
FOREGROUND = 60  # summed channel difference to the background above which a pixel belongs to the object

FACTS = {"source": "easy-vqa 1.0", "licence": "MIT", "meta": {"world": "two-object scenes"}}
JUDGED = ("question", "bag", "depth")
"""Its bags are even with their needles, so the images without the needle say which one is missing, to whom knows which to leave out."""

Kind = tuple[str, str]
Ask = Literal["colour", "terse", "yes-no", "caption", "words"]
OF_ONE = ("caption", "words")
"""Asked of samples of one image."""


@dataclass(frozen=True)
class Scene:
    anchor: Kind
    target: Kind
    image: bytes
    """PNG."""

    @cached_property
    def picture(self) -> Picture:
        """The scene as haystacks hold it; of its colours the target's alone is one to answer with."""
        info, kinds = describe(self.image), [" ".join(kind) for kind in (self.anchor, self.target)]
        digest, mark = hashlib.sha256(self.image).hexdigest(), (info.crc32, info.num_bytes)
        return Picture(" and ".join(kinds), self, digest, mark, frozenset(kinds), frozenset({*kinds, self.target[0]}))


def pictures(split: str) -> dict[Kind, list[Path]]:
    """The pictures of an easy-vqa split ("train" or "test": disjoint files) by what they show. Raises ValueError without the package."""
    try:
        import easy_vqa
    except ImportError:
        raise ValueError("the pictures come from the easy-vqa package: pip install --no-deps easy-vqa==1.0") from None
    folder = Path(easy_vqa.__file__).parent / "data" / split
    facts: dict[int, dict[str, str]] = defaultdict(dict)
    for question, answer, number in json.loads((folder / "questions.json").read_text()):
        facts[number] |= _facts(question, answer)
    by_kind: dict[Kind, list[Path]] = {kind: [] for kind in KINDS}
    for number, fact in sorted(facts.items()):
        if len(fact) == 2:
            by_kind[fact["colour"], fact["shape"]].append(folder / "images" / f"{number}.png")
    return by_kind


def _facts(question: str, answer: str) -> dict[str, str]:
    """What a question and its answer tell for certain: {"colour": ..., "shape": ...} or less."""
    words = question.rstrip("?").split()
    negated = "not" in words or "no" in words
    if answer in ("yes", "no") and negated == (answer == "yes"):
        return {}
    named = [*words, answer]
    colours, shapes = [word for word in named if word in COLOURS], [word for word in named if word in SHAPES]
    return ({"colour": colours[0]} if colours else {}) | ({"shape": shapes[0]} if shapes else {})


def compose(anchor: Image.Image, target: Image.Image) -> bytes:
    """A scene of two cut-outs on the anchor picture's ground, as PNG."""
    cut, ground = _cut_out(anchor)
    scene = Image.new("RGB", (2 * CELL, 2 * CELL), ground)
    scene.paste(cut, (0, 0))
    scene.paste(_cut_out(target)[0], (CELL, CELL))
    buffer = io.BytesIO()
    scene.save(buffer, "PNG")
    return buffer.getvalue()


def _cut_out(picture: Image.Image) -> tuple[Image.Image, tuple[int, int, int]]:
    """The object of a picture in a square cell, and the picture's ground colour."""
    pixels = np.asarray(picture.convert("RGB"), dtype=int)
    ground = np.median(pixels.reshape(-1, 3), 0).astype(int)
    rows, columns = np.nonzero(np.abs(pixels - ground).sum(-1) > FOREGROUND)
    half = MARGIN * max(np.ptp(rows) + 1, np.ptp(columns) + 1) / 2
    x, y = (columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2
    wide = Image.new("RGB", (picture.width * 3, picture.height * 3), tuple(ground.tolist()))
    wide.paste(picture.convert("RGB"), (picture.width, picture.height))
    left, top = x + picture.width - half, y + picture.height - half
    return wide.crop(tuple(round(v) for v in (left, top, left + 2 * half, top + 2 * half))).resize((CELL, CELL)), tuple(ground.tolist())


def scenes(split: str, number: int, seed: int) -> dict[Kind, list[Scene]]:
    """`number` scenes by anchor, for each anchor as many as for any other, with targets that repeat only after all 24 kinds have come."""
    rng, by_kind = random.Random(f"scenes {split} {seed}"), pictures(split)
    targets = {anchor: [kind for _ in range(number // len(KINDS) ** 2 + 1) for kind in rng.sample(KINDS, len(KINDS))] for anchor in KINDS}
    made: dict[Kind, list[Scene]] = defaultdict(list)
    for i in track(range(number), "scenes"):
        anchor = KINDS[i % len(KINDS)]
        target = targets[anchor][i // len(KINDS)]
        with Image.open(rng.choice(by_kind[anchor])) as a, Image.open(rng.choice(by_kind[target])) as b:
            made[anchor].append(Scene(anchor, target, compose(a, b)))
    return made


def haystack(key: str, library: dict[Kind, list[Scene]], images: int, questions: int, ask: tuple[Ask, ...], seed: str) -> Draft:
    """One haystack. Each asked anchor stands in one image, nothing else in the haystack is of an asked kind, and the targets' colours are
    as even as the number of images allows, so that the bag of all objects tells nothing about an answer."""
    rng = random.Random(seed)
    asked = _asked_kinds(rng, questions)
    others = [kind for kind in KINDS if kind not in asked]
    anchors = asked + rng.choices(others, k=images - questions)
    colours = [colour for _ in range(images // len(COLOURS) + 1) for colour in rng.sample(COLOURS, len(COLOURS))][:images]
    rng.shuffle(colours)

    def scene(anchor: Kind, colour: str) -> Scene:
        return rng.choice([s for s in library[anchor] if s.target[0] == colour and s.target not in asked])

    shown = [scene(anchor, colour) for anchor, colour in zip(anchors, colours, strict=True)]
    rng.shuffle(shown)
    places = {scene.anchor: place for place, scene in enumerate(shown)}
    said = tuple(_question(rng, rng.choice(ask), shown, places[anchor]) for anchor in asked)
    return Draft(key, tuple(scene.picture for scene in shown), said)


def _asked_kinds(rng: random.Random, questions: int) -> list[Kind]:
    """Distinct kinds, at most two of a colour: every colour keeps a shape that may stand anywhere."""
    free = [(colour, shape) for colour in COLOURS for shape in rng.sample(SHAPES, 2)]
    return rng.sample(free, questions)


def _question(rng: random.Random, ask: Ask, shown: list[Scene], needle: int) -> Question:
    """A question about the image at `needle`."""
    scene = shown[needle]
    anchor = " ".join(scene.anchor)
    if ask in OF_ONE:
        return Question("What is in the image?", (" and " if ask == "caption" else " ").join((anchor, " ".join(scene.target))), (), needle)
    if ask in ("colour", "terse"):
        text = f"{anchor}:" if ask == "terse" else f"What colour is the other shape in the image with the {anchor}?"
        evenly = -(-len(shown) // len(COLOURS)) / len(shown)  # a colour that is shown most is right so often
        return Question(text, scene.target[0], COLOURS, needle, watched=COLOURS, bag_chance=evenly)
    elsewhere = [other.target for other in shown if other.target != scene.target]
    answer = rng.choice(("yes", "no")) if elsewhere else "yes"
    target = " ".join(scene.target if answer == "yes" else rng.choice(elsewhere))
    return Question(f"For the image with the {anchor}, is there a {target}?", answer, ("yes", "no"), needle, watched=(target,))


def drafts(split: str, samples: int, images: int, questions: int, ask: tuple[Ask, ...], seed: int, num_scenes: int) -> Iterator[Draft]:
    """The haystacks of one data set, a pure function of its arguments."""
    most = min(images, 2 * len(COLOURS))
    if not 1 <= questions <= most:
        raise ValueError(f"--questions {questions}: a haystack of {images} images can ask 1 to {most} questions")
    if images > 1 and (of_one := sorted({*ask} & {*OF_ONE})):
        raise ValueError(f"--ask {of_one[0]} is for samples of one image, not {images}")
    if num_scenes < len(KINDS) ** 2:
        raise ValueError(f"--scenes {num_scenes}: every anchor needs a scene with every target, {len(KINDS) ** 2} in all")
    library = scenes(split, num_scenes, seed)
    for i in range(samples):
        yield haystack(f"{split}-{seed}-{i:06d}", library, images, questions, ask, f"haystack {split} {seed} {i}")


def haystacks(split: str, samples: int, images: int, questions: int, ask: tuple[Ask, ...], seed: int, num_scenes: int) -> Iterator[Sample]:
    """The same with their bytes."""
    return (sample_of(draft, _bytes, FACTS) for draft in drafts(split, samples, images, questions, ask, seed, num_scenes))


def _bytes(picture: Picture) -> bytes:
    return picture.source.image


app = typer.Typer(no_args_is_help=True, help="Make data whose answers are known.")


@app.callback()
def _group() -> None:
    """Make data whose answers are known."""


@app.command("haystack", epilog="Example: laid-data synth haystack runs/data/train --samples 512 --images 64")
def haystack_command(
    output: Annotated[Path, typer.Argument(help="Folder for the shards; must not exist.")],
    split: Annotated[str, typer.Option(help="Which pictures: train or test (disjoint).")] = "train",
    samples: Annotated[int, typer.Option(min=1)] = 512,
    images: Annotated[int, typer.Option(min=1, help="Images in each haystack; windows are drawn from them.")] = 64,
    questions: Annotated[int, typer.Option(min=1, help="Questions in each haystack, as turns.")] = 6,
    ask: Annotated[
        list[str] | None, typer.Option(help="colour (8 answers), terse, yes-no, caption, words; may be given twice; default colour.")
    ] = None,
    num_scenes: Annotated[int, typer.Option("--scenes", help="Distinct scenes to draw from.")] = 2304,
    seed: int = 0,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Visual-Haystacks-like samples from the pictures of the easy-vqa package."""
    asks = tuple(ask or ["colour"])
    if split not in ("train", "test") or not set(asks) <= set(get_args(Ask)):
        raise ValueError(f"--split {split} --ask {list(asks)}: splits are train and test, questions are {', '.join(get_args(Ask))}")
    if output.exists():
        raise ValueError(f"{output} exists; choose another folder or remove it")
    made = list(track(drafts(split, samples, images, questions, asks, seed, num_scenes), "haystacks", samples))
    found = shortcuts(made, JUDGED)
    refuse_leaks(found, str(output))
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(output, "the data set") as folder:
        fingerprint = write(made, _bytes, lambda draft: FACTS, folder, "write").fingerprint
    report = {"folder": str(output), "samples": samples, "images": samples * images, "fingerprint": fingerprint}
    show(report | {"shortcuts": [baseline.row() for baseline in found]}, as_json)
    if not as_json:
        next_step("laid-data", "preview", output, "--sheet", "preview.png")
