"""Laws of files that others made: text is read as JSON reads it or refused; no name leads out of the image root; bombs are seen early."""

import io
import json
import struct
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.image_root import ImageRoot
from data_tools.inputs import entries
from laid_ds.data.record import DataError


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "/etc/passwd", "link.jpg", "deep/../../secret.jpg", "a\0b", "x" * 5000, "http://h/x.jpg", "", "none.jpg"]
)
def test_a_name_that_is_no_file_under_the_root_is_refused_with_the_name(pictures, name):
    with pytest.raises(DataError, match="image"):
        ImageRoot(pictures).read(name)


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
