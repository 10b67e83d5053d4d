"""Laws of files that others made: text is read as JSON reads it or refused; no name leads out of the image root; bombs are seen early."""

import contextlib
import gzip
import io
import json
import struct
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.image_root import ImageRoot
from data_tools.inputs import entries, read_json
from laid_ds.data.record import DataError


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "/etc/passwd", "link.jpg", "deep/../../secret.jpg", "a\0b", "x" * 5000, "http://h/x.jpg", "", "none.jpg"]
)
def test_a_name_that_is_no_file_under_the_root_is_refused_with_the_name(pictures, name):
    with pytest.raises(DataError, match="image"):
        ImageRoot(pictures).read(name)


def test_a_link_out_of_the_root_is_followed_by_choice_alone(pictures, tmp_path):
    """`..` never climbs: not out of the root, and not from where a link leads."""
    secret = (pictures.parent / "secret.jpg").read_bytes()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "far").symlink_to(pictures / "deep")
    (tmp_path / "root" / "gone.jpg").symlink_to(tmp_path / "none.jpg")
    with pytest.raises(DataError, match=r"'link.jpg' leads out of the image root by a link; --follow-links allows that"):
        ImageRoot(pictures).read("link.jpg")
    assert ImageRoot(pictures, follow_links=True).read("link.jpg") == secret
    root = ImageRoot(tmp_path / "root", follow_links=True)
    for name in ("far/p6.png", "/far/p6.png", str(tmp_path / "root" / "far" / "p6.png")):
        assert root.read(name) == (pictures / "deep" / "p6.png").read_bytes()
    for name in ("far/../../secret.jpg", "far/../p0.jpg", "../root2/x.jpg", str(pictures / "p0.jpg"), "gone.jpg"):
        with pytest.raises(DataError, match="image"):
            root.read(name)


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(100_000, 1), (1, 100_000), (12_000, 12_000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_by_its_header(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png_header(*size))
    with pytest.raises(DataError, match=rf"bomb.png.*{size[0]} x {size[1]} pixels; the limits are"):
        ImageRoot(tmp_path).read("bomb.png")


def test_a_file_that_is_no_image_or_too_large_is_refused(tmp_path, monkeypatch):
    (tmp_path / "x.jpg").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"x.jpg.*not a jpg, png, webp, gif image"):
        ImageRoot(tmp_path).read("x.jpg")
    monkeypatch.setattr("data_tools.image_root.MAX_IMAGE_BYTES", 5)
    with pytest.raises(DataError, match="the limit is 5"):
        ImageRoot(tmp_path).read("x.jpg")


@given(text=st.text('[]{}",: \n1aé', max_size=40))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_of_entries_is_read_as_json_reads_it_or_refused(tmp_path, text):
    path = tmp_path / "entries.json"
    path.write_text(text)
    try:
        found = list(entries(path))
    except DataError:
        return
    if text.lstrip().startswith("["):
        assert found == json.loads(text)
    else:
        assert found == [json.loads(line) for line in io.StringIO(text) if line.strip()]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_list_is_read_the_same_in_pieces_of_any_size(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("data_tools.inputs.CHUNK", chunk)
    whole = [{"a": "x]" * number, "b": [number, {"c": "é"}]} for number in range(20)]
    for indent in (None, 2):
        (tmp_path / "e.json").write_text(json.dumps(whole, indent=indent, ensure_ascii=False))
        assert list(entries(tmp_path / "e.json")) == whole


FOUND = [{"a": 1}, {"b": ["é", {"c": None}]}]
LINES = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in FOUND)
SPELLINGS = {
    "list": json.dumps(FOUND),
    "lines": LINES,
    "lines without a last end": LINES.rstrip(),
    "lines with empty ones": "\n" + LINES.replace("\n", "\r\n\r\n"),
    "wrapped": json.dumps({"data": FOUND}),
    "wrapped, over several lines": json.dumps({"version": 1, "data": FOUND, "more": None}, indent=1, ensure_ascii=False),
}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("text", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_entries_are_the_same_in_every_spelling(tmp_path, text, pack, mark):
    (tmp_path / "e").write_bytes(pack(mark + text.encode()))
    assert list(entries(tmp_path / "e")) == FOUND


def test_a_single_entry_may_have_a_list_named_data_among_others(tmp_path):
    (tmp_path / "e").write_text('{"data": [1]}\n{"data": [2]}\n')
    assert list(entries(tmp_path / "e")) == [{"data": [1]}, {"data": [2]}]


BROKEN = {
    "line cut off": (b'{"a": 1}\n{"b": "x', "line 2: Unterminated string.* cut off after"),
    "list cut off": (b'[{"a": 1}, {"b": "x', "entry 1: Unterminated string.* cut off after"),
    "list without end": (b'[{"a": 1}', "entry 0: the file is cut off: the list does not end"),
    "list without end behind a comma": (b'[{"a": 1},', "entry 1: .*cut off after"),
    "more after the list": (b'[{"a": 1}] {"b"', "after the end of the list there is '{\"b\"'"),
    "no comma": (b'[{"a": 1} {"b": 2}]', 'entry 0: a comma or the end of the list must follow, not \'{"b": 2}'),
    "NaN in a line": (b'{"a": 1}\n{"b": NaN}\n', "line 2: NaN is not a JSON number"),
    "NaN in a list": (b'[{"a": 1}, {"b": -Infinity}, {"c": 1}]', "entry 1: -Infinity is not a JSON number"),
    "a field twice": (b'{"image": "a", "image": "b"}\n', "line 1: field 'image' is given twice"),
    "a field twice in a list": (b'[{"image": "a", "image": "b"}]', "entry 0: field 'image' is given twice"),
    "single quotes": (b"{'a': 1}\n", "line 1: Expecting property name.*: \"'a': 1"),
    "UTF-16": ("[1]".encode("utf-16"), "begins with a UTF-16 byte order mark"),
    "a mark inside": (b'{"a": 1}\n\xef\xbb\xbf{"b": 1}\n', "line 2: a byte order mark stands inside the file"),
    "Latin-1 in a line": (b'{"a": 1}\n{"b": "\xe9"}\n', "line 2: it is not UTF-8"),
    "Latin-1 in a list": (b'[{"a": 1}, {"b": "\xe9"}]', "entry 0 or soon after it, is not UTF-8"),
    "an object that is no list": (b'{\n"a": 1\n}\n', "line 1: "),
    "more beside the wrapped list": (b'{"data": [], "tools": ["x"]}', "beside its list 'data': field 'tools'"),
    "gzip cut off": (gzip.compress(b'{"a": 1}\n' * 100)[:-9], "damaged or cut off"),
    "gzip damaged": (gzip.compress(b'{"a": 1}\n')[:12] + b"\xff" * 20, "damaged or cut off"),
}


@pytest.mark.parametrize("data, message", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_is_refused_with_its_place_and_what_is_there(tmp_path, data, message):
    (tmp_path / "e.json").write_bytes(data)
    with pytest.raises(DataError, match=f"e.json.*{message}"):
        list(entries(tmp_path / "e.json"))


@given(data=st.binary(max_size=40), start=st.sampled_from([b"", b"[", b"{", b"\x1f\x8b\x08\0", b"\xef\xbb\xbf", b'{"data":[']))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_or_refused(tmp_path, data, start):
    (tmp_path / "e").write_bytes(start + data)
    for read in (lambda path: list(entries(path)), lambda path: list(entries(path, keep_going=True)), read_json):
        with contextlib.suppress(DataError):
            read(tmp_path / "e")
