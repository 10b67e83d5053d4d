"""Our own lines beside a folder of images: one question with its answer."""

from data_tools.formats.fields import Entry, check_fields, identity, take, take_images, take_strings
from data_tools.formats.marks import interleave, refuse_foreign_marks
from data_tools.image_root import ImageRoot
from laid_ds.data.record import DataError, Sample, Turn

FIELDS = {"image", "images", "question", "answer", "system", "needles", "choices", "haystack", "fixed"}


def read_entry(entry: Entry, key: str, root: ImageRoot) -> Sample:
    """`images`, `question`, `answer`, and optional `system`, `needles`, `choices`, `source`, `licence`, `meta`,
    `haystack`, `fixed`. Without <image> marks the images stand before the question."""
    question, answer = take(entry, "question", str), take(entry, "answer", str)
    check_fields(entry, FIELDS)
    for text in (question, answer):
        refuse_foreign_marks(text)
    images, choices = take_images(entry), take_strings(entry, "choices", [])
    if not answer.strip():
        raise DataError(f"the question {question[:60]!r} has no answer")
    if choices and answer not in choices:
        raise DataError(f"answer {answer[:40]!r} is none of the choices {str(choices)[:80]}")
    if choices and len(set(choices)) < max(len(choices), 2):
        raise DataError(f"choices {str(choices)[:80]} must be two or more, each given once")
    needles = take(entry, "needles", list, [])
    if any(needle in needles[:place] for place, needle in enumerate(needles)):
        raise DataError(f"needles {str(needles)[:60]} name an image twice")
    asked, answered = interleave([question, answer], len(images))
    turns = [Turn("user", asked, tuple(needles), tuple(choices)), Turn("assistant", answered)]
    if system := take(entry, "system", str, ""):
        turns.insert(0, Turn("system", (system,)))
    source, licence = take(entry, "source", str, ""), take(entry, "licence", str, "")
    windows = {"haystack": take(entry, "haystack", bool, False), "fixed": tuple(take(entry, "fixed", list, []))}
    facts = take(entry, "meta", dict, {}) | identity(entry)
    return Sample(key, tuple(turns), root.read_all(images), source, licence, meta=facts, **windows)
