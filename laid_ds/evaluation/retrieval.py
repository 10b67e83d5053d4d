"""Which layers and heads of a model look at the needle: what a recipe's `align.pairs` should be chosen from.

The paper compares last layers. A pretrained decoder retrieves elsewhere (docs/choosing.md), so it is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laid_ds.data.dataset import Dataset
from laid_ds.data.images import Pixels
from laid_ds.evaluation.haystack import read_haystacks
from laid_ds.evaluation.heads import CLEAR, retrieving_heads
from laid_ds.evaluation.spectra import check_needles, needle_profile
from laid_ds.models.attention import attention_shape
from laid_ds.models.load import load_config, load_model
from laid_ds.models.processor import Renderer, load_processor


@dataclass(frozen=True)
class Retrieval:
    """Attention of a model's answering rows on their needle."""

    size: int
    """Images in each haystack."""
    haystacks: int
    mass: dict[int, list[float]]
    """Decoder layer -> mean share of attention on the needle's tokens, one number per query head."""

    def heads(self) -> list[tuple[int, int, float]]:
        """(layer, head, mass) of the heads that retrieve, most first (evaluation/heads.py)."""
        return retrieving_heads(self.mass)

    def pairs(self, student_layers: int) -> list[tuple[int, int]]:
        """(student layer, teacher layer), ascending, for the layers with a head that retrieves: the student's at the same share of its
        depth, round((t + 1) L_s / L_t) - 1 (ours). Of several teacher layers for one student layer, that with the most mass."""
        teacher_layers, chosen = max(self.mass) + 1, {}
        for layer, _, _ in self.heads():
            chosen.setdefault(max(0, round((layer + 1) * student_layers / teacher_layers) - 1), layer)
        return sorted(chosen.items())

    def couples(self, pairs: list[tuple[int, int]], student_heads: int) -> list[list[tuple[int, int]]]:
        """For each of `pairs` (student head, teacher head) of the teacher layer's heads that retrieve, most first: the student's head at
        the same share of its heads, floor(j H_s / H_t), or the next that is still free (ours). At most H_s of them."""
        found = []
        for _, layer in pairs:
            retrieving, taken = [head for of, head, _ in self.heads() if of == layer][:student_heads], []
            for head in retrieving:
                start = head * student_heads // len(self.mass[layer])
                taken.append(next(i % student_heads for i in range(start, start + student_heads) if i % student_heads not in taken))
            found.append(list(zip(taken, retrieving, strict=True)))
        return found

    def as_json(self) -> dict[str, Any]:
        heads = [{"layer": layer, "head": head, "mass": mass} for layer, head, mass in self.heads()]
        return {"images": self.size, "haystacks": self.haystacks, "retrieving": heads, "mass": {str(k): v for k, v in self.mass.items()}}

    def as_text(self) -> str:
        """A line per layer with its strongest heads; those that retrieve are starred."""
        retrieving = {(layer, head) for layer, head, _ in self.heads()}
        lines = [f"attention on the needle among {self.size} images, {self.haystacks} haystacks", "layer  head: mass, strongest first"]
        for layer, shares in sorted(self.mass.items()):
            best = sorted(range(len(shares)), key=lambda head: -shares[head])[:4]
            said = "  ".join(f"{head}: {shares[head]:.3f}{'*' if (layer, head) in retrieving else ' '}" for head in best)
            lines.append(f"{layer:>5}  {said}".rstrip())
        if not retrieving:
            lines.append(f"no head has {CLEAR:g} of its attention on the needle: the model does not retrieve at this size; try fewer")
        return "\n".join(lines)


def measure(model: Path, shards: Path, size: int, haystacks: int, dtype: str) -> Retrieval:
    """Look at the first haystacks of a set, drawn as `laid eval` draws them. Streams: no attention map is held.

    Raises ValueError where the folder is no model, where the set has fewer haystacks, cannot show this many images, or records no needles.
    """
    load_config(model)
    dataset = Dataset.open(shards)
    read_haystacks(dataset, haystacks)
    check_needles(dataset, haystacks)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded, renderer = load_model(model, dtype).to(device).eval(), Renderer(load_processor(model), Pixels())
    profile = needle_profile(loaded, renderer, dataset, size, haystacks)
    return Retrieval(size, haystacks, {int(layer): found["marked_mass"] for layer, found in profile.items()})


def depth_and_heads(model: Path) -> tuple[int, int]:
    """Layers and query heads of the decoder of a model folder, from its config."""
    config = load_config(model)
    return config.get_text_config().num_hidden_layers, attention_shape(config)[0]
