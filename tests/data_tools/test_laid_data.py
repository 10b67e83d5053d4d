"""Laws of the command line: every verb has help with an example and works on a small set; bad input is one sentence and exit code 2."""

import json
import os
from pathlib import Path

import pytest
from data_samples import make_sample, picture, write_dataset
from PIL import Image
from typer.main import get_command

from data_tools import cli
from laid_ds.data.dataset import Dataset

VERBS = [name for name in get_command(cli.app).commands if name != "synth"]
SAMPLES = [make_sample(i, i % 4) for i in range(25)]


@pytest.fixture
def folder(tmp_path) -> Path:
    write_dataset(tmp_path / "set", SAMPLES, samples_per_shard=7)
    return tmp_path / "set"


@pytest.fixture
def source(tmp_path) -> tuple[Path, Path]:
    """(lines, image root)."""
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"p{number}.jpg").write_bytes(picture(number))
    entry = {"images": ["p0.jpg", "p1.jpg"], "question": "Same?", "answer": "no"}
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(entry) + "\n" for _ in range(5)))
    return tmp_path / "lines.jsonl", tmp_path / "images"


def test_the_verbs_are_those_that_are_documented():
    expected = "build compose import export score index verify repair info stats plan cat preview reshard merge split shuffle"
    assert set(VERBS) == set(expected.split())


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(laid_data, verb):
    outcome = laid_data(verb, "--help")
    assert outcome.code == 0
    assert f"Example: laid-data {verb}" in outcome.out
    assert "--json" in outcome.out


def test_a_set_is_built_and_looked_at(laid_data, source, tmp_path):
    lines, images = source
    out = tmp_path / "built"
    built = laid_data("build", "folder", lines, out, "--images", images, "--samples-per-shard", 2, "--licence", "CC0-1.0", "--json")
    assert built.json == {"folder": str(out), "shards": 3, "samples": 5, "rejected": 0}
    assert laid_data("info", out, "--json").json["samples"] == 5
    stats = laid_data("stats", out, "--json").json
    assert stats["licences"] == {"CC0-1.0": 5}
    assert stats["images_histogram"] == {"below 4": 5}
    assert laid_data("verify", out, "--deep").code == 0
    again = laid_data("build", "folder", lines, out, "--images", images, "--samples-per-shard", 2, "--licence", "CC0-1.0", "--resume")
    assert "already complete: True" in again.out


def test_cat_and_preview_show_a_sample(laid_data, folder, tmp_path):
    shown = laid_data("cat", folder, "sample-00006", "--images", tmp_path / "files", "--json").json
    assert shown["turns"][0] == {"role": "user", "text": "[0][1]which one?", "needles": [1], "choices": ["yes", "no"]}
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == ["sample-00006.000.jpg", "sample-00006.001.jpg"]
    assert (tmp_path / "files" / "sample-00006.001.jpg").read_bytes() == SAMPLES[6].images[1]
    assert "user: [0][1]which one?" in laid_data("preview", folder, "--first", 6, "--sheet", tmp_path / "sheet.png").out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (8 * 128, 142)


def test_plan_counts_steps_and_agrees_with_the_stream(laid_data, folder):
    plain = laid_data("plan", folder, "--world-size", 2, "--json").json
    assert (plain["slots"], plain["micro_steps_per_epoch"]) == (25, 12.5)
    packed = laid_data("plan", folder, "--world-size", 2, "--budget", 100, "--json").json
    assert packed["packs"] < 25
    assert packed["fill"] > plain["fill"]
    assert laid_data("plan", folder, "--shuffle", "none", "--json").json["first"][0] == {"position": 0, "key": "sample-00000"}


def test_a_blend_is_planned_by_its_weights(laid_data, folder, tmp_path):
    write_dataset(tmp_path / "more", [make_sample(i, 1) for i in range(100, 115)])
    plan = laid_data("plan", folder, tmp_path / "more", "--weights", "1,3", "--shuffle", "none", "--json").json
    assert plan["samples"] == 40
    assert sum(entry["key"] >= "sample-00100" for entry in plan["first"]) == 3


def test_samples_survive_every_rewrite(laid_data, folder, tmp_path):
    def bytes_of(*folders):
        return {sample.key: (sample.turns, sample.images) for sample in Dataset.open([tmp_path / name for name in folders])}

    whole = bytes_of("set")
    assert laid_data("reshard", folder, tmp_path / "small", "--samples-per-shard", 3, "--json").json["shards"] == 9
    assert laid_data("split", folder, tmp_path, "--shares", "train=0.8,val=0.2").code == 0
    assert laid_data("merge", tmp_path / "train", tmp_path / "val", "--out", tmp_path / "merged").code == 0
    assert laid_data("shuffle", folder, tmp_path / "shuffled", "--seed", 1).code == 0
    assert len(Dataset.open(tmp_path / "val")) == 5
    for name in ("small", "merged", "shuffled"):
        assert bytes_of(name) == whole
        assert laid_data("verify", tmp_path / name).code == 0
    assert Dataset.open(tmp_path / "shuffled").keys.tolist() != Dataset.open(folder).keys.tolist()
    assert laid_data("reshard", folder, tmp_path / "small", "--resume", "--json").json["samples"] == 25
    other = laid_data("shuffle", folder, tmp_path / "small", "--resume")
    assert (other.code, "holds other samples" in other.err) == (2, True)
    short = laid_data("reshard", folder, tmp_path / "short", "--max-tokens", 15, "--json").json
    assert short["samples"] + short["left_out"] == 25
    assert Dataset.open(tmp_path / "short").lengths.max() <= 15


def test_verify_and_repair_tell_by_their_exit_code(laid_data, folder):
    assert laid_data("verify", folder).code == 0
    os.truncate(folder / "shard-000001.tar", 9000)
    found = laid_data("verify", folder, "--json")
    assert found.code == 1
    assert {problem["shard"] for problem in found.json["problems"]} == {"shard-000001.tar"}
    assert "shard shard-000001.tar, key sample-000" in laid_data("verify", folder).out
    assert laid_data("repair", folder).code == 1
    assert laid_data("verify", folder, "--deep").code == 0
    assert laid_data("repair", folder).code == 0
    assert laid_data("index", folder, "--json").json["shards"] == 4


def test_benchmarks_come_in_go_out_and_are_scored(laid_data, source, tmp_path):
    _, images = source
    entry = {"conversations": [{"value": "Cat?"}, {"value": "yes"}], "pos_image": ["p0.jpg"], "neg_image": ["p1.jpg", "p2.jpg"]}
    (tmp_path / "visual_haystack_3.json").write_text(json.dumps([entry]))
    assert laid_data("import", "vhs", tmp_path / "visual_haystack_3.json", tmp_path / "vhs", "--images", images, "--depth", 0).code == 0
    assert laid_data("export", "vhs", tmp_path / "vhs", tmp_path / "out").code == 0
    assert json.loads((tmp_path / "out" / "visual_haystack_3.json").read_text()) == [entry]
    assert laid_data("export", "mm-niah", tmp_path / "vhs", tmp_path / "niah", "--json").json["entries"] == 1
    assert laid_data("export", "vhs", tmp_path / "vhs", tmp_path / "out").code == 2
    mixed = [{"images": "p0.jpg", "question": "?", "answer": answer} for answer in ("yes", "a dot")]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, mixed)))
    assert laid_data("build", "folder", tmp_path / "mixed.jsonl", tmp_path / "mixed", "--images", images).code == 0
    lost = laid_data("export", "vhs", tmp_path / "mixed", tmp_path / "some", "--json")
    assert (lost.code, lost.json["samples_without_yes_or_no"]) == (1, 1)
    (tmp_path / "results" / "3_images").mkdir(parents=True)
    (tmp_path / "results" / "3_images" / "000.json").write_text(json.dumps({**entry, "result": {"response": "Yes."}}))
    assert laid_data("score", "vhs", tmp_path / "results", "--json").json["results"]["3"]["strict_accuracy"] == 1


def test_the_choices_of_build_reach_it(laid_data, tmp_path):
    root, lines = tmp_path / "images", tmp_path / "lines.jsonl"
    root.mkdir()
    (root / "cut.jpg").write_bytes(picture(0, width=200, height=150)[:-4000])
    Image.new("RGB", (20_000, 10)).save(root / "long.bmp")
    entry = {"question": "?", "answer": "a"}
    lines.write_text(json.dumps({**entry, "images": "cut.jpg"}) + "\n" + json.dumps({**entry, "images": "long.bmp", "hint": 1}))
    assert "entry 0: image 'cut.jpg': image cannot be decoded" in laid_data("build", "folder", lines, tmp_path / "a", "--images", root).err
    build = ("build", "folder", lines, tmp_path / "b", "--images", root, "--no-decode", "--shrink", "--ignore", "hint", "--json")
    assert laid_data(*build).json == {"folder": str(tmp_path / "b"), "shards": 1, "samples": 2, "rejected": 0, "images_shrunk": 1}
    lines.write_text(json.dumps({"texts": ["a", None, None], "images": [None, "gone.png", "long.bmp"]}))
    documents = laid_data("build", "obelics", lines, tmp_path / "c", "--images", root, "--shrink", "--keep-rest", "--json").json
    assert (documents["samples"], documents["images_lost"]) == (1, 1)


def test_an_answer_that_is_not_learned_is_shown(laid_data, tmp_path):
    (tmp_path / "chat.json").write_text(json.dumps([{"messages": [{"role": "assistant", "content": "draft", "loss": False}]}]))
    laid_data("build", "llava", tmp_path / "chat.json", tmp_path / "set", "--images", tmp_path)
    shown = laid_data("cat", tmp_path / "set", "sample-00000000", "--json").json
    assert shown["turns"] == [{"role": "assistant", "text": "draft", "supervised": False}]


BAD = {
    "no such folder": (["info", "{tmp}/none"], "it has no dataset.json"),
    "no shards": (["verify", "{tmp}/images"], "holds no shards"),
    "not a folder": (["verify", "{tmp}/lines.jsonl"], "is no folder"),
    "no such key": (["cat", "{tmp}/set", "nobody"], "no sample has the key 'nobody'"),
    "no such source": (["build", "llava", "{tmp}/none.json", "{tmp}/new", "--images", "{tmp}/images"], "No such file"),
    "no image root": (["build", "folder", "{tmp}/lines.jsonl", "{tmp}/new", "--images", "{tmp}/none"], "is no folder"),
    "another format": (["build", "llava", "{tmp}/lines.jsonl", "{tmp}/new", "--images", "{tmp}/images"], "entry 0: neither conversations"),
    "full folder": (["build", "folder", "{tmp}/lines.jsonl", "{tmp}/set", "--images", "{tmp}/images"], "already holds a finished data set"),
    "broken json": (["build", "folder", "{tmp}/broken.json", "{tmp}/new", "--images", "{tmp}/images"], "entry 1:"),
    "prefix": (["build", "folder", "{tmp}/lines.jsonl", "{tmp}/new", "--images", "{tmp}/images", "--prefix", "a.b"], "key 'a.b-00000000'"),
    "keep rest": (
        ["build", "folder", "{tmp}/lines.jsonl", "{tmp}/new", "--images", "{tmp}/images", "--keep-rest"],
        "--keep-rest is for documents",
    ),
    "depth": (["import", "mm-niah", "{tmp}/lines.jsonl", "{tmp}/new", "--images", "{tmp}/images", "--depth", "0"], "--depth is for vhs"),
    "seed": (["import", "llava", "{tmp}/lines.jsonl", "{tmp}/new", "--images", "{tmp}/images", "--seed", "1"], "--seed is for vhs"),
    "processor without deep": (["verify", "{tmp}/set", "--processor", "{tmp}/model"], "needs --deep"),
    "no processor": (
        ["build", "folder", "{tmp}/lines.jsonl", "{tmp}/new", "--images", "{tmp}/images", "--processor", "{tmp}/model"],
        "holds no processor",
    ),
    "shares": (["split", "{tmp}/set", "{tmp}/new", "--shares", "train=0.9"], "sum to 0.9"),
    "shares form": (["split", "{tmp}/set", "{tmp}/new", "--shares", "train"], "not of the form"),
    "shares of two points": (["split", "{tmp}/set", "{tmp}/new", "--shares", "train=1.0.0"], "not of the form"),
    "empty share": (["split", "{tmp}/set", "{tmp}/new", "--shares", "new=0.99,val=0.01"], "the share val=0.01 of 25 samples is none"),
    "nothing left": (["reshard", "{tmp}/set", "{tmp}/new", "--max-tokens", "1"], "--max-tokens 1 leaves no sample of"),
    "a part that is there": (["split", "{tmp}/set", "{tmp}", "--shares", "new=0.5,set=0.5"], "/set already holds a data set"),
    "same set twice": (["merge", "{tmp}/set", "{tmp}/set", "--out", "{tmp}/new"], "the key is also in shard"),
    "budget too small": (["plan", "{tmp}/set", "--budget", "10"], "does not fit a budget of 10"),
    "shuffle": (["plan", "{tmp}/set", "--shuffle", "some"], "shuffle 'some' is neither"),
    "no weights": (["plan", "{tmp}/set", "--weights", "a"], "--weights 'a': give one number above 0 for each folder"),
    "no place": (["import", "vhs", "{tmp}/lines.jsonl", "{tmp}/new", "--images", "{tmp}/images", "--depth", "nan"], "--depth nan: give a"),
    "weights": (["plan", "{tmp}/set", "--weights", "1,2"], "2 weights for 1 sources"),
    "token counts": (["stats", "{tmp}/set", "--tokens", "fp"], "no token counts named 'fp'"),
    "no results": (["score", "vhs", "{tmp}/none"], "does not exist"),
    "unknown format": (["build", "csv", "x", "y", "--images", "z"], "csv"),
    "missing option": (["build", "folder", "x", "y"], "--images"),
}


@pytest.mark.parametrize("args, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_sentence(laid_data, folder, source, tmp_path, args, message):
    (tmp_path / "broken.json").write_text('[{"images": ["p0.jpg"], "question": "?", "answer": "a"}, {"images"')
    outcome = laid_data(*(arg.replace("{tmp}", str(tmp_path)) for arg in args))
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    assert not list(tmp_path.glob("new/**/dataset.json"))


@pytest.mark.parametrize("verb", [("split", "--shares", "train=0.99,val=0.01"), ("reshard", "--max-tokens", "1")])
def test_a_part_without_samples_is_refused_before_anything_is_written(laid_data, folder, tmp_path, verb):
    assert laid_data(verb[0], folder, tmp_path / "new", *verb[1:]).code == 2
    assert not (tmp_path / "new").exists()


def test_nothing_but_the_result_is_printed_where_no_terminal_listens(laid_data, folder):
    assert laid_data("verify", folder, "--json").err == ""


def test_files_of_all_sizes_become_one_set_in_their_order(laid_data, source, tmp_path):
    _, images = source
    entries = {}
    for size in (1, 3, 2):
        entries[size] = [{"conversations": [{"value": f"Is it {n}?"}, {"value": "no"}], "pos_image": ["p0.jpg"]} for n in range(3)]
        for entry in entries[size]:
            entry["neg_image"] = ["p1.jpg", "p2.jpg"][: size - 1]
        (tmp_path / f"visual_haystack_{size}.json").write_text(json.dumps(entries[size]))
    files = [tmp_path / f"visual_haystack_{size}.json" for size in (1, 3, 2)]
    assert laid_data("import", "vhs", *files, tmp_path / "vhs", "--images", images, "--json").json["samples"] == 9
    found = list(Dataset.open(tmp_path / "vhs"))
    assert [len(sample.images) for sample in found] == [1] * 3 + [3] * 3 + [2] * 3
    assert [sample.meta["vhs"] for sample in found] == entries[1] + entries[3] + entries[2]
    again = ["import", "vhs", *files, tmp_path / "vhs", "--images", images, "--resume"]
    assert laid_data(*again, "--json").json["already_complete"]
    assert "holds another build" in laid_data(*(word for word in again if word != files[2])).err
    entries[2][1]["conversations"][1]["value"] = "perhaps"
    files[2].write_text(json.dumps(entries[2]))
    found = laid_data("import", "vhs", *files, tmp_path / "bad", "--images", images)
    assert (found.code, "visual_haystack_2.json, entry 1: answer 'perhaps'" in found.err) == (2, True)
    found = laid_data("import", "vhs", files[0], files[0], tmp_path / "twice", "--images", images)
    assert (found.code, f"{files[0]} is given twice" in found.err) == (2, True)
    found = laid_data("import", "mm-niah", *files, tmp_path / "niah", "--images", images)
    assert (found.code, "import those of mm-niah one by one" in found.err) == (2, True)
