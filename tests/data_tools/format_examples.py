"""An entry of each format, readers by name, and entries with a random part replaced."""

import json

from hypothesis import strategies as st

from data_tools import build as building
from data_tools.build import FORMATS, Build
from data_tools.image_root import ImageRoot
from laid_ds.data.dataset import Dataset

LLAVA = {
    "id": "x1",
    "image": ["p0.jpg", "p1.jpg"],
    "conversations": [
        {"from": "human", "value": "<image>\nand <image> differ?"},
        {"from": "gpt", "value": "Yes."},
        {"from": "human", "value": "How?"},
        {"from": "gpt", "value": "Colour."},
    ],
}
MIRAGE = {
    **LLAVA,
    "conversations": [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "2"}],
    "relevant_images": [0, 1],
}
SHAREGPT = {
    "images": ["p2.jpg"],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "A dot."},
    ],
}
OBELICS = {"texts": ["before", None, "after", None], "images": [None, "p0.jpg", None, "deep/p6.png"]}
MMC4 = {
    "text_list": ["one", "two"],
    "image_info": [{"image_name": "p3.jpg", "matched_text_index": 1}, {"image_name": "p1.jpg", "matched_text_index": 0}],
}
FOLDER = {
    "images": ["p0.jpg", "p1.jpg"],
    "question": "Same?",
    "answer": "no",
    "needles": [1],
    "choices": ["yes", "no"],
    "licence": "CC0-1.0",
}
VHS = {
    "conversations": [{"from": "human", "value": "For the image with the cat, is there a dog?"}, {"from": "gpt", "value": "yes"}],
    "pos_image": ["p0.jpg"],
    "neg_image": ["p1.jpg", "p2.jpg", "deep/p6.png"],
    "other": {"kept": 1},
}
NIAH = {
    "id": 3,
    "images_list": ["p0.jpg", "p1.jpg"],
    "context": "text <image> more <image> end",
    "question": "Which one?",
    "answer": 1,
    "meta": {
        "placed_depth": 0.4,
        "context_length": 1500,
        "context_length_text": 1000,
        "context_length_image": 500,
        "num_images": 2,
        "needles": ["p1.jpg"],
        "choices": None,
        "choices_image_path": ["p2.jpg", "p3.jpg"],
    },
}
LONGBENCH = {"id": 1, "ctxs": ["p0.jpg", "p1.jpg"], "question": "Is there a cat?", "answer": "no"}
LONGBENCH_NIAH = {
    "id": 2,
    "ctxs": [{"text": "a <image> b"}, {"text": "c"}],
    "question": "Which?",
    "image_list": ["p0.jpg"],
    "choices_image": ["p1.jpg", "p2.jpg"],
    "needle_image_list": ["p0.jpg"],
    "answer": 0,
}
LONGBENCH_DOCUMENT = {
    "id": 3,
    "page_list": ["p0.jpg", "deep/p6.png"],
    "doc_name": "a-rather-long-name-of-a-paper",
    "question": "How many?",
    "answer": "3",
    "answer_format": "Integer",
}
LONGBENCH_PASSAGES = {
    "id": 4,
    "ctxs": [{"title": "Cats", "text": "They purr."}, {"title": "Dogs", "text": "They bark."}],
    "image": "p0.jpg",
    "question": "What is this?",
    "answer": ["cat", "house cat"],
}
EXAMPLES = [
    ("llava", LLAVA),
    ("llava", MIRAGE),
    ("sharegpt", SHAREGPT),
    ("obelics", OBELICS),
    ("mmc4", MMC4),
    ("folder", FOLDER),
    ("vhs", VHS),
    ("mm-niah", NIAH),
    ("mmlongbench", LONGBENCH),
    ("mmlongbench", LONGBENCH_NIAH),
    ("mmlongbench", LONGBENCH_DOCUMENT),
    ("mmlongbench", LONGBENCH_PASSAGES),
]


def read(format: str, entry, pictures):
    return FORMATS[format](entry, "key", ImageRoot(pictures))


def build_set(out, format, found, pictures, **options) -> Dataset:
    source = out.parent / f"{out.name}.jsonl"
    source.write_text("".join(json.dumps(entry) + "\n" for entry in found))
    building.build(Build(format, source, pictures, "s", **options), out, resume=False, jobs=2)
    return Dataset.open(out)


NAMES = st.sampled_from(
    ["p0.jpg", "../secret.jpg", "/etc/passwd", "link.jpg", "deep/../../secret.jpg", "", ".", "a\0b", "x" * 5000, "http://h/x.jpg", "deep"]
)
TEXT = st.sampled_from(["yes", "<image>", "<image><image>", "", "\ud800", "Which?"]) | st.text(max_size=5)
SCALAR = st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats() | TEXT | NAMES
VALUE = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=2), max_leaves=6)


def changed(entry, draw):
    """The entry with a random part replaced."""
    if isinstance(entry, dict) and entry and draw(st.booleans()):
        name = draw(st.sampled_from(sorted(entry)))
        return {**entry, name: changed(entry[name], draw)}
    if isinstance(entry, list) and entry and draw(st.booleans()):
        place = draw(st.integers(0, len(entry) - 1))
        return [*entry[:place], changed(entry[place], draw), *entry[place + 1 :]]
    return draw(VALUE)
