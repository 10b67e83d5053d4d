"""One entry of a known format becomes one sample. An entry that is not of its format is a `DataError`, never another exception."""

from collections.abc import Callable
from typing import Any

from data_tools.inputs import Entry, ImageRoot, interleave, take, take_strings
from laid_ds.data.record import DataError, Sample, Segment, Turn

Importer = Callable[[Entry, str, ImageRoot], Sample]

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def llava(entry: Entry, key: str, root: ImageRoot) -> Sample:
    """LLaVA and ShareGPT: `conversations` [{from, value}] or `messages` [{role, content}], `image` or `images`, <image> marks in the
    text; `relevant_images` (0/1 for each image) become the needles of each question."""
    names = _image_names(entry)
    said = take(entry, "conversations", list, take(entry, "messages", list, [])) or []
    if not said:
        raise DataError("neither conversations nor messages")
    speakers = [_speaker(turn) for turn in said]
    segments = interleave([_speech(turn) for turn in said], len(names))
    needles = _relevant(entry, len(names))
    turns = [Turn(role, part, needles if role == "user" else ()) for role, part in zip(speakers, segments, strict=True)]
    return Sample(key, tuple(turns), _read_all(names, root), meta=_identity(entry))


def obelics(entry: Entry, key: str, root: ImageRoot) -> Sample:
    """OBELICS: `texts` and `images` of equal length, in each place one of them null. The document is one assistant turn."""
    texts, images = take(entry, "texts", list), take(entry, "images", list)
    if len(texts) != len(images):
        raise DataError(f"{len(texts)} texts beside {len(images)} images")
    segments: list[Segment] = []
    names: list[str] = []
    for place, (text, image) in enumerate(zip(texts, images, strict=True)):
        if isinstance(text, str) and image is None:
            segments.append(text)
        elif isinstance(image, str) and text is None:
            segments.append(len(names))
            names.append(image)
        else:
            raise DataError(f"place {place} must hold a text or an image name, and null beside it")
    return Sample(key, (Turn("assistant", tuple(segments)),), _read_all(names, root), meta=_identity(entry))


def mmc4(entry: Entry, key: str, root: ImageRoot) -> Sample:
    """MMC4: `text_list`, and `image_info` [{image_name, matched_text_index}]; an image stands before its text."""
    texts, infos = take_strings(entry, "text_list"), take(entry, "image_info", list)
    before: dict[int, list[str]] = {}
    for info in infos:
        place = take(info, "matched_text_index", int)
        if not 0 <= place < len(texts):
            raise DataError(f"matched_text_index {place} of {len(texts)} texts")
        before.setdefault(place, []).append(take(info, "image_name", str))
    segments: list[Segment] = []
    names: list[str] = []
    for place, text in enumerate(texts):
        for name in before.get(place, []):
            segments.append(len(names))
            names.append(name)
        segments.append(text)
    return Sample(key, (Turn("assistant", tuple(segments)),), _read_all(names, root), meta=_identity(entry))


def folder(entry: Entry, key: str, root: ImageRoot) -> Sample:
    """Our own lines beside a folder of images: `images`, `question`, `answer`, and optional `needles`, `choices`, `source`, `licence`,
    `meta`. Without <image> marks in the question the images stand before it."""
    names = _image_names(entry)
    (question,) = interleave([take(entry, "question", str)], len(names))
    needles = take(entry, "needles", list, [])
    turns = (
        Turn("user", question, tuple(needles), tuple(take_strings(entry, "choices", []))),
        Turn("assistant", (take(entry, "answer", str),)),
    )
    source, licence = take(entry, "source", str, ""), take(entry, "licence", str, "")
    return Sample(key, turns, _read_all(names, root), source, licence, meta=take(entry, "meta", dict, {}) | _identity(entry))


def _image_names(entry: Entry) -> list[str]:
    names = take(entry, "images", (str, list), take(entry, "image", (str, list), []))
    names = [names] if isinstance(names, str) else names
    if not all(isinstance(name, str) for name in names):
        raise DataError("image names must be text")
    return names


def _speaker(turn: Any) -> str:
    speaker = take(turn, "from", str, take(turn, "role", str, ""))
    if speaker not in SPEAKERS:
        raise DataError(f"speaker {speaker[:40]!r} is none of {', '.join(SPEAKERS)}")
    return SPEAKERS[speaker]


def _speech(turn: Any) -> str:
    return take(turn, "value", str) if "value" in turn else take(turn, "content", str)


def _relevant(entry: Entry, num_images: int) -> tuple[int, ...]:
    relevant = take(entry, "relevant_images", list, [])
    if relevant and len(relevant) != num_images:
        raise DataError(f"{len(relevant)} relevant_images for {num_images} images")
    return tuple(index for index, is_relevant in enumerate(relevant) if is_relevant)


def _identity(entry: Entry) -> dict[str, Any]:
    return {"id": entry["id"]} if entry.get("id") is not None else {}


def _read_all(names: list[str], root: ImageRoot) -> tuple[bytes, ...]:
    return tuple(root.read(name) for name in names)
