"""OBELICS and MMC4: documents of interleaved text and images. A document is one assistant turn, its texts joined as the source does:
neighbouring texts of OBELICS by a blank line (the release's own final processing), MMC4's sentences by one space (open_flamingo)."""

from typing import Any

from data_tools.formats.fields import Entry, check_fields, identity, is_empty, take, take_strings
from data_tools.formats.marks import joined
from data_tools.image_root import ImageRoot
from laid_ds.data.record import DataError, Sample, Segment, Turn

BLANK_LINE, SPACE = "\n\n", " "
MMC4_FIELDS = {"text_list", "image_info", "similarity_matrix", "could_have_url_duplicate"}
MMC4_IMAGE_FIELDS = {"image_name", "raw_url", "matched_text_index", "matched_sim", "face_detections"}


def obelics(entry: Entry, key: str, root: ImageRoot) -> Sample:
    """OBELICS: `texts` and `images` of equal length, in each place one of them null. Both null is a picture that was lost."""
    texts, images = take(entry, "texts", list), take(entry, "images", list)
    check_fields(entry, {"texts", "images"})
    if len(texts) != len(images):
        raise DataError(f"{len(texts)} texts beside {len(images)} images")
    nodes: list[str | dict] = []
    for place, (text, image) in enumerate(zip(texts, images, strict=True)):
        if isinstance(text, str) and is_empty(image):
            nodes += [text] if text else []
        elif text is None and (isinstance(image, (str, dict)) or (image is None and root.keep_rest)):
            nodes.append({"image": image})
        else:
            raise DataError(f"place {place} must hold a text or an image, and null beside it")
    return _document(entry, key, root, nodes, between_texts=BLANK_LINE)


def mmc4(entry: Entry, key: str, root: ImageRoot) -> Sample:
    """MMC4: `text_list`, and `image_info` [{image_name, matched_text_index}]; an image stands before its text."""
    texts, infos = take_strings(entry, "text_list"), take(entry, "image_info", list, [])
    check_fields(entry, MMC4_FIELDS)
    before: dict[int, list[dict]] = {}
    for info in infos:
        place = take(info, "matched_text_index", int)
        check_fields(info, MMC4_IMAGE_FIELDS)
        if not 0 <= place < len(texts):
            raise DataError(f"matched_text_index {place} of {len(texts)} texts")
        before.setdefault(place, []).append({"image": take(info, "image_name", str)})
    spaced = [text + SPACE for text in texts[:-1]] + texts[-1:]
    nodes = [node for place, text in enumerate(spaced) for node in (*before.get(place, []), text)]
    return _document(entry, key, root, nodes, between_texts="")


def _document(entry: Entry, key: str, root: ImageRoot, nodes: list[str | dict], between_texts: str) -> Sample:
    """Texts and {"image": source} in their order as one turn. Images that cannot be read are left out where the root keeps the rest."""
    segments: list[Segment] = []
    images: list[bytes] = []
    lost: list[Any] = []
    for node in nodes:
        if isinstance(node, str):
            segments += [between_texts, node] if segments and isinstance(segments[-1], str) else [node]
        elif (image := root.read_or_lose(node["image"])) is None:
            lost.append(node["image"])
        else:
            segments.append(len(images))
            images.append(image)
    if lost and not images:
        raise DataError(f"none of its {len(lost)} images is left")
    meta = identity(entry) | ({"lost_images": [str(source)[:200] for source in lost]} if lost else {})
    return Sample(key, (Turn("assistant", joined(segments)),), tuple(images), meta=meta)
