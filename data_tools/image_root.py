"""Images under one root, read by name. All of it is untrusted."""

from pathlib import Path

from laid_ds.data.images import check_limits
from laid_ds.data.record import DataError, describe

MAX_IMAGE_BYTES = 128 << 20


class ImageRoot:
    """Reads images under one folder; no name leads out of it."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        if not self.folder.is_dir():
            raise DataError(f"image root {folder} is no folder")

    def read(self, name: str) -> bytes:
        """The bytes of an image, which must have a known format and legal size."""
        path = self._path(name)
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise DataError(f"image {name!r} has {path.stat().st_size} bytes; the limit is {MAX_IMAGE_BYTES}")
        data = path.read_bytes()
        try:
            info = describe(data)
            check_limits(info.width, info.height)
        except DataError as error:
            raise DataError(f"image {name!r}: {error.reason}") from None
        return data

    def _path(self, name: str) -> Path:
        if "://" in name:
            raise DataError(f"image {name[:200]!r} is a URL; fetch it into the image root and name the file")
        try:
            path = (self.folder / name).resolve()
            inside = path.is_relative_to(self.folder) and path.is_file()
        except (ValueError, OSError, RuntimeError) as error:  # a null character, a name too long, a loop of links
            raise DataError(f"image name {name[:200]!r}: {error}") from None
        if not path.is_relative_to(self.folder):
            raise DataError(f"image name {name[:200]!r} leads out of the image root")
        if not inside:
            raise DataError(f"image {name[:200]!r} is not in {self.folder}")
        return path


def read_all(names: list[str], root: ImageRoot) -> tuple[bytes, ...]:
    """The bytes of several images."""
    return tuple(root.read(name) for name in names)
