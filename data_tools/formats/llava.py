"""LLaVA, ShareGPT, OpenAI and TRL: a conversation beside its images, or with its images in place."""

from typing import Any

from data_tools.formats.fields import Entry, check_fields, identity, is_empty, take, take_images, take_one_of
from data_tools.formats.marks import Piece, Place, arrange, pieces_of, refuse_foreign_marks
from data_tools.image_root import ImageRoot
from laid_ds.data.record import DataError, Sample, Turn

FIELDS = {"conversations", "messages", "image", "images", "system", "relevant_images"}
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
LOSS_FIELDS = ("loss", "weight", "train", "supervised")
TURN_FIELDS = {"from", "role", "value", "content", *LOSS_FIELDS}
SOURCE_FIELDS = ("image", "image_url", "path", "url", "base64")


def read_entry(entry: Entry, key: str, root: ImageRoot) -> Sample:
    """`conversations` [{from, value}] or `messages` [{role, content}], `image` or `images`, <image> marks in the text or parts as content;
    `system` becomes a system turn; a turn with `loss`, `weight` or `train` of 0 is not learned; `relevant_images` (0/1 for each image)
    become the needles of each question."""
    said = take_turns(entry)
    roles = [role_of(turn) for turn in said]
    pieces = [_pieces(turn) for turn in said]
    images, segments = _show(roles, pieces, take_images(entry))
    for number, (turn, role, part) in enumerate(zip(said, roles, segments, strict=True)):
        if is_learned(turn, role) and role == "assistant" and all(isinstance(text, str) and not text.strip() for text in part):
            raise DataError(f"turn {number} is an answer that says nothing")
    needles = _relevant(entry, len(images))
    turns = [
        Turn(role, part, needles if role == "user" else (), supervised=is_learned(turn, role))
        for turn, role, part in zip(said, roles, segments, strict=True)
    ]
    return Sample(key, tuple(turns), root.read_all(images), meta=identity(entry))


def take_turns(entry: Entry) -> list[Any]:
    """The turns of a conversation, a `system` field first."""
    take(entry, "conversations", list, [])
    take(entry, "messages", list, [])
    said = take_one_of(entry, ("conversations", "messages"))
    if said is None:
        raise DataError("neither conversations nor messages")
    check_fields(entry, FIELDS)
    if not (system := take(entry, "system", str, "")):
        return said
    if any(role_of(turn) == "system" for turn in said):
        raise DataError("field 'system' is given beside a system turn; one of them must go")
    return [{"role": "system", "content": system}, *said]


def role_of(turn: Any) -> str:
    """Whose turn it is, as records call it."""
    take(turn, "from", str, "")
    take(turn, "role", str, "")
    speaker = take_one_of(turn, ("from", "role")) or ""
    if speaker not in SPEAKERS:
        raise DataError(f"speaker {speaker[:40]!r} is none of {', '.join(SPEAKERS)}")
    return SPEAKERS[speaker]


def is_learned(turn: Entry, role: str) -> bool:
    """What a turn says of itself: true, 1 or nothing; false or 0."""
    said = {name: turn[name] for name in LOSS_FIELDS if turn.get(name) is not None}
    for name, value in said.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise DataError(f"field {name!r} of a turn is {str(value)[:40]!r}; a turn is learned (true, 1) or not (false, 0)")
        if value and role != "assistant":
            raise DataError(f"field {name!r} asks to learn a {role} turn; only assistant turns are learned")
    if len({bool(value) for value in said.values()}) > 1:
        raise DataError(f"fields {', '.join(map(repr, said))} of a turn disagree")
    return role != "assistant" or all(said.values())


def take_content(turn: Entry) -> str | list[Any]:
    """What a turn says, which must be all that it holds."""
    check_fields(turn, TURN_FIELDS)
    if not is_empty(turn.get("value")) and not is_empty(turn.get("content")):
        raise DataError("fields 'value' and 'content' of a turn are both given; one of them must go")
    return take(turn, "value" if is_empty(turn.get("content")) and "value" in turn else "content", (str, list))


def _pieces(turn: Entry) -> list[Piece]:
    content = take_content(turn)
    if isinstance(content, str):
        return _text(content)
    return [piece for part in content for piece in _part(part)]


def _text(text: str) -> list[Piece]:
    refuse_foreign_marks(text)
    return pieces_of(text)


def _part(part: Any) -> list[Piece]:
    """One part of a content list: {"type": "text", "text": ...}, or an image, given in place or as the next of the entry's images."""
    kind = take(part, "type", str)
    check_fields(part, {"type", "text"} if kind == "text" else {"type", *SOURCE_FIELDS})
    if kind == "text":
        return _text(take(part, "text", str))
    if kind not in ("image", "image_url"):
        raise DataError(f"a part of type {kind[:40]!r} is none of text, image, image_url")
    source = _source(take_one_of(part, SOURCE_FIELDS))
    if kind == "image_url" and source is None:
        raise DataError("a part of type 'image_url' without its image_url")
    return [Place({"bytes": source} if not is_empty(part.get("base64")) else source, exact=True)]


def _source(given: Any) -> Any:
    """An image as `ImageRoot.read` takes it; OpenAI wraps the URL into an object."""
    if isinstance(given, dict) and "url" in given:
        check_fields(given, {"url", "detail"})
        if given.get("detail") not in (None, "auto", "high"):
            raise DataError(f"field 'detail' is {str(given['detail'])[:40]!r}; images are shown as they are (auto, high)")
        return take(given, "url", str)
    if given is not None and not isinstance(given, (str, dict)):
        raise DataError(f"an image part holds {type(given).__name__}; it must be a file name, a data: URL, or an object with path or bytes")
    return given


def _show(roles: list[str], turns: list[list[Piece]], images: list[Any]) -> tuple[list[Any], list[tuple]]:
    """All images in the order of their indices, and the segments of each turn."""
    places = [piece for turn in turns for piece in turn if isinstance(piece, Place)]
    if len({place.exact for place in places}) > 1:
        raise DataError("image parts stand beside <image> marks; say all images in one way")
    given = [place.source for place in places if place.source is not None]
    if given and (images or len(given) < len(places)):
        raise DataError(f"{len(given)} of {len(places)} image parts hold their image, {len(images)} images stand beside the conversation")
    images = given or images
    if images and not places and "user" not in roles:
        raise DataError(f"{len(images)} images without a mark, and no user turn to show them in")
    return images, arrange(turns, len(images), roles.index("user") if "user" in roles else 0)


def _relevant(entry: Entry, num_images: int) -> tuple[int, ...]:
    relevant = take(entry, "relevant_images", list, [])
    if relevant and len(relevant) != num_images:
        raise DataError(f"{len(relevant)} relevant_images for {num_images} images")
    if not all(isinstance(value, int) and value in (0, 1) for value in relevant):
        raise DataError(f"relevant_images {str(relevant)[:60]} must hold 0 or 1 for each image")
    return tuple(index for index, is_relevant in enumerate(relevant) if is_relevant)
