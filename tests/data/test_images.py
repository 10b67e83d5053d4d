"""Laws of pixels: the default path gives PIL's pixels bit for bit; limits are checked before anything is decompressed."""

import io
import zlib
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from data_samples import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from transformers.image_utils import load_image

from laid_ds.data import images
from laid_ds.data.images import Pixels
from laid_ds.data.record import DataError, describe


def stock(data: bytes) -> Image.Image:
    """The path of the stock processors from a file to pixels."""
    return load_image(Image.open(io.BytesIO(data)))


def saved(mode: str, fmt: str, size=(67, 45), **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode).save(file, fmt, **options)
    return file.getvalue()


TURNED = Image.Exif()
TURNED[0x0112] = 6
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
KINDS = {
    **{
        f"jpeg {mode} {subsampling} {'progressive' if progressive else 'baseline'}": saved(
            mode, "JPEG", subsampling=subsampling, progressive=progressive
        )
        for mode in ("RGB", "L", "CMYK")
        for subsampling in (0, 1, 2)
        for progressive in (False, True)
    },
    "jpeg one pixel": saved("RGB", "JPEG", (1, 1)),
    "jpeg restart": saved("RGB", "JPEG", restart_marker_rows=1),
    "jpeg stored as rgb": saved("RGB", "JPEG", keep_rgb=True),
    **{f"png {mode}": saved(mode, "PNG") for mode in ("RGB", "RGBA", "P", "L", "LA", "1", "I;16")},
    "webp": saved("RGB", "WEBP"),
    "webp lossless": saved("RGBA", "WEBP", lossless=True),
    "gif": saved("P", "GIF"),
    **{f"{fmt} turned": saved("RGB", fmt, exif=TURNED) for fmt in ("JPEG", "PNG", "WEBP")},
    **{f"{fmt} turned by xmp": saved("RGB", fmt, xmp=XMP) for fmt in ("JPEG", "WEBP")},
}


@pytest.mark.parametrize("data", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("decoder", ["exact", "pil"])
def test_the_default_pixels_are_those_of_the_stock_path(data, decoder):
    decoded = Pixels(decoder).decode(data)
    assert decoded.mode == "RGB"
    assert decoded.tobytes() == stock(data).tobytes()


MODES = {"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "RGBA", "P", "L", "LA", "1", "I;16"), "WEBP": ("RGB", "RGBA")}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fmt, mode", [(fmt, mode) for fmt, modes in MODES.items() for mode in modes])
def test_a_turned_picture_is_upright_as_the_stock_path_turns_it(fmt, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_upright(saved(mode, fmt, exif=exif), orientation)


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_transparency_is_dropped_as_the_stock_path_drops_it(mode):
    assert_upright(saved(mode, "PNG", transparency=b"\0\x80" if mode == "P" else 3 if mode == "L" else (1, 2, 3)), 1)


def tiff_directory(order: str, kind: int, value: int) -> bytes:
    number = partial(int.to_bytes, byteorder=order)
    entry = number(0x0112, 2) + number(kind, 2) + number(1, 4) + number(value, {3: 2, 4: 4}[kind]).ljust(4, b"\0")
    return {"little": b"II", "big": b"MM"}[order] + number(42, 2) + number(8, 4) + number(1, 2) + entry + number(0, 4)


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("kind", [3, 4])
def test_either_byte_order_is_read(fmt, order, kind):
    assert_upright(saved("RGB", fmt, exif=b"Exif\0\0" + tiff_directory(order, kind, 6)), 6)


@pytest.mark.parametrize("fmt", ["JPEG", "WEBP"])
def test_an_orientation_in_xmp_counts_where_exif_has_none(fmt):
    assert_upright(saved("RGB", fmt, xmp=XMP), 8)
    assert_upright(saved("RGB", fmt, xmp=XMP, exif=b"Exif\0\0" + tiff_directory("big", 3, 1)), 1)


@pytest.mark.parametrize("packed", [False, True])
def test_an_orientation_in_the_texts_of_a_png_counts(packed):
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", XMP.decode(), zip=packed)
    assert_upright(saved("RGB", "PNG", pnginfo=texts), 8)
    texts = PngImagePlugin.PngInfo()
    profile = b"Exif\0\0" + tiff_directory("little", 3, 5)
    texts.add_text("Raw profile type exif", f"\nexif\n{len(profile):8}\n{profile.hex()}\n", zip=packed)
    assert_upright(saved("RGB", "PNG", pnginfo=texts), 5)


def test_an_orientation_behind_the_pixels_counts():
    data, end = saved("RGB", "PNG"), 12  # the last chunk, IEND, has 12 bytes
    content = b"eXIf" + tiff_directory("big", 3, 6)
    chunk = (len(content) - 4).to_bytes(4) + content + zlib.crc32(content).to_bytes(4)
    assert_upright(data[:-end] + chunk + data[-end:], 6)


def assert_upright(data: bytes, orientation: int) -> None:
    """Both decoders give the stock pixels, and the record says their size."""
    expected = stock(data)
    assert (expected.size == (45, 67)) == (orientation >= 5)
    info = describe(data)
    assert (info.width, info.height) == expected.size
    for decoder in ("exact", "pil"):
        assert Pixels(decoder).decode(data).tobytes() == expected.tobytes()


def test_the_faster_decoder_is_used_only_where_it_was_seen_to_agree(monkeypatch):
    pytest.importorskip("simplejpeg", reason="simplejpeg is not installed (the extra `fast`)")
    assert images.simplejpeg_equals_pil()
    monkeypatch.setattr(images, "simplejpeg_equals_pil", lambda: False)
    monkeypatch.setattr(images, "_decode_jpeg", None)  # must not be called
    assert Pixels("exact").decode(KINDS["jpeg one pixel"]).size == (1, 1)


def test_the_approximate_decoder_is_close_and_has_to_be_asked_for():
    pytest.importorskip("simplejpeg", reason="simplejpeg is not installed (the extra `fast`)")
    data = saved("RGB", "JPEG", (300, 200), quality=90)
    difference = np.asarray(Pixels("fast").decode(data), int) - np.asarray(stock(data), int)
    assert 0 < np.abs(difference).mean() < 4


@pytest.mark.parametrize("size", [(40, 30), (100, 90)])
def test_resizing(size):
    image = stock(saved("RGB", "PNG"))
    assert Pixels().resize(image, *size).tobytes() == image.resize(size, Image.Resampling.BICUBIC).tobytes()
    difference = np.asarray(Pixels(resizer="torch").resize(image, *size), int) - np.asarray(Pixels().resize(image, *size), int)
    assert np.abs(difference).mean() < 1
    assert Pixels().resize(image, *image.size) is image


def test_the_choice_can_be_recorded_and_made_again():
    choice = Pixels(resizer="torch", max_side=100)
    assert Pixels(**choice.state_dict()) == choice
    with pytest.raises(ValueError, match="choose from"):
        Pixels("cv2")


@pytest.mark.parametrize("limit, allowed", [({"max_side": 66}, False), ({"max_side": 67}, True), ({"max_pixels": 3014}, False)])
def test_limits(limit, allowed):
    pixels = replace(Pixels(), **limit)
    if allowed:
        assert pixels.decode(KINDS["png RGB"]).size == (67, 45)
    else:
        with pytest.raises(DataError, match="image of 67 x 45 pixels; the limits are"):
            pixels.decode(KINDS["png RGB"])


@given(
    kind=st.sampled_from(sorted(KINDS)),
    end=st.integers(0, 10**6),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_any_damaged_image_is_decoded_or_refused(kind, end, flips):
    data = bytearray(KINDS[kind])
    for place, mask in flips:
        data[place % len(data)] ^= mask
    try:
        Pixels(max_pixels=1 << 20).decode(bytes(data[: len(data) - end % len(data)]))
    except DataError:
        return


def test_half_an_image_is_refused():
    for fmt in ("JPEG", "PNG", "WEBP"):
        data = picture(0, fmt, 200, 150)
        with pytest.raises(DataError, match=r"decoded"):
            Pixels().decode(data[: len(data) // 2])
