"""Format and upright size of an encoded image, from its header: of its parts, only texts are decompressed. Standard library only.

Cameras store a photo as the sensor saw it, and beside it how to turn it (EXIF or XMP orientation). Where that is a quarter turn, the
upright picture is as wide as the stored one is high. The places looked at, and their order, are those of `PIL.Image.getexif`.
"""

import re
import zlib
from collections.abc import Iterator

FORMATS = ("jpg", "png", "webp", "gif")
QUARTER_TURNS = (5, 6, 7, 8)
ORIENTATION = 0x0112
INTEGER_TYPES = {3: 2, 4: 4, 8: 2, 9: 4}  # TIFF's short, long, and signed: their bytes
MAX_TEXT_BYTES = 1 << 20
XMP_JPEG = b"http://ns.adobe.com/xap/1.0/\0"
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')

Metadata = tuple[bytes | None, bytes | None]
"""EXIF and XMP of an image."""


def read_header(data: bytes) -> tuple[str, int, int]:
    """(format, width, height) of the upright picture. Raises ValueError for what is no image of a known format."""
    fmt = _format_of(data)
    (width, height), metadata = {"png": _png, "jpg": _jpeg, "gif": _gif, "webp": _webp}[fmt](data)
    return (fmt, height, width) if _orientation(*metadata) in QUARTER_TURNS else (fmt, width, height)


def _format_of(data: bytes) -> str:
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and len(data) >= 24:
        return "png"
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:6] in (b"GIF87a", b"GIF89a") and len(data) >= 10:
        return "gif"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30:
        return "webp"
    raise ValueError(f"not a {', '.join(FORMATS)} image (first bytes {data[:8].hex() or 'none'})")


def _gif(data: bytes) -> tuple[tuple[int, int], Metadata]:
    return (int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little")), (None, None)


def _jpeg(data: bytes) -> tuple[tuple[int, int], Metadata]:
    place, exif, xmp = 2, None, None
    while place + 9 <= len(data):
        if data[place] != 0xFF:
            raise ValueError(f"jpg image with a broken marker at byte {place}")
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4])
        if marker == 0xFF:  # fill byte
            place += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            return (int.from_bytes(data[place + 7 : place + 9]), int.from_bytes(data[place + 5 : place + 7])), (exif, xmp)
        content = data[place + 4 : place + 2 + length] if marker == 0xE1 else b""
        if content.startswith(b"Exif\0\0"):
            exif = content if exif is None else exif + content[6:]
        elif content.startswith(XMP_JPEG):
            xmp = content
        place += 2 + length
    raise ValueError("jpg image without a frame header")


def _png(data: bytes) -> tuple[tuple[int, int], Metadata]:
    exif = raw_exif = xmp = None
    for kind, content in _png_chunks(data):
        if kind == b"eXIf":
            exif = content
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword, _, text = content.partition(b"\0")
            if keyword == b"XML:com.adobe.xmp":
                xmp = _png_text(kind, text)
            elif keyword == b"Raw profile type exif":
                raw_exif = _unhex(_png_text(kind, text))
    return (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])), (raw_exif if exif is None else exif, xmp)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = 8
    while place + 8 <= len(data):
        length, kind = int.from_bytes(data[place : place + 4]), data[place + 4 : place + 8]
        yield kind, b"" if kind == b"IDAT" else data[place + 8 : place + 8 + length]
        place += 12 + length


def _png_text(kind: bytes, text: bytes) -> bytes:
    """The text of a chunk behind its keyword; empty where it cannot be read."""
    if kind == b"tEXt":
        return text
    packed = kind == b"zTXt"
    if kind == b"iTXt":
        packed, rest = text[:1] == b"\1", text[2:]
        text = rest.partition(b"\0")[2].partition(b"\0")[2]  # language, translated keyword
    else:
        text = text[1:]
    try:
        return zlib.decompressobj().decompress(text, MAX_TEXT_BYTES) if packed else text
    except zlib.error:
        return b""


def _unhex(text: bytes) -> bytes:
    """A profile as ImageMagick writes it into a text: three lines about it, then lines of hexadecimal digits."""
    try:
        return bytes.fromhex("".join(text.decode("latin-1").split("\n")[3:]))
    except ValueError:
        return b""


def _webp(data: bytes) -> tuple[tuple[int, int], Metadata]:
    kind = data[12:16]
    if kind == b"VP8X":
        size = int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
        chunks = dict(_riff_chunks(data))
        return size, (chunks.get(b"EXIF"), chunks.get(b"XMP "))
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1), (None, None)
    if kind == b"VP8 ":
        return (int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF), (None, None)
    raise ValueError(f"webp image with an unknown chunk {kind!r}")


def _riff_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = 12
    while place + 8 <= len(data):
        kind, length = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if kind in (b"EXIF", b"XMP "):
            yield kind, data[place + 8 : place + 8 + length]
        place += 8 + length + length % 2


def _orientation(exif: bytes | None, xmp: bytes | None) -> int:
    """1 to 8 as EXIF counts them; 1, upright, where nothing else is said."""
    found = _exif_orientation(exif) if exif else None
    if found is None and xmp and (said := XMP_ORIENTATION.search(xmp)):
        found = int(said[1])
    return 1 if found is None else found


def _exif_orientation(exif: bytes) -> int | None:
    """The orientation among the tags of the first directory."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II": "little", b"MM": "big"}.get(exif[:2])
    if order is None:
        return None

    def number(place: int, num_bytes: int) -> int:
        return int.from_bytes(exif[place : place + num_bytes], order)

    first, found = number(4, 4), None
    for place in range(first + 2, first + 2 + 12 * number(first, 2), 12):
        if number(place, 2) == ORIENTATION and number(place + 2, 2) in INTEGER_TYPES and number(place + 4, 4) == 1:
            found = number(place + 8, INTEGER_TYPES[number(place + 2, 2)])
    return found
