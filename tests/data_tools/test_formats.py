"""Laws of importers: field by field in and out again; any other input is one documented error; no name leads out of the image root."""

import contextlib
import io
import json
import struct
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from data_samples import picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools import build as building
from data_tools import mm_niah, mmlongbench, visual_haystacks
from data_tools.build import FORMATS, Build
from data_tools.inputs import ImageRoot, entries, interleave
from laid_ds.data.dataset import Dataset
from laid_ds.data.index import DATASET
from laid_ds.data.record import DataError, Turn, encode


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A root with p0.jpg .. p5.jpg and deep/p6.png, and a file beside the root that nobody may reach."""
    root = tmp_path_factory.mktemp("files") / "root"
    (root / "deep").mkdir(parents=True)
    for number in range(6):
        (root / f"p{number}.jpg").write_bytes(picture(number))
    (root / "deep" / "p6.png").write_bytes(picture(6, "PNG"))
    (root.parent / "secret.jpg").write_bytes(picture(7))
    (root / "link.jpg").symlink_to(root.parent / "secret.jpg")
    return root


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
]


def read(format: str, entry, pictures):
    return FORMATS[format](entry, "key", ImageRoot(pictures))


def test_llava_keeps_turns_and_places(pictures):
    sample = read("llava", LLAVA, pictures)
    assert sample.turns == (
        Turn("user", (0, "\nand ", 1, " differ?")),
        Turn("assistant", ("Yes.",)),
        Turn("user", ("How?",)),
        Turn("assistant", ("Colour.",)),
    )
    assert sample.images == (picture(0), picture(1))
    assert sample.meta == {"id": "x1"}


def test_one_mark_stands_for_all_images_and_relevant_ones_are_needles(pictures):
    assert read("llava", MIRAGE, pictures).turns[0] == Turn("user", (0, 1, "\nWhich?"), needles=(1,))
    assert [turn.role for turn in read("sharegpt", SHAREGPT, pictures).turns] == ["system", "user", "assistant"]


def test_documents_are_interleaved_as_they_say(pictures):
    assert read("obelics", OBELICS, pictures).turns[0].segments == ("before", 0, "after", 1)
    mmc4 = read("mmc4", MMC4, pictures)
    assert mmc4.turns[0].segments == (0, "one", 1, "two")
    assert mmc4.images == (picture(1), picture(3))


def test_folder_lines_carry_needles_choices_and_licence(pictures):
    sample = read("folder", FOLDER, pictures)
    assert sample.turns == (Turn("user", (0, 1, "Same?"), (1,), ("yes", "no")), Turn("assistant", ("no",)))
    assert sample.licence == "CC0-1.0"


def test_haystacks_know_their_needle_and_their_order_is_a_function_of_the_seed(pictures):
    root = ImageRoot(pictures)
    orders = [visual_haystacks.read_entry(VHS, "key", root, seed=seed).meta["image_paths"] for seed in (0, 0, 1, 2)]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) > 1
    for depth, place in ((0, 0), (0.5, 2), (1, 3)):
        sample = visual_haystacks.read_entry(VHS, "key", root, depth=depth)
        assert sample.turns[0].needles == (place,)
        assert sample.images[place] == picture(0)


def test_mm_niah_letters_its_choices(pictures):
    sample = read("mm-niah", NIAH, pictures)
    assert sample.turns[0].segments[:4] == ("text ", 0, " more ", 1)
    assert sample.turns[0].segments[4].startswith(" end\nWhich one?\nA. ")
    assert (sample.turns[0].needles, sample.turns[0].choices, sample.turns[1].text) == ((1,), ("A", "B"), "B")
    assert len(sample.images) == 4


def test_mmlongbench_reads_both_parts(pictures):
    haystack = read("mmlongbench", LONGBENCH, pictures)
    assert [segment for segment in haystack.turns[0].segments if isinstance(segment, int)] == [0, 1]
    assert haystack.turns[0].text.endswith("Question: Is there a cat?")
    lettered = read("mmlongbench", LONGBENCH_NIAH, pictures)
    assert (lettered.turns[0].needles, lettered.turns[1].text, len(lettered.images)) == ((0,), "A", 3)


def build_set(out, format, found, pictures, **options) -> Dataset:
    source = out.parent / f"{out.name}.jsonl"
    source.write_text("".join(json.dumps(entry) + "\n" for entry in found))
    building.build(Build(format, source, pictures, "s", **options), out, resume=False, jobs=2)
    return Dataset.open(out)


def test_haystacks_come_out_as_they_went_in(tmp_path, pictures):
    oracle = {**VHS, "neg_image": []}
    dataset = build_set(tmp_path / "set", "vhs", [VHS, oracle], pictures)
    report = visual_haystacks.write_files(dataset, tmp_path / "out")
    assert report["entries"] == {"4": 1, "oracle": 1}
    assert json.loads((tmp_path / "out" / "visual_haystack_4.json").read_text()) == [VHS]
    for name in VHS["pos_image"] + VHS["neg_image"]:
        assert (tmp_path / "out" / "images" / name).read_bytes() == (pictures / name).read_bytes()
    again = visual_haystacks.read_entry(VHS, "s-00000000", ImageRoot(tmp_path / "out" / "images"))
    assert encode(again) == encode(visual_haystacks.read_entry(VHS, "s-00000000", ImageRoot(pictures)))


def test_lines_come_out_as_they_went_in(tmp_path, pictures):
    dataset = build_set(tmp_path / "set", "mm-niah", [NIAH], pictures)
    mm_niah.write_file(dataset, tmp_path / "out")
    assert [json.loads(line) for line in (tmp_path / "out" / "annotations.jsonl").read_text().splitlines()] == [NIAH]


@pytest.mark.parametrize("format", ["vhs", "mm-niah"])
def test_any_set_with_such_questions_becomes_a_benchmark(tmp_path, pictures, format):
    """Export of our own samples, and import of what was exported, keep question, answer, needles and images."""
    dataset = build_set(tmp_path / "set", "folder", [FOLDER], pictures)
    write, name = {
        "vhs": (visual_haystacks.write_files, "visual_haystack_2.json"),
        "mm-niah": (mm_niah.write_file, "annotations.jsonl"),
    }[format]
    write(dataset, tmp_path / "out")
    (entry,) = entries(tmp_path / "out" / name)
    sample = read(format, entry, tmp_path / "out" / "images")
    question, answer = sample.turns
    (needle,) = question.needles
    assert sample.images[needle] == picture(1)
    assert "Same?" in question.text
    assert answer.text == {"vhs": "no", "mm-niah": "B"}[format]


def test_an_export_never_writes_outside_its_folder(tmp_path, pictures):
    sample = visual_haystacks.read_entry(VHS, "key", ImageRoot(pictures))
    hostile = replace(sample, meta={**sample.meta, "image_paths": ["../../p0.jpg", "/p1.jpg", "p2.jpg", "p3.jpg"]})
    with pytest.raises(DataError, match="leads out"):
        visual_haystacks.write_files([hostile], tmp_path / "out")
    assert not (tmp_path / "p0.jpg").exists()


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


@pytest.mark.parametrize("format, example", EXAMPLES)
@given(data=st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_entry_is_read_or_refused(pictures, format, example, data):
    entry = changed(example, data.draw)
    try:
        sample = read(format, entry, pictures)
        encode(sample)
    except DataError:
        return
    assert picture(7) not in sample.images


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "/etc/passwd", "link.jpg", "deep/../../secret.jpg", "a\0b", "x" * 5000, "http://h/x.jpg", "", "none.jpg"]
)
def test_a_name_that_is_no_file_under_the_root_is_refused_with_the_name(pictures, name):
    with pytest.raises(DataError, match="image"):
        ImageRoot(pictures).read(name)


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(100_000, 1), (1, 100_000), (12_000, 12_000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_by_its_header(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png_header(*size))
    with pytest.raises(DataError, match=rf"bomb.png.*{size[0]} x {size[1]} pixels; the limits are"):
        ImageRoot(tmp_path).read("bomb.png")


def test_a_file_that_is_no_image_or_too_large_is_refused(tmp_path, monkeypatch):
    (tmp_path / "x.jpg").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"x.jpg.*not a jpg, png, webp, gif image"):
        ImageRoot(tmp_path).read("x.jpg")
    monkeypatch.setattr("data_tools.inputs.MAX_IMAGE_BYTES", 5)
    with pytest.raises(DataError, match="the limit is 5"):
        ImageRoot(tmp_path).read("x.jpg")


@given(text=st.text('[]{}",: \n1aé', max_size=40))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_of_entries_is_read_as_json_reads_it_or_refused(tmp_path, text):
    path = tmp_path / "entries.json"
    path.write_text(text)
    try:
        found = list(entries(path))
    except DataError:
        return
    if text.lstrip().startswith("["):
        assert found == json.loads(text)
    else:
        assert found == [json.loads(line) for line in io.StringIO(text) if line.strip()]


RESULTS = [
    (visual_haystacks.score_entries, {"conversations": [{"value": "?"}, {"value": "yes"}], "result": {"response": "no"}}),
    (visual_haystacks.score_entries, {"conversations": [{"value": "?"}, {"value": "yes"}], "response": ["no", "yes"]}),
    (mm_niah.score_lines, {"context_length": 1500, "placed_depth": [0.5], "answer": [1], "response": "[1]"}),
    (partial(mm_niah.score_lines, counting=True), {"context_length": 1500, "placed_depth": 1, "answer": "[1]", "response": "[1]"}),
    *((partial(mmlongbench.score_entries, rule=rule), {"answer": 1, "output": "B"}) for rule in ("binary", "sum", "letter", "contains")),
]


@pytest.mark.parametrize("score, result", RESULTS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_result_is_scored_or_refused(score, result, data):
    with contextlib.suppress(DataError):
        score([changed(result, data.draw)])


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_list_is_read_the_same_in_pieces_of_any_size(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("data_tools.inputs.CHUNK", chunk)
    whole = [{"a": "x]" * number, "b": [number, {"c": "é"}]} for number in range(20)]
    for indent in (None, 2):
        (tmp_path / "e.json").write_text(json.dumps(whole, indent=indent, ensure_ascii=False))
        assert list(entries(tmp_path / "e.json")) == whole


def test_marks_and_images_must_agree():
    assert interleave(["a", "b"], 2) == [(0, 1, "a"), ("b",)]
    with pytest.raises(DataError, match="2 <image> marks for 3 images"):
        interleave(["<image><image>"], 3)


def lines(count: int) -> list[dict]:
    return [{**FOLDER, "question": f"Question {number}?"} for number in range(count)]


def test_a_build_does_not_depend_on_the_number_of_threads(tmp_path, pictures):
    for jobs in (1, 5):
        source = tmp_path / "source.jsonl"
        source.write_text("".join(json.dumps(entry) + "\n" for entry in lines(20)))
        building.build(Build("folder", source, pictures, "s", samples_per_shard=6), tmp_path / f"set{jobs}", resume=False, jobs=jobs)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("set1", "set5")]
    assert files[0] == files[1]


def test_a_bad_entry_stops_the_build_or_is_listed(tmp_path, pictures):
    found = lines(10)
    found[4] = {**FOLDER, "images": ["../secret.jpg"]}
    with pytest.raises(DataError, match=r"set.jsonl, entry 4: image name '../secret.jpg' leads out"):
        build_set(tmp_path / "set", "folder", found, pictures)
    assert not (tmp_path / "set" / DATASET).exists()
    dataset = build_set(tmp_path / "skip", "folder", found, pictures, skip_bad=True)
    assert len(dataset) == 9
    (rejected,) = entries(tmp_path / "skip" / "rejected.jsonl")
    assert rejected["entry"] == 4


@pytest.mark.parametrize("stop_after", [1, 7, 13])
def test_an_interrupted_build_goes_on_to_the_same_bytes(tmp_path, pictures, monkeypatch, stop_after):
    found = lines(20)
    found[3] = found[12] = {"bad": 1}
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps(entry) + "\n" for entry in found))
    plan = Build("folder", source, pictures, "s", skip_bad=True, samples_per_shard=4)
    building.build(plan, tmp_path / "whole", resume=False, jobs=2)

    written = 0
    write = building.ShardWriter.write

    def interrupted(self, sample):
        nonlocal written
        written += 1
        if written > stop_after:
            raise KeyboardInterrupt
        write(self, sample)

    monkeypatch.setattr(building.ShardWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        building.build(plan, tmp_path / "set", resume=False, jobs=2)
    monkeypatch.setattr(building.ShardWriter, "write", write)
    building.build(plan, tmp_path / "set", resume=True, jobs=2)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "set")]
    assert files[0] == files[1]
    assert building.build(plan, tmp_path / "set", resume=True, jobs=2)["already_complete"]
    other = Build("folder", source, pictures, "t", skip_bad=True, samples_per_shard=4)
    with pytest.raises(DataError, match="holds another build"):
        building.build(other, tmp_path / "set", resume=True, jobs=2)
