"""Which layers and heads of a model look at the needle: what a recipe's `align.pairs` and `align.heads` should be chosen from.

The paper compares last layers. A pretrained decoder retrieves elsewhere (docs/choosing.md), so it is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laid_ds.data.dataset import Dataset
from laid_ds.data.images import Pixels
from laid_ds.evaluation.haystack import number_of, read_haystacks, survey
from laid_ds.evaluation.heads import CLEAR, MORE, Looks, as_tree
from laid_ds.evaluation.spectra import check_needles, needle_profile
from laid_ds.models.attention import attention_shape
from laid_ds.models.identity import model_marks, read_whole
from laid_ds.models.image_pixels import OPTION, Limits, limit_pixels
from laid_ds.models.load import load_config, load_model
from laid_ds.models.numbering import numbers_images
from laid_ds.models.processor import Renderer, load_processor

NUM_HAYSTACKS = 32


@dataclass(frozen=True)
class Retrieval:
    """Attention of a model's answering rows on their needle, and by how far the needle lies behind."""

    looks: Looks
    bins: list[int]
    """Lower edges of distances in tokens, from the answering row to the needle's last token."""
    haystacks_at: list[int]
    """How many of the haystacks have their needle there."""
    mass_at: dict[int, list[list[float]]]
    """Decoder layer -> mean share of attention on the needle [H][bins]; 0 where no haystack has one."""

    def by_distance(self, layer: int, head: int) -> list[dict[str, Any]]:
        """Of one head, where haystacks have their needle."""
        there = zip(self.bins, self.haystacks_at, self.mass_at[layer][head], strict=True)
        return [{"from_distance": edge, "haystacks": number, "mass": mass} for edge, number, mass in there if number]

    def as_json(self) -> dict[str, Any]:
        heads = [
            {"layer": layer, "head": head, "mass": mass, "by_distance": self.by_distance(layer, head)}
            for layer, head, mass in self.looks.heads()
        ]
        return as_tree(self.looks) | {"retrieving": heads}

    def as_text(self) -> str:
        """A line per layer with its strongest heads, those that retrieve starred; and of these a line each by the needle's distance."""
        looks, found = self.looks, self.looks.heads()
        retrieving = {(layer, head) for layer, head, _ in found}
        lines = [
            f"{looks.path}: attention on the needle in {looks.haystacks} haystacks of {looks.images}; a head that looks everywhere alike"
            f" has {looks.flat:.3f}",
            "layer  head: mass, strongest first",
        ]
        for layer, shares in sorted(looks.mass.items()):
            best = sorted(range(len(shares)), key=lambda head: -shares[head])[:4]
            said = "  ".join(f"{head}: {shares[head]:.3f}{'*' if (layer, head) in retrieving else ' '}" for head in best)
            lines.append(f"{layer:>5}  {said}".rstrip())
        if not retrieving:
            least = max(CLEAR, MORE * looks.flat)
            said = f"no head has {least:.2g} of its attention on the needle: the model does not retrieve at this size; try fewer --images"
            return "\n".join([*lines, said])
        there = [n for n, number in enumerate(self.haystacks_at) if number]
        edges = "".join(f"{self.bins[n]:>8}" for n in there)
        lines += ["by the needle's distance in tokens, from", f"  layer.head{edges}"]
        for layer, head, _ in found:
            masses = "".join(f"{self.mass_at[layer][head][n]:>8.3f}" for n in there)
            lines.append(f"{f'{layer}.{head}':>12}{masses}")
        return "\n".join([*lines, f"{'haystacks':>12}" + "".join(f"{self.haystacks_at[n]:>8}" for n in there)])


def measure(model: Path, shards: Path, size: int, haystacks: int | None, dtype: str, image_pixels: Limits | None = None) -> Retrieval:
    """Look at the first haystacks of a set, drawn as `laid eval` draws them, pictures within `image_pixels` (None: as the folder says).
    Streams: no attention map is held. haystacks: None for 32, or all of a smaller set.

    Raises ValueError where the folder is no model, where the set has fewer haystacks, cannot show this many images, or records no needles,
    and where the family cannot keep the limits.
    """
    config, dataset = load_config(model), Dataset.open(shards)
    haystacks = number_of(dataset, haystacks, NUM_HAYSTACKS)
    read_haystacks(dataset, haystacks)
    check_needles(dataset, haystacks, "`laid probe`")
    processor = limit_pixels(load_processor(model), image_pixels, OPTION)
    renderer = Renderer(processor, Pixels(), number_images=numbers_images(model))
    files = read_whole(model, model_marks(model))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_model(model, dtype).to(device).eval()
    profile = {int(layer): found for layer, found in needle_profile(loaded, renderer, dataset, size, haystacks).items()}
    any_layer = next(iter(profile.values()))
    looks = Looks(
        path=str(model),
        files=files,
        layers=config.get_text_config().num_hidden_layers,
        images=size,
        haystacks=haystacks,
        flat=any_layer["flat_mass"],
        mass={layer: found["marked_mass"] for layer, found in profile.items()},
        key_heads={layer: attention_shape(config, layer)[1] for layer in profile},
    )
    by_distance = {layer: found["needle_mass"] for layer, found in profile.items()}
    return Retrieval(looks, any_layer["bins"], any_layer["needle_rows"], by_distance)


def measure_student(
    model: Path, shards: Path, size: int, haystacks: int | None, dtype: str, image_pixels: Limits | None = None
) -> Retrieval:
    """`measure`, of a model with a shorter window: where no head retrieves among `size` images, among half as many, and so on down to the
    fewest that the haystacks allow, and at least 2; the first size at which some head does, else `size`."""
    sizes = [size >> n for n in range(size.bit_length()) if size >> n >= 2] or [size]
    first, dataset = None, Dataset.open(shards)
    for asked in survey(dataset, number_of(dataset, haystacks, NUM_HAYSTACKS), sizes, scored=False).sizes:
        found = measure(model, shards, asked, haystacks, dtype, image_pixels)
        if found.looks.heads():
            return found
        first = first or found
    assert first is not None
    return first
