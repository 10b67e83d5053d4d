"""From encoded bytes to pixels. One choice of decoder and resizer serves teacher and student, and is recorded with the run.

"exact" gives the pixels that the stock processors are given, those of `transformers.image_utils.load_image`: the file opened by PIL, turned
upright as its EXIF or XMP says, then `convert("RGB")`, whatever its depth and transparency. It takes a faster decoder only for kinds of
files on which that decoder, as installed, agrees bit for bit.
"""

import importlib.util
import io
import struct
import warnings
import zlib
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from laid_ds.data.record import DataError, describe

DECODERS = ("exact", "pil", "fast")
RESIZERS = ("pil", "torch")
MAX_SIDE = 16_384
MAX_PIXELS = 64 << 20
PIL_ERRORS = (  # on damaged files
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, AssertionError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # the limits are ours
warnings.filterwarnings("ignore", message="Palette images with Transparency")  # dropped by rule, in every mode


@dataclass(frozen=True)
class Pixels:
    """How images become pixels."""

    decoder: str = "exact"
    """exact: PIL's pixels, faster where proven equal. pil: PIL alone. fast: simplejpeg with approximate DCT; not bit-equal to PIL."""
    resizer: str = "pil"
    """pil: PIL bicubic, as the stock processors without torchvision. torch: antialiased uint8 bicubic, about 3x faster, not bit-equal."""
    max_side: int = MAX_SIDE
    max_pixels: int = MAX_PIXELS

    def __post_init__(self):
        if self.decoder not in DECODERS or self.resizer not in RESIZERS:
            raise ValueError(f"decoder {self.decoder!r}, resizer {self.resizer!r}: choose from {DECODERS} and {RESIZERS}")
        if self.decoder == "fast" and not has_simplejpeg():
            raise ValueError('decoder "fast" needs the package simplejpeg')

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint records, so that a resumed run sees the same pixels."""
        return asdict(self)

    def decode(self, data: bytes) -> Image.Image:
        """Upright RGB pixels. An image beyond the limits is refused by its header, before anything is decompressed."""
        info = describe(data)
        check_limits(info.width, info.height, self.max_side, self.max_pixels)
        if info.fmt != "jpg" or self.decoder == "pil" or (self.decoder == "exact" and not simplejpeg_equals_pil()):
            image = upright(data)
        else:
            image = _decode_jpeg(data, exact=self.decoder == "exact")
        if image.size != (info.width, info.height):  # a record would promise another length than the text has
            raise DataError(f"image of {info.width} x {info.height} pixels by its header, {image.width} x {image.height} when decoded")
        return image

    def resize(self, image: Image.Image, width: int, height: int) -> Image.Image:
        """Bicubic, with antialias."""
        if image.size == (width, height):
            return image
        if self.resizer == "pil":
            return image.resize((width, height), Image.Resampling.BICUBIC)
        return _resize_torch(image, width, height)


def check_limits(width: int, height: int, max_side: int = MAX_SIDE, max_pixels: int = MAX_PIXELS) -> None:
    """Refuse decompression bombs and absurd sizes."""
    if max(width, height) > max_side or width * height > max_pixels:
        raise DataError(f"image of {width} x {height} pixels; the limits are {max_side} a side and {max_pixels} in all")


def check_decodable(data: bytes, name: str) -> None:
    """Decode an image to its last row, under the default limits."""
    try:
        Pixels(decoder="pil").decode(data)
    except DataError as error:
        raise DataError(f"{name}: {error.reason}") from None


def upright(data: bytes) -> Image.Image:
    """RGB pixels of any file that PIL knows, turned as it says. Raises DataError for one that is damaged."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except PIL_ERRORS as error:
        raise DataError(f"image cannot be decoded: {error}") from None


def _decode_jpeg(data: bytes, exact: bool) -> Image.Image:
    """simplejpeg where it may, PIL for the rest: CMYK, and every file that simplejpeg does not like."""
    import simplejpeg

    try:
        _, _, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours in ("YCbCr", "Gray", "RGB"):
            pixels = Image.fromarray(simplejpeg.decode_jpeg(data, "RGB", fastdct=not exact, fastupsample=not exact))
            return _turned_like(data, pixels)
    except ValueError:
        pass  # PIL says what is wrong, or reads it
    return upright(data)


def _turned_like(data: bytes, pixels: Image.Image) -> Image.Image:
    """Pixels of a file, turned as PIL would turn them."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels.getexif()[ExifTags.Base.Orientation] = image.getexif().get(ExifTags.Base.Orientation, 1)
    except PIL_ERRORS as error:
        raise DataError(f"image cannot be decoded: {error}") from None
    return ImageOps.exif_transpose(pixels)


@cache
def has_simplejpeg() -> bool:
    """Whether the optional faster JPEG decoder is installed."""
    return importlib.util.find_spec("simplejpeg") is not None


@cache
def simplejpeg_equals_pil() -> bool:
    """Whether the two decoders, as installed, agree bit for bit on every kind of JPEG that is given to the faster one."""
    return has_simplejpeg() and all(_decode_jpeg(data, exact=True).tobytes() == upright(data).tobytes() for data in _probe_jpegs())


def _probe_jpegs() -> list[bytes]:
    """Odd sizes, each chroma subsampling, baseline and progressive, colour and grey."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    picture = Image.fromarray(noise).resize((75, 53), Image.Resampling.BICUBIC)
    files = []
    for mode in ("RGB", "L"):
        for subsampling in (0, 1, 2):
            for progressive in (False, True):
                file = io.BytesIO()
                picture.convert(mode).save(file, "JPEG", subsampling=subsampling, progressive=progressive, quality=85)
                files.append(file.getvalue())
    return files


def _resize_torch(image: Image.Image, width: int, height: int) -> Image.Image:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # [1, 3, height, width]
    resized = torch.nn.functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return Image.fromarray(resized[0].permute(1, 2, 0).contiguous().numpy())
