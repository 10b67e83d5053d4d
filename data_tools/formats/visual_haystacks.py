"""Visual Haystacks: read and write its files, and score its answers.

A file `visual_haystack_{N|oracle}.json` is a list of entries with a yes/no question in `conversations` and with `pos_image` and
`neg_image`, lists of paths. The benchmark shuffles them without a seed; here the order follows from a seed and the entry's key.
"""

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.formats.fields import Entry, check_fields, take, take_strings
from data_tools.formats.marks import IMAGE_MARK, refuse_foreign_marks
from data_tools.image_root import ImageRoot
from data_tools.inputs import read_json, visible
from laid_ds.data.record import DataError, Sample, Turn, describe
from laid_ds.evaluation.visual_haystacks_rule import ANSWERS, is_compliant, is_exact, is_right, words

PROMPT = "You are given a set of images. Please answer the following question in Yes or No: "
SPEAKERS = ("human", "user"), ("gpt", "assistant")
RESAMPLES = 100
SUFFIXES = {
    ".jpg": "jpg",
    ".jpeg": "jpg",
    ".png": "png",
    ".gif": "gif",
    ".webp": "webp",
    **dict.fromkeys((".bmp", ".tif", ".tiff", ".avif"), ""),
}
"""The end of a picture's name -> its format, where we keep it."""


def read_entry(entry: Entry, key: str, root: ImageRoot, *, seed: int = 0, depth: float | None = None) -> Sample:
    """One entry. `depth` in [0, 1] puts the needle there (single-needle entries); without it all images are shuffled."""
    said = take(entry, "conversations", list)
    check_fields(entry, (), others=True)
    if len(said) != 2:
        raise DataError(f"conversations must hold a question and its answer, not {len(said)} turns")
    for turn, speakers in zip(said, SPEAKERS, strict=True):
        if (speaker := take(turn, "from", str, "")) not in ("", *speakers):
            raise DataError(f"a question of {speakers[0]} and its answer of {SPEAKERS[1][0]} must follow, not what {speaker[:40]!r} says")
        check_fields(turn, ("from", "value"), others=True)
    question, answer = take(said[0], "value", str), take(said[1], "value", str)
    if answer not in ANSWERS:
        raise DataError(f"answer {answer[:40]!r} is neither yes nor no")
    refuse_foreign_marks(question)
    if IMAGE_MARK in question:
        raise DataError(f"the question holds {IMAGE_MARK}; its images are those of pos_image and neg_image")
    positive, negative = take_strings(entry, "pos_image"), take_strings(entry, "neg_image", [])
    if not positive or set(positive) & set(negative):
        raise DataError("pos_image must name the needles, and neg_image none of them")
    names = _ordered(positive, negative, random.Random(f"{seed}:{key}"), depth)
    needles = tuple(index for index, name in enumerate(names) if name in positive)
    turns = (Turn("user", (*range(len(names)), PROMPT + question), needles, ANSWERS), Turn("assistant", (answer,)))
    return Sample(key, turns, root.read_all(names), "Visual Haystacks", meta={"vhs": entry, "image_paths": names})


def _ordered(positive: list[str], negative: list[str], rng: random.Random, depth: float | None) -> list[str]:
    if depth is None:
        names = positive + negative
        rng.shuffle(names)
        return names
    if len(positive) != 1 or not 0 <= depth <= 1:
        raise DataError(f"depth {depth} needs one needle and a number in [0, 1]; the entry has {len(positive)} needles")
    names = rng.sample(negative, len(negative))
    names.insert(min(int(depth * (len(names) + 1)), len(names)), positive[0])
    return names


def write_files(samples: Iterable[Sample], out: Path) -> dict[str, Any]:
    """Entries by number of images, and the images under `out/images`. An imported sample gives its own entry back."""
    by_count: dict[str, list[Entry]] = {}
    left_out = 0
    for sample in samples:
        if "vhs" not in sample.meta and not _pairs(sample):
            left_out += 1
            continue
        names = write_images(sample, out / "images", exact="vhs" in sample.meta)
        for entry in _entries_of(sample, names):
            oracle = not entry["neg_image"]
            by_count.setdefault("oracle" if oracle else str(len(names)), []).append(entry)
    if not by_count:
        raise DataError(f"none of the {left_out} samples asks a question whose answer is yes or no, as Visual Haystacks does")
    for count, found in by_count.items():
        (out / f"visual_haystack_{count}.json").write_text(json.dumps(found, ensure_ascii=False, indent=1))
    counts = {count: len(found) for count, found in sorted(by_count.items())}
    return {"entries": counts, "samples_without_yes_or_no": left_out}


def _entries_of(sample: Sample, names: list[str]) -> Iterable[Entry]:
    if "vhs" in sample.meta:
        yield sample.meta["vhs"]
        return
    for question, answer in _pairs(sample):
        yield {
            "conversations": [
                {"from": "human", "value": question.text.removeprefix(PROMPT)},
                {"from": "gpt", "value": answer.text.lower()},
            ],
            "pos_image": [names[needle] for needle in question.needles],
            "neg_image": [name for index, name in enumerate(names) if index not in question.needles],
        }


def _pairs(sample: Sample) -> list[tuple[Turn, Turn]]:
    """Questions that are answered yes or no, with their answers."""
    pairs = zip(sample.turns, sample.turns[1:], strict=False)
    return [(asked, said) for asked, said in pairs if (asked.role, said.role) == ("user", "assistant") and said.text.lower() in ANSWERS]


def write_images(sample: Sample, folder: Path, *, exact: bool = False) -> list[str]:
    """The images under the names they came with, or under the sample's key where there are none, or where the name says another format or
    is another picture's. `exact`: the names must stay, because an entry that is given back says them."""
    known = sample.meta.get("image_paths") or []
    names = []
    for index, image in enumerate(sample.images):
        fmt = describe(image).fmt
        own = f"{sample.key}.{index:03d}.{fmt}"
        name = known[index] if len(known) == len(sample.images) else own
        path = _inside(folder, name, sample.key)
        taken = path.exists() and path.read_bytes() != image
        if taken and exact:
            raise DataError(
                f"image {name!r} is another picture than an earlier sample's of that name; export such sets apart", key=sample.key
            )
        if not exact and (taken or SUFFIXES.get(path.suffix.lower(), fmt) != fmt):
            name, path = own, _inside(folder, own, sample.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
        names.append(name)
    return names


def _inside(folder: Path, name: str, key: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise DataError(f"image name {name!r} leads out of {folder}", key=key)
    return path


def score(folder: Path, seed: int = 0) -> dict[str, Any]:
    """Scores of each `{N}_images` folder of results, by the benchmark's rule and by the strict one."""
    groups = sorted(folder.glob("*_images"), key=lambda path: (len(path.name), path.name)) or [folder]
    results = {}
    for group in groups:
        entries = {str(path): read_json(path) for path in visible(group, "*.json")}
        if not entries:
            raise DataError(f"{group} holds no results (*.json)")
        results[group.name.removesuffix("_images")] = score_entries(list(entries.values()), seed, list(entries))
    return {"benchmark": "vhs", "results": results}


def score_entries(entries: list[Entry], seed: int = 0, places: Sequence[str] = ()) -> dict[str, float]:
    """Accuracy and compliance. Official: the answer is among the words of the response; mean and deviation over 100 resamples, here with
    a seed. Strict: the response is the answer and nothing else. `places`: where each entry stands, for sentences."""
    places = places or [f"answer {number}" for number in range(len(entries))]
    rows = [_judge(entry, place) for entry, place in zip(entries, places, strict=True)]
    table = np.array(rows, np.float64)  # [entries, 4]
    rng = np.random.default_rng(seed)
    means = np.array([table[rng.integers(0, len(table), len(table))].mean(0) for _ in range(RESAMPLES)])
    return {
        "entries": len(table),
        "official_accuracy": float(means[:, 0].mean()),
        "official_accuracy_std": float(means[:, 0].std()),
        "official_compliance": float(means[:, 1].mean()),
        "strict_accuracy": float(table[:, 2].mean()),
        "says_yes_and_no": float(table[:, 3].mean()),
    }


def _judge(entry: Entry, place: str) -> np.ndarray:
    """(in the words, compliant, exactly the answer, both yes and no), a mean where the entry has one response for each needle position."""
    try:
        said = take(entry, "conversations", list)
        answer, responses = take(said[1] if len(said) > 1 else {}, "value", str), _responses(entry)
    except DataError as error:
        raise DataError(f"{place}: {error.reason}") from None
    rows = [
        (
            is_right(answer, response),
            is_compliant(response),
            is_exact(answer, response),
            words(response.lower()).issuperset(ANSWERS),
        )
        for response in responses
    ]
    return np.mean(np.array(rows, np.float64), axis=0)


def _responses(entry: Entry) -> list[str]:
    """One response, or one for each needle position."""
    holder = entry if "response" in entry else take(entry, "result", dict)
    response = take(holder, "response", (str, list))
    responses = [response] if isinstance(response, str) else take_strings(holder, "response")
    if not responses:
        raise DataError("an entry without responses")
    return responses
