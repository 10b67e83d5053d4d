"""Laws of building: the number of threads changes nothing, a bad entry is named, an interrupted build goes on to the same bytes."""

import json

import pytest
from format_examples import FOLDER, build_set

from data_tools import build as building
from data_tools.build import Build
from data_tools.inputs import entries
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
