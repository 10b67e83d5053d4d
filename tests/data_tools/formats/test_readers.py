"""Laws of the readers of formats: field by field in, and out again; any other entry is one documented error."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from data_samples import picture
from format_examples import (
    EXAMPLES,
    FOLDER,
    LLAVA,
    LONGBENCH,
    LONGBENCH_DOCUMENT,
    LONGBENCH_NIAH,
    LONGBENCH_PASSAGES,
    MIRAGE,
    MMC4,
    NIAH,
    OBELICS,
    SHAREGPT,
    VHS,
    build_set,
    changed,
    read,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools.benchmark_files import export
from data_tools.build import FORMATS
from data_tools.formats import mm_niah, visual_haystacks
from data_tools.formats.marks import interleave
from data_tools.image_root import ImageRoot
from data_tools.inputs import entries
from laid_ds.data.haystack import why_whole
from laid_ds.data.record import DataError, Turn, encode
from laid_ds.data.writer import ShardWriter


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
    assert mmc4.turns[0].segments == (0, "one ", 1, "two")
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


def test_marks_and_images_must_agree():
    assert interleave(["a", "b"], 2) == [(0, 1, "a"), ("b",)]
    with pytest.raises(DataError, match="2 <image> marks for 3 images"):
        interleave(["<image><image>"], 3)


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


def test_mmlongbench_reads_documents_and_passages(pictures):
    document = read("mmlongbench", {**LONGBENCH_DOCUMENT, "page_list": ["p0.jpg", "deep/../p1.jpg"]}, pictures)
    pages = "Document : [0]\n\nDocument ..: [1]"
    asked = "Question: Based on Document a-rather-long-n, answer the following question. How many?"
    assert shown(document).endswith(f"Answer: [answer]\n\n{pages}\n\n{asked}")
    assert document.turns[1].text == "3"
    passages = read("mmlongbench", LONGBENCH_PASSAGES, pictures)
    assert "Document (Title: Cats): They purr.\n\nDocument (Title: Dogs): They bark.\n\nQuestion: [0]What is this?" in shown(passages)
    assert passages.turns[1].text == "cat"
    for change, message in (({"answer_format": "Essay"}, "answer_format 'Essay' is none of"), ({"answer": {}}, "field 'answer' is dict")):
        with pytest.raises(DataError, match=message):
            read("mmlongbench", {**LONGBENCH_DOCUMENT, **change}, pictures)
    with pytest.raises(DataError, match="holds no text that would be accepted"):
        read("mmlongbench", {**LONGBENCH_PASSAGES, "answer": []}, pictures)


def test_only_known_needles_make_a_mm_niah_line_a_haystack(pictures):
    """Choices, and pictures in the question, stay where they are; a needle drawn into an image, or words not there, are unknown."""
    sample = read("mm-niah", NIAH, pictures)
    assert (sample.haystack, sample.fixed, sample.turns[0].needles) == (True, (2, 3), (1,))

    def line(*needles, question="Which one?", context=NIAH["context"], answer="a dot"):
        meta = {**NIAH["meta"], "needles": list(needles), "choices_image_path": None}
        return read("mm-niah", {**NIAH, "question": question, "context": context, "answer": answer, "meta": meta}, pictures)

    assert (line("more <image>").haystack, line("more <image>").turns[0].needles) == (True, ())
    assert not any(line(*needles).haystack for needles in ((), ("drawn.png",), ("p0.jpg", "drawn.png"), ("more", "less")))
    assert line("p0.jpg", "drawn.png").turns[0].needles == ()
    asked = line("p0.jpg", question="Is this <image> in the text?", context="text <image>")
    assert (asked.haystack, asked.fixed, asked.turns[0].needles) == (True, (1,), (0,))
    assert not line("p1.jpg", question="Is this <image> in the text?", context="text <image>").haystack


def test_only_known_needles_make_a_mmlongbench_line_a_haystack(pictures):
    sample = read("mmlongbench", LONGBENCH_NIAH, pictures)
    assert (sample.haystack, sample.fixed, sample.turns[0].needles) == (True, (1, 2), (0,))
    asked = {**LONGBENCH_NIAH, "choices_image": [], "question": "How often <image>?", "answer": [1]}
    assert (read("mmlongbench", asked, pictures).haystack, read("mmlongbench", asked, pictures).fixed) == (True, (1,))
    pasted = read("mmlongbench", {**asked, "needle_image_list": ["p3.jpg"]}, pictures)
    assert (pasted.haystack, pasted.turns[0].needles, pasted.fixed) == (False, (), (1,))
    words = {**LONGBENCH_NIAH, "choices_image": [], "answer": "x", "needle_image_list": []}
    assert (read("mmlongbench", words, pictures).haystack, why_whole(read("mmlongbench", LONGBENCH, pictures)) is None) == (True, False)
    assert why_whole(read("mmlongbench", {**LONGBENCH, "pos_image": ["p1.jpg"]}, pictures)) is None


def test_folder_lines_may_say_that_they_are_haystacks(pictures):
    sample = read("folder", {**FOLDER, "needles": [], "haystack": True, "fixed": [1]}, pictures)
    assert (sample.haystack, sample.fixed) == (True, (1,))


PLACES = st.lists(st.integers(0, 5), min_size=1, max_size=6)
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=6)


def shown(sample) -> str:
    """What a sample's question reads as, an image as its number in the names of the pictures."""
    by_bytes = {picture(number): f"[{number}]" for number in range(6)}
    return "".join(part if isinstance(part, str) else by_bytes[sample.images[part]] for part in sample.turns[0].segments)


@given(images=PLACES, texts=st.lists(WORDS, min_size=7, max_size=7), answer=WORDS, needles=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_line_of_ours_means_what_it_says(pictures, images, texts, answer, needles):
    asked = needles.draw(st.lists(st.sampled_from(range(len(images))), unique=True))
    names = [f"p{number}.jpg" for number in images]
    texts = texts[: len(images) + 1]
    marked = {"question": "<image>".join(texts), "images": names, "answer": answer, "needles": asked}
    if not answer.strip():
        with pytest.raises(DataError, match="has no answer"):
            read("folder", marked, pictures)
        return
    sample = read("folder", marked, pictures)
    assert shown(sample) == texts[0] + "".join(f"[{number}]{text}" for number, text in zip(images, texts[1:], strict=True))
    assert (sample.turns[0].needles, sample.turns[1]) == (tuple(asked), Turn("assistant", (answer,)))
    bare = read("folder", {**marked, "question": "".join(texts)}, pictures)
    assert shown(bare) == "".join(f"[{number}]" for number in images) + "".join(texts)


@given(order=st.permutations(range(6)), needles=st.integers(1, 5), question=WORDS, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_haystack_knows_its_needles(pictures, order, needles, question, seed):
    names = [f"p{number}.jpg" for number in order]
    conversations = [{"from": "human", "value": question}, {"from": "gpt", "value": "no"}]
    entry = {"conversations": conversations, "pos_image": names[:needles], "neg_image": names[needles:]}
    sample = visual_haystacks.read_entry(entry, "key", ImageRoot(pictures), seed=seed)
    assert {sample.images[needle] for needle in sample.turns[0].needles} == {picture(number) for number in order[:needles]}
    assert sorted(sample.images) == sorted(picture(number) for number in range(6))
    assert (sample.turns[0].text.endswith(question), sample.turns[1].text) == (True, "no")
    line = {"ctxs": names, "question": question, "answer": "No"}
    assert shown(read("mmlongbench", line, pictures)).split("[answer]")[1].startswith("\n\n" + "\n".join(f"[{number}]" for number in order))


@given(images=PLACES, texts=st.lists(WORDS, min_size=7, max_size=7), question=WORDS, number=st.integers(0, 2))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_interleaved_line_reads_in_its_order(pictures, images, texts, question, number):
    names, texts = [f"p{image}.jpg" for image in images], texts[: len(images) + 1]
    meta = {"needles": [], "choices": ["a", "b", "c"]}
    entry = {"images_list": names, "context": "<image>".join(texts), "question": question, "answer": number, "meta": meta}
    sample = read("mm-niah", entry, pictures)
    context = texts[0] + "".join(f"[{image}]{text}" for image, text in zip(images, texts[1:], strict=True))
    assert shown(sample).startswith(f"{context}\n{question}\nA. a\nB. b\nC. c\n")
    assert sample.turns[1].text == "ABC"[number]


REFUSED = {
    "more turns": ("vhs", {**VHS, "conversations": VHS["conversations"] * 2}, "a question and its answer, not 4 turns"),
    "no needle": ("vhs", {**VHS, "pos_image": []}, "pos_image must name the needles"),
    "a needle among the others": ("vhs", {**VHS, "neg_image": ["p0.jpg"]}, "and neg_image none of them"),
    "a mark in the question": ("vhs", {**VHS, "conversations": [{"value": "<image>?"}, {"value": "yes"}]}, "the question holds <image>"),
    "a system prompt": ("vhs", {**VHS, "system": "x"}, "'system' says a system prompt"),
    "videos": ("mm-niah", {**NIAH, "videos": ["x"]}, "'videos' says videos"),
    "two kinds of choices": ("mm-niah", {**NIAH, "meta": {**NIAH["meta"], "choices": ["a", "b"]}}, "'choices' and 'choices_image_path'"),
    "sound": ("mmlongbench", {**LONGBENCH, "audios": ["x"]}, "'audios' says sound"),
    "an answer that cannot be chosen": ("folder", {**FOLDER, "answer": "maybe"}, "answer 'maybe' is none of the choices"),
    "an unknown field": ("folder", {**FOLDER, "hint": "x"}, "field 'hint' is not known"),
    "a mark without image": ("folder", {**FOLDER, "images": [], "needles": [], "question": "<image>?"}, "1 <image> marks for 0 images"),
    "another mark": ("folder", {**FOLDER, "question": "<video>?"}, "the mark <video>"),
    "no answer": ("folder", {**FOLDER, "answer": " ", "choices": []}, "the question 'Same\\?' has no answer"),
    "a choice twice": ("folder", {**FOLDER, "choices": ["no", "no"]}, "must be two or more, each given once"),
    "one choice": ("folder", {**FOLDER, "choices": ["no"]}, "must be two or more, each given once"),
    "a needle twice": ("folder", {**FOLDER, "needles": [0, 0]}, "needles \\[0, 0\\] name an image twice"),
    "an answer of none": ("llava", {**LLAVA, "conversations": [*LLAVA["conversations"][:3], {"from": "gpt", "value": ""}]}, "turn 3 is an"),
    "no letter": ("mm-niah", {**NIAH, "answer": "C"}, "answer 'C' is none of the choices A, B"),
    "no letter but counts": ("mm-niah", {**NIAH, "answer": [1]}, "answer '\\[1\\]' is none of the choices A, B"),
    "an empty letter": ("mm-niah", {**NIAH, "answer": ""}, "answer '' says nothing"),
    "no counts": ("mm-niah", {**NIAH, "answer": [], "meta": {"needles": []}}, "answer \\[\\] says nothing"),
    "no letter of it": ("mmlongbench", {**LONGBENCH_NIAH, "answer": "C"}, "answer 'C' is none of the choices A, B"),
    "an answer before its question": (
        "vhs",
        {**VHS, "conversations": [{"from": "gpt", "value": "?"}, {"from": "human", "value": "yes"}]},
        "must follow, not what 'gpt' says",
    ),
    "a loss": ("vhs", {**VHS, "conversations": [VHS["conversations"][0], {"value": "yes", "loss": 0}]}, "field 'loss' says what is to be"),
    "no choice of that number": ("mm-niah", {**NIAH, "answer": 2}, "answer 2 is the number of no choice"),
}


@pytest.mark.parametrize("format, entry, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_a_format_cannot_say_is_refused(pictures, format, entry, message):
    with pytest.raises(DataError, match=message):
        read(format, entry, pictures)


def test_our_own_lines_may_have_a_system_prompt(pictures):
    assert read("folder", {**FOLDER, "system": "Be brief."}, pictures).turns[0] == Turn("system", ("Be brief.",))


def test_an_export_says_how_many_samples_it_cannot_hold(tmp_path, pictures):
    dataset = build_set(tmp_path / "set", "folder", [FOLDER, {**FOLDER, "answer": "a dot", "choices": []}], pictures)
    report = visual_haystacks.write_files(dataset, tmp_path / "out")
    assert (report["entries"], report["samples_without_yes_or_no"]) == ({"2": 1}, 1)


def two_roots(tmp_path) -> list[Path]:
    """Two folders with another p0.jpg each, and bmp files."""
    for number, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p0.jpg").write_bytes(picture(number))
        (tmp_path / name / "p1.jpg").write_bytes(picture(5))
        Image.new("RGB", (8, 8 + number)).save(tmp_path / name / "b0.bmp")
    return [tmp_path / "a", tmp_path / "b"]


@pytest.mark.parametrize("write", [visual_haystacks.write_files, mm_niah.write_file])
def test_an_export_holds_each_picture_of_a_name(tmp_path, write):
    """Two pictures of one name become two files, and a file's name says its format; names that an entry says must stay, or are refused."""
    roots = two_roots(tmp_path)
    asked = {**FOLDER, "images": ["p0.jpg", "p1.jpg", "b0.bmp"]}
    paths = {"image_paths": asked["images"]}
    ours = [replace(FORMATS["folder"](asked, f"key-{number}", ImageRoot(root)), meta=paths) for number, root in enumerate(roots)]
    write(ours, tmp_path / "ours")
    written = {str(path.relative_to(tmp_path / "ours" / "images")): path.read_bytes() for path in (tmp_path / "ours" / "images").iterdir()}
    assert set(written) == {"p0.jpg", "p1.jpg", "key-0.002.png", "key-1.000.jpg", "key-1.002.png"}
    assert set(written.values()) == {image for sample in ours for image in sample.images}
    haystack, line = {**VHS, "neg_image": ["p1.jpg"]}, {**NIAH, "answer": "x", "meta": {"needles": ["p0.jpg"]}}
    format, entry = ("vhs", haystack) if write is visual_haystacks.write_files else ("mm-niah", line)
    given = [FORMATS[format](entry, f"key-{number}", ImageRoot(root)) for number, root in enumerate(roots)]
    with pytest.raises(DataError, match=r"image 'p0.jpg' is another picture than an earlier sample's of that name"):
        write(given, tmp_path / "given")
    write([given[0], given[0]], tmp_path / "same")


@pytest.mark.parametrize("write, count", [(visual_haystacks.write_files, "yes_or_no"), (mm_niah.write_file, "question")])
def test_an_export_of_samples_that_it_cannot_hold_is_refused(tmp_path, pictures, write, count):
    document = read("obelics", OBELICS, pictures)
    with pytest.raises(DataError, match="none of the 2 samples asks a question"):
        write([document, document], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = write([document, read("folder", FOLDER, pictures)], tmp_path / "out")
    assert report[f"samples_without_{count}"] == 1
    assert sorted(path.name for path in (tmp_path / "out" / "images").iterdir()) == ["key.000.jpg", "key.001.jpg"]


@pytest.mark.parametrize("format", ["vhs", "mm-niah", "lmms-eval"])
def test_an_export_is_whole_or_not_there(tmp_path, pictures, format):
    """What is refused at the last sample has left nothing, and nothing of another's is touched; an empty folder is taken."""
    good = build_set(tmp_path / "good", "folder", [FOLDER], pictures)
    hostile = replace(good.read(0), key="last", meta={"image_paths": ["../../x.jpg", "/y.jpg"]})
    with ShardWriter(tmp_path / "set") as writer:
        writer.write(good.read(0))
        writer.write(hostile)
    with pytest.raises(DataError, match="leads out"):
        export(format, str(tmp_path / "set"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))) == []
    (tmp_path / "out").mkdir()
    told = export(format, str(tmp_path / "good"), tmp_path / "out")
    assert told["folder"] == str(tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert not [path for path, found in before.items() if b".partial" in found]
    with pytest.raises(ValueError, match="out is not empty; choose another folder"):
        export(format, str(tmp_path / "good"), tmp_path / "out")
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
