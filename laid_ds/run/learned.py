"""What is learned beside the student's weights, kept for the report: mixtures and gains as they are when a checkpoint is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from laid_ds.method.align import Align
from laid_ds.models.rope_gain import gain
from laid_ds.runtime import checkpoint, distributed, engine

FILE = "learned.json"


def write_learned(align: Align, output: Path, step: int) -> None:
    """Replace learned.json in a run's folder. Collective, since ZeRO-3 may have sharded the parameters."""
    with engine.whole(list(align.parameters())):
        found = learned(align)
    if distributed.rank() == 0:
        checkpoint.write_durably(output / FILE, json.dumps({"step": step} | found))


def learned(align: Align) -> dict[str, Any]:
    """ "pairs" of (student, teacher) layers; student layer -> "mixing" [H_s, H_t], "key_mixing" [K_s, K_t] (separate mixing alone) and
    "gain" g [H or 1, P]: weights and factors as they act, to four digits."""
    mixing = {layer: align.weights(int(layer)) for layer in (*align.mixing, *align.kept)}
    parts = {"mixing": {}, "key_mixing": {}, "gain": {layer: gain(theta) for layer, theta in align.gain.items()}}
    for layer, weights in mixing.items():
        both = weights if isinstance(weights, tuple) else (weights,)
        parts |= {name: parts[name] | {layer: own} for name, own in zip(("mixing", "key_mixing"), both, strict=False)}
    return {"pairs": align.pairs} | {name: {layer: _numbers(own) for layer, own in found.items()} for name, found in parts.items()}


def _numbers(tensor: Tensor) -> list[list[float]]:
    return [[float(f"{value:.4g}") for value in row] for row in tensor.detach().float().tolist()]
