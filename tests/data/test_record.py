"""Laws of the record: what is written comes back, and anything else is one documented error."""

import contextlib
import json
import pickle
from dataclasses import replace

import pytest
from data_samples import make_sample, picture
from hypothesis import given, settings
from hypothesis import strategies as st

from laid_ds.data.record import DataError, Origin, Sample, Turn, decode, describe, encode, estimate_tokens, parse, record_of

ORIGIN = Origin("shard-000000.tar", "sample-00001", 512)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT, st.lists, max_leaves=5
)


@given(texts=st.lists(TEXT, min_size=1, max_size=4), num_images=st.integers(0, 3), meta=st.dictionaries(TEXT, JSON, max_size=3))
@settings(max_examples=60, deadline=None)
def test_decode_inverts_encode(texts, num_images, meta):
    sample = make_sample(1, num_images)
    turns = (*sample.turns, *(Turn("user", (text,), choices=(text,)) for text in texts))
    sample = Sample("sample-00001", turns, sample.images, "s", "l", {"fp": 3}, meta, ORIGIN)
    assert decode(encode(sample), sample.images, ORIGIN) == sample


def test_what_a_record_says_of_windows_is_written_only_where_it_is_not_the_default():
    """Records without it stay byte for byte what they were, and readers that do not know it refuse it by name."""
    plain = make_sample(1, 3)
    assert not {"haystack", "fixed"} & json.loads(encode(plain)).keys()
    sample = replace(plain, haystack=True, fixed=(2, 0))
    fields = json.loads(encode(sample))
    assert (fields["haystack"], fields["fixed"], encode(sample)[: len(encode(plain)) - 1]) == (True, [2, 0], encode(plain)[:-1])
    assert decode(encode(sample), sample.images, ORIGIN) == replace(sample, origin=ORIGIN)


def test_an_answer_that_is_not_learned_says_so_and_others_say_nothing():
    learned, read = Turn("assistant", ("a",)), Turn("assistant", ("b",), supervised=False)
    data = encode(Sample("sample-00001", (learned, read)))
    assert decode(data, (), ORIGIN).turns == (learned, read)
    assert [turn.get("supervised") for turn in json.loads(data)["turns"]] == [None, False]


@pytest.mark.parametrize("fmt, name", [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif")])
def test_image_size_is_read_from_the_header(fmt, name):
    info = describe(picture(0, fmt, width=37, height=19))
    assert (info.fmt, info.width, info.height) == (name, 37, 19)


BAD = {
    "no turns": {"turns": []},
    "future version": {"v": 2},
    "unknown field": {"extra": 1},
    "unknown role": {"turns": [{"role": "judge", "segments": [{"t": "x"}]}]},
    "image out of range": {"turns": [{"role": "user", "segments": [{"i": 2}]}]},
    "negative image": {"turns": [{"role": "user", "segments": [{"i": -1}]}]},
    "boolean image": {"turns": [{"role": "user", "segments": [{"i": True}]}]},
    "needle out of range": {"turns": [{"role": "user", "segments": [{"i": 0}, {"i": 1}], "needles": [5]}]},
    "needle of an answer": {"turns": [{"role": "assistant", "segments": [{"i": 0}, {"i": 1}], "needles": [0]}]},
    "supervised no truth value": {"turns": [{"role": "assistant", "segments": [{"i": 0}, {"i": 1}], "supervised": 0}]},
    "a question cannot be unsupervised": {"turns": [{"role": "user", "segments": [{"i": 0}, {"i": 1}], "supervised": False}]},
    "image never shown": {"turns": [{"role": "user", "segments": [{"i": 0}]}]},
    "segment of two kinds": {"turns": [{"role": "user", "segments": [{"i": 0, "t": "x"}]}]},
    "tokens no object": {"tokens": [1]},
    "token count no number": {"tokens": {"fp": "many"}},
    "meta no object": {"meta": 3},
    "source no text": {"source": None},
    "haystack no truth value": {"haystack": 1},
    "fixed image out of range": {"fixed": [2]},
    "fixed image twice": {"fixed": [0, 0]},
    "fixed no list": {"fixed": 0},
    "half a surrogate": {"meta": {"x": "\ud800"}},
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD.keys())
def test_a_bad_field_is_named_with_its_place(change):
    sample = make_sample(1)
    data = json.dumps({**json.loads(encode(sample)), **change}).encode()
    with pytest.raises(DataError, match=r"shard shard-000000.tar, key sample-00001, offset 512") as caught:
        decode(data, sample.images, ORIGIN)
    assert (caught.value.shard, caught.value.key, caught.value.offset) == ("shard-000000.tar", "sample-00001", 512)


@given(data=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=300, deadline=None)
def test_any_bytes_parse_or_raise_the_documented_error(data):
    with contextlib.suppress(DataError):
        parse(data)


@given(place=st.integers(0), byte=st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_a_changed_record_parses_or_raises_the_documented_error(place, byte):
    data = bytearray(encode(make_sample(1, 0)))
    data[place % len(data)] = byte
    with contextlib.suppress(DataError):
        parse(bytes(data))


@given(data=st.binary(max_size=64), start=st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\0\0\0\0WEBPVP8X"]))
@settings(max_examples=300, deadline=None)
def test_any_image_header_is_described_or_refused(data, start):
    try:
        info = describe(start + data)
    except DataError:
        return
    assert min(info.width, info.height) > 0


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"v":' + b"9" * 5000 + b"}", b'{"v":NaN}', b"\xff\xfe", b""])
def test_hostile_json_is_the_documented_error(data):
    with pytest.raises(DataError):
        parse(data)


@pytest.mark.parametrize("key", ["", "a.b", "../x", "_hidden", "a/b", "x" * 81, "ü"])
def test_a_key_that_stock_readers_would_cut_is_refused(key):
    with pytest.raises(DataError, match="key"):
        encode(Sample(key, (Turn("user", ("x",)),)))


def test_an_image_that_changed_is_refused():
    sample = make_sample(1)
    with pytest.raises(DataError, match="image 1"):
        decode(encode(sample), (sample.images[0], picture(99, "PNG")), ORIGIN)


def test_the_error_survives_a_process_boundary():
    error = pickle.loads(pickle.dumps(DataError("bad", shard="s", key="k", offset=3)))
    assert (str(error), error.shard, error.key, error.offset) == ("bad [shard s, key k, offset 3]", "s", "k", 3)


def test_the_token_estimate_counts_every_shown_image():
    sample = make_sample(1, 2)
    record = record_of(sample)
    twice = (*sample.turns, Turn("user", (0, "")))
    assert estimate_tokens(twice, record.images) - estimate_tokens(sample.turns, record.images) == 5 + 1 * 1 + 2
