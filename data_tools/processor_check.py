"""Whether a model's processor can take a sample: asked of the processor itself, before a run meets the sample."""

from collections.abc import Callable
from pathlib import Path
from threading import Lock

from laid_ds.data.images import Pixels
from laid_ds.data.record import DataError, Sample, describe

Check = Callable[[Sample], None]


def check_with(folder: Path) -> Check:
    """A check that makes tensors of a sample as a run would; it raises DataError for one that this model folder's processor refuses."""
    from laid_ds.models.processor import Renderer, load_processor  # transformers takes seconds to import

    renderer, lock = Renderer(load_processor(folder), Pixels(), cache_bytes=0), Lock()

    def check(sample: Sample) -> None:
        with lock:
            for index, image in enumerate(sample.images):
                info = describe(image)
                _ask(renderer.image_length, info.width, info.height, name=f"image {index} of {info.width} x {info.height} pixels")
            _ask(renderer, sample, name="the sample")

    def _ask(render: Callable, *what, name: str) -> None:
        try:
            render(*what)
        except Exception as error:  # whatever a processor of any family raises, it is this sample that it cannot take
            said = str(error) or type(error).__name__
            raise DataError(f"{name} is refused by the processor of {folder}: {said}") from None

    return check
