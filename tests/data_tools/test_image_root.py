"""Laws of images on their way into a shard: their pixels are those of the stock path, whatever the format; limits refuse or shrink."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from data_tools.image_root import ImageRoot
from laid_ds.data.images import MAX_SIDE, Pixels
from laid_ds.data.record import DataError, describe

MODES = {
    "BMP": ("RGB", "L", "P", "1"),
    "TIFF": ("RGB", "RGBA", "L", "LA", "P", "CMYK", "I;16"),
    "AVIF": ("RGB", "RGBA"),
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "RGBA", "P", "L", "LA", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("P",),
}
ORIENTED = [fmt for fmt in MODES if fmt not in ("BMP", "GIF")]
CASES = [(fmt, mode, turn) for fmt, modes in MODES.items() for mode in modes for turn in (range(1, 9) if fmt in ORIENTED else (1,))]


def saved(fmt: str, mode: str = "RGB", orientation: int = 1, size=(31, 17)) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 4), np.uint8)
    image = Image.fromarray(pixels, "RGBA").resize(size, Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image = image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)
    image.save(file, fmt, **({} if orientation == 1 else {"exif": exif}))
    return file.getvalue()


@pytest.mark.parametrize("fmt, mode, orientation", CASES)
def test_pixels_are_those_of_the_stock_path(tmp_path, fmt, mode, orientation):
    (tmp_path / "x").write_bytes(data := saved(fmt, mode, orientation))
    root = ImageRoot(tmp_path)
    kept = root.read("x")
    info, stock = describe(kept), load_image(Image.open(io.BytesIO(data)))  # PIL garbles a turned TIFF that it maps from a file
    assert (info.width, info.height) == stock.size == ((31, 17) if orientation < 5 else (17, 31))
    assert Pixels().decode(kept).tobytes() == stock.tobytes()
    if fmt in ("BMP", "TIFF", "AVIF"):
        assert (info.fmt, root.changes) == ("png", {f"images_re_encoded_{fmt.lower()}": 1})
    else:
        assert (kept, root.changes) == (data, {})


def test_an_image_may_be_given_in_place(tmp_path):
    data = saved("PNG")
    text = base64.b64encode(data).decode()
    for source in (f"data:image/png;base64,{text}", {"bytes": text, "path": "any.png"}, {"bytes": text}):
        assert ImageRoot(tmp_path).read(source) == data


def test_a_path_may_be_spelled_as_on_another_machine(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "x.png").write_bytes(data := saved("PNG"))
    inside = str(tmp_path / "deep" / "x.png")
    for name in ("deep/x.png", "/deep/x.png", "deep\\x.png", "\\deep\\x.png", "./deep/x.png", inside, f"file://{inside}"):
        assert ImageRoot(tmp_path).read(name) == data
        assert ImageRoot(tmp_path).read({"path": name}) == data


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "BMP", "TIFF"])
def test_an_image_beyond_the_limits_is_refused_or_shrunk(tmp_path, fmt):
    (tmp_path / "x").write_bytes(saved(fmt, size=(MAX_SIDE * 2, 40)))
    with pytest.raises(DataError, match=r"the limits are .* --shrink"):
        ImageRoot(tmp_path).read("x")
    root = ImageRoot(tmp_path, shrink=True)
    kept = root.read("x")
    info = describe(kept)
    assert (info.width, info.height, info.fmt) == (MAX_SIDE, 20, "jpg" if fmt == "JPEG" else "png")
    expected = load_image(Image.open(tmp_path / "x")).resize((MAX_SIDE, 20), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(Pixels().decode(kept), int) - np.asarray(expected, int)).mean() < 3
    assert root.changes == {"images_shrunk": 1}


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_a_cut_image_is_refused_and_named(tmp_path, fmt):
    data = saved(fmt, "P" if fmt == "GIF" else "RGB", size=(300, 200))
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="image 'cut'"):
        ImageRoot(tmp_path).read("cut")
    if fmt in ("JPEG", "PNG"):
        assert ImageRoot(tmp_path, decode=False).read("cut") == data[: len(data) // 2]
