"""Heads that look at the needle are found where they are, and those of a student are coupled with them as the rules say."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from data_tools import text_facts
from laid_ds import cli
from laid_ds.data.dataset import Dataset
from laid_ds.data.images import Pixels
from laid_ds.data.writer import ShardWriter
from laid_ds.evaluation import heads
from laid_ds.evaluation.haystack import window_of_size
from laid_ds.evaluation.heads import CLEAR, Looks, Probe, read_probe, retrieving_heads
from laid_ds.evaluation.retrieval import Retrieval, measure, measure_student
from laid_ds.models.processor import Renderer, load_processor
from tests.support.looking import looking


def looks(mass: dict[int, list[float]], keys: int | None = None, who: str = "teacher", flat: float = 0.0) -> Looks:
    """keys: key heads of each layer; default: as many as query heads."""
    return Looks(who, {}, max(mass) + 1, 16, 32, flat, mass, {layer: keys or len(shares) for layer, shares in mass.items()})


def blind(layers: int, heads: int, keys: int | None = None) -> Looks:
    return looks({layer: [0.01] * heads for layer in range(layers)}, keys, "student")


def test_heads_are_those_near_the_best_one_and_the_best_comes_first():
    assert retrieving_heads({0: [0.01, 0.02], 1: [0.3, 0.7], 2: [0.36, 0.34]}) == [(1, 1, 0.7), (2, 0, 0.36)]


def test_a_head_that_looks_everywhere_alike_does_not_retrieve_however_few_the_images():
    mass = {0: [0.5, 0.45], 1: [0.55, 0.97]}
    assert len(retrieving_heads(mass)) == 3
    assert retrieving_heads(mass, flat=0.48) == [(1, 1, 0.97)]


def test_a_model_that_looks_nowhere_has_none_and_says_so():
    found = looks({0: [0.01, CLEAR - 0.01], 1: [0.02, 0.03]})
    assert found.heads() == []
    assert "does not retrieve" in Retrieval(found, [0], [32], {0: [[0.0]] * 2, 1: [[0.0]] * 2}).as_text()
    with pytest.raises(ValueError, match="no head of teacher retrieves in haystacks of 16: head 1 of layer 0 with 0"):
        Probe(found, blind(2, 2)).pairs()
    nothing = Probe(found, blind(2, 2)).proposed()
    assert (nothing.pairs, nothing.heads) == ([], [])
    assert "fewer --images" in nothing.why


def test_layers_are_paired_at_the_same_depth_where_the_student_retrieves_nowhere():
    deep = {layer: [0.0, 0.9] if layer == 18 else [0.8, 0.0] if layer == 17 else [0.01, 0.02] for layer in range(30)}
    assert Probe(looks(deep), blind(30, 2)).pairs() == [(17, 17), (18, 18)]
    assert Probe(looks(deep), blind(15, 2)).pairs() == [(8, 17), (9, 18)]
    assert Probe(looks(deep), blind(3, 2)).pairs() == [(1, 18)], "two teacher layers fall on one student layer: the stronger stays"
    assert Probe(looks({0: [0.9], **{layer: [0.0] for layer in range(1, 30)}}), blind(2, 1)).pairs() == [(0, 0)]


def test_layers_are_paired_with_those_that_retrieve_in_the_student():
    deep = {layer: [0.0, 0.9] if layer == 18 else [0.8, 0.0] if layer == 10 else [0.01, 0.02] for layer in range(30)}
    shallow = {layer: [0.3, 0.0] if layer in (11, 13) else [0.0, 0.01] for layer in range(15)}
    assert Probe(looks(deep), looks(shallow)).pairs() == [(11, 18)], "10 and 18 of 30 lie at 5 and 9 of 15: both are nearest to 11"
    shallow[3] = [0.0, 0.4]
    assert Probe(looks(deep), looks(shallow)).pairs() == [(3, 10), (11, 18)]


def test_heads_are_coupled_at_the_same_share_and_never_twice():
    teacher = looks({0: [0.0] * 8, 1: [0.0, 0.0, 0.9, 0.8, 0.0, 0.0, 0.0, 0.7]})
    assert Probe(teacher, blind(4, 8)).couples([(3, 1)]) == [[(2, 2), (3, 3), (7, 7)]]
    assert Probe(teacher, blind(4, 4)).couples([(3, 1)]) == [[(1, 2), (2, 3), (3, 7)]], "1 is taken, so 3 takes the next"
    assert Probe(teacher, blind(4, 16)).couples([(3, 1)]) == [[(4, 2), (6, 3), (14, 7)]]
    assert Probe(teacher, blind(4, 8)).couples([(3, 1), (3, 1)])[1] == [(4, 2), (5, 3), (0, 7)], "none twice over all pairs of a layer"


def test_a_student_with_too_few_heads_is_refused_and_the_pairs_are_told():
    teacher = looks({0: [0.0] * 8, 1: [0.0, 0.0, 0.9, 0.8, 0.0, 0.0, 0.0, 0.7]})
    probe = Probe(teacher, blind(4, 2))
    with pytest.raises(
        ValueError, match=r"3 heads of layer 1 of teacher retrieve \(\[2, 3, 7\]\), and layer 3 of student has 2 heads left"
    ):
        probe.couples([(3, 1)])
    assert (probe.proposed().pairs, probe.proposed().heads) == ([(3, 1)], None)


def test_heads_that_retrieve_in_the_student_come_first():
    teacher = looks({0: [0.0, 0.9, 0.8, 0.0]})
    student = looks({0: [0.3, 0.0, 0.0, 0.5]})
    assert Probe(teacher, student).couples([(0, 0)]) == [[(3, 1), (0, 2)]], "the strongest with the strongest"


def test_heads_of_one_key_head_stay_together_as_long_as_they_can():
    """Teacher: 9 heads of 3 key heads; 6 and 7 read the third. Student: 8 heads of 2 key heads, 0 to 3 and 4 to 7."""
    one_group = looks({0: [0.0] * 6 + [0.9, 0.8, 0.0]}, 3)
    assert Probe(one_group, blind(1, 8, 2)).couples([(0, 0)]) == [[(5, 6), (6, 7)]]
    two_groups = looks({0: [0.0, 0.0, 0.0, 0.0, 0.9, 0.8, 0.7, 0.0, 0.0]}, 3)  # 4 and 5 read the second, 6 the third
    assert Probe(two_groups, blind(1, 8, 2)).couples([(0, 0)]) == [[(3, 4), (0, 5), (5, 6)]], "5 goes where 4 went, 6 elsewhere"
    three_groups = looks({0: [0.9, 0.0, 0.0, 0.8, 0.0, 0.0, 0.7, 0.0, 0.0]}, 3)
    assert Probe(three_groups, blind(1, 8, 2)).couples([(0, 0)]) == [[(0, 0), (4, 3), (5, 6)]], "the student has two key heads only"


def test_layers_that_are_not_there_or_do_not_retrieve_are_refused():
    probe = Probe(looks({0: [0.0], 1: [0.9]}), blind(2, 2))
    with pytest.raises(ValueError, match="layer 5 of the student was not looked at; student has the layers"):
        probe.couples([(5, 1)])
    with pytest.raises(ValueError, match=r"no head of layer 0 of teacher retrieves \(.*0.000\); those that do are in the layers \[1\]"):
        probe.couples([(1, 0)])


@pytest.fixture(scope="module")
def looking_pair(world, tmp_path_factory):
    """Head 2 of the teacher's layer 1 and head 0 of the student's look at images, and nothing else does."""
    folder = tmp_path_factory.mktemp("looking")
    return looking(world, "teacher", 1, 2, folder / "teacher"), looking(world, "student", 1, 0, folder / "student")


def test_heads_that_are_known_to_look_are_found_and_coupled(world, looking_pair, tmp_path, capsys):
    """A head that looks at 3 images alike has a third of its attention on the needle, from wherever."""
    teacher, student = looking_pair
    out = tmp_path / "new" / "probe.json"
    words = ["probe", str(teacher), str(world.shards), "--images=3", "--haystacks=12", "--student", str(student), "--out", str(out)]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*words, "--json"])
    assert stopped.value.code == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads(out.read_text())
    (head,) = said["retrieving"]
    assert (head["layer"], head["head"]) == (1, 2)
    assert head["mass"] == pytest.approx(1 / 3, abs=0.1)
    there = head["by_distance"]
    assert sum(one["haystacks"] for one in there) == 12
    assert sum(one["mass"] * one["haystacks"] for one in there) / 12 == pytest.approx(head["mass"])
    assert [(one["layer"], one["head"]) for one in said["student"]["retrieving"]] == [(1, 0)]
    assert (said["pairs"], said["heads"]) == ([[1, 1]], [[[0, 2]]]), "by share it would be head 1: the student's own comes first"
    probe = read_probe(out)
    assert (probe.pairs(), probe.couples([(1, 1)])) == ([(1, 1)], [[(0, 2)]])
    with pytest.raises(SystemExit):
        cli.main(words)
    printed = capsys.readouterr().out
    assert f'probe = "{out}"\npairs = "probed"\nheads = "probed"\n# pairs = [[1, 1]]\n# heads = [[[0, 2]]]\n' in printed
    assert "    1  2: 0.3" in printed
    assert "\nby the needle's distance in tokens, from\n" in printed


def test_a_student_that_is_lost_is_looked_at_among_fewer_images(world, looking_pair, monkeypatch):
    """Looking at all images alike, its head has a sixth of its attention on the needle of 6, a third on that of 3: as if clear."""
    monkeypatch.setattr(heads, "CLEAR", 0.25)
    found = measure_student(looking_pair[1], world.shards, 6, 12, "float32")
    assert (found.looks.images, [(layer, head) for layer, head, _ in found.looks.heads()]) == (3, [(1, 0)])
    untrained = measure_student(world.student, world.shards, 6, 2, "float32")
    assert (untrained.looks.images, untrained.looks.heads()) == (6, []), "it looks nowhere: the size that was asked"


@pytest.fixture(scope="module")
def flat(world, tmp_path_factory):
    """The query of head 2 of layer 1 is made zero, so that it attends to all alike."""
    model, head, width = world.load("teacher"), 2, 16
    attention = model.model.language_model.layers[1].self_attn
    assert attention.head_dim == width
    with torch.no_grad():
        attention.q_proj.weight[head * width : (head + 1) * width] = 0
        attention.q_proj.bias[head * width : (head + 1) * width] = 0
    folder = tmp_path_factory.mktemp("flat") / "flat"
    shutil.copytree(world.teacher, folder)
    model.save_pretrained(folder)
    return folder


def test_a_head_that_looks_everywhere_alike_has_the_needles_share_of_what_it_sees(world, flat, capsys):
    """Its mass is 1 / (tokens up to the answering row), an image being one token."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["probe", str(flat), str(world.shards), "--images=3", "--haystacks=5", "--student", str(world.student), "--json"])
    assert stopped.value.code == 0
    said = json.loads(capsys.readouterr().out)
    renderer, dataset = Renderer(load_processor(flat), Pixels()), Dataset.open(world.shards)
    rows = [renderer(window_of_size(dataset.read(i), 3, 1)).supervised for i in range(5)]
    shares = [1 / int(torch.nonzero(supervised)[0]) for supervised in rows]  # the row before the answer sees all before the answer
    assert said["mass"]["1"][2] == pytest.approx(sum(shares) / 5, rel=1e-5)
    assert said["flat"] == pytest.approx(sum(shares) / 5, rel=1e-5)
    assert sorted(said["mass"]) == ["0", "1"]
    assert (said["pairs"], said["heads"]) == ([], []), "no head of an untrained model looks at the needle"
    assert "no head of" in said["why"]


def test_a_text_among_texts_is_a_needle_too(world, flat, tmp_path, capsys):
    """Its tokens are counted in what the tokenizer makes of the one line and of all before the answer."""
    with ShardWriter(tmp_path / "shards") as writer:
        for sample in text_facts.haystacks("test", 4, 9, 2, seed=1):
            writer.write(sample)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["probe", str(flat), str(tmp_path / "shards"), "--images=5", "--haystacks=4", "--student", str(world.student), "--json"])
    assert stopped.value.code == 0
    said = json.loads(capsys.readouterr().out)
    renderer, dataset, shares = Renderer(load_processor(flat), Pixels()), Dataset.open(tmp_path / "shards"), []
    for i in range(4):
        window = window_of_size(dataset.read(i), 5, 1)
        seen = int(torch.nonzero(renderer(window).supervised)[0])
        line = window.turns[0].segments[window.turns[0].needles[0]]
        shares.append(len(renderer.processor.tokenizer(line)["input_ids"]) / seen)
    assert said["flat"] == pytest.approx(sum(shares) / 4, rel=0.15), "a token may straddle two lines"
    assert said["mass"]["1"][2] == pytest.approx(said["flat"], rel=1e-5)
    assert (said["images"], said["student"]["images"]) == (5, 5)


def test_a_smaller_set_is_looked_at_whole_where_no_number_was_given(world):
    """12 haystacks, not 32."""
    assert measure(world.teacher, world.shards, 2, None, "float32").looks.haystacks == 12
    with pytest.raises(ValueError, match="13 haystacks asked for"):
        measure(world.teacher, world.shards, 2, 13, "float32")


@pytest.mark.parametrize(
    "change, sentence",
    [
        ("--images=7", "has 6 images"),
        ("--haystacks=99", "99 haystacks asked for"),
        ("--student=nowhere", "no model at nowhere"),
        ("--out=FOLDER", "is a folder; name a file in it, as "),
        ("--out=FOLDER/file/probe.json", "file: File exists"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(world, tmp_path, capsys, change, sentence):
    (tmp_path / "file").write_text("x")
    change = change.replace("FOLDER", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["probe", str(world.teacher), str(world.shards), "--images", "3", "--haystacks", "4", change])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert len(said.strip().splitlines()) == 1
