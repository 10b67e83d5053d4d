"""A conversation as the text that the model's chat template makes of it, and where its answers stand in that text.

The template reads the sample as it is, so the text is the one of inference. It runs once more with a word of ours in the place of every
answer: what it writes around these words must be what stands around the answers too, character for character; else the sample is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

from jinja2.exceptions import TemplateError
from transformers import ProcessorMixin

NAMED = re.compile(r"(<[^<>\s'\"]+>|\[/?[A-Z_]+\])")  # <think>, <|channel>, [/THINK]: what a template may look for in an answer
Segments = tuple[str | int, ...]
Span = tuple[int, int]


class TurnLike(Protocol):
    """A turn: a role, and text (str) and images (int) in order (data.record.Turn is one). `supervised`, where there: to be learned."""

    role: str
    segments: Segments


@dataclass(frozen=True)
class Template:
    """A processor's chat template, and what it does: learned by running it on a question and an answer."""

    processor: ProcessorMixin
    lists: frozenset[str]
    """The roles whose content it takes as a list of parts; of the others it takes one text."""
    end: str
    """The marks that it writes after an answer that is the last turn, with the whitespace before them ("" where it writes none)."""
    reserved: re.Pattern[str]
    """The tokens that are no text in a text of the sample: special ones, that of an image, those around turns."""
    named: re.Pattern[str] | None
    """The marks within a text that it names, in a group (thoughts, as a rule)."""


@dataclass(frozen=True)
class Said:
    """A conversation as text."""

    text: str
    spans: list[Span]
    """Its supervised answers with their end marks: in order, apart from each other."""
    literal: list[Span]
    """What the tokenizer would take for a mark of the model, and is a text of the sample."""


@dataclass(frozen=True)
class _Piece:
    """A text of an answer, and the word that takes its place in the second run."""

    turn: int
    text: str
    word: str
    optional: bool = False
    """Whether the template may leave it out: it stands beside a mark that the template names."""
    opening: tuple[str, ...] = ()
    """The marks before it, where it is the first text of its segment."""
    closing: tuple[str, ...] = ()
    """The marks after it, where it is the last."""


@dataclass(frozen=True)
class _Place:
    """Where the text of a piece stands."""

    piece: _Piece
    start: int
    stop: int


def learn_template(processor: ProcessorMixin) -> Template:
    """Raises ValueError for a template that writes neither parts nor texts, and where the processor has none."""
    lists, text = _accepted(processor)
    added = [token for token in processor.tokenizer.added_tokens_decoder.values() if not token.content.isspace()]
    end = _end(processor, lists, text, _any_of({token.content for token in added}))
    around = _render(processor, [_message("user", (_word("user"),), lists)]) + end
    reserved = {token.content for token in added if token.special or token.content in around} | {processor.image_token}
    source = "".join(processor.chat_template.values()) if isinstance(processor.chat_template, dict) else processor.chat_template
    named = set(NAMED.findall(source))
    reserved -= {mark for mark in named if "think" in mark.lower()}  # an answer's own: meant as marks
    return Template(
        processor,
        lists=lists,
        end=end,
        reserved=re.compile(_any_of(reserved)),
        named=re.compile(f"({_any_of(named - reserved)})") if named - reserved else None,
    )


def say(template: Template, turns: Sequence[TurnLike], prompt: bool = False) -> Said:
    """The text of stock `apply_chat_template`, and in it each assistant turn that is to be learned.

    prompt: the last turn is a question, and the text is what the model is given to answer it; nothing is to be learned.

    A span holds what the template writes for one turn's segments, from the first to the last (edges trimmed and thoughts left out where the
    template does that), and the end mark after it. Raises ValueError with the cause where the template refuses the turns, where it makes
    something else of an answer, and where a text holds a mark of the model and its place cannot be told.
    """
    lines = [(turn.role, tuple(turn.segments)) for turn in turns]
    text = _write(template, lines, prompt)
    _check_heard(template, lines, text, prompt)
    taught = [number for number, turn in enumerate(turns) if turn.role == "assistant" and getattr(turn, "supervised", True) and not prompt]
    spans = [_with_end(text, span, template.end) for span in _answers(template, lines, taught, text)] if taught else []
    return Said(text, _apart(spans), _literal(template, lines, text, prompt))


def where(template: Template, turns: Sequence[TurnLike], number: int) -> list[Span]:
    """Where in the text of `say` each text segment of a turn stands. Raises ValueError where that cannot be told."""
    lines = [(turn.role, tuple(turn.segments)) for turn in turns]
    places = _places(template, lines, [number], _write(template, lines))
    if len(places) != sum(isinstance(segment, str) for segment in lines[number][1]):
        raise ValueError(f"the chat template leaves out texts of turn {number}")
    return [(place.start, place.stop) for place in places]


def _check_heard(template: Template, lines: list[tuple[str, Segments]], text: str, prompt: bool) -> None:
    """Raises ValueError where the template leaves out what a tool said: many know no tools, and the answers would come out of nothing."""
    tools = [number for number, (role, _) in enumerate(lines) if role == "tool"]
    if tools:
        try:
            _places(template, lines, tools, text, prompt)
        except ValueError as error:
            raise ValueError(f"the chat template does not show the model what a tool said: {error}") from None


def template_note(student: Template, teacher: Template, turns: Sequence[TurnLike]) -> str:
    """What a user should know where the teacher's own template makes another text of these turns than the student's, which both models are
    shown; "" where they agree."""
    lines = [(turn.role, tuple(turn.segments)) for turn in turns]
    shown, shared = _write(student, lines), "the teacher is shown what the student's chat template writes"
    try:
        own = _write(teacher, lines)
    except ValueError as error:
        return f"{shared}; its own: {error}"
    if shown == own:
        return ""
    place = _first_difference(shown, own)
    return f"{shared}, {_around(shown, place)!r}; its own would write {_around(own, place)!r}"


def turn_text(turn: TurnLike) -> str:
    """The text segments of a turn, joined."""
    return "".join(segment for segment in turn.segments if isinstance(segment, str))


def _any_of(marks: set[str]) -> str:
    """A regular expression for any of them, the longest first."""
    return "|".join(re.escape(mark) for mark in sorted(marks, key=lambda mark: (-len(mark), mark)))


def _accepted(processor: ProcessorMixin) -> tuple[frozenset[str], str]:
    """The roles of which the template takes lists, and what it makes of a question and an answer. A part holds a word that no template asks
    for: one that prints it prints the list as it is. Lists are preferred: they are how a stock processor is asked about images."""
    causes: list[str] = []
    for listed in product((True, False), repeat=2):
        lists = frozenset(role for role, is_listed in zip(("user", "assistant"), listed, strict=True) if is_listed)
        text = _tried(processor, lists, ("user", "assistant"), causes)
        if text is not None:
            break
    else:
        raise ValueError(f"the chat template cannot write a question and its answer: {causes[0]}")
    for role, talk in (("system", ("system", "user", "assistant")), ("tool", ("user", "assistant", "tool", "assistant"))):
        listed = _tried(processor, lists | {role}, talk, causes) is not None
        if listed or _tried(processor, lists, talk, causes) is None:
            lists |= {role}
    return lists, text


def _end(processor: ProcessorMixin, lists: frozenset[str], text: str, marks: str) -> str:
    """The marks after the answer that ends `text`. Some templates write the prompt of the next answer there whether asked or not: that
    opens as this answer was opened, and is none of its end."""
    before, _, tail = text.rpartition(_word("assistant"))
    first = re.match(rf"\s*(?:{marks})", tail) if marks else None
    if first is None:
        return ""
    if _render(processor, [_message(role, (_word(role),), lists) for role in ("user", "assistant")], prompt=True) == text:
        opening, tail = before.rpartition(_word("user"))[2].rstrip(), tail.rstrip()
        shared = next((n for n in range(len(tail), 0, -1) if opening.endswith(tail[-n:])), 0)
        tail = tail[: max(first.end(), len(tail) - shared)]
    return re.match(rf"\s*(?:{marks})+", tail)[0]


def _tried(processor: ProcessorMixin, lists: frozenset[str], roles: Sequence[str], causes: list[str]) -> str | None:
    """What the template makes of a word from each role, or None and a cause when that is not these words."""
    messages = [_message(role, (_word(role),), lists) for role in roles]
    for message in messages:
        if isinstance(message["content"], list):
            message["content"][0]["unasked"] = _word("unasked")
    try:
        text = _render(processor, messages)
    except ValueError as error:
        causes.append(str(error))
        return None
    if all(_word(role) in text for role in roles) and _word("unasked") not in text:
        return text
    causes.append(f"it writes {text!r} for {messages}")
    return None


def _word(role: str) -> str:
    return f"xq{role}qx"


def _literal(template: Template, lines: list[tuple[str, Segments]], text: str, prompt: bool) -> list[Span]:
    """The marks of the model that stand in texts of the sample, by their place in what the template makes of it."""
    held = template.reserved.search(
        "".join(s for _, said in lines for s in said if isinstance(s, str))
    )  # one may run over texts that touch
    if held is None:
        return []
    try:
        places = _places(template, lines, list(range(len(lines))), text, prompt)
    except ValueError as error:
        raise ValueError(f"a text holds {held[0]!r}, a mark of this model, and where it is to be text cannot be told: {error}") from None
    spans = _apart([(place.start, place.stop) for place in places if place.start < place.stop])
    marks = [found.span() for found in template.reserved.finditer(text)]
    return [(start, stop) for start, stop in marks if any(first < stop and start < last for first, last in spans)]


def _write(template: Template, lines: Sequence[tuple[str, Segments]], prompt: bool = False) -> str:
    return _render(template.processor, [_message(role, segments, template.lists) for role, segments in lines], prompt)


def _render(processor: ProcessorMixin, messages: list[dict[str, Any]], prompt: bool = False) -> str:
    """Raises ValueError with the template's own words where it refuses the messages."""
    stock = ProcessorMixin.apply_chat_template  # some families' own ask their video part even where there is no video
    try:
        return stock(processor, messages, tokenize=False, add_generation_prompt=prompt)
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # all that a template can raise
        roles = ", ".join(message["role"] for message in messages[:6]) + (", ..." if len(messages) > 6 else "")
        raise ValueError(f"the chat template refuses the turns ({roles}): {error}") from error


def _message(role: str, segments: Segments, lists: frozenset[str]) -> dict[str, Any]:
    if role in lists:
        return {"role": role, "content": [{"type": "text", "text": s} if isinstance(s, str) else {"type": "image"} for s in segments]}
    if not all(isinstance(segment, str) for segment in segments):
        raise ValueError(f"the chat template takes plain text from the {role}, and a {role} turn of the sample shows an image")
    return {"role": role, "content": "".join(segments)}


def _answers(template: Template, lines: list[tuple[str, Segments]], taught: list[int], text: str) -> list[Span]:
    places = _places(template, lines, taught, text)
    return [_span(template, lines, turn, [place for place in places if place.piece.turn == turn], text) for turn in taught]


def _places(template: Template, lines: list[tuple[str, Segments]], turns: list[int], text: str, prompt: bool = False) -> list[_Place]:
    """Where the texts of some turns stand. Raises ValueError where the text is not that of the words with those texts for words."""
    causes: dict[Any, str] = {}
    for cut, edged in _ways(template, lines, turns):
        swapped, pieces = _swapped(lines, turns, _stem(text), cut, edged)
        try:
            return _found(text, _write(template, swapped, prompt), pieces)
        except ValueError as error:
            causes[cut, edged] = str(error)
    raise ValueError(causes[None, False])


def _ways(template: Template, lines: list[tuple[str, Segments]], taught: list[int]) -> Iterator[tuple[re.Pattern[str] | None, bool]]:
    """(what answers are cut at, whether a word is put before and after images at their edges), the usual way first."""
    segments = [lines[turn][1] for turn in taught]
    if any(isinstance(said[edge], int) for said in segments for edge in (0, -1)):
        yield None, True
    yield None, False
    if template.named and any(template.named.search(part) for said in segments for part in said if isinstance(part, str)):
        yield template.named, False


def _stem(text: str) -> str:
    """How our words begin: as nothing in the text does."""
    stem = "xq"
    while stem in text:
        stem += "q"
    return stem


def _swapped(
    lines: list[tuple[str, Segments]], taught: list[int], stem: str, cut: re.Pattern[str] | None, edged: bool
) -> tuple[list[tuple[str, Segments]], list[_Piece]]:
    """The turns with a word for every text of the answers, and which word stands for what."""
    pieces: list[_Piece] = []

    def word(turn: int, text: str, **marks: Any) -> str:
        pieces.append(_Piece(turn, text, f"{stem}{len(pieces)}x", **marks))
        return pieces[-1].word

    def words(turn: int, text: str) -> str:
        if cut is None or not cut.search(text):
            return word(turn, text)
        parts = cut.split(text)  # every second one is a mark
        said = [place for place in range(0, len(parts), 2) if parts[place].strip()]
        for place in said:
            opening = tuple(parts[1:place:2]) if place == said[0] else ()
            closing = tuple(parts[place + 1 :: 2]) if place == said[-1] else ()
            parts[place] = word(turn, parts[place], optional=True, opening=opening, closing=closing)
        return "".join(parts)

    swapped = list(lines)
    for turn in taught:
        role, segments = lines[turn]
        before = (word(turn, ""),) if edged and isinstance(segments[0], int) else ()
        inside = tuple(words(turn, segment) if isinstance(segment, str) else segment for segment in segments)
        after = (word(turn, ""),) if edged and isinstance(segments[-1], int) else ()
        swapped[turn] = role, before + inside + after
    return swapped, pieces


def _found(text: str, probe: str, pieces: list[_Piece]) -> list[_Place]:
    """Where the pieces stand in `text`, if it is `probe` with pieces for words. Raises ValueError if it is not."""
    for piece in pieces:
        times = probe.count(piece.word)
        if times != 1 and not (times == 0 and piece.optional):
            does = f"writes {times} times" if times else "leaves out"
            raise ValueError(f"the chat template {does} what is said in turn {piece.turn}: {_around(piece.text)!r}")
    present = sorted((piece for piece in pieces if piece.word in probe), key=lambda piece: probe.index(piece.word))
    between, rest = [], probe
    for piece in present:
        before, _, rest = rest.partition(piece.word)
        between.append(before)
    between.append(rest)
    reached: dict[int, tuple[int, ...]] = {len(between[0]): ()} if text.startswith(between[0]) else {}
    for piece, after in zip(present, between[1:], strict=True):
        ahead: dict[int, tuple[int, ...]] = {}
        for start, bounds in reached.items():
            for form in _forms(piece.text):
                stop = start + len(form)
                if text.startswith(form, start) and text.startswith(after, stop):
                    ahead.setdefault(stop + len(after), (*bounds, start, stop))
        reached = ahead
    if len(text) not in reached:
        raise ValueError(_difference(text, "".join(b + p.text for b, p in zip(between, present, strict=False)) + between[-1]))
    bounds = reached[len(text)]
    return [_Place(piece, *bounds[2 * i : 2 * i + 2]) for i, piece in enumerate(present)]


def _forms(text: str) -> dict[str, None]:
    """A text as templates write it: as it is, or without whitespace or line ends at its edges."""
    trimmed = (text, text.rstrip(), text.lstrip(), text.strip(), text.rstrip("\n"), text.lstrip("\n"), text.strip("\n"))
    return dict.fromkeys(trimmed)


def _span(template: Template, lines: list[tuple[str, Segments]], turn: int, places: list[_Place], text: str) -> Span:
    """From the first to the last place of a turn, with the marks that open and close it where the template took the answer apart. What is
    in the prompt already is not the answer's."""
    if not places:
        raise ValueError(f"the chat template writes nothing of the answer of turn {turn}: {_around(str(lines[turn][1][0]))!r}")
    start, stop = places[0].start, places[-1].stop
    opened = start
    for mark in reversed(places[0].piece.opening):
        before = text[:opened].rstrip()
        opened = len(before) - len(mark) if before.endswith(mark) else opened
    for mark in places[-1].piece.closing:
        after = text[stop:].lstrip()
        stop = len(text) - len(after) + len(mark) if after.startswith(mark) else stop
    if opened < start:
        prompt = _prompt(template, lines[:turn])
        opened = max(opened, len(prompt)) if len(prompt) <= start and text.startswith(prompt) else opened
    return opened, stop


def _prompt(template: Template, before: list[tuple[str, Segments]]) -> str:
    """What the model is given before it answers; "" where the template has no such thing."""
    try:
        return _write(template, before, prompt=True) if before else ""
    except ValueError:  # no question before this answer
        return ""


def _with_end(text: str, span: Span, end: str) -> Span:
    start, stop = span
    return start, stop + len(end) if text.startswith(end, stop) else stop


def _apart(spans: list[Span]) -> list[Span]:
    """Spans in order; those that touch are one."""
    merged: list[Span] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return merged


def _first_difference(text: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))


def _difference(text: str, expected: str) -> str:
    place = _first_difference(text, expected)
    return (
        f"the chat template makes something else of what is said, and what would be learned cannot be told: it writes "
        f"{_around(text, place)!r} where {_around(expected, place)!r} was meant"
    )


def _around(text: str, place: int = 0) -> str:
    start = max(0, place - 20)
    return ("..." if start else "") + text[start : place + 40] + ("..." if place + 40 < len(text) else "")
