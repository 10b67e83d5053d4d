"""What was said: some right and some wrong answers of each model, with the pictures where the shards are still there."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from laid_ds.data.dataset import Dataset
from laid_ds.data.record import DataError, Sample
from laid_ds.evaluation.scores import Scored, scored
from laid_ds.report.html_parts import paragraph, swatch
from laid_ds.report.palette import Style

EACH = 2  # right and wrong answers of a model that are shown
MOST_MODELS = 8
THUMB, COLUMNS, MOST_IMAGES = 60, 6, 12  # pixels, in a row, on a sheet
FRAME = "#d4002a"
MOST_CHARACTERS = 400


def samples_part(answers: Sequence[Mapping[str, Any]], setting: Mapping[str, Any], baseline: str, styles: Mapping[str, Style]) -> str:
    """ "" where no answer is kept."""
    if not answers:
        return ""
    found = scored(answers)
    models = sorted(
        {one.answer["model"] for one in found}, key=lambda name: (name != baseline, list(styles).index(name) if name in styles else 0)
    )
    datasets, notes = _datasets({one.answer["task"] for one in found}, setting)
    cards = [
        _card(one, datasets, styles)
        for name in models[:MOST_MODELS]
        for one in _chosen([one for one in found if one.answer["model"] == name])
    ]
    left = [f"Only {MOST_MODELS} of {len(models)} models are shown."] if len(models) > MOST_MODELS else []
    return "".join(paragraph(note, "note") for note in (*notes, *left)) + f"<div class=cards>{''.join(cards)}</div>"


def _chosen(found: Sequence[Scored]) -> list[Scored]:
    """Right and wrong ones of the most images, whose haystacks come first: no better reason, and the same for every model."""
    largest = sorted(found, key=lambda one: -one.answer["size"])
    right = [one for one in largest if one.official == 1]
    return [*right[:EACH], *[one for one in largest if one.official < 1][:EACH]]


def _datasets(tasks: set[str], setting: Mapping[str, Any]) -> tuple[dict[str, Dataset], list[str]]:
    """Task -> its shards where they are still what was asked, and a sentence for each that is not."""
    found, notes = {}, []
    for task in sorted(tasks):
        asked = (setting.get("tasks") or {}).get(task, setting)
        place = asked.get("shards")
        if not isinstance(place, str) or not Path(place).is_dir():
            notes.append(f"No pictures of {task}: its shards are not at {place or 'any place that is recorded'} any more.")
            continue
        try:
            dataset = Dataset.open(place)
        except (DataError, OSError) as error:
            notes.append(f"No pictures of {task}: {error}.")
            continue
        if dataset.fingerprint != asked.get("fingerprint"):
            notes.append(f"No pictures of {task}: {place} holds other shards now than those that were asked.")
        else:
            found[task] = dataset
    return found, notes


def _card(one: Scored, datasets: Mapping[str, Dataset], styles: Mapping[str, Style]) -> str:
    answer = one.answer
    dataset = datasets.get(answer["task"])
    sheet = "" if dataset is None else _sheet(answer, dataset)
    verdict = "right" if one.official == 1 else "wrong" if one.official == 0 else f"{one.official:.2f}"
    verdict += (
        "" if one.official == one.strict else f" (strictly {'right' if one.strict == 1 else 'wrong' if one.strict == 0 else one.strict})"
    )
    depth = "" if answer["depth"] is None else f", needle at depth {answer['depth']:.2f}"
    name = answer["model"]
    mark = swatch(styles[name]) if name in styles else ""
    facts = f"{answer['task']}, {answer['size']} images{depth}, {answer['key']}"
    return (
        f"<article class={verdict.split()[0]}><h4>{mark}{html.escape(name)}: {html.escape(verdict)}</h4>"
        f"{sheet}<dl><dt>question<dd>{_cut(answer.get('question'))}<dt>answer<dd>{_cut(' or '.join(map(str, answer['expected'])))}"
        f"<dt>said<dd>{_cut(answer['said'])}</dl><small>{html.escape(facts)}</small></article>"
    )


def _cut(words: Any) -> str:
    shown = "".join(letter if letter.isprintable() else " " for letter in str(words or ""))
    shown = shown if len(shown) <= MOST_CHARACTERS else f"...{shown[-MOST_CHARACTERS:]}"
    return html.escape(shown) or "<em>nothing</em>"


def _sheet(answer: Mapping[str, Any], dataset: Dataset) -> str:
    """The pictures around the needle, which is framed; "" for pictures that cannot be read."""
    try:
        sample = dataset.read(dataset.find(answer["key"]))
        shown = _numbers(answer.get("shown") or [], sample)
        needles = _needles(answer, sample)
        middle = next((place for place, number in enumerate(shown) if number in needles), 0)
        first = max(0, min(middle - MOST_IMAGES // 2, len(shown) - MOST_IMAGES))
        part = shown[first : first + MOST_IMAGES]
        pictures = [_thumb(sample.images[number], number in needles) for number in part]
    except (OSError, IndexError, ValueError):  # DataError among them
        return "<p class=note>its pictures cannot be read</p>"
    if not pictures:
        return ""
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (min(len(pictures), COLUMNS) * THUMB, rows * THUMB), "white")
    for place, picture in enumerate(pictures):
        sheet.paste(picture, (place % COLUMNS * THUMB, place // COLUMNS * THUMB))
    data = io.BytesIO()
    sheet.save(data, "WEBP", quality=72)
    which = f"images {first + 1} to {first + len(part)} of {len(shown)}"
    alt = f"{which}; framed: what the question needs"
    source = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
    return f'<img alt="{alt}" width={sheet.width} height={sheet.height} src="{source}"><p class=note>{alt}</p>'


def _numbers(shown: Sequence[str | int], sample: Sample) -> list[int]:
    names = sample.meta.get("image_paths") or []
    return [entry if isinstance(entry, int) else names.index(entry) for entry in shown]


def _needles(answer: Mapping[str, Any], sample: Sample) -> set[int]:
    """Of the question that was asked: the one with its words, which a window may have put elsewhere."""
    asked = (answer.get("question") or "").removeprefix("...")
    questions = [turn for turn in sample.turns if turn.role == "user"]
    return set(next((turn.needles for turn in questions if asked and turn.text.endswith(asked)), ()))


def _thumb(data: bytes, framed: bool) -> Image.Image:
    with Image.open(io.BytesIO(data)) as picture:
        picture.draft("RGB", (2 * THUMB, 2 * THUMB))  # a JPEG is decoded no larger
        small = ImageOps.exif_transpose(picture).convert("RGB")
    small.thumbnail((THUMB - 6, THUMB - 6))
    tile = Image.new("RGB", (THUMB, THUMB), FRAME if framed else "white")
    if framed:
        ImageDraw.Draw(tile).rectangle((3, 3, THUMB - 4, THUMB - 4), fill="white")
    tile.paste(small, ((THUMB - small.width) // 2, (THUMB - small.height) // 2))
    return tile
