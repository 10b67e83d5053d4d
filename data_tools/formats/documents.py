"""OBELICS and MMC4: documents of interleaved text and images. A document is one assistant turn."""

from data_tools.formats.fields import Entry, identity, take, take_strings
from data_tools.image_root import ImageRoot, read_all
from laid_ds.data.record import DataError, Sample, Segment, Turn


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
    return Sample(key, (Turn("assistant", tuple(segments)),), read_all(names, root), meta=identity(entry))


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
    return Sample(key, (Turn("assistant", tuple(segments)),), read_all(names, root), meta=identity(entry))
