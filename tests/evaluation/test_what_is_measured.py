"""An evaluation reports only what it measured: sizes, questions and haystacks that do not fit are left out or refused, in so many words."""

from __future__ import annotations

import json
import shutil
import weakref
from dataclasses import replace
from itertools import pairwise
from typing import ClassVar

import pytest
import torch

from laid_ds import cli
from laid_ds.data.dataset import Dataset
from laid_ds.data.images import Pixels
from laid_ds.data.record import DataError, Turn
from laid_ds.data.writer import ShardWriter
from laid_ds.evaluation import asking
from laid_ds.evaluation.asking import ask
from laid_ds.evaluation.evaluate import How, evaluate_models
from laid_ds.evaluation.haystack import Haystacks, read_haystacks, survey
from laid_ds.evaluation.retrieval import measure
from laid_ds.evaluation.tasks import Wish
from laid_ds.models.processor import Renderer, load_processor
from laid_ds.report.write import write_report
from laid_ds.sequence import ALONE


@pytest.fixture
def samples(world):
    """Three haystacks of 6 images with 3 questions of one needle."""
    dataset = Dataset.open(world.shards)
    return [dataset.read(i) for i in range(3)]


@pytest.fixture
def surveyed(tmp_path):
    """Survey some samples as a data set."""

    def of(samples, sizes, folder="set"):
        with ShardWriter(tmp_path / folder) as writer:
            for sample in samples:
                writer.write(sample)
        return survey(Dataset.open(tmp_path / folder), len(samples), sizes)

    return of


def first_question(sample, **changes):
    """The sample with its first question changed."""
    return replace(sample, turns=(replace(sample.turns[0], **changes), *sample.turns[1:]))


def without_needles(sample):
    return replace(sample, turns=tuple(replace(turn, needles=()) for turn in sample.turns))


def test_a_size_that_some_haystack_does_not_hold_is_left_out(samples, surveyed):
    short = replace(samples[2], turns=samples[2].turns[:2], images=samples[2].images[:5])
    short = first_question(short, segments=(*range(5), "which?"), needles=(4,))
    found = surveyed([*samples[:2], short], [1, 5, 6, 7])
    assert found.sizes == [1, 5]
    assert found.left_out == {
        6: f"1 of 3 haystacks do not allow it ({short.key} has 5 images)",
        7: f"3 of 3 haystacks do not allow it ({samples[0].key} has 6 images)",
    }


def test_a_size_too_small_for_a_question_is_left_out(samples, surveyed):
    """Else small sizes would be measured on other, easier questions than large ones."""
    found = surveyed([samples[0], first_question(samples[1], needles=(0, 2, 4))], [1, 2, 3, 6])
    assert found.sizes == [3, 6]
    assert set(found.left_out.values()) == {f"1 of 2 haystacks do not allow it ({samples[1].key} has a question that needs 3 images)"}


def test_what_is_no_haystack_is_measured_as_it_is_or_not_at_all(samples, surveyed):
    whole = [without_needles(sample) for sample in samples]
    assert surveyed(whole, [1, 3, 6]).sizes == [6]
    with pytest.raises(ValueError, match=r"nothing can be measured .* has 6 images, and none may be left out: it records no needles"):
        surveyed(whole, [1, 3], "again")


def unanswered(sample):
    return replace(sample, turns=(*sample.turns, Turn("user", ("and?",), (0,), ("yes", "no"))))


def unlearned(sample):
    return replace(sample, turns=(sample.turns[0], replace(sample.turns[1], supervised=False), *sample.turns[2:]))


BAD = {
    "no choices": (lambda s: first_question(s, choices=()), "offers no choices"),
    "one choice": (lambda s: first_question(s, choices=(s.turns[1].text,) * 2), "offers no choices"),
    "another answer": (lambda s: first_question(s, choices=("yes", "no")), r"is none of its choices"),
    "other choices in one haystack": (lambda s: first_question(s, choices=("no", s.turns[1].text)), r"offer \[2, 8\] choices"),
    "an answer not to be learned": (unlearned, "is marked as none to learn"),
    "no answer": (unanswered, "'and\\?' has no answer"),
    "no question": (lambda s: replace(s, turns=(Turn("assistant", tuple(range(6))),)), "offer no choices"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD.keys())
def test_a_question_that_cannot_be_scored_is_refused_by_key(samples, surveyed, change, message):
    with pytest.raises(DataError, match=message) as caught:
        surveyed([samples[0], change(samples[1])], [1])
    assert caught.value.key == samples[1].key


def test_haystacks_with_other_numbers_of_choices_have_no_common_chance(samples, surveyed):
    other = [replace(turn, choices=(*turn.choices, "pink")) if turn.choices else turn for turn in samples[1].turns]
    with pytest.raises(ValueError, match=f"offer 8 choices in {samples[0].key} and 9 in {samples[1].key}"):
        surveyed([samples[0], replace(samples[1], turns=tuple(other))], [1])


def test_asking_for_a_size_that_a_haystack_does_not_hold_is_an_error(world, samples):
    for one, size, message in (
        (samples[0], 7, "has 6 images"),
        (first_question(samples[0], needles=(1, 2)), 1, "a question that needs 2"),
        (without_needles(samples[0]), 2, "none may be left out"),
    ):
        one = replace(one, turns=one.turns[:2])
        with pytest.raises(DataError, match=message):
            ask(None, None, [one], [size], 1)


def test_a_model_that_computes_nan_is_not_one_that_is_always_wrong(world, samples):
    model, renderer = world.load("student").eval(), Renderer(load_processor(world.student), Pixels())
    model.get_output_embeddings().weight.data[5, 0] = float("nan")
    with pytest.raises(ValueError, match=f"not finite for the answers of {samples[0].key}"):
        ask(model, renderer, samples, [2], 1)


class FakeRow:
    """A rendered sample of some length, which is known to be alive."""

    alive: ClassVar[weakref.WeakSet] = weakref.WeakSet()
    most = 0

    def __init__(self, sample):
        self.key, self.supervised = sample.key, torch.zeros(3 + int(sample.key[-1]) % 4)
        FakeRow.alive.add(self)
        FakeRow.most = max(FakeRow.most, len(FakeRow.alive))


def test_one_batch_and_one_haystack_are_in_memory(samples, monkeypatch):
    """Batches are those of all rows in their order, greedily filled; the rest is rendered when its turn comes."""
    many = [replace(samples[0], key=f"h-{i}") for i in range(40)]
    batches = []

    def collated(rows, keys, pad, multiple):
        assert multiple == 1
        batches.append(list(keys))
        return type("Batch", (), {"keys": tuple(keys), "to": lambda self, device, waiting: self})()

    monkeypatch.setattr(asking, "collate", collated)
    monkeypatch.setattr(asking, "group_of", lambda model: ALONE)
    monkeypatch.setattr(asking, "force", lambda model, batch: [[([], 1)]] * len(batch.keys))
    renderer = type("Renderer", (), {"__call__": lambda self, sample: FakeRow(sample)})()
    renderer.processor = type("P", (), {"tokenizer": type("T", (), {"pad_token_id": 0})})
    FakeRow.most = 0
    found = ask(type("M", (), {"device": "cpu"}), renderer, many, [2], 1, tokens_per_batch=20)["2"]
    assert found == [[1]] * 40
    assert FakeRow.most == max(map(len, batches)) + 1 < 8
    assert [key for batch in batches for key in batch] == [sample.key for sample in many]
    lengths = {sample.key: 3 + int(sample.key[-1]) % 4 for sample in many}
    for batch, after in pairwise(batches):
        size = max(lengths[key] for key in batch) * len(batch)
        assert size <= 20 < max(lengths[key] for key in (*batch, after[0])) * (len(batch) + 1)


def test_haystacks_are_read_when_they_are_asked_for(world, monkeypatch):
    dataset, read = Dataset.open(world.shards), []
    monkeypatch.setattr(Dataset, "read", lambda self, i: read.append(i) or i)
    found = read_haystacks(dataset, 5)
    assert (len(found), read) == (5, [])
    assert list(found) == list(found) == [0, 1, 2, 3, 4]
    assert list(Haystacks(dataset, [7, 7])) == [7, 7]


def run(*words):
    with pytest.raises(SystemExit) as exit_status:
        cli.main([str(word) for word in words])
    return exit_status.value.code or 0


def test_what_was_left_out_is_said_recorded_and_reported(world, tmp_path, capsys):
    out = tmp_path / "runs" / "e.json"
    assert run("eval", world.shards, f"student={world.student}", "--out", out, "--sizes", "2,6,50,100", "--haystacks", 4) == 0
    said = capsys.readouterr()
    assert "not measured at 50, 100 images: 4 of 4 haystacks do not allow it (train-0-000000 has 6 images)" in said.err
    assert "student: 4 of 4 haystacks of 6 images" in said.err
    assert f"next: laid report {out.parent}" in said.out
    results = json.loads(out.read_text())
    assert results["setting"]["sizes"] == [2, 6]
    assert set(results["models"]["student"]["answers"]) == {"2", "6"}
    assert set(results["left_out"]) == {"50", "100"}
    assert run("report", out.parent) == 0
    assert "not measured at 50, 100 images" in (text := capsys.readouterr().out)
    assert "no window: student is at 0.000 with 2 images, not above chance" in text
    assert run("report", out.parent, "--json") == 0
    numbers = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert set(numbers["left_out"]) == {"50", "100"}


@pytest.mark.parametrize(
    "words, message",
    [
        (["a=STUDENT", "a=TEACHER"], "the name 'a' is given to several models"),
        (["a=STUDENT", "b=nowhere"], "no model at nowhere"),
        (["=STUDENT"], "models are given as NAME=FOLDER"),
        (["a=STUDENT", "--dtype", "float16"], "--dtype 'float16' is none of float32, bfloat16"),
        (["a=STUDENT", "--zero3"], "--zero3 shards models over ranks, and there is one: give --ranks, or leave out --zero3"),
        (["a=STUDENT", "--zero3", "--dry-run"], "--zero3 shards models over ranks, and there is one"),
        (["a=STUDENT", "--self-extend", "a=0,0"], "SelfExtend needs a group and a window of at least 1, got group=0, window=0"),
        (["a=STUDENT", "--self-extend", "a=0,0", "--dry-run"], "SelfExtend needs a group and a window of at least 1"),
        (["a=STUDENT", "--out", "SHARDS"], "cannot be read"),
        (["a=STUDENT", "--out", "SHARDS/dataset.json"], "does not hold results of `laid eval`"),
        (["a=STUDENT", "--out", "SHARDS/dataset.json/e.json"], "the results cannot be written to"),
    ],
)
def test_what_would_fail_is_refused_before_a_model_is_asked(world, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.setattr("laid_ds.evaluation.evaluate.load_model", lambda *_: pytest.fail("a model was loaded"))
    places = {"STUDENT": world.student, "TEACHER": world.teacher, "SHARDS": world.shards}
    for name, place in places.items():
        words = [word.replace(name, str(place)) for word in words]
    out = [] if "--out" in words else ["--out", tmp_path / "e.json"]
    assert run("eval", world.shards, *words, *out, "--sizes", "2", "--haystacks", "2") == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_asked_in_words_or_as_json(world, tmp_path, capsys):
    words = ("eval", world.shards, f"a={world.student}", "--out", tmp_path / "e.json", "--sizes", "2", "--haystacks", "3", "--dry-run")
    assert run(*words) == 0
    assert capsys.readouterr().out == f"nothing speaks against asking a about {world.shards.name}\n"
    assert run(*words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["models"], [task["haystacks"] for task in found["tasks"]]) == (["a"], [3])


def test_a_smaller_set_is_asked_whole_where_no_number_was_given(world, tmp_path, capsys):
    """12 haystacks; and a folder is no model for the = in its path."""
    (tmp_path / "lr=1").mkdir()
    shards = tmp_path / "lr=1" / "test"
    shutil.copytree(world.shards, shards)
    words = ("eval", shards, f"a={world.student}", "--out", tmp_path / "e.json", "--sizes", "2", "--dry-run", "--json")
    assert run(*words) == 0
    assert [(task["task"], task["haystacks"]) for task in json.loads(capsys.readouterr().out)["tasks"]] == [("test", 12)]
    assert run(*words, "--haystacks", "13") == 2
    assert "13 haystacks asked for" in capsys.readouterr().err


def test_attention_on_needles_needs_needles(world, samples, tmp_path):
    with ShardWriter(tmp_path / "set") as writer:
        for sample in samples:
            writer.write(replace(without_needles(sample), haystack=True))
    with pytest.raises(DataError, match=f"records no needles, so that --attention .*{samples[0].key}"):
        evaluate_models([tmp_path / "set"], {"student": world.student}, tmp_path / "e.json", Wish([2], 3), How(attention=True))
    with pytest.raises(DataError, match="records no needles, so that `laid probe` cannot look at them"):
        measure(world.teacher, tmp_path / "set", 2, None, "float32")


def results(models, **setting):
    asked = {"shards": "s", "fingerprint": "f", "sizes": [1, 4], "haystacks": 2, "questions": 1, "choices": 2, "dtype": "float32"}
    return {"setting": asked | setting, "versions": {}, "models": {name: {"answers": answers} for name, answers in models.items()}}


GOOD, BLIND = {"1": [[1], [1]], "4": [[1], [0]]}, {"1": [[0], [0]], "4": [[0], [0]]}


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_a_report_holds_the_models_of_every_results_file(tmp_path):
    write(tmp_path, evaluation=results({"student": GOOD}), more=results({"laid": GOOD}, shards="elsewhere"), run={"name": "no results"})
    assert [row.name for row in write_report(tmp_path, "student").rows] == ["student", "laid"]
    write(tmp_path, other=results({"third": {"1": [[1], [1]]}}, sizes=[1]))
    with pytest.raises(ValueError, match=r"other.json was made with other sizes than .*evaluation.json"):
        write_report(tmp_path, "student")
    write(tmp_path, other=results({"laid": BLIND}))
    with pytest.raises(ValueError, match="different answers of laid"):
        write_report(tmp_path, "student")
    (tmp_path / "other.json").write_text('{"setting"')
    with pytest.raises(ValueError, match=r"other.json cannot be read as JSON"):
        write_report(tmp_path, "student")
    with pytest.raises(ValueError, match="is no folder"):
        write_report(tmp_path / "nowhere", "student")


def test_a_ratio_to_no_window_is_none_and_the_report_valid_json(tmp_path, capsys):
    """A baseline that is never right sets no threshold: there is neither a window nor a ratio."""
    blind = results({"student": {"1": [[0], [1]], "4": [[0], [0]]}, "laid": GOOD, "blind": BLIND}, choices=4)
    write(tmp_path, evaluation=blind)
    assert run("report", tmp_path, "--baseline", "laid", "--json") == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["models"]
    assert found["blind"]["against_baseline"]["times"] == 0
    assert run("report", tmp_path, "--baseline", "blind", "--json") == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["models"]["laid"] == {"name": "laid", "accuracy": {"1": 1.0, "4": 0.5}, "window": None, "against_baseline": None}
    assert run("report", tmp_path, "--baseline", "blind") == 0
    assert "no window: blind is at 0.000 with 1 image, not above chance (0.250)" in capsys.readouterr().out
