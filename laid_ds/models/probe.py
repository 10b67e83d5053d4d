"""Measures a model instead of believing a table: how its queries rotate, what the positions mean, and where a gain folds.

Every attention layer of the decoder is called again, alone, with the very arguments it got in one forward pass over a few text tokens; only
the rotation is exchanged. What comes out are the queries that the attention function sees, so no name of a submodule is needed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from laid_ds.models.attention import NAME, Listening, Tap, attention_layers, decoder
from laid_ds.models.family import family
from laid_ds.models.load import load_config, load_model
from laid_ds.models.rope_gain import apply_gain, fold, norm_style

NUM_TOKENS = 7
TOLERANCE = 1e-4  # of the largest coordinate; queries in fp32

Rotation = tuple[Tensor, Tensor] | Tensor
"""What a decoder hands to its attention layers: (cos, sin), or complex numbers."""


@dataclass(frozen=True)
class Measured:
    """What a model does."""

    layout: str
    positions: str
    gain: str
    rotary_dims: dict[int, int]
    """Layer -> coordinates of a query that rotate (0: the layer has no RoPE)."""
    axes: str
    """The position axis of each plane of the first rotating layer: t, h, w, or "" where a token has one position."""
    query_norm: str
    """How the norm that the gain folds into uses its weight: "w", "1+w", or "" where there is none."""


@torch.no_grad()
def probe(model: PreTrainedModel) -> Measured:
    """Measure a model (on the CPU or one device, not partitioned) and compare with the table.

    Raises ValueError when the family is unknown or when an expectation fails, with its name.
    """
    expected = family(model.config)
    measured = measure(model)
    wrong = [name for name in ("layout", "positions", "gain") if getattr(measured, name) != getattr(expected, name)]
    if wrong:
        told = "; ".join(f"{name} is {getattr(measured, name)!r}, expected {getattr(expected, name)!r}" for name in wrong)
        raise ValueError(
            f"{expected.model_type} with {expected.decoder} is not what the table of families says: {told}. Correct"
            " laid_ds/models/family.py if this model is right"
        )
    return measured


def probe_folder(path: str | Path) -> dict[str, Any]:
    """What `probe` finds in a model folder, and the family it agrees with. Raises ValueError too when the folder holds no whole model."""
    expected = family(load_config(path))
    measured = asdict(probe(load_model(path)))
    return {"model_type": expected.model_type, "decoder": expected.decoder, "tier": expected.tier} | measured


@torch.no_grad()
def measure(model: PreTrainedModel) -> Measured:
    """Measure a model without expecting anything. Raises ValueError for a decoder that does not rotate its queries as a RoPE does."""
    recorded = _record(model)
    layouts = {
        index: _layout(replay.queries(_turn(replay.rotation)), replay.queries(_still(replay.rotation)))
        for index, replay in recorded.layers.items()
    }
    rotating = [index for index, (_, dims) in layouts.items() if dims]
    found = sorted({layouts[index][0] for index in rotating})
    if len(found) != 1:
        raise ValueError(f"{model.config.model_type}: queries rotate in {len(found)} ways ({', '.join(found)}); one RoPE layout is needed")
    first = recorded.layers[rotating[0]]
    axes = _axes(recorded, first, *layouts[rotating[0]])
    stretches = sum(a != b for a, b in pairwise(axes)) + 1
    return Measured(
        layout=found[0],
        positions="1d" if not axes else "mrope" if stretches == len(set(axes)) else "mrope_interleaved",
        gain=_fold_place({i: (replay, layouts[i][1]) for i, replay in recorded.layers.items()}, found[0]),
        rotary_dims={index: dims for index, (_, dims) in layouts.items()},
        axes=axes,
        query_norm=norm_style(first.attention),
    )


@dataclass
class _Replay:
    """An attention layer in fp32, apart from its model, and the arguments of its call."""

    attention: nn.Module
    call: inspect.BoundArguments
    tap: Tap

    @property
    def rotation(self) -> Rotation:
        return self.call.arguments["position_embeddings"]

    def queries(self, rotation: Rotation, attention: nn.Module | None = None) -> Tensor:
        """[H, T, D]: the queries of this layer (or of a changed copy of it) under another rotation."""
        chosen = self.attention if attention is None else attention
        object.__setattr__(chosen, "_laid", Listening(0, self.tap))
        self.call.arguments |= {"self": chosen, "position_embeddings": rotation}
        with self.tap.open() as heads:
            type(chosen).forward(*self.call.args, **self.call.kwargs)
        return heads[0].query[0]


@dataclass
class _Recorded:
    """One forward pass: the calls of the attention layers, and the first call of the rotary module."""

    layers: dict[int, _Replay]
    rotary: nn.Module
    call: inspect.BoundArguments


def _record(model: PreTrainedModel) -> _Recorded:
    """Run a few text tokens and keep what the attention layers and the rotary module were called with."""
    rotary, attentions = decoder(model).rotary_emb, attention_layers(model)
    calls: dict[nn.Module, inspect.BoundArguments] = {}

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, inspect.signature(type(module).forward).bind(module, *args, **kwargs))

    with ExitStack() as stack, _evaluating(model):
        for module in (rotary, *attentions.values()):
            stack.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        model(input_ids=_text_tokens(model), use_cache=False)
    return _Recorded({index: _replay(attention, calls[attention]) for index, attention in attentions.items()}, rotary, calls[rotary])


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    try:
        yield model.eval()
    finally:
        model.train(was_training)


def _text_tokens(model: PreTrainedModel) -> Tensor:
    """[1, NUM_TOKENS] token ids that stand for no image and no end."""
    tree = model.config.to_dict() | model.config.get_text_config().to_dict()
    special = {value for name, value in tree.items() if name.endswith(("token_id", "token_index")) and isinstance(value, int)}
    ids = [number for number in range(3, 3 + NUM_TOKENS + len(special)) if number not in special][:NUM_TOKENS]
    return torch.tensor([ids], device=model.device)


def _replay(attention: nn.Module, call: inspect.BoundArguments) -> _Replay:
    if "position_embeddings" not in call.arguments:
        raise ValueError(f"{type(attention).__name__} is not handed its rotation (position_embeddings); its family cannot be probed")
    twin = copy.deepcopy(attention).float().eval()
    twin.config._attn_implementation = NAME
    for name, value in call.arguments.items():
        call.arguments[name] = _in_fp32(value)
    return _Replay(twin, call, Tap([0]))


def _in_fp32(value: Any) -> Any:
    """Floating tensors in fp32, inside tuples and dictionaries too; everything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.float()
    if isinstance(value, tuple):
        return tuple(_in_fp32(part) for part in value)
    return {name: _in_fp32(part) for name, part in value.items()} if type(value) is dict else value


def _by_angle(rotation: Rotation, angle: Tensor) -> Rotation:
    """The rotation with other angles; its length (which some RoPE variants scale) stays."""
    if isinstance(rotation, Tensor):
        return torch.polar(rotation.abs(), angle)
    length = torch.hypot(*rotation)
    return length * angle.cos(), length * angle.sin()


def _still(rotation: Rotation) -> Rotation:
    """No rotation at all."""
    return _by_angle(rotation, torch.zeros_like(_angle(rotation)))


def _turn(rotation: Rotation) -> Rotation:
    """Every angle that is not 0 made large, so that the slowest planes of a long-context model are seen to turn within a few tokens."""
    return _by_angle(rotation, _angle(rotation).abs().pow(0.1))


def _angle(rotation: Rotation) -> Tensor:
    return rotation.angle() if isinstance(rotation, Tensor) else torch.atan2(rotation[1], rotation[0])


def _planes(query: Tensor, layout: str, dims: int) -> Tensor:
    """query [..., D] -> the two coordinates of each of the dims / 2 planes, [..., P, 2]."""
    rotating = query[..., :dims]
    return rotating.unflatten(-1, (2, -1)).transpose(-1, -2) if layout == "half" else rotating.unflatten(-1, (-1, 2))


def _same(a: Tensor, b: Tensor) -> bool:
    return (a - b).abs().max().item() <= TOLERANCE * max(a.abs().max().item(), b.abs().max().item()) if a.numel() else True


def _layout(turned: Tensor, still: Tensor) -> tuple[str, int]:
    """The fewest coordinates, and their pairing, such that pairs keep their lengths and the others do not change. ("", 0): no RoPE."""
    if _same(turned, still):
        return "", 0
    for dims in range(2, still.shape[-1] + 1, 2):
        for layout in ("half", "interleaved"):
            lengths = [_planes(query, layout, dims).norm(dim=-1) for query in (turned, still)]
            if _same(turned[..., dims:], still[..., dims:]) and _same(*lengths):
                return layout, dims
    raise ValueError("queries change with their position, but not by a rotation of pairs of coordinates; this is no RoPE we know")


def _axes(recorded: _Recorded, replay: _Replay, layout: str, dims: int) -> str:
    """The letter of the axis that turns each plane, or "" where the rotary module knows only one position per token."""
    still = _planes(replay.queries(_still(replay.rotation)), layout, dims)
    letters = ["-"] * (dims // 2)
    for axis, letter in enumerate("thw"):
        positions = torch.zeros(3, 1, NUM_TOKENS, dtype=torch.long, device=still.device)
        positions[axis] = torch.arange(NUM_TOKENS, device=still.device)
        recorded.call.arguments["position_ids"] = positions
        rotation = _in_fp32(recorded.rotary.forward(*recorded.call.args[1:], **recorded.call.kwargs))
        if _angle(rotation).ndim != _angle(replay.rotation).ndim:
            return ""
        turned = _planes(replay.queries(_turn(rotation)), layout, dims)
        for plane in range(dims // 2):
            if not _same(turned[..., plane, :], still[..., plane, :]):
                letters[plane] = letter
    return "".join(letters)


def _fold_place(layers: dict[int, tuple[_Replay, int]], layout: str) -> str:
    """ "head" or "layer" if a folded gain does in every layer what the gain does, else "none"."""
    for place in ("head", "layer"):
        if all(_folds(replay, place, dims, layout) for replay, dims in layers.values()):
            return place
    return "none"


def _folds(replay: _Replay, place: str, dims: int, layout: str) -> bool:
    """Whether queries of a folded copy equal queries times the gain."""
    rotation = _turn(replay.rotation)
    queries = replay.queries(rotation)
    heads, _, head_dim = queries.shape
    rows, planes = heads if place == "head" else 1, (dims or head_dim) // 2
    theta = torch.linspace(-1, 1, rows * planes, device=queries.device).view(rows, planes)
    folded = copy.deepcopy(replay.attention)
    try:
        fold(folded, theta, layout)
    except ValueError:  # fold says that this place does not hold it, which is the answer
        return False
    return _same(replay.queries(rotation, folded), apply_gain(queries[None], theta, layout)[0])
