"""The text is that of stock `apply_chat_template`, and exactly the answers in it are supervised, over public chat templates and any texts:
equal or refused, never different."""

from __future__ import annotations

import copy
import io
import itertools
import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from unicodedata import normalize

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import ProcessorMixin

from laid_ds.data.batch import Prepare
from laid_ds.data.dataset import Dataset
from laid_ds.data.images import Pixels
from laid_ds.data.record import DataError, Sample
from laid_ds.models.chat import turn_text
from laid_ds.models.processor import Renderer, answer_tokens, load_processor
from tests.models.templates import MARKS, STOCKS, Stock


@dataclass(frozen=True)
class Said:
    """A turn."""

    role: str
    segments: tuple[str | int, ...]
    supervised: bool = True


def talk(*turns) -> tuple[Said, ...]:
    return tuple(Said("assistant" if role == "unlearned" else role, tuple(said), role != "unlearned") for role, *said in turns)


ANSWERS = ("ruddy tabby", "beside hearth", "nothing remains")  # words that no question and no template holds
WORDS = " ".join(ANSWERS).split()
TALKS = {
    "single": talk(("user", 0, "What is it?"), ("assistant", ANSWERS[0])),
    "multi": talk(
        *(("user", 0, "What is it?"), ("assistant", ANSWERS[0]), ("user", "Where?"), ("assistant", ANSWERS[1])),
        *(("user", "And then?"), ("assistant", ANSWERS[2])),
    ),
    "system": talk(
        ("system", "Be brief."), ("user", 0, "What is it?"), ("assistant", ANSWERS[0]), ("user", "Where?"), ("assistant", ANSWERS[1])
    ),
    "images": talk(("user", 0, "First.", 1, "Second. Which?"), ("assistant", ANSWERS[0]), ("user", 2, "Now?"), ("assistant", ANSWERS[1])),
    "text": talk(("user", "What is it?"), ("assistant", ANSWERS[0]), ("user", "Where?"), ("assistant", ANSWERS[1])),
    "system_text": talk(("system", "Be brief."), ("user", "What is it?"), ("assistant", ANSWERS[0])),
    "document": talk(("assistant", 0, ANSWERS[0], 1, ANSWERS[1])),
    "document_text": talk(("assistant", ANSWERS[0])),
    "unsupervised": talk(
        *(("user", 0, "What is it?"), ("unlearned", "A guess."), ("user", "Sure?"), ("assistant", ANSWERS[0])),
    ),
    "consecutive": talk(("user", "What is it?"), ("assistant", ANSWERS[0]), ("assistant", ANSWERS[1])),
    "two_parts": talk(("user", "What is it?"), ("assistant", "ruddy ", "tabby"), ("user", "Where?"), ("assistant", ANSWERS[1])),
    "edges": talk(("user", "What is it?"), ("assistant", f"\n {ANSWERS[0]} \n"), ("user", "Where?"), ("assistant", f" {ANSWERS[1]}")),
    "empty": talk(("user", "What is it?"), ("assistant", ""), ("user", "Where?"), ("assistant", ANSWERS[0])),
    "blank": talk(("user", "What is it?"), ("assistant", " \n"), ("user", "Where?"), ("assistant", ANSWERS[0])),
    "echo": talk(("user", "tabby tabby?"), ("assistant", "tabby"), ("user", "tabby"), ("assistant", "tabby tabby")),
    "thinking": talk(("user", 0, "What is it?"), ("assistant", f"<think>it has ears</think>{ANSWERS[0]}")),
    "thinking_multi": talk(
        *(("user", 0, "What is it?"), ("assistant", f"<think>\nit has ears\n</think>\n\n{ANSWERS[0]}")),
        *(("user", "Where?"), ("assistant", f"<think>\nlook again\n</think>\n\n{ANSWERS[1]}")),
    ),
    "thinking_text": talk(
        *(("user", "What is it?"), ("assistant", f"<think>it has ears</think>{ANSWERS[0]}")),
        *(("user", "Where?"), ("assistant", f"<think>look again</think>{ANSWERS[1]}")),
    ),
}


def picture(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(file, "PNG")
    return file.getvalue()


IMAGES = tuple(picture((80 * i, 0, 255 - 80 * i)) for i in range(3))


def sample_of(turns: tuple[Said, ...]) -> Sample:
    shown = max((segment for turn in turns for segment in turn.segments if isinstance(segment, int)), default=-1)
    return Sample("k", turns, images=IMAGES[: shown + 1])


@pytest.fixture(scope="module")
def plain(world) -> ProcessorMixin:
    """A processor whose tokenizer has the special tokens of all the templates."""
    processor = load_processor(world.student)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)}, replace_extra_special_tokens=False)
    processor.tokenizer.add_tokens(["<think>", "</think>"])
    processor.tokenizer.bos_token = "<s>"
    return processor


def with_template(plain: ProcessorMixin, template: str) -> ProcessorMixin:
    processor = copy.copy(plain)
    processor.chat_template = template.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return processor


@pytest.fixture(scope="module")
def renderers(plain):
    """The name of a stand-in -> its renderer, made once."""
    return cache(lambda stock: Renderer(with_template(plain, STOCKS[stock].template), Pixels()))


def stock_text(processor: ProcessorMixin, turns: tuple[Said, ...], texts: tuple[str, ...]) -> str:
    def content(turn: Said):
        if turn.role in texts:
            return "".join(turn.segments)
        return [{"type": "image"} if isinstance(s, int) else {"type": "text", "text": s} for s in turn.segments]

    return processor.apply_chat_template([{"role": turn.role, "content": content(turn)} for turn in turns], tokenize=False)


def own(rendered) -> int:
    """The number of tokens without a stand-in image after the last one."""
    return len(rendered.shows) - rendered.trailing


def learned(processor: ProcessorMixin, rendered) -> list[str]:
    """The runs of supervised tokens as texts, without whitespace at their edges. An image that stands in an answer does not end it."""
    ids, supervised = rendered.tokens["input_ids"][: own(rendered)], rendered.supervised[: own(rendered)]
    joined = supervised | ((ids == processor.image_token_id) & supervised.roll(1))
    runs = itertools.groupby(range(len(ids)), lambda i: bool(joined[i]))
    return [processor.tokenizer.decode(ids[list(places)]).strip() for is_run, places in runs if is_run]


def text_of(processor: ProcessorMixin, rendered) -> str:
    """What the model reads, with one mark for an image and without the stand-in after the last token."""
    return processor.tokenizer.decode(rendered.tokens["input_ids"][: own(rendered)])


def meant(text: str, turns: tuple[Said, ...], case: Stock) -> list[str]:
    """The answers as they stand in the stock text, found by their words, which stand there once. Those that touch are one."""
    spans: list[tuple[int, int]] = []
    for turn in turns:
        if turn.role != "assistant" or not turn.supervised:
            continue
        words = [word for word in WORDS if word in turn_text(turn)]
        assert all(text.count(word) == 1 for word in words)
        start, stop = text.index(words[0]), text.index(words[-1]) + len(words[-1])
        if isinstance(turn.segments[0], int) and not case.apart:
            start = text.index("<|vision_start|>")
        blank = len(text[stop:]) - len(text[stop:].lstrip())
        stop += blank + len(case.end) if case.end and text.startswith(case.end, stop + blank) else 0
        spans.append((start, stop))
    touching = [i for i in range(1, len(spans)) if spans[i - 1][1] == spans[i][0]]
    starts = [start for i, (start, _) in enumerate(spans) if i not in touching]
    stops = [stop for i, (_, stop) in enumerate(spans) if i + 1 not in touching]
    return [text[start:stop].strip() for start, stop in zip(starts, stops, strict=True)]


WORDED = [name for name in TALKS if name not in ("empty", "blank", "echo") and "thinking" not in name]


@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("stock", STOCKS)
def test_stock_text_or_a_refusal(renderers, stock, name):
    case, turns = STOCKS[stock], TALKS[name]
    processor = renderers(stock).processor
    renderer = renderers(stock)
    if name in case.refused:
        with pytest.raises(ValueError, match="chat template"):
            renderer(sample_of(turns))
        return
    rendered = renderer(sample_of(turns))
    assert text_of(processor, rendered) == stock_text(processor, turns, case.texts)


@pytest.mark.parametrize("stock, name", [(stock, name) for stock in STOCKS for name in WORDED if name not in STOCKS[stock].refused])
def test_the_answers_and_their_end_marks_are_supervised(renderers, stock, name):
    case, turns = STOCKS[stock], TALKS[name]
    processor = renderers(stock).processor
    found = learned(processor, renderers(stock)(sample_of(turns)))
    assert found == meant(stock_text(processor, turns, case.texts), turns, case)


TOOL = talk(("user", "What is it?"), ("assistant", "look()"), ("tool", "murky lantern"), ("assistant", ANSWERS[0]))


@pytest.mark.parametrize("stock", STOCKS)
def test_what_a_tool_said_is_read_and_not_learned_or_the_talk_is_refused(plain, stock):
    processor = with_template(plain, STOCKS[stock].template)
    text = None
    try:
        rendered = Renderer(processor, Pixels())(sample_of(TOOL))
        text = text_of(processor, rendered)
    except ValueError as error:
        said = str(error)
    if text is None:
        assert re.search("does not show the model what a tool said|the chat template refuses the turns", said), said
        return
    assert text.count("murky lantern") == 1
    assert not any("lantern" in run for run in learned(processor, rendered))
    assert ANSWERS[0] in learned(processor, rendered)[-1]


def test_templates_that_know_tools_show_them(plain):
    for name in ("qwen2_5_vl", "internvl", "idefics3", "chatml"):
        Renderer(with_template(plain, STOCKS[name].template), Pixels())(sample_of(TOOL))


THOUGHTS = {
    "qwen3_5": ["{1}<|im_end|>", "look again\n</think>\n\n{2}<|im_end|>"],
    "qwen3": ["{1}<|im_end|>", "<think>\nlook again\n</think>\n\n{2}<|im_end|>"],
    "glm4_5v": ["{1}", "<think>look again</think>\n{2}"],
    "lfm2_5_vl": ["{1}<|im_end|>", "<think>look again</think>{2}<|im_end|>"],
    "deepseek_distill": ["{1}</s>", "{2}</s>"],
    "qwen3_vl": ["<think>it has ears</think>{1}<|im_end|>", "<think>look again</think>{2}<|im_end|>"],
    "gemma3": ["<think>it has ears</think>{1}<end_of_turn>", "<think>look again</think>{2}<end_of_turn>"],
}
"""Of the talk "thinking_text", read off the templates: the thoughts that stand in the text and are not in the prompt."""


@pytest.mark.parametrize("stock", THOUGHTS)
def test_thoughts_are_learned_where_the_template_shows_them(renderers, stock):
    processor = renderers(stock).processor
    found = learned(processor, renderers(stock)(sample_of(TALKS["thinking_text"])))
    assert found == [said.replace("{1}", ANSWERS[0]).replace("{2}", ANSWERS[1]) for said in THOUGHTS[stock]]


@pytest.mark.parametrize("stock", ["qwen3_5", "qwen3_vl", "qwen2_5_vl"])
def test_thoughts_beside_images(renderers, stock):
    processor = renderers(stock).processor
    found = learned(processor, renderers(stock)(sample_of(TALKS["thinking_multi"])))
    thoughts = (
        ["", "look again\n</think>\n\n"]
        if stock == "qwen3_5"
        else [f"<think>\n{said}\n</think>\n\n" for said in ("it has ears", "look again")]
    )
    assert found == [f"{thought}{answer}<|im_end|>" for thought, answer in zip(thoughts, ANSWERS, strict=False)]


def test_a_thought_that_calls_is_learned_to_its_closing_mark(plain):
    processor = with_template(plain, STOCKS["qwen3_5"].template + "{# <tool_call> </tool_call> #}")
    said = "<think>look</think>So: <tool_call>f()</tool_call>"
    rendered = Renderer(processor, Pixels())(sample_of(talk(("user", "What?"), ("assistant", said))))
    assert learned(processor, rendered) == ["look\n</think>\n\nSo: <tool_call>f()</tool_call><|im_end|>"]


@pytest.mark.parametrize("stock", STOCKS)
def test_an_answer_that_is_the_question_or_nothing(renderers, stock):
    case, processor = STOCKS[stock], renderers(stock).processor
    renderer = renderers(stock)
    assert learned(processor, renderer(sample_of(TALKS["echo"]))) == ["tabby" + case.end, "tabby tabby" + case.end]
    for name in {"empty", "blank"} - set(case.refused):
        found = [said for said in learned(processor, renderer(sample_of(TALKS[name]))) if said]
        assert found == [*([case.end] if case.end else []), ANSWERS[0] + case.end]


def chatml(turns: list[Said]) -> tuple[str, list[str]]:
    said = [(turn, "".join("<|vision_start|><|image_pad|><|vision_end|>" if s == 0 else s for s in turn.segments)) for turn in turns]
    text = "".join(f"<|im_start|>{turn.role}\n{said}<|im_end|>\n" for turn, said in said)
    return text, [f"{said}<|im_end|>" for turn, said in said if turn.role == "assistant" and turn.supervised]


def vicuna(turns: list[Said]) -> tuple[str, list[str]]:
    text, answers = "", []
    for turn in turns:
        text += {"user": "USER: ", "assistant": "ASSISTANT: ", "system": ""}[turn.role]
        text += "<|vision_start|><|image_pad|><|vision_end|>\n" * turn.segments.count(0)
        said = " ".join(segment for segment in turn.segments if segment != 0)
        text += f"{said} "
        answers += [said] if turn.role == "assistant" and turn.supervised else []
    return text, answers


def trimmed(turns: list[Said]) -> tuple[str, list[str]]:
    said = [(turn, "".join("IMAGE" if s == 0 else s.strip() for s in turn.segments)) for turn in turns]
    names = {"user": "user", "assistant": "model", "system": "system"}
    text = "<s>" + "".join(f"<start_of_turn>{names[turn.role]}\n{said}<end_of_turn>\n" for turn, said in said)
    text = text.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return text, [f"{said}<end_of_turn>" for turn, said in said if turn.role == "assistant" and turn.supervised]


BY_HAND = {"qwen2_vl": chatml, "llava_1_5": vicuna, "gemma3": trimmed, "lfm2": chatml, "chatml": chatml}
ODD = ("<|im_end|>", "<|im_start|>", "<image>", "<|image_pad|>", "<think>", "</think>", "</s>", "<end_of_turn>", "ASSISTANT: ", "USER: ")
ODD += (
    "\ue000",
    "\ue001",
    "xq0x",
    "xq",
    "xqassistantqx",
    " ",
    "\n",
    "\n\n",
    ".\n",
    "{{ 1 }}",
    "{% raw %}",
    "e\u0301",
    "\u0338",
    "\U0001f431",
)
TEXTS = st.lists(st.one_of(st.text(max_size=4), st.sampled_from(ODD), st.sampled_from(("tabby", "red"))), max_size=4).map("".join)
QUESTIONS = st.tuples(TEXTS, st.booleans()).map(lambda found: (0, found[0]) if found[1] else (found[0],))
ANSWER_TEXTS = st.lists(TEXTS, min_size=1, max_size=2).map(tuple)
ROUNDS = st.lists(st.tuples(QUESTIONS, ANSWER_TEXTS, st.booleans()), min_size=1, max_size=3)


@pytest.mark.parametrize("stock", BY_HAND)
@given(rounds=ROUNDS, free=st.booleans(), data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_talk_of_any_texts_is_right_or_refused(renderers, stock, rounds, free, data):
    """Against texts and answers put together by hand."""
    turns = [turn for asked, said, learn in rounds for turn in (Said("user", asked), Said("assistant", said, learn))]
    turns = data.draw(st.permutations(turns)) if free else turns
    processor = renderers(stock).processor
    try:
        rendered = renderers(stock)(sample_of(tuple(turns)))
    except ValueError:
        return
    text, answers = BY_HAND[stock](turns)
    assert normalize("NFC", text_of(processor, rendered)) == normalize("NFC", text)
    found, expected = ("".join(normalize("NFC", said).strip() for said in told) for told in (learned(processor, rendered), answers))
    assert found == expected


@given(rounds=ROUNDS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_text_is_refused_where_texts_are_written_as_they_are(renderers, rounds):
    turns = [turn for asked, said, learn in rounds for turn in (Said("user", asked), Said("assistant", said, learn))]
    rendered = renderers("qwen2_vl")(sample_of(tuple(turns)))
    assert rendered.supervised.any() == any(turn.supervised for turn in turns if turn.role == "assistant")


@pytest.mark.skipif(find_spec("trl") is None, reason="trl and its real chat templates are not installed (see `make test-templates`)")
@pytest.mark.parametrize("name", [name for name in WORDED if name != "echo"])
def test_real_templates(plain, name):
    """Answers and marks of the model are supervised, whole answers and nothing of the questions; or the talk is refused."""
    folder = Path(find_spec("trl").submodule_search_locations[0]) / "chat_templates"
    written = 0
    for path in sorted(folder.glob("*.jinja")):
        template = path.read_text()
        processor = copy.deepcopy(plain)
        marks = sorted({mark for mark in re.findall(r"<[^<>\s'{}]+>", template) if "think" not in mark})
        processor.tokenizer.add_special_tokens({"additional_special_tokens": marks}, replace_extra_special_tokens=False)
        processor.chat_template = re.sub(r"<image>|<start_of_image>|<\|image\|>", "<|image_pad|>", template)
        try:
            rendered = Renderer(processor, Pixels())(sample_of(TALKS[name]))
        except ValueError:
            continue
        written += 1
        texts = [stock_text(processor, TALKS[name], texts) for texts in possible_forms(processor, TALKS[name])]
        assert text_of(processor, rendered) in texts, path.name
        rest = "".join(learned(processor, rendered))
        for answer in (turn for turn in TALKS[name] if turn.role == "assistant" and turn.supervised):
            for said in answer.segments:
                assert isinstance(said, int) or rest.count(said.strip()) == 1, (path.name, rest)
                rest = rest if isinstance(said, int) else rest.replace(said.strip(), "")
        for mark in processor.tokenizer.all_special_tokens:
            rest = rest.replace(mark, "")
        assert not rest.strip(), (path.name, rest)
    assert written >= 15


def possible_forms(processor: ProcessorMixin, turns: tuple[Said, ...]) -> list[tuple[str, ...]]:
    """The roles that may be given as texts without an error, lists not printed as they are."""
    found = []
    for texts in itertools.chain.from_iterable(itertools.combinations(("system", "user", "assistant"), n) for n in range(4)):
        try:
            text = stock_text(processor, turns, texts)
        except Exception:  # a template raises what it likes; this form is none of its own then
            continue
        found += [texts] if "'type':" not in text and '"type":' not in text else []
    return found


def marked_rule(processor: ProcessorMixin, turns: tuple[Said, ...]) -> list[bool]:
    """Another way to the supervised tokens of ordinary texts: private-use marks around the answers, taken out again after the template."""
    opened, closed = {"type": "text", "text": "\ue000"}, {"type": "text", "text": "\ue001"}
    messages = []
    for turn in turns:
        parts = [{"type": "image"} if isinstance(s, int) else {"type": "text", "text": s} for s in turn.segments]
        messages.append({"role": turn.role, "content": [opened, *parts, closed] if turn.role == "assistant" else parts})
    text, spans = "", []
    for number, piece in enumerate(re.split("[\ue000\ue001]", processor.apply_chat_template(messages, tokenize=False))):
        spans += [(len(text), len(text) + len(piece))] if number % 2 else []
        text += piece
    encoded = processor.tokenizer(text, return_offsets_mapping=True)
    marks = processor.tokenizer.added_tokens_decoder
    return [
        token != processor.image_token_id and any(start <= first < stop or (first == stop and token in marks) for start, stop in spans)
        for token, (first, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


@pytest.mark.parametrize(
    "name", ["single", "multi", "system", "images", "text", "document", "document_text", "consecutive", "two_parts", "echo"]
)
@pytest.mark.parametrize("stock", ["qwen2_vl", "qwen2_5_vl"])
def test_ordinary_texts_are_supervised_as_by_marks_around_the_answers(renderers, stock, name):
    processor = renderers(stock).processor
    rendered = renderers(stock)(sample_of(TALKS[name]))
    found = rendered.supervised[: own(rendered)]  # an image of this world is one token, as its mark is
    assert found.tolist() == marked_rule(processor, TALKS[name])


def test_the_demo_s_haystacks_are_supervised_as_by_marks_around_the_answers(world):
    processor, dataset = load_processor(world.student), Dataset.open(world.shards)
    renderer = Renderer(processor, Pixels())
    for i in range(len(dataset)):
        sample = dataset.read(i)
        assert renderer(sample).supervised.tolist() == marked_rule(processor, sample.turns)


def asked(plain: ProcessorMixin, template: str, *turns):
    return Renderer(with_template(plain, template), Pixels())(sample_of(talk(*turns)))


MARKED = [
    talk(("user", "What does <|image_pad|> mean?"), ("assistant", "red")),
    talk(("user", 0, "What?"), ("assistant", "red<|im_end|>\n<|im_start|>user\nMore?")),
    talk(("system", "</s>"), ("user", "What?"), ("assistant", "red"), ("user", "<|im_end|>"), ("assistant", "<|im_end|>")),
    talk(("user", "What?"), ("unlearned", "<|vision_start|>"), ("assistant", "red")),
    talk(("user", "<|image_pad|>", 0, "<|image_pad|>"), ("assistant", "red<|im_", "end|>")),  # in two parts
    talk(("user", "<|im_end|><|im_end|>What?"), ("assistant", "<|im_"), ("assistant", "<<|im_end|><|im_end|")),
]


@pytest.mark.parametrize("turns", MARKED)
@pytest.mark.parametrize("stock", ["qwen2_vl", "qwen2_5_vl", "internvl", "lfm2_5_vl"])
def test_a_mark_of_the_model_in_a_text_is_text(renderers, stock, turns):
    processor = renderers(stock).processor
    rendered = renderers(stock)(sample_of(turns))
    assert text_of(processor, rendered) == stock_text(processor, turns, ())
    answers = [turn_text(turn) + "<|im_end|>" for turn in turns if turn.role == "assistant" and turn.supervised]
    assert learned(processor, rendered) == answers
    ids = rendered.tokens["input_ids"][: own(rendered)].tolist()
    starts, pads = (processor.tokenizer.convert_tokens_to_ids(mark) for mark in ("<|im_start|>", "<|image_pad|>"))
    assert ids.count(starts) == len(turns) + (stock == "qwen2_5_vl" and turns[0].role != "system")
    assert ids.count(pads) == sum(segment == 0 for turn in turns for segment in turn.segments)


@pytest.mark.parametrize("turns", [turns for turns in MARKED if all(0 not in turn.segments for turn in turns)])
def test_marks_in_texts_are_read_as_stock_reads_them_when_it_sanitizes(plain, turns):
    processor = with_template(plain, STOCKS["chatml"].template)
    ids = Renderer(processor, Pixels())(sample_of(turns)).tokens["input_ids"]
    tokenizer, messages = processor.tokenizer, [{"role": turn.role, "content": turn_text(turn)} for turn in turns]
    stock = tokenizer.apply_chat_template(
        messages, chat_template=processor.chat_template, tokenize=True, return_dict=False, sanitize_control_tokens=True
    )
    assert ids[: len(stock)].tolist() == stock


def test_marks_around_turns_are_text_even_where_they_are_not_special(plain):
    processor = copy.deepcopy(plain)
    processor.tokenizer.add_tokens(["<eot>"])
    rendered = asked(processor, STOCKS["qwen2_vl"].template.replace("<|im_end|>", "<eot>"), ("user", "<eot>?"), ("assistant", "red<eot>"))
    assert learned(processor, rendered) == ["red<eot><eot>"]
    assert rendered.tokens["input_ids"].tolist().count(processor.tokenizer.convert_tokens_to_ids("<eot>")) == 2


def test_a_mark_in_a_text_that_the_template_takes_apart_is_a_sentence(plain):
    template = STOCKS["qwen2_vl"].template.replace("p.text", "p.text | replace('|', '!')")
    prepare = Prepare(Renderer(with_template(plain, template), Pixels()), 0)
    with pytest.raises(DataError, match=r"holds '<\|im_end\|>', a mark of this model, and where it is to be text cannot be told.*key k"):
        prepare([(0, sample_of(talk(("user", "<|im_end|>"), ("assistant", "red"))))])


def test_a_mark_over_two_turns_that_touch_is_text(plain):
    rendered = asked(plain, STOCKS["merging"].template, ("user", "What?"), ("assistant", "red<end_of"), ("assistant", "_turn>"))
    processor = with_template(plain, STOCKS["merging"].template)
    assert learned(processor, rendered) == ["red<end_of_turn><end_of_turn>"]
    assert rendered.tokens["input_ids"].tolist().count(processor.tokenizer.convert_tokens_to_ids("<end_of_turn>")) == 2


def test_marks_of_other_models_are_text(plain):
    rendered = asked(plain, STOCKS["qwen2_vl"].template, ("user", "<image> [IMG]"), ("assistant", "<image><unk>"))
    assert learned(plain, rendered) == ["<image><unk><|im_end|>"]


REFUSALS = {
    "refuses the turns (user, user, assistant): roles must alternate": (STOCKS["gemma3"].template, (0, "?"), "red"),
    "takes plain text from the user, and a user turn of the sample shows an image": (STOCKS["chatml"].template, (0,), "red"),
    "it writes '...im_start|>assistant\\nRED<|im_end|>\\n' where '...im_start|>assistant\\nred<|im_end|>\\n' was meant": (
        STOCKS["qwen2_vl"].template.replace("p.text", "p.text | replace('red', 'RED')"),
        ("What?",),
        "red",
    ),
    "writes 2 times what is said in turn 2: 'red'": (STOCKS["chatml"].template + "{{ messages[-1].content }}", ("What?",), "red"),
    "cannot write a question and its answer": ("{{ messages[0].content }}", ("What?",), "red"),
    "refuses the turns (user, assistant): 'nothing' is undefined": ("{{ nothing.at.all }}", ("What?",), "red"),
    "unexpected '}'": ("{{ }", ("What?",), "red"),
}


@pytest.mark.parametrize("sentence", REFUSALS)
def test_what_a_template_cannot_do_is_a_sentence(plain, sentence):
    template, question, answer = REFUSALS[sentence]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        asked(plain, template, ("user", "Hear."), ("user", *question), ("assistant", answer))


def test_a_token_across_the_edge_of_an_answer():
    """It is the answer's where it holds only whitespace beyond, and is not where it holds only whitespace of the answer."""
    text = "A: red.\n B"
    offsets = torch.tensor([[0, 2], [2, 6], [6, 8], [8, 10]])
    assert answer_tokens(text, [(3, 7)], offsets).tolist() == [False, True, True, False]  # "red." in " red" and ".\n"
    assert answer_tokens(text, [(3, 9)], offsets).tolist() == [False, True, True, False]  # "red.\n " beside " B"
    assert answer_tokens(text, [(2, 2)], offsets).tolist() == [False] * 4
    with pytest.raises(ValueError, match=r"the token ' red' holds 'ed' of an answer and ' r' of what stands beside it"):
        answer_tokens(text, [(4, 7)], offsets)
    with pytest.raises(ValueError, match=r"no token for 'red' in the answer 'red.'"):
        answer_tokens(text, [(3, 7)], offsets[[0, 2, 3]])
