"""Laws of composed haystacks: the needle alone answers, nothing else tells, train and test share no picture, leaks are refused.

Pictures are those of the easy-vqa package: one shape in one colour each. What is true of a picture is known apart from the code under test.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from data_samples import picture
from typer.testing import CliRunner

from data_tools.cli import app
from data_tools.compose.draw import sides
from data_tools.compose.pool import Picture
from data_tools.synth import COLOURS, SHAPES
from data_tools.synth import pictures as easy_pictures
from laid_ds.data.dataset import Dataset
from laid_ds.data.haystack import draw_window, why_whole
from laid_ds.evaluation.haystack import survey

PER_KIND = 60
SIZES = ("--rule", "class", "--samples", 400, "--questions", 2, "--size", "2-24", "--test-samples", 100, "--seed", 3)
CHI_SQUARE_9 = 27.9  # exceeded once in 1000 times with 9 degrees of freedom


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Pictures NUMBER.png, and truth.json: name -> [colour, shape]."""
    root = tmp_path_factory.mktemp("own")
    (root / "pictures").mkdir()
    truth = {}
    for (colour, shape), paths in easy_pictures("train").items():
        for path in paths[:PER_KIND]:
            truth[path.name] = [colour, shape]
            (root / "pictures" / path.name).write_bytes(path.read_bytes())
    (root / "truth.json").write_text(json.dumps(truth))
    return root


@pytest.fixture(scope="module")
def truth(root) -> dict[str, tuple[str, str]]:
    """sha256 of a picture -> (colour, shape)."""
    named = json.loads((root / "truth.json").read_text())
    digests = {hashlib.sha256((root / "pictures" / name).read_bytes()).hexdigest(): tuple(kind) for name, kind in named.items()}
    assert len(digests) == len(named) == 24 * PER_KIND
    return digests


def colour_rows(root: Path) -> list[dict]:
    """A question about each picture; all of a shape have the same one."""
    named = json.loads((root / "truth.json").read_text())
    return [
        {"image": name, "question": f"What colour is the {shape}?", "answer": colour, "shows": [shape]}
        for name, (colour, shape) in named.items()
    ]


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(folder: Path):
    """(sample, question turn, answer) of a data set."""
    return [
        (sample, turn, sample.turns[number + 1].text)
        for sample in Dataset.open(folder)
        for number, turn in enumerate(sample.turns)
        if turn.role == "user"
    ]


def digest(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()


@pytest.fixture(scope="module")
def composed(root, tmp_path_factory):
    """A training and a test set of one list, and what the command said of them."""
    out = tmp_path_factory.mktemp("composed")
    lines = write_lines(out / "mine.jsonl", colour_rows(root))
    size = ("--samples", 400, "--questions", 2, "--size", "2-24", "--test-samples", 100, "--seed", 3)
    said = run(
        "questions", lines, "--images", root / "pictures", "--rule", "class", "--train", out / "train", "--test", out / "test", *size
    )
    return out, said


def run(*arguments) -> dict:
    """What `laid-data compose ARGUMENTS --json` says."""
    done = CliRunner().invoke(app, ["compose", *map(str, arguments), "--json"])
    assert done.exit_code == 0, done.exception
    return json.loads(done.stdout)


@pytest.mark.parametrize("part", ["train", "test"])
def test_each_question_is_answered_by_its_needle_alone(composed, truth, part):
    for sample, turn, answer in asked(composed[0] / part):
        shape = turn.text.removeprefix("What colour is the ").removesuffix("?")
        kinds = [truth[digest(image)] for image in sample.images]
        assert [place for place, kind in enumerate(kinds) if kind[1] == shape] == list(turn.needles)
        assert answer == kinds[turn.needles[0]][0]
        assert turn.choices == tuple(sorted(COLOURS))


def test_train_and_test_share_no_picture(composed):
    out, said = composed
    train, test = ({digest(image) for sample in Dataset.open(out / part) for image in sample.images} for part in ("train", "test"))
    assert not train & test
    assert len(train) > len(test) > 50
    assert said["train"]["pictures_to_draw_from"] == round(0.8 * 24 * PER_KIND)


def test_sides_go_by_content_not_by_name_nor_order(truth):
    pictures = [Picture(f"{i}.png", i, digest, (0, i), frozenset(), frozenset()) for i, digest in enumerate(truth)]
    renamed = [replace(picture, name=f"other {picture.name}", source="") for picture in reversed(pictures)]
    first, second = ({some[i].digest for i in sides(some, 0.3, 7).nonzero()[0]} for some in (pictures, renamed))
    assert first == second
    assert len(first) == round(0.3 * len(pictures))


def test_pictures_of_another_set_are_left_out(root, composed, tmp_path):
    lines = write_lines(tmp_path / "mine.jsonl", colour_rows(root))
    more = ("--images", root / "pictures", "--rule", "class", "--size", 10, "--samples", 200, "--apart-from", composed[0] / "train")
    said = run("questions", lines, *more, "--train", tmp_path / "set")
    before, now = (
        {digest(image) for sample in Dataset.open(at) for image in sample.images} for at in (composed[0] / "train", tmp_path / "set")
    )
    assert not before & now
    assert said["left_out"]["pictures of --apart-from"] == len(before)


def test_needles_stand_at_every_depth_and_answers_are_even(root, tmp_path):
    lines = write_lines(tmp_path / "mine.jsonl", colour_rows(root))
    run("questions", lines, "--images", root / "pictures", "--rule", "class", "--train", tmp_path / "set", "--samples", 800, "--size", 10)
    questions = asked(tmp_path / "set")
    places = Counter(turn.needles[0] for _, turn, _ in questions)
    assert sum((places[place] - 80) ** 2 / 80 for place in range(10)) < CHI_SQUARE_9
    for colour in COLOURS:  # at no depth is one answer likelier
        near = sum(turn.needles[0] < 5 for _, turn, answer in questions if answer == colour)
        assert 25 < near < 75
    assert set(Counter(answer for _, _, answer in questions).values()) == {100}


def independent_baselines(folder: Path, truth) -> dict[str, tuple[float, float]]:
    """Name -> (accuracy, chance), without the code under test: the commonest answer of a question in the other half; the colour that the
    other images show most, and least; the colour that the whole bag shows most, among as many as it shows."""
    questions = asked(folder)
    half = len(questions) // 2
    tables = [Counter((turn.text, answer) for _, turn, answer in part) for part in (questions[half:], questions[:half])]
    hits = {"question": [], "most": [], "least": [], "bag": []}
    bag_chance = []
    for number, (sample, turn, answer) in enumerate(questions):
        table = tables[number >= half]
        hits["question"].append(max(COLOURS, key=lambda colour: table[turn.text, colour]) == answer)
        colours = Counter(truth[digest(image)][0] for image in sample.images)
        others = colours - Counter([truth[digest(sample.images[turn.needles[0]])][0]])
        for name, key in (("most", max), ("least", min)):
            hits[name].append(key(COLOURS, key=lambda colour: others[colour]) == answer)
        hits["bag"].append(max(COLOURS, key=lambda colour: colours[colour]) == answer)
        bag_chance.append(1 / len(colours))
    chances = {name: 1 / 8 for name in hits} | {"bag": sum(bag_chance) / len(bag_chance)}
    return {name: (sum(hit) / len(hit), chances[name]) for name, hit in hits.items()}


def test_neither_the_question_nor_the_bag_of_images_tells(composed, truth):
    out, said = composed
    for name, (accuracy, chance) in independent_baselines(out / "train", truth).items():
        assert abs(accuracy - chance) < 3 * (chance * (1 - chance) / 800) ** 0.5, name
    for part in ("train", "test"):
        rows = {row["baseline"]: row for row in said[part]["shortcuts"]}
        assert set(rows) == {"question", "others", "bag", "depth"}
        assert all(abs(row["errors_above_chance"]) < 3 for row in rows.values())


def test_windows_keep_the_needle(composed, truth):
    out, _ = composed
    dataset = Dataset.open(out / "train")
    for number in range(0, 400, 20):
        sample = dataset.read(number)
        assert why_whole(sample) is None
        for images in (1, 2, 5, 24):
            window = draw_window(sample, images, 1, (number, images))
            assert len(window.images) == min(images, len(sample.images))
            question, answer = window.turns
            colour, shape = truth[digest(window.images[question.needles[0]])]
            assert (question.text, answer.text) == (f"What colour is the {shape}?", colour)


def test_the_test_set_can_be_scored_at_every_size(composed):
    found = survey(Dataset.open(composed[0] / "test"), 100, (2, 8, 24))
    assert (found.sizes, found.choices, found.left_out) == ([2, 8, 24], 8, {})


def test_the_same_arguments_give_the_same_bytes(root, tmp_path):
    lines = write_lines(tmp_path / "mine.jsonl", colour_rows(root))
    arguments = ("questions", lines, "--images", root / "pictures", "--rule", "class", "--samples", 20)
    said = [
        run(*arguments, "--train", tmp_path / name, "--seed", seed, "--jobs", jobs)["train"]["fingerprint"]
        for name, seed, jobs in (("a", 0, 1), ("b", 0, 4), ("c", 1, 4))
    ]
    assert said[0] == said[1] != said[2]
    assert len({(tmp_path / name / "composed.json").read_bytes() for name in "ab"}) == 1


# What leaks.


def refusal(laid_data, *arguments) -> str:
    """The one sentence by which a command is refused."""
    outcome = laid_data("compose", *arguments)
    assert outcome.code == 2, outcome.out
    assert outcome.out == ""
    assert len(outcome.err.splitlines()) == 1
    return outcome.err


def test_an_answer_that_is_the_one_not_shown_is_refused(laid_data, root, tmp_path):
    """The rule names the answer's own shape alone, so the other shapes on offer stand among the distractors, and it does not."""
    named = json.loads((root / "truth.json").read_text())
    rows = [
        {
            "image": name,
            "question": "Is there a circle, a rectangle or a triangle?",
            "answer": shape,
            "about": [shape],
            "choices": list(SHAPES),
        }
        for name, (_, shape) in named.items()
    ]
    for row in rows:  # without the question, which every other picture is asked, too
        row["question"] = row["question"].replace("a circle", f"{row['image']}: a circle")
    lines = write_lines(tmp_path / "leaks.jsonl", rows)
    more = ("--images", root / "pictures", "--rule", "class", "--train", tmp_path / "set", "--samples", 300)
    assert "the train set leaks" in (said := refusal(laid_data, "questions", lines, *more))
    assert "follow from the images without the needle" in said
    assert not (tmp_path / "set").exists()


def test_an_answer_that_the_distractors_show_is_refused(laid_data, root, tmp_path):
    """Distractors of a "no" must not show red, and those of a "yes" may."""
    named = json.loads((root / "truth.json").read_text())
    rows = [
        {
            "image": name,
            "question": f"Does the {shape} of {name} have red beside it?",
            "answer": answer,
            "choices": ["yes", "no"],
            "about": [shape, "red"] if answer == "no" else [shape],
            "shows": [colour, shape],
        }
        for number, (name, (colour, shape)) in enumerate(named.items())
        for answer in [("yes", "no")[number % 2]]
    ]
    lines = write_lines(tmp_path / "leaks.jsonl", rows)
    more = ("--images", root / "pictures", "--rule", "class", "--train", tmp_path / "set", "--samples", 250)
    assert "the train set leaks" in refusal(laid_data, "questions", lines, *more)
    assert not (tmp_path / "set").exists()


def test_an_answer_that_the_question_tells_is_refused(laid_data, root, tmp_path):
    named = json.loads((root / "truth.json").read_text())
    rows = [
        {"image": name, "question": f"Is {name} a {word} picture?", "answer": answer, "choices": ["yes", "no"]}
        for number, name in enumerate(named)
        for word, answer in [(("warm", "yes"), ("cold", "no"))[number % 2]]
    ]
    lines = write_lines(tmp_path / "leaks.jsonl", rows)
    more = ("--images", root / "pictures", "--rule", "question", "--train", tmp_path / "set", "--samples", 300)
    assert "100.0% of the answers follow from the question alone (chance 50.0%" in refusal(laid_data, "questions", lines, *more)


def test_a_question_with_one_answer_is_asked_once(laid_data, root, tmp_path):
    named = json.loads((root / "truth.json").read_text())
    rows = [{"image": name, "question": f"What is it that {name} shows?", "answer": shape} for name, (_, shape) in named.items()]
    lines = write_lines(tmp_path / "open.jsonl", rows)
    more = ("--images", root / "pictures", "--rule", "question")
    run("questions", lines, *more, "--train", tmp_path / "set", "--samples", len(rows), "--size", 3)
    texts = [turn.text for _, turn, _ in asked(tmp_path / "set")]
    assert len(set(texts)) == len(texts) == len(rows)
    assert f"only {len(rows)} questions could be asked" in refusal(
        laid_data, "questions", lines, *more, "--train", tmp_path / "more", "--samples", len(rows) + 1
    )
    assert "a test needs answers to choose from" in refusal(laid_data, "questions", lines, *more, "--test", tmp_path / "test")


# Sources.


def coco_files(root: Path, out: Path) -> Path:
    """An instances file of the pictures: its colour and its shape are the classes of each."""
    named = json.loads((root / "truth.json").read_text())
    names = [*COLOURS, *SHAPES]
    images = [{"id": number, "file_name": name} for number, name in enumerate(named)]
    kinds = [(number, word) for number, kind in enumerate(named.values()) for word in kind]
    tree = {
        "images": images,
        "annotations": [{"id": i, "image_id": number, "category_id": names.index(word)} for i, (number, word) in enumerate(kinds)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
    }
    out.write_text(json.dumps(tree))
    return out


@pytest.mark.parametrize("format", ["coco", "vhs"])
def test_of_instances_only_the_needle_shows_the_anchor(root, tmp_path, truth, format):
    instances = coco_files(root, tmp_path / "instances.json")
    size = ("--samples", 400, "--size", 12) if format == "coco" else ()
    said = run(format, instances, "--images", root / "pictures", "--train", tmp_path / "set", *size)
    questions = asked(tmp_path / "set")
    for sample, turn, answer in questions:
        words = turn.text.partition("For the image with the ")[2].removesuffix("?")
        anchor, target = words.split(", is there a ")
        kinds = [truth[digest(image)] for image in sample.images]
        assert [place for place, kind in enumerate(kinds) if anchor in kind] == list(turn.needles)
        assert answer == ("yes" if target in kinds[turn.needles[0]] else "no")
    assert Counter(answer for _, _, answer in questions) == {"yes": len(questions) // 2, "no": len(questions) // 2}
    assert all(row["errors_above_chance"] < 3 for row in said["train"]["shortcuts"])
    if format == "vhs":  # the paper's recipe
        assert said["train"]["samples"] == 5000
        assert said["train"]["images_in_a_sample"] == [2, 20]
        assert all(turn.text.startswith("You are given a set of images. Please answer") for _, turn, _ in questions)


def test_vqa_is_led_by_a_class_that_only_the_needle_shows(root, tmp_path, truth):
    instances = coco_files(root, tmp_path / "instances.json")
    named = json.loads((root / "truth.json").read_text())
    questions = [{"image_id": n, "question_id": n, "question": "Is it red or blue?"} for n in range(len(named))]
    answers = ["yes" if colour in ("red", "blue") else "no" for colour, _ in named.values()]
    annotations = [{"image_id": n, "question_id": n, "multiple_choice_answer": answer, "answers": []} for n, answer in enumerate(answers)]
    (tmp_path / "questions.json").write_text(json.dumps({"data_subtype": "val2014", "questions": questions}))
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": annotations}))
    files = (tmp_path / "annotations.json", tmp_path / "questions.json", "--instances", instances, "--images", root / "pictures")
    lead = ("--lead", "In the image with the {class}: ")
    run("vqa", *files, *lead, "--train", tmp_path / "set", "--samples", 200, "--size", 6)
    led = []
    for sample, turn, answer in asked(tmp_path / "set"):
        name = turn.text.removeprefix("In the image with the ").removesuffix(": Is it red or blue?")
        led.append(name)
        kinds = [truth[digest(image)] for image in sample.images]
        assert [place for place, kind in enumerate(kinds) if name in kind] == list(turn.needles)
        assert answer == ("yes" if kinds[turn.needles[0]][0] in ("red", "blue") else "no")
    counts = Counter(led)
    assert all(counts[colour] <= 1 for colour in COLOURS)  # a question that a colour leads has one answer
    assert all(counts[shape] > 40 for shape in SHAPES)


def test_llava_rows_a_table_and_shards_say_the_same_as_lines(root, tmp_path, laid_data):
    rows = colour_rows(root)
    lines = write_lines(tmp_path / "mine.jsonl", rows)
    chats = [
        {
            "id": row["image"],
            "image": row["image"],
            "conversations": [
                {"from": "human", "value": f"<image>\n{row['question']}"},
                {"from": "gpt", "value": row["answer"]},
                {"from": "human", "value": "Are you sure?"},
                {"from": "gpt", "value": "Yes."},
            ],
            "shows": row["shows"],
        }
        for row in rows
    ]
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    body = [f"{row['image']},{row['question']},{row['answer']},{row['shows'][0]}" for row in rows]
    (tmp_path / "mine.csv").write_text("\n".join(["image,question,answer,shows", *body]))
    plain = [{name: row[name] for name in ("image", "question", "answer")} | {"meta": {"shows": row["shows"]}} for row in rows]
    single = write_lines(tmp_path / "single.jsonl", plain)
    assert laid_data("build", "folder", single, tmp_path / "shards", "--images", root / "pictures").code == 0
    more = ("--rule", "class", "--samples", 30, "--size", 5)
    images = ("--images", root / "pictures")
    sources = {
        "a": ("questions", lines, *images),
        "b": ("questions", tmp_path / "mine.csv", *images),
        "c": ("llava", tmp_path / "chats.json", *images),
        "d": ("shards", tmp_path / "shards"),
    }
    shown = {}
    for name, source in sources.items():
        run(*source, *more, "--train", tmp_path / name)
        shown[name] = [
            (turn.text, turn.needles, answer, list(map(digest, sample.images))) for sample, turn, answer in asked(tmp_path / name)
        ]
    assert shown["a"] == shown["b"] == shown["c"] == shown["d"]


def test_folders_are_classes(root, tmp_path, truth):
    named = json.loads((root / "truth.json").read_text())
    for name, (colour, _) in named.items():
        (tmp_path / "own" / colour).mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / colour / name).write_bytes((root / "pictures" / name).read_bytes())
    folders = ("--train", tmp_path / "train", "--test", tmp_path / "test")
    said = run("classes", tmp_path / "own", *folders, "--choices", 3, "--samples", 400, "--size", 9, "--questions", 2)
    for part in ("train", "test"):
        for sample, turn, answer in asked(tmp_path / part):
            colours = [truth[digest(image)][0] for image in sample.images]
            assert [place for place, colour in enumerate(colours) if colour in turn.choices] == list(turn.needles)
            assert answer == colours[turn.needles[0]]
            assert all(choice in turn.text for choice in turn.choices)
        assert {row["baseline"] for row in said[part]["shortcuts"]} == {"question", "others", "depth"}
        assert all(abs(row["errors_above_chance"]) < 3 for row in said[part]["shortcuts"])


def test_captions_keep_a_questions_words_from_distractors(root, tmp_path, truth):
    named = json.loads((root / "truth.json").read_text())
    rows = [
        {"image": name, "question": f"What colour are the {shape}s?", "answer": colour, "caption": f"There is a {shape} on the wall"}
        for name, (colour, shape) in named.items()
    ]
    lines = write_lines(tmp_path / "mine.jsonl", rows)
    run("questions", lines, "--images", root / "pictures", "--rule", "caption", "--train", tmp_path / "set", "--samples", 100, "--size", 6)
    for sample, turn, answer in asked(tmp_path / "set"):
        shape = turn.text.removeprefix("What colour are the ").removesuffix("s?")
        kinds = [truth[digest(image)] for image in sample.images]
        assert [(place, kind[0]) for place, kind in enumerate(kinds) if kind[1] == shape] == [(turn.needles[0], answer)]


# Bad input.


GOOD = {"image": "p0.jpg", "question": "What colour is the dog?", "answer": "red", "about": ["dog"]}
BAD_ROWS = [
    ({"image": "none.jpg"}, "entry 1: image 'none.jpg' is not in"),
    ({"image": "torn.jpg"}, "entry 1: image 'torn.jpg': image cannot be decoded"),
    ({"image": "copy.jpg"}, "entry 1: 'copy.jpg' and 'p0.jpg' are the same picture, byte for byte; keep one of them"),
    ({"choices": ["blue", "green"]}, "entry 1: answer 'red' is none of the choices ['blue', 'green']"),
    ({"mood": "glad"}, "entry 1: field 'mood' is not known"),
    ({"answer": ""}, "entry 1: the question 'What colour is the dog?' has no answer"),
    ({"question": ""}, "entry 1: answer 'red' without a question"),
    ({"question": None, "answer": None, "choices": ["a", "b"]}, "entry 1: choices ['a', 'b'] without a question"),
    ({"choices": ["red"]}, "entry 1: choices ['red'] leave nothing to choose"),
    ({"choices": ["red", "red"]}, "entry 1: choices ['red', 'red'] name one answer twice"),
    ({"image": None}, "entry 1: 0 images; a row to compose from names one picture"),
    ({"question": "What colour is the <video>?"}, "entry 1: the text holds the mark <video>"),
    ({"question": "What colour is the dog of the second image?"}, "entry 1: the question names an image by its place"),
    ({"answer": "\ud800"}, "entry 1: the question or its answers hold half a surrogate pair"),
    ({"about": ["cat"]}, "entry 1: the question does not name what it is about ('cat')"),
    ({"question": "What colour is it?", "about": None}, "entry 1: --rule class needs the class"),
    ({"image": "p0.jpg", "answer": "blue"}, "is answered 'blue' here and 'red' elsewhere"),
]


@pytest.mark.parametrize("change, sentence", BAD_ROWS, ids=[sentence[:40] for _, sentence in BAD_ROWS])
def test_a_bad_row_is_refused_by_name_and_may_be_left_out(laid_data, tmp_path, change, sentence):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        (images / f"p{number}.jpg").write_bytes(picture(number))
    (images / "copy.jpg").write_bytes(picture(0))
    (images / "torn.jpg").write_bytes(picture(5)[:-200])
    others = [{"image": f"p{n}.jpg", "question": "What colour is the cat?", "answer": "blue", "about": ["cat"]} for n in (2, 3)]
    rows = [GOOD, {**GOOD, "image": "p1.jpg", **change}, *others]
    lines = write_lines(tmp_path / "mine.jsonl", rows)
    more = ("questions", lines, "--images", images, "--rule", "class", "--train", tmp_path / "set", "--samples", 2, "--size", 2)
    assert sentence in refusal(laid_data, *more)
    assert not list(tmp_path.glob("set*"))
    said = laid_data("compose", *more, "--skip-bad", "--json").json
    assert said["rejected"] == 1
    assert sentence in json.loads((tmp_path / "set" / "rejected.jsonl").read_text())["reason"]


def test_a_table_with_a_missing_cell_is_refused_by_line(laid_data, tmp_path, pictures):
    (tmp_path / "mine.csv").write_text("image,question,answer\np0.jpg,Which?,red\np1.jpg,Which?\n")
    more = ("--images", pictures, "--rule", "question", "--train", tmp_path / "set")
    assert "mine.csv, line 3: the line has not as many cells" in refusal(laid_data, "questions", tmp_path / "mine.csv", *more)


@pytest.mark.parametrize(
    "name, text, sentence",
    [
        ("mine.csv", "image,question\n", "mine.csv holds no rows"),
        ("mine.jsonl", "", "mine.jsonl holds no rows"),
        ("mine.jsonl", '{"image": "p0.jpg"}', "none of the 1 rows (the first: mine.jsonl, entry 0) holds a question"),
    ],
)
def test_a_file_without_questions_is_named(laid_data, tmp_path, pictures, name, text, sentence):
    (tmp_path / name).write_text(text)
    options = ("--images", pictures, "--rule", "question", "--train", tmp_path / "set")
    assert sentence in refusal(laid_data, "questions", tmp_path / name, *options)


def test_a_picture_whose_name_is_no_utf_8_is_named(laid_data, tmp_path):
    (tmp_path / "own" / "ant").mkdir(parents=True)
    Path(os.fsdecode(os.fsencode(tmp_path / "own" / "ant") + b"/\xff.jpg")).write_bytes(picture(0))
    assert "\\udcff.jpg': its name is no UTF-8" in refusal(laid_data, "classes", tmp_path / "own", "--train", tmp_path / "set")


def test_a_table_whose_columns_differ_by_a_space_is_refused(laid_data, tmp_path, pictures):
    (tmp_path / "mine.csv").write_text("image,question,answer, answer\np0.jpg,Which?,red,blue\n")
    more = ("--images", pictures, "--rule", "question", "--train", tmp_path / "set")
    assert "a column is named twice in its head (image, question, answer, answer)" in refusal(
        laid_data, "questions", tmp_path / "mine.csv", *more
    )


ASKED, ANSWERED = {"from": "human", "value": "<image>\nWhat colour is the dog?"}, {"from": "gpt", "value": "red"}
BAD_CHATS = [
    ([ASKED, {**ANSWERED, "loss": 0}], {}, "the answer 'red' is not to be learned by its own word"),
    ([ASKED, {**ANSWERED, "weight": 0.5}], {}, "field 'weight' of a turn is '0.5'"),
    ([{**ASKED, "train": True}, ANSWERED], {}, "field 'train' asks to learn a user turn"),
    ([ASKED, {**ANSWERED, "reasoning_content": "hm"}], {}, "field 'reasoning_content' says a train of thought"),
    ([ASKED, {**ANSWERED, "tool_calls": [{"name": "f"}]}], {}, "field 'tool_calls' says the use of tools"),
    ([ASKED, {**ANSWERED, "foo": 1}], {}, "field 'foo' is not known"),
    ([ASKED, {**ANSWERED, "content": "blue"}], {}, "fields 'value' and 'content' of a turn are both given"),
    ([ASKED, {**ANSWERED, "role": "assistant"}], {}, "fields 'from' and 'role' are both given"),
    ([ASKED, ANSWERED], {"relevant_images": [0]}, "relevant_images [0] must be [1]"),
    ([ANSWERED, ASKED], {}, "a row to compose from is a question and its answer, as text"),
]


@pytest.mark.parametrize("turns, more, sentence", BAD_CHATS, ids=[sentence[:40] for _, _, sentence in BAD_CHATS])
def test_what_a_turn_says_of_itself_is_kept_or_refused(laid_data, tmp_path, pictures, turns, more, sentence):
    row = {"image": "p0.jpg", "conversations": turns, "about": ["dog"], **more}
    lines = write_lines(tmp_path / "chats.jsonl", [row])
    options = ("--images", pictures, "--rule", "class", "--train", tmp_path / "set")
    assert f"chats.jsonl, entry 0: {sentence}" in refusal(laid_data, "llava", lines, *options)


def test_what_a_turn_says_of_itself_may_be_ignored(laid_data, tmp_path, pictures):
    chats = [
        {"image": f"p{n}.jpg", "conversations": [ASKED, {**ANSWERED, "loss": 0, "foo": 1}], "about": ["dog"], "relevant_images": [1]}
        for n in range(2)
    ]
    rows = [*chats, *({"image": f"p{n}.jpg", "conversations": [ASKED, ANSWERED], "shows": ["dog"]} for n in (2, 3))]
    rows += [{"image": "p4.jpg", "conversations": [{**ASKED, "value": "What colour is the cat?"}, ANSWERED], "shows": ["cat"]}]
    lines = write_lines(tmp_path / "chats.jsonl", rows)
    options = ("--images", pictures, "--rule", "class", "--train", tmp_path / "set", "--samples", 1, "--size", 2)
    assert laid_data("compose", "llava", lines, *options, "--ignore", "loss", "--ignore", "foo").code == 0


COCO = {
    "images": [{"id": 0, "file_name": "p0.jpg"}, {"id": 1, "file_name": "p1.jpg"}],
    "annotations": [{"id": 7, "image_id": 0, "category_id": 0, "caption": "a cat"}],
    "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}],
}
BAD_COCO = [
    ("images", {"id": 0, "file_name": "p2.jpg"}, ", images, entry 2: id 0 names 'p2.jpg' here and 'p0.jpg' before"),
    ("images", {"id": "2", "file_name": "p2.jpg"}, ", images, entry 2: field 'id' is str; it must be int"),
    ("categories", {"id": 1, "name": "cow"}, ", categories, entry 2: id 1 names 'cow' here and 'dog' before"),
    ("annotations", {"image_id": 5, "category_id": 0, "caption": "x"}, ", annotations, entry 1: the file does not list its image 5"),
    ("annotations", {"category_id": 0, "caption": "x"}, ", annotations, entry 1: field 'image_id' is missing"),
]


@pytest.mark.parametrize("part, entry, sentence", BAD_COCO)
def test_an_id_of_a_coco_file_names_one_thing(laid_data, tmp_path, pictures, part, entry, sentence):
    (tmp_path / "coco.json").write_text(json.dumps({**COCO, part: [*COCO[part], entry]}))
    options = ("--images", pictures, "--train", tmp_path / "set")
    assert f"coco.json{sentence}" in refusal(laid_data, "coco", tmp_path / "coco.json", *options)
    if part != "categories":
        lines = write_lines(tmp_path / "mine.jsonl", [GOOD])
        more = (*options, "--rule", "caption", "--captions", tmp_path / "coco.json")
        assert f"coco.json{sentence}" in refusal(laid_data, "questions", lines, *more)


def vqa_files(folder: Path, questions: list[dict], annotations: list[dict]) -> tuple[Path, Path]:
    """A questions file and its annotations file."""
    (folder / "asked.json").write_text(json.dumps({"questions": questions}))
    (folder / "answered.json").write_text(json.dumps({"annotations": annotations}))
    return folder / "asked.json", folder / "answered.json"


VQA = (
    [{"question_id": n, "image_id": n, "question": "Which?"} for n in range(2)],
    [{"question_id": n, "image_id": n, "multiple_choice_answer": answer} for n, answer in enumerate(("red", "blue"))],
)
BAD_VQA = [
    (0, {"question_id": 1}, "asked.json, questions, entry 2: question_id 1 is given twice"),
    (0, {"question_id": "2"}, "asked.json, questions, entry 2: field 'question_id' is str; it must be int"),
    (0, {"question_id": 2, "image_id": 0, "question": "x"}, "asked.json, questions, entry 2: no annotation answers it (question_id 2)"),
    (1, {"question_id": 1}, "answered.json, annotations, entry 2: question_id 1 is given twice"),
]


@pytest.mark.parametrize("part, entry, sentence", BAD_VQA)
def test_an_entry_of_a_vqa_file_is_refused_by_file_and_place(laid_data, tmp_path, pictures, part, entry, sentence):
    trees = [[*found, *([entry] if part == number else [])] for number, found in enumerate(VQA)]
    (tmp_path / "coco.json").write_text(json.dumps(COCO))
    more = ("--instances", tmp_path / "coco.json", "--images", pictures, "--rule", "question", "--train", tmp_path / "set")
    assert sentence in refusal(laid_data, "vqa", *vqa_files(tmp_path, *trees), *more)


def test_an_annotation_of_another_image_is_refused_and_one_without_a_question_is_counted(laid_data, tmp_path, pictures):
    (tmp_path / "coco.json").write_text(json.dumps(COCO))
    more = ("--instances", tmp_path / "coco.json", "--images", pictures, "--rule", "question", "--train", tmp_path / "set")
    asked, answered = VQA
    files = vqa_files(tmp_path, asked, [{**answered[0], "image_id": 1}, answered[1]])
    sentence = "asked.json, questions, entry 0: question_id 0 is of image 0 here and of image 1 at answered.json, annotations, entry 0"
    assert sentence in refusal(laid_data, "vqa", *files, *more)
    files = vqa_files(tmp_path, asked, [*answered, {**answered[0], "question_id": 9}])
    said = laid_data("compose", "vqa", *files, *more, "--size", 1, "--samples", 1, "--dry-run", "--json").json
    assert said["left_out"] == {"annotations of questions that no file asks": 1}


def test_an_image_id_that_two_instances_files_give_to_two_pictures_tells_no_picture_of_a_question(laid_data, tmp_path, pictures):
    (tmp_path / "coco.json").write_text(json.dumps(COCO))
    (tmp_path / "other.json").write_text(json.dumps({**COCO, "images": [{"id": 0, "file_name": "p2.jpg"}]}))
    both = ("--instances", tmp_path / "coco.json", "--instances", tmp_path / "other.json")
    more = (*both, "--images", pictures, "--rule", "question", "--train", tmp_path / "set")
    sentence = "asked.json, questions, entry 0: the --instances files call image 0 'p0.jpg' and 'p2.jpg'"
    assert sentence in refusal(laid_data, "vqa", *vqa_files(tmp_path, *VQA), *more)


def test_files_beside_the_rows_say_of_which_pictures(laid_data, tmp_path, pictures):
    """By the name, or by its last part where that can be one picture alone; files that list none of the pictures are refused."""
    (tmp_path / "images" / "d").mkdir(parents=True)
    for number, name in enumerate(("p0.jpg", "d/p0.jpg", "p1.jpg", "p2.jpg")):
        (tmp_path / "images" / name).write_bytes(picture(number))

    def told(option: str, listed: list[str], rows: list[str]) -> tuple:
        images = [{"id": number, "file_name": name} for number, name in enumerate(listed)]
        annotations = [{"image_id": number, "category_id": 0, "caption": "a dog"} for number in range(len(listed))]
        (tmp_path / "coco.json").write_text(json.dumps({**COCO, "images": images, "annotations": annotations}))
        asked = {"question": "Which?", "answer": "red"}
        lines = write_lines(tmp_path / "mine.jsonl", [{"image": name, **asked} for name in rows])
        size = ("--size", 1, "--samples", 1, "--dry-run", "--train", tmp_path / "set")
        more = ("--images", tmp_path / "images", "--rule", "question", *size)
        return laid_data("compose", "questions", lines, *more, option, tmp_path / "coco.json")

    for option in ("--instances", "--captions"):
        for listed, rows, counted in ((["p0.jpg"], ["p0.jpg", "d/p0.jpg"], None), (["a/p1.jpg", "p2.jpg"], ["p1.jpg", "p2.jpg"], 2)):
            outcome = told(option, listed, rows)
            if counted is None:
                assert f"entry 1: the {option} files list 'p0.jpg', which may be any of 'p0.jpg', 'p0.jpg', 'd/p0.jpg'" in outcome.err
            else:
                assert f"{option}: lists {counted} of the pictures" in outcome.out
        two = told(option, ["a/p1.jpg", "b/p1.jpg"], ["p1.jpg"])
        assert f"entry 0: the {option} files list 'p1.jpg', which may be any of 'a/p1.jpg', 'b/p1.jpg', 'p1.jpg'" in two.err
        none = told(option, ["x.jpg"], ["p1.jpg", "p2.jpg"])
        assert f"the {option} files list none of the 2 pictures of the rows: rows name 'p1.jpg', the files 'x.jpg'" in none.err
        assert two.code == none.code == 2


WRONG_USES = [
    ((), "say what tells the picture of a question from its distractors: --rule class"),
    (("--rule", "colour"), "--rule 'colour' is none of class, caption, question"),
    (("--lead", "Look: "), "must say where the class stands: {class}"),
    (("--rule", "class", "--size", "20-2"), "--size '20-2': give a number of images"),
    (("--rule", "class", "--size", "1001"), "from 1 to 1000"),
    (("--rule", "class", "--size", "2", "--questions", "3"), "each needs a needle of its own"),
    (("--rule", "class", "--size", "400"), "needs 399 distractors, and its rule leaves"),
    (("--rule", "class", "--answers", "red,red,blue"), "--answers red,red,blue: give two or more, each once"),
    (("--rule", "class", "--answers", "red"), "--answers red: give two or more, each once"),
    (("--rule", "class", "--test", "{tmp}/set"), "--train and --test are both"),
    (("--rule", "class", "--test", "{tmp}/set/t"), "/set/t one lies inside the other"),
    (("--rule", "class", "--test", "{tmp}"), "exists; choose another folder"),
    (("--rule", "class", "--train", "{tmp}/set/t", "--test", "{tmp}/set"), "one lies inside the other"),
    (("--rule", "class", "--choices", "3"), "no question is left to ask"),
]


@pytest.mark.parametrize("options, sentence", WRONG_USES)
def test_what_cannot_be_meant_is_refused(laid_data, root, tmp_path, options, sentence):
    lines = write_lines(tmp_path / "mine.jsonl", colour_rows(root)[:200])
    options = [word.replace("{tmp}", str(tmp_path)) for word in options]
    said = refusal(laid_data, "questions", lines, "--images", root / "pictures", "--train", tmp_path / "set", *options)
    assert sentence in said
    assert not list(tmp_path.glob("set*"))


def test_a_class_with_too_few_pictures_is_refused_by_name(laid_data, tmp_path):
    for number, name in enumerate(("ant", "ant", "ant", "bee", "bee", "bee", "cow")):
        (tmp_path / "own" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name / f"{number}.jpg").write_bytes(picture(number))
    said = refusal(laid_data, "classes", tmp_path / "own", "--train", tmp_path / "set", "--choices", 2)
    assert "class 'cow' has 1 pictures for train, which needs at least 2" in said
    assert "holds 3 classes; a question that offers 4 needs at least 5" in refusal(
        laid_data, "classes", tmp_path / "own", "--train", tmp_path / "set"
    )


def test_a_dry_run_writes_nothing_and_says_the_same(laid_data, root, tmp_path, composed):
    lines = write_lines(tmp_path / "mine.jsonl", colour_rows(root))
    size = ("--samples", 400, "--questions", 2, "--size", "2-24", "--test-samples", 100, "--seed", 3)
    folders = ("--train", tmp_path / "train", "--test", tmp_path / "test")
    outcome = laid_data(
        "compose", "questions", lines, "--images", root / "pictures", "--rule", "class", *folders, *size, "--dry-run", "--json"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["mine.jsonl"]
    for part in ("train", "test"):
        assert outcome.json[part].items() <= composed[1][part].items()


def test_a_finished_set_is_not_written_over_and_says_what_comes_next(laid_data, composed, root):
    out, said = composed
    assert said["next"][0] == f"laid-data preview {out / 'train'} --sheet preview.png"
    more = ("--images", root / "pictures", "--rule", "class", "--train", out / "train")
    assert f"{out / 'train'} exists" in refusal(laid_data, "questions", out / "mine.jsonl", *more)


def test_an_interrupt_leaves_nothing_behind(root, tmp_path):
    lines = write_lines(tmp_path / "mine.jsonl", colour_rows(root))
    more = ("--images", root / "pictures", "--rule", "class", "--train", tmp_path / "new" / "train", "--test", tmp_path / "new" / "test")
    words = [sys.executable, "-m", "data_tools.cli", "compose", "questions", lines, *more, "--samples", 1000, "--size", 100]
    process = subprocess.Popen([*map(str, words)], stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("new/.train.*.partial/train/*.tmp")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode not in (0, None)
    assert "Traceback" not in said
    assert not list((tmp_path / "new").iterdir())


IDLE = [
    ("coco", ("--choices", "7"), "--choices is for questions, llava, vqa, shards, classes; with coco, which makes"),
    ("vhs", ("--rule", "class"), "--rule is for questions, llava, vqa, shards; with vhs, which makes"),
    ("coco", ("--ignore", "annotations"), "--ignore is for questions, llava; with coco"),
    ("vqa", ("--ignore", "question"), "--ignore is for questions, llava; with vqa"),
    ("classes", ("--ignore", "circle"), "--ignore is for questions, llava; with classes"),
    ("classes", ("--images", "/nope"), "--images is for questions, llava, vqa, coco, vhs; with classes"),
    ("shards", ("--images", "/nope"), "--images is for questions, llava, vqa, coco, vhs; with shards"),
    ("shards", ("--instances", "x.json"), "--instances is for questions, llava, vqa; with shards"),
    ("shards", ("--captions", "x.json"), "--captions is for questions, llava, vqa; with shards"),
    ("shards", ("--ignore", "shows"), "--ignore is for questions, llava; with shards"),
    ("shards", ("--no-decode",), "--no-decode is for questions, llava, vqa, coco, vhs, classes; with shards"),
    ("shards", ("--follow-links",), "--follow-links is for questions, llava, vqa, coco, vhs, classes; with shards"),
    ("questions", ("--test-size", "7"), "--test-size would change nothing without --test"),
    ("questions", ("--test-samples", "7"), "--test-samples would change nothing without --test"),
    ("questions", ("--test-share", "7"), "--test-share would change nothing without both --train and --test"),
]


@pytest.mark.parametrize("format, options, sentence", IDLE)
def test_an_option_that_changes_nothing_is_refused(laid_data, tmp_path, format, options, sentence):
    assert sentence in refusal(laid_data, format, tmp_path, "--train", tmp_path / "set", *options)
