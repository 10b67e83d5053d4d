"""Laws of conversations: what a row says is what is learned, however it is spelled; what a sample cannot hold is refused by its name."""

import base64

import pytest
from data_samples import picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.build import FORMATS
from data_tools.formats.fields import SAYS_MORE
from data_tools.image_root import ImageRoot
from laid_ds.data.record import DataError, Turn, encode


def read(entry, pictures):
    return FORMATS["llava"](entry, "key", ImageRoot(pictures))


def talk(*said, **fields):
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in said], **fields}


def chat(*said, **fields):
    return {"messages": [{"role": role, "content": content} for role, content in said], **fields}


def in_place(number: int) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(picture(number)).decode()


ASKED, ANSWERED = ("human", "<image>What?"), ("gpt", "A dot.")
QUESTION, ANSWER = Turn("user", (0, "What?")), Turn("assistant", ("A dot.",))
SAME = {
    "image": talk(ASKED, ANSWERED, image="p0.jpg"),
    "image beside empty images": talk(ASKED, ANSWERED, image="p0.jpg", images=[]),
    "images beside a null image": talk(ASKED, ANSWERED, image=None, images=["p0.jpg"]),
    "fields that say nothing": talk(ASKED, ANSWERED, image="p0.jpg", width=3, source="here", metadata={"a": 1}, picture_id=5),
    "empty fields": talk(
        ASKED, ANSWERED, image="p0.jpg", videos=[], tools="[]", functions="", system="", kto_tag=None, objects={}, audios=[None], other=None
    ),
    "a turn that is learned": {
        "images": ["p0.jpg"],
        "messages": [
            {"role": "user", "content": "<image>What?", "loss": False, "name": None},
            {"role": "assistant", "content": "A dot.", "loss": True, "weight": 1, "train": None},
        ],
    },
    "no mark": talk(("human", "What?"), ANSWERED, image="p0.jpg"),
    "both names of conversations": {**talk(ASKED, ANSWERED, image="p0.jpg"), "messages": []},
    "data URL": talk(ASKED, ANSWERED, image=in_place(0)),
    "bytes": talk(ASKED, ANSWERED, images=[{"path": None, "bytes": base64.b64encode(picture(0)).decode()}]),
    "path object": talk(ASKED, ANSWERED, images=[{"path": "p0.jpg", "bytes": None}]),
    "leading slash": talk(ASKED, ANSWERED, image="/p0.jpg"),
    "backslash": talk(ASKED, ANSWERED, image=".\\deep\\..\\p0.jpg"),
    "file URL": talk(ASKED, ANSWERED, image="file:///p0.jpg"),
    "parts with image_url": chat(
        ("user", [{"type": "image_url", "image_url": {"url": in_place(0), "detail": "auto"}}, {"type": "text", "text": "What?"}]),
        ("assistant", [{"type": "text", "text": "A "}, {"type": "text", "text": "dot."}]),
    ),
    "parts with image_url as text": chat(
        ("user", [{"type": "image_url", "image_url": "p0.jpg"}, {"type": "text", "text": "What?"}]), ("assistant", "A dot.")
    ),
    "parts beside images": chat(
        ("user", [{"type": "image"}, {"type": "text", "text": "What?"}]),
        ("assistant", [{"type": "text", "text": "A dot."}]),
        images=["p0.jpg"],
    ),
    "parts with nulls": chat(
        ("user", [{"type": "image", "image": "p0.jpg", "text": None}, {"type": "text", "text": "What?", "image": None}]),
        ("assistant", [{"type": "text", "text": "A dot.", "image": None}]),
        images=None,
    ),
    "parts with base64": chat(
        ("user", [{"type": "image", "base64": base64.b64encode(picture(0)).decode()}, {"type": "text", "text": "What?"}]),
        ("assistant", "A dot."),
    ),
}


@pytest.mark.parametrize("entry", SAME.values(), ids=SAME.keys())
def test_one_meaning_in_many_spellings(pictures, entry):
    sample = read(entry, pictures)
    assert sample.turns == (QUESTION, ANSWER)
    assert sample.images == (picture(0),)


def test_a_system_column_is_a_system_turn(pictures):
    assert read(talk(ASKED, ANSWERED, image="p0.jpg", system="Rhyme."), pictures).turns == (Turn("system", ("Rhyme.",)), QUESTION, ANSWER)


@pytest.mark.parametrize("field, value", [("loss", False), ("weight", 0), ("weight", 0.0), ("train", False), ("supervised", False)])
def test_an_answer_that_is_not_to_be_learned_is_kept_but_not_learned(pictures, field, value):
    entry = chat(("user", "a"), ("assistant", "draft"), ("user", "b"), ("assistant", "final"))
    entry["messages"][1][field] = value
    assert [turn.supervised for turn in read(entry, pictures).turns] == [True, False, True, True]


def test_images_without_marks_stand_in_the_first_question_never_in_a_system_turn(pictures):
    turns = read(talk(("system", "Be brief."), ("human", "a"), ("gpt", "b"), ("human", "c"), image=["p0.jpg", "p1.jpg"]), pictures).turns
    assert [turn.segments for turn in turns] == [("Be brief.",), (0, 1, "a"), ("b",), ("c",)]


def test_a_call_of_a_function_is_the_assistants_own_answer(pictures):
    assert read(talk(("human", "a"), ("function_call", "f()")), pictures).turns[1] == Turn("assistant", ("f()",))


@pytest.mark.parametrize("entry", [talk(("human", "a"), ("observation", "b")), chat(("user", "a"), ("tool", "b"))])
def test_what_a_tool_said_is_a_turn_of_its_own(pictures, entry):
    assert read(entry, pictures).turns[1] == Turn("tool", ("b",))


def turn_with(**fields):
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **fields}]}


def part(**fields):
    return chat(("user", [fields, {"type": "text", "text": "a"}]), ("assistant", "b"))


REFUSED = {
    "a mark without image": (talk(ASKED, ANSWERED), "1 <image> marks for 0 images"),
    "a mark beside null": (talk(ASKED, ANSWERED, image=None), "1 <image> marks for 0 images"),
    "a mark beside an empty list": (talk(ASKED, ANSWERED, images=[]), "1 <image> marks for 0 images"),
    "two marks, three images": (talk(("human", "<image><image>"), ANSWERED, image=["p0.jpg"] * 3), "2 <image> marks for 3 images"),
    "image and images": (talk(ASKED, ANSWERED, image="p0.jpg", images=["p1.jpg"]), "'image' and 'images' are both given"),
    "conversations and messages": ({**talk(ASKED, ANSWERED, image="p0.jpg"), **chat(("user", "x"))}, "'conversations' and 'messages'"),
    "no turn for images": (talk(("gpt", "x"), image="p0.jpg"), "no user turn to show them in"),
    "a null among images": (talk(ASKED, ANSWERED, image=["p0.jpg", None]), "image 1 is None"),
    **{
        f"mark {mark}": (talk(("human", f"{mark}What?"), ANSWERED), "only <image> is known")
        for mark in (
            "<video>",
            "<audio>",
            "<Image>",
            "<img>",
            "<image_1>",
            "<image 1>",
            "<|image_1|>",
            "<ImageHere>",
            "<image-placeholder>",
        )
    },
    "system twice": (talk(("system", "x"), ASKED, ANSWERED, image="p0.jpg", system="y"), "'system' is given beside a system turn"),
    "half a weight": (turn_with(weight=0.5), "field 'weight' of a turn is '0.5'"),
    "a question to learn": (
        chat(("user", "a")) | {"messages": [{"role": "user", "content": "a", "train": True}]},
        "asks to learn a user turn",
    ),
    "loss against weight": (turn_with(loss=True, weight=0), "disagree"),
    "value and content": (turn_with(value="c"), "'value' and 'content' of a turn are both given"),
    "no content": (chat(("user", "a"), ("assistant", None)), "field 'content' is NoneType"),
    "an unknown field of a turn": (turn_with(style="short"), "field 'style' is not known"),
    "a thought": (turn_with(reasoning_content="hm"), "'reasoning_content' says a train of thought"),
    "calls": (turn_with(tool_calls=[{"name": "f"}]), "'tool_calls' says the use of tools"),
    "an unknown speaker": (talk(("human", "a"), ("narrator", "b")), "speaker 'narrator'"),
    "a tool to learn": (chat(("user", "a")) | {"messages": [{"role": "tool", "content": "a", "train": True}]}, "asks to learn a tool turn"),
    "needles that are no truth value": (talk(ASKED, ANSWERED, image="p0.jpg", relevant_images=["no"]), "must hold 0 or 1"),
    "a video part": (part(type="video_url", video_url="v.mp4"), "field 'video_url' is not known"),
    "a sound part": (part(type="input_audio"), "a part of type 'input_audio' is none of"),
    "image part without image": (part(type="image"), "1 <image> marks for 0 images"),
    "image_url without url": (part(type="image_url"), "without its image_url"),
    "two images in a part": (part(type="image", image="p0.jpg", path="p1.jpg"), "'image' and 'path' are both given"),
    "a smaller image": (part(type="image_url", image_url={"url": "p0.jpg", "detail": "low"}), "field 'detail' is 'low'"),
    "parts and images": ({**part(type="image", image="p0.jpg"), "images": ["p1.jpg"]}, "1 images stand beside the conversation"),
    "more images than parts": ({**part(type="image"), "images": ["p0.jpg", "p1.jpg"]}, "1 <image> marks for 2 images"),
    "part and mark": (
        chat(("user", [{"type": "image", "image": "p0.jpg"}, {"type": "text", "text": "<image>"}]), ("assistant", "b")),
        "say all images in one way",
    ),
    "no base64": (talk(ASKED, ANSWERED, image="data:image/png;base64,!"), "is not base64"),
    "a URL": (talk(ASKED, ANSWERED, image="https://x/p0.jpg"), "is a URL"),
    "an unknown key of an image": (talk(ASKED, ANSWERED, image=[{"path": "p0.jpg", "crop": [0, 0, 1, 1]}]), "unknown field 'crop'"),
}


@pytest.mark.parametrize("entry, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_a_sample_cannot_hold_is_refused_with_its_name(pictures, entry, message):
    with pytest.raises(DataError, match=message.replace("|", r"\|")):
        read(entry, pictures)


@pytest.mark.parametrize("name", [*sorted(SAYS_MORE), "anything"])
@pytest.mark.parametrize("value", [0, False, "x", [1]])
def test_no_field_that_may_change_what_is_learned_is_dropped(pictures, name, value):
    if name == "system" and isinstance(value, str):
        return  # the one of them that conversations know
    with pytest.raises(DataError, match=f"'{name}'"):
        read(talk(ASKED, ANSWERED, image="p0.jpg", **{name: value}), pictures)


WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1, max_size=8)
TURN = st.tuples(st.sampled_from(["user", "assistant"]), st.lists(WORDS | st.none(), min_size=1, max_size=4), st.booleans())
SPEAKER = {"user": "human", "assistant": "gpt", "system": "system"}


def expected(system: str, model) -> tuple[list[Turn], int]:
    """The turns that a model of a conversation means: texts, and None for the next image."""
    turns, images = [Turn("system", (system,))] if system else [], 0
    for role, pieces, learned in model:
        segments: list = []
        for piece in pieces:
            if piece is None:
                segments.append(images)
                images += 1
            elif segments and isinstance(segments[-1], str):
                segments[-1] += piece
            else:
                segments.append(piece)
        turns.append(Turn(role, tuple(segments), supervised=learned or role == "user"))
    return turns, images


def spelled(spelling: str, system: str, model) -> dict:
    names = iter(range(100))
    said = []
    for role, pieces, learned in model:
        if spelling == "marks":
            turn = {"from": SPEAKER[role], "value": "".join("<image>" if piece is None else piece for piece in pieces)}
        else:
            shown = {"column": lambda: {"type": "image"}, "in place": lambda: {"type": "image", "image": f"p{next(names) % 6}.jpg"}}[
                spelling
            ]
            turn = {"role": role, "content": [shown() if piece is None else {"type": "text", "text": piece} for piece in pieces]}
        said.append(turn if learned or role == "user" else {**turn, "loss": False})
    count = sum(piece is None for _, pieces, _ in model for piece in pieces)
    images = {} if spelling == "in place" else {"images": [f"p{number % 6}.jpg" for number in range(count)]}
    system_first = {"system": system} if spelling == "marks" else {}
    if system and spelling != "marks":
        said.insert(0, {"role": "system", "content": system})
    return {"conversations" if spelling == "marks" else "messages": said, **images, **system_first}


@given(system=st.just("") | WORDS, model=st.lists(TURN, min_size=1, max_size=4), spelling=st.sampled_from(["marks", "column", "in place"]))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_conversation_means_the_same_in_any_spelling(pictures, system, model, spelling):
    if any(
        role == "assistant" and learned and not "".join(piece or "<image>" for piece in pieces).strip() for role, pieces, learned in model
    ):
        with pytest.raises(DataError, match="is an answer that says nothing"):
            read(spelled(spelling, system, model), pictures)
        return
    sample = read(spelled(spelling, system, model), pictures)
    turns, images = expected(system, model)
    assert list(sample.turns) == turns
    assert sample.images == tuple(picture(number % 6) for number in range(images))
    encode(sample)
