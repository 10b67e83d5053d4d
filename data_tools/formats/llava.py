"""LLaVA and ShareGPT: a conversation beside its images."""

from typing import Any

from data_tools.formats.fields import Entry, identity, image_names, interleave, take
from data_tools.image_root import ImageRoot, read_all
from laid_ds.data.record import DataError, Sample, Turn

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read_entry(entry: Entry, key: str, root: ImageRoot) -> Sample:
    """LLaVA and ShareGPT: `conversations` [{from, value}] or `messages` [{role, content}], `image` or `images`, <image> marks in the
    text; `relevant_images` (0/1 for each image) become the needles of each question."""
    names = image_names(entry)
    said = take(entry, "conversations", list, take(entry, "messages", list, [])) or []
    if not said:
        raise DataError("neither conversations nor messages")
    speakers = [_speaker(turn) for turn in said]
    segments = interleave([_speech(turn) for turn in said], len(names))
    needles = _relevant(entry, len(names))
    turns = [Turn(role, part, needles if role == "user" else ()) for role, part in zip(speakers, segments, strict=True)]
    return Sample(key, tuple(turns), read_all(names, root), meta=identity(entry))


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
