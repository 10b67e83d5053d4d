"""Fields of an entry, checked as they are taken. What says nothing about learning may stand beside them; the rest is refused by name."""

from collections.abc import Iterable, Sequence
from typing import Any

from laid_ds.data.record import DataError

Entry = dict[str, Any]

NAMES = (
    "id idx index uid uuid key __key__ hash sha256 md5 source dataset dataset_name data_source origin split subset category topic "
    "domain task type task_type question_type answer_type difficulty language lang url urls file_name filename width height "
    "image_width image_height image_size image_sizes size num_images num_turns licence license author model model_name timestamp "
    "date created_at updated_at version meta metadata general_metadata"
)
SAYS_NOTHING = frozenset(NAMES.split())
"""Where an entry comes from and what it looks like. Every name that ends in _id belongs to it."""

EMPTY_TEXTS = ("[]", "{}", "null")
SAYS_MORE = {
    **dict.fromkeys(("kto_tag", "label", "labels", "chosen", "rejected", "rejected_response", "preference", "rank"), "a preference"),
    **dict.fromkeys(("reward", "rewards", "score", "scores"), "a reward"),
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call", "tool_call_id"), "the use of tools"),
    **dict.fromkeys(("video", "videos"), "videos"),
    **dict.fromkeys(("audio", "audios"), "sound"),
    **dict.fromkeys(("objects", "bbox", "bboxes", "boxes", "masks", "ref"), "places in images"),
    "system": "a system prompt",
    **dict.fromkeys(("loss", "weight", "train", "loss_scale", "mask"), "what is to be learned"),
    **dict.fromkeys(("reasoning_content", "thinking", "reasoning"), "a train of thought"),
}
"""Names that are known to mean something which a sample cannot hold."""


def check_fields(entry: Entry, known: Iterable[str], *, others: bool = False) -> None:
    """Refuse by name a field that is not `known` and could change what must be learned. An empty field (null, "", [], {}, or
    these as text) says nothing. `others`: fields nobody knows may stay, because the sample's meta keeps the entry."""
    for name, value in entry.items():
        if name in known or name in SAYS_NOTHING or is_empty(value) or value in EMPTY_TEXTS:
            continue
        if name in SAYS_MORE:
            raise DataError(f"field {name[:60]!r} says {SAYS_MORE[name]}, which this format cannot learn")
        if not (others or name.endswith("_id")):
            raise DataError(f"field {name[:60]!r} is not known and might change what is to be learned; remove it, or name it to --ignore")


def without(value: Any, ignored: Sequence[str], depth: int = 5) -> Any:
    """An entry without these fields, nor its turns (in a list) and their parts (in a list of each turn)."""
    if depth and ignored and isinstance(value, dict):
        return {name: without(inner, ignored, depth - 1) for name, inner in value.items() if name not in ignored}
    if depth and ignored and isinstance(value, list):
        return [without(inner, ignored, depth - 1) for inner in value]
    return value


def is_empty(value: Any) -> bool:
    """Whether a field says nothing: null, "", [], {}, or a list of nulls."""
    return value is None or value in ("", [], {}) or (isinstance(value, list) and all(item is None for item in value))


def take(entry: Any, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
    """A field of an entry that must be of this type; absent or null gives the default, or is an error if that is None."""
    if not isinstance(entry, dict):
        raise DataError(f"an entry is {type(entry).__name__}, not an object")
    value = entry.get(name)
    if value is None and default is not None:
        return default
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise DataError(f"field {name!r} is {'missing' if name not in entry else type(value).__name__}; it must be {expected}")
    return value


def take_strings(entry: Any, name: str, default: list | None = None) -> list[str]:
    """A field that must be a list of text."""
    values = take(entry, name, list, default)
    if not all(isinstance(value, str) for value in values):
        raise DataError(f"field {name!r} must hold text alone")
    return values


def take_one_of(entry: Any, names: Iterable[str]) -> Any:
    """The one of several fields that is not empty, None if all are. Two of them would be two sayings of one thing."""
    given = [name for name in names if not is_empty(entry.get(name))]
    if len(given) > 1:
        raise DataError(f"fields {' and '.join(map(repr, given))} are both given; one of them must go")
    return entry[given[0]] if given else None


def take_images(entry: Entry) -> list[Any]:
    """The images in `image` or `images`, each as `ImageRoot.read` takes it."""
    images = take_one_of(entry, ("image", "images"))
    images = [] if images is None else images if isinstance(images, list) else [images]
    for place, image in enumerate(images):
        if not isinstance(image, (str, dict)) or not image:
            raise DataError(f"image {place} is {image!r}"[:80] + "; it must be a file name, a data: URL, or an object with path or bytes")
    return images


def identity(entry: Entry) -> dict[str, Any]:
    """What the entry calls itself, for the sample's meta."""
    return {"id": entry["id"]} if entry.get("id") is not None else {}
