"""Our own lines beside a folder of images: one question with its answer."""

from data_tools.formats.fields import Entry, identity, image_names, interleave, take, take_strings
from data_tools.image_root import ImageRoot, read_all
from laid_ds.data.record import Sample, Turn


def read_entry(entry: Entry, key: str, root: ImageRoot) -> Sample:
    """Our own lines beside a folder of images: `images`, `question`, `answer`, and optional `needles`, `choices`, `source`, `licence`,
    `meta`, `haystack`, `fixed`. Without <image> marks in the question the images stand before it."""
    names = image_names(entry)
    (question,) = interleave([take(entry, "question", str)], len(names))
    needles = take(entry, "needles", list, [])
    turns = (
        Turn("user", question, tuple(needles), tuple(take_strings(entry, "choices", []))),
        Turn("assistant", (take(entry, "answer", str),)),
    )
    source, licence = take(entry, "source", str, ""), take(entry, "licence", str, "")
    windows = {"haystack": take(entry, "haystack", bool, False), "fixed": tuple(take(entry, "fixed", list, []))}
    return Sample(key, turns, read_all(names, root), source, licence, meta=take(entry, "meta", dict, {}) | identity(entry), **windows)
