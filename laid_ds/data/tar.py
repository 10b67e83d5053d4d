"""The bytes of a shard: tar members that check themselves, and the samples that they make. Nothing here opens a file."""

from isal.isal_zlib import crc32 as crc32_of  # zlib's numbers, about ten times faster

from laid_ds.data.record import MAX_JSON_BYTES, DataError, Record, Sample, encode_record

BLOCK = 512
END_OF_ARCHIVE = bytes(2 * BLOCK)
MAGIC = b"ustar\x0000crc32-"  # in each header that this project writes
MAGIC_PLACE = 257
MAX_SAMPLE_BYTES = (1 << 31) - (1 << 20)  # one pread


def tar_header(name: str, num_bytes: int, crc32: int) -> bytes:
    """The one header this project writes for a member. The owner's name carries the data's crc32, so a shard checks itself."""
    header = bytearray(BLOCK)
    fields = {
        0: name.encode("ascii"),
        100: b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % num_bytes + b"00000000000\0" + b" " * 8 + b"0",
        MAGIC_PLACE: MAGIC + b"%08x" % crc32,
        329: b"0000000\0" * 2,
    }
    for place, value in fields.items():
        header[place : place + len(value)] = value
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def parse_tar_header(header: bytes) -> tuple[str, int, int]:
    """(name, size, crc32) of a member; any byte that `tar_header` would not have written is a `DataError`."""
    try:
        name = header[:100].rstrip(b"\0").decode("ascii")
        num_bytes, crc32 = int(header[124:135], 8), int(header[271:279], 16)
    except ValueError:
        raise DataError("tar header is damaged or not written by this project") from None
    if tar_header(name, num_bytes, crc32) != header:
        raise DataError("tar header is damaged or not written by this project")
    return name, num_bytes, crc32


def begins_as_ours(head: bytes) -> bool:
    """Whether a file whose first bytes these are begins with a header of this project, damaged or not."""
    return head[MAGIC_PLACE : MAGIC_PLACE + len(MAGIC)] == MAGIC


def begins_as_of_others(head: bytes) -> bool:
    """Whether a file begins as an archive that another program wrote: compressed, or with a tar header whose checksum holds."""
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")):
        return True
    text = head[148:156].strip(b" \0")
    if len(head) < BLOCK or begins_as_ours(head) or not text or text.strip(b"01234567"):
        return False
    return int(text, 8) == sum(head[:148]) + sum(head[156:BLOCK]) + 8 * ord(" ")


def padding(num_bytes: int) -> int:
    """Bytes from the end of a member's data to the next block."""
    return -num_bytes % BLOCK


def pack_sample(sample: Sample, record: Record) -> bytes:
    """The tar members of a sample: the JSON first, then the images in order."""
    text = encode_record(record, sample.key)
    members = [(f"{sample.key}.json", text, crc32_of(text))]
    for index, (image, info) in enumerate(zip(sample.images, record.images, strict=True)):
        members.append((f"{sample.key}.{index:03d}.{info.fmt}", image, info.crc32))
    pieces = []
    for name, data, crc32 in members:
        pieces += [tar_header(name, len(data), crc32), data, bytes(padding(len(data)))]
    packed = b"".join(pieces)
    if len(text) > MAX_JSON_BYTES or len(packed) > MAX_SAMPLE_BYTES:
        raise DataError(f"sample of {len(packed)} bytes; the limit is {MAX_SAMPLE_BYTES}", key=sample.key)
    return packed


def split_sample(packed: bytes) -> list[memoryview]:
    """Member data of a packed sample whose checksum held, JSON first. Views, no copies."""
    view, parts, place, end = memoryview(packed), [], 0, len(packed)
    while place < end:
        start = place + BLOCK
        num_bytes = int(packed[place + 124 : place + 135], 8)
        place = start + num_bytes + -num_bytes % BLOCK
        parts.append(view[start : start + num_bytes])
    return parts
