"""Laws of documents: texts are joined as their source joins them, images keep their places, and a lost image costs itself alone."""

import pytest
from data_samples import picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.formats.documents import mmc4, obelics
from data_tools.image_root import ImageRoot
from laid_ds.data.record import DataError

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
INFO = st.tuples(st.integers(0, 5), st.integers(0, 9))


@given(texts=st.lists(WORDS, min_size=1, max_size=5), infos=st.lists(INFO, max_size=6))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mmc4_is_its_sentences_with_one_space_and_an_image_before_its_own(pictures, texts, infos):
    entry = {
        "text_list": texts,
        "image_info": [{"image_name": f"p{image}.jpg", "matched_text_index": place % len(texts)} for image, place in infos],
    }
    sample = mmc4(entry, "key", ImageRoot(pictures))
    assert sample.turns[0].text == " ".join(texts)
    ordered = sorted(entry["image_info"], key=lambda info: info["matched_text_index"])  # stable
    assert sample.images == tuple((pictures / info["image_name"]).read_bytes() for info in ordered)
    read = ""
    for segment in sample.turns[0].segments:
        if isinstance(segment, int):
            place = ordered[segment]["matched_text_index"]
            assert read == "".join(text + " " for text in texts[:place])
        else:
            read += segment


@given(nodes=st.lists(st.integers(0, 5) | WORDS, min_size=1, max_size=8))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_obelics_has_a_blank_line_between_neighbouring_texts(pictures, nodes):
    entry = {
        "texts": [node if isinstance(node, str) else None for node in nodes],
        "images": [f"p{node}.jpg" if isinstance(node, int) else None for node in nodes],
        "metadata": "[]",
        "general_metadata": "{}",
    }
    sample = obelics(entry, "key", ImageRoot(pictures))
    filled = [node for node in nodes if node != ""]
    expected, images = [], 0
    for before, node in zip([None, *filled], filled, strict=False):
        if isinstance(node, int):
            expected.append(images)
            images += 1
        elif isinstance(before, str):
            expected[-1] += "\n\n" + node
        else:
            expected.append(node)
    assert sample.turns[0].segments == (tuple(expected) or ("",))
    assert sample.images == tuple(picture(node) for node in filled if isinstance(node, int))


LOSING = [
    (obelics, {"texts": ["a", None, "b", None], "images": [None, None, None, "p1.jpg"]}, ("a\n\nb", 0), ["None"]),
    (obelics, {"texts": ["a", None, None], "images": [None, "gone.jpg", "p1.jpg"]}, ("a", 0), ["gone.jpg"]),
    (
        mmc4,
        {
            "text_list": ["a", "b"],
            "image_info": [{"image_name": "gone.jpg", "matched_text_index": 0}, {"image_name": "p1.jpg", "matched_text_index": 1}],
        },
        ("a ", 0, "b"),
        ["gone.jpg"],
    ),
]


@pytest.mark.parametrize("reader, entry, segments, lost", LOSING)
def test_a_document_that_lost_an_image_is_refused_or_keeps_the_rest(pictures, reader, entry, segments, lost):
    with pytest.raises(DataError, match=r"image|place 1"):
        reader(entry, "key", ImageRoot(pictures))
    root = ImageRoot(pictures, keep_rest=True)
    sample = reader(entry, "key", root)
    assert sample.turns[0].segments == segments
    assert sample.images == (picture(1),)
    assert sample.meta["lost_images"] == lost
    assert root.changes == {"images_lost": 1}


def test_a_document_that_lost_all_images_is_refused(pictures):
    with pytest.raises(DataError, match="none of its 1 images is left"):
        obelics({"texts": ["a", None], "images": [None, "gone.jpg"]}, "key", ImageRoot(pictures, keep_rest=True))


@pytest.mark.parametrize(
    "reader, entry, name",
    [
        (obelics, {"texts": ["a"], "images": [None], "label": 1}, "label"),
        (mmc4, {"text_list": ["a"], "image_info": [], "reward": 1}, "reward"),
        (mmc4, {"text_list": ["a"], "image_info": [{"image_name": "p1.jpg", "matched_text_index": 0, "crop": [1]}]}, "crop"),
    ],
)
def test_a_field_nobody_knows_is_refused_by_name(pictures, reader, entry, name):
    with pytest.raises(DataError, match=f"'{name}'"):
        reader(entry, "key", ImageRoot(pictures))
