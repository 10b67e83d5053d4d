"""Laws of building: the number of threads changes nothing, a bad entry is named, an interrupted build goes on to the same bytes."""

import json
from dataclasses import replace

import pytest
from data_samples import picture
from format_examples import EXAMPLES, FOLDER, LLAVA, OBELICS, build_set, changed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools import build as building
from data_tools.build import Build
from data_tools.inputs import entries
from data_tools.verify import verify
from laid_ds.data.index import DATASET
from laid_ds.data.record import DataError


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


def test_the_user_s_word_makes_haystacks_unless_an_entry_speaks_against_it(tmp_path, pictures):
    one = {"image": ["p0.jpg", "p1.jpg"], "conversations": [{"from": "human", "value": "A cat?"}, {"from": "gpt", "value": "no"}]}
    plain, said = (build_set(tmp_path / name, "llava", [one], pictures, haystack=name == "said").read(0) for name in ("plain", "said"))
    assert (plain.haystack, said.haystack) == (False, True)
    assert "haystack" not in json.loads((tmp_path / "plain" / "build.json").read_text())
    named = {**one, "conversations": [{"from": "human", "value": "What is Image-2?"}, {"from": "gpt", "value": "a dot"}]}
    with pytest.raises(DataError, match=r"entry 1: --haystack .* names an image by its place \('Image-2'\)"):
        build_set(tmp_path / "named", "llava", [one, named], pictures, haystack=True)
    ends = {**one, "conversations": one["conversations"][:1]}
    with pytest.raises(DataError, match=r"entry 0: --haystack .* is not a row of questions"):
        build_set(tmp_path / "ends", "llava", [ends], pictures, haystack=True)


@pytest.mark.parametrize("bad", ["\ud800", {"\udfff": 1}])
def test_an_id_that_cannot_be_written_is_the_fault_of_its_entry(tmp_path, pictures, bad):
    found = [FOLDER, {**FOLDER, "id": bad}, FOLDER]
    with pytest.raises(DataError, match=r"entry 1"):
        build_set(tmp_path / "set", "folder", found, pictures)
    assert len(build_set(tmp_path / "skip", "folder", found, pictures, skip_bad=True)) == 2


@pytest.mark.parametrize("place", [1, 2, 3])
@pytest.mark.parametrize("line", ['{"a": ', '{"id": NaN}', "x"])
def test_a_bad_line_is_listed_like_a_bad_entry(tmp_path, pictures, line, place):
    found = [json.dumps(FOLDER)] * 2
    (tmp_path / "lines.jsonl").write_text("\n".join([*found[: place - 1], line, *found[place - 1 :]]))
    plan = Build("folder", tmp_path / "lines.jsonl", pictures, "s")
    with pytest.raises(DataError, match=rf"lines.jsonl, line {place}"):
        building.build(plan, tmp_path / "set", resume=False, jobs=2)
    report = building.build(replace(plan, skip_bad=True), tmp_path / "skip", resume=False, jobs=2)
    assert (report["samples"], report["rejected"]) == (2, 1)
    assert next(entries(tmp_path / "skip" / "rejected.jsonl"))["entry"] == place - 1


def test_a_prefix_that_makes_no_key_is_refused_before_anything_is_read(tmp_path, pictures):
    (tmp_path / "lines.jsonl").write_text("no JSON")
    with pytest.raises(DataError, match=r"key 'a\.b-00000000' must be"):
        building.build(Build("folder", tmp_path / "lines.jsonl", pictures, "a.b"), tmp_path / "set", resume=False, jobs=1)


def test_ignored_fields_are_left_out_at_every_level(tmp_path, pictures):
    turns = [{**turn, "style": "short"} for turn in LLAVA["conversations"]]
    entry = {**LLAVA, "conversations": turns, "kto_tag": True}
    with pytest.raises(DataError, match=r"entry 0: field 'kto_tag' says a preference"):
        build_set(tmp_path / "set", "llava", [entry], pictures)
    with pytest.raises(DataError, match=r"entry 0: field 'style' is not known"):
        build_set(tmp_path / "set2", "llava", [entry], pictures, ignore=("kto_tag",))
    ignored = build_set(tmp_path / "set3", "llava", [entry], pictures, ignore=("kto_tag", "style"))
    assert ignored.read(0).turns == build_set(tmp_path / "plain", "llava", [LLAVA], pictures).read(0).turns


def test_the_result_counts_what_was_done_to_images(tmp_path, pictures):
    root = tmp_path / "images"
    root.mkdir()
    (root / "p0.jpg").write_bytes(picture(0))
    for name in ("a.bmp", "b.bmp", "c.tiff"):
        Image.new("RGB", (8, 8)).save(root / name)
    source = tmp_path / "lines.jsonl"
    found = [
        {**FOLDER, "images": ["a.bmp", "p0.jpg"]},
        {**FOLDER, "images": ["b.bmp", "c.tiff"]},
        {**FOLDER, "images": ["c.tiff", "gone.jpg"]},
    ]
    source.write_text("".join(json.dumps(entry) + "\n" for entry in found))
    report = building.build(Build("folder", source, root, "s", skip_bad=True), tmp_path / "set", resume=False, jobs=2)
    counts = {name: count for name, count in report.items() if name.startswith("images")}
    assert counts == {"images_re_encoded_bmp": 2, "images_re_encoded_tiff": 1}  # of the samples that are in the set
    source.write_text(json.dumps({**OBELICS, "images": [None, "p0.jpg", None, "gone.jpg"]}))
    report = building.build(Build("obelics", source, root, "s", keep_rest=True), tmp_path / "documents", resume=False, jobs=2)
    assert report["images_lost"] == 1


@pytest.mark.parametrize("format, example", EXAMPLES)
@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_entry_becomes_a_sample_or_is_named(tmp_path_factory, pictures, format, example, data):
    folder = tmp_path_factory.mktemp("build")
    found = [example, *(changed(example, data.draw) for _ in range(3))]
    (folder / "lines.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in found))
    plan = Build(format, folder / "lines.jsonl", pictures, "s", skip_bad=True)
    report = building.build(plan, folder / "set", resume=False, jobs=1)
    assert report["samples"] + report["rejected"] == len(found)
    rejected = list(entries(folder / "set" / "rejected.jsonl")) if report["rejected"] else []
    assert all(f"entry {line['entry']}:" in line["reason"] or f"line {line['entry'] + 1}:" in line["reason"] for line in rejected)
    assert verify(folder / "set", True, 1)["sound"]


def test_a_sample_that_the_processor_cannot_take_is_refused_at_build_and_found_in_a_set(tmp_path, world):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (1, 5000)).save(tmp_path / "images" / "thin.png")
    Image.new("RGB", (40, 50)).save(tmp_path / "images" / "wide.png")
    found = [{"images": [name], "question": "?", "answer": "a"} for name in ("wide.png", "thin.png")]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in found))
    plan = Build("folder", tmp_path / "lines.jsonl", tmp_path / "images", "s")
    with pytest.raises(DataError, match=r"entry 1: image 0 of 1 x 5000 pixels is refused by the processor of .*aspect ratio"):
        building.build(replace(plan, processor=world.student), tmp_path / "asked", resume=False, jobs=2)
    building.build(plan, tmp_path / "set", resume=False, jobs=2)
    assert verify(tmp_path / "set", True, 2)["sound"]
    (problem,) = verify(tmp_path / "set", True, 2, world.student)["problems"]
    assert (problem["key"], "1 x 5000" in problem["reason"]) == ("s-00000001", True)
    with pytest.raises(ValueError, match="needs --deep"):
        verify(tmp_path / "set", False, 2, world.student)
