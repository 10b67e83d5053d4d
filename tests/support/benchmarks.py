"""Files of the fields of three benchmarks (not of their words), with pictures of a world, and their shards by `laid-data import`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_tools import build
from laid_ds.data.dataset import Dataset

COLOURS = ("red", "green", "blue", "gray")


def write_pictures(shards: Path, folder: Path, number: int) -> list[str]:
    """The first pictures of a data set, as files; their names."""
    folder.mkdir(parents=True)
    names: list[str] = []
    for sample in Dataset.open(shards):
        for image in sample.images:
            if len(names) < number:
                names.append(f"{len(names):03d}.png")
                (folder / names[-1]).write_bytes(image)
    return names


def visual_haystacks(names: list[str], entries: int, images: int, needles: int = 1) -> list[dict[str, Any]]:
    """visual_haystack_{images}.json."""
    return [
        {
            "conversations": [
                {"from": "human", "value": f"For the image with the {COLOURS[i % 4]} shape, is there a circle?"},
                {"from": "gpt", "value": ("yes", "no")[i % 2]},
            ],
            "pos_image": [names[(i + k) % len(names)] for k in range(needles)],
            "neg_image": [names[(i + k) % len(names)] for k in range(needles, images)],
        }
        for i in range(entries)
    ]


def mm_niah(names: list[str], entries: int, task: str) -> list[dict[str, Any]]:
    """{retrieval,counting,reasoning}-{text,image}.jsonl: open answers, lists of counts, words or pictures to choose from."""
    return [_niah(names, i, task) for i in range(entries)]


def _niah(names: list[str], i: int, task: str) -> dict[str, Any]:
    shown = [names[(i + k) % len(names)] for k in range((2 + i) % 4)]  # some have none
    pictures = [names[-1], names[-2], names[-3]] if task in ("retrieval-image", "reasoning-image") else None
    words = [*COLOURS] if task == "reasoning-text" else None
    answer = {"counting-text": [1, i % 3], "counting-image": [i % 2, 2], "retrieval-text": COLOURS[i % 4]}.get(task, i % 3)
    return {
        "id": i,
        "images_list": shown,
        "context": " ".join(f"The {COLOURS[k % 4]} shape. <image>" for k in range(len(shown))) or "No shape.",
        "question": "Which shape is it?",
        "answer": answer,
        "meta": {
            "placed_depth": [0.2, 0.6] if isinstance(answer, list) else round(0.1 + 0.2 * (i % 5), 1),
            "context_length": 1500 + 1000 * i,
            "context_length_text": 1000,
            "context_length_image": 500 + 1000 * i,
            "num_images": len(shown),
            "needles": [f"The {COLOURS[0]} shape."] if task.endswith("text") else shown[:1],
            "choices": words,
            "choices_image_path": pictures,
        },
    }


def mmlongbench(names: list[str], entries: int, task: str) -> list[dict[str, Any]]:
    """vh_single, retrieval-image and counting-text of MM-NIAH, slidevqa (DocVQA), infoseek (visual RAG)."""
    return [_longbench(names, i, task) for i in range(entries)]


def _longbench(names: list[str], i: int, task: str) -> dict[str, Any]:
    shown = [names[(i + k) % len(names)] for k in range(3)]
    passages = [{"title": colour, "text": f"The {colour} shape is large."} for colour in COLOURS]
    paragraphs = [{"text": "A shape. <image>"}, {"text": "Another. <image> <image>"}]
    return {"id": i, "question": "Is there a circle?"} | {
        "vh_single": {"ctxs": shown, "answer": ("yes", "no")[i % 2]},
        "retrieval-image": {
            "ctxs": paragraphs,
            "image_list": shown,
            "choices_image": names[-3:],
            "needle_image_list": shown[:1],
            "answer": i % 3,
        },
        "counting-text": {"ctxs": paragraphs, "image_list": shown, "needle_image_list": [], "answer": [1, 2]},
        "slidevqa": {
            "page_list": [f"doc-{i}/{name}" for name in shown],
            "doc_name": f"doc-{i}",
            "answer": f"{i}",
            "answer_format": "Integer",
        },
        "infoseek": {"ctxs": passages, "image": names[i % len(names)], "answer": ["red", "the red one"]},
    }[task]


def import_shards(folder: Path, format: str, name: str, entries: list[dict[str, Any]], pictures: Path, **options: Any) -> Path:
    """The shards of a file of these entries."""
    source = folder / (f"{name}.json" if format == "vhs" else f"{name}.jsonl")
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    source.write_text(json.dumps(entries) if format == "vhs" else lines)
    build.build(build.Build(format, source, pictures, name.replace("_", "-"), **options), folder / name, resume=False, jobs=1)
    return folder / name
