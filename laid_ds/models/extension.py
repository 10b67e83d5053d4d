"""Longer windows without training, as baselines: YaRN changes a folder's config, SelfExtend changes how a loaded model attends.

Letters: B batch, T query tokens, S key tokens, H query heads, K key-value heads, D head dim, P rotary planes.
"""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from laid_ds.disk import whole_folder
from laid_ds.models.attention import decoder, listen
from laid_ds.models.family import family
from laid_ds.models.load import load_config

ROWS_PER_CHUNK = 256  # SelfExtend holds [B, H, rows, S] scores


def yarn(config: PretrainedConfig, factor: float) -> PretrainedConfig:
    """A copy of a model's config whose decoder stretches its positions by `factor` as YaRN does; M-RoPE sections are kept.

    Raises ValueError for a factor that is not above 1 and for a decoder whose RoPE is not the default one.
    """
    if not 1 < factor < math.inf:
        raise ValueError(f"a YaRN factor of {factor} stretches nothing; give a number above 1")
    stretched = copy.deepcopy(config)
    text = stretched.get_text_config()
    found = getattr(text, "rope_parameters", None) or {}
    if found.get("rope_type") != "default":
        raise ValueError(f"YaRN starts from the default RoPE; the decoder of this {config.model_type} has rope_parameters={found}")
    window = text.max_position_embeddings
    text.rope_parameters = found | {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": window}
    text.max_position_embeddings = int(window * factor)
    return stretched


def write_yarn(stock: str | Path, output: str | Path, factor: float) -> None:
    """Copy a model folder with YaRN in its config; the weights stay as they are. Raises ValueError when `output` exists, when the
    disk has no room for it, and as `yarn`."""
    output = Path(output)
    if output.exists():
        raise ValueError(f"{output} exists; choose another folder or remove it")
    config = yarn(load_config(stock), factor)
    num_bytes = sum(path.stat().st_size for path in Path(stock).rglob("*") if path.is_file())
    with whole_folder(output, f"the model {output.name}", num_bytes) as partial:
        shutil.copytree(stock, partial)
        config.save_pretrained(partial)


def self_extend(model: PreTrainedModel, group: int, window: int) -> None:
    """Put the model's decoder on SelfExtend, for prefill and for decoding with a cache.

    Keys nearer than `window` tokens are seen as ever; farther ones at positions divided by `group`, on every axis of the positions.
    Raises ValueError for numbers that make no sense and for a decoder that rotates other than by one (cos, sin) in all layers.
    """
    if group < 1 or window < 1:
        raise ValueError(f"SelfExtend needs a group and a window of at least 1, got group={group}, window={window}")
    rotary = decoder(model).rotary_emb
    if not hasattr(rotary, "inv_freq") or model.config.get_text_config().model_type in ("cohere2", "llama4_text"):
        raise ValueError(
            f"{model.config.model_type} does not rotate all its layers by one (cos, sin); SelfExtend is not defined for it here"
        )
    attend = SelfExtend(rotary, family(model.config).layout, group, window)
    rotary.register_forward_pre_hook(attend.hear, with_kwargs=True)
    listen(model, attend=attend)


class SelfExtend:
    """Attention with grouped positions for far keys. Keeps the positions of all keys, which a cache holds rotated."""

    def __init__(self, rotary: nn.Module, layout: str, group: int, window: int):
        self.rotary, self.layout, self.group, self.window = rotary, layout, group, window
        self.new: Tensor | None = None
        self.positions: Tensor | None = None

    def hear(self, rotary: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each forward pass of the decoder: the positions [..., B, T] of its tokens."""
        self.new = kwargs["position_ids"] if "position_ids" in kwargs else args[1]

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """query [B, H, T, D], key and value [B, K, S, D], mask [B, 1, T, S] bool or None (causal) -> [B, T, H, D]."""
        self._extend_positions(query.shape[2], key.shape[2])
        seen = self.positions[..., -key.shape[2] :]  # a layer with a sliding window has forgotten the others
        far_key = self._turn(key, seen // self.group - seen)
        shift = self.window - self.window // self.group
        own = seen[..., -query.shape[2] :]
        far_query = self._turn(query, own // self.group + shift - own)
        heads = query.shape[1] // key.shape[1]
        keys, far_keys, values = (tensor.repeat_interleave(heads, 1) for tensor in (key, far_key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = [
            self._rows(start, query, far_query, keys, far_keys, values, attention_mask, scale)
            for start in range(0, query.shape[2], ROWS_PER_CHUNK)
        ]
        return torch.cat(out, 2).transpose(1, 2), None

    def _rows(
        self,
        start: int,
        query: Tensor,
        far_query: Tensor,
        key: Tensor,
        far_key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        """[B, H, rows, D] for the rows from `start`."""
        part = slice(start, start + ROWS_PER_CHUNK)
        near, far = query[:, :, part] @ key.mT, far_query[:, :, part] @ far_key.mT
        tokens, rows = key.shape[2], near.shape[2]
        index = torch.arange(tokens, device=query.device)
        distance = (index[tokens - query.shape[2] :][part, None] - index)[:rows]
        visible = distance >= 0 if attention_mask is None else attention_mask[:, :, part]
        scores = torch.where(distance < self.window, near, far).float() * scale
        return scores.masked_fill(~visible, torch.finfo(torch.float32).min).softmax(-1).to(value.dtype) @ value

    def _extend_positions(self, num_queries: int, num_keys: int) -> None:
        """All layers of a pass come here; the first one takes the new positions in."""
        if self.new is not None:
            begins = num_queries == num_keys and (num_queries > 1 or self.positions is None)
            self.positions = self.new if begins or self.positions is None else torch.cat([self.positions, self.new], -1)
            self.new = None
        if num_keys > self.positions.shape[-1]:
            raise ValueError(f"the cache holds {num_keys - num_queries} keys that SelfExtend has not seen; prefill with it too")

    def _turn(self, x: Tensor, by: Tensor) -> Tensor:
        """x [B, heads, tokens, D], rotated already, turned on by `by` [..., B, tokens] positions; lengths stay as they are."""
        cos, sin = self.rotary.forward(x.float(), by)
        planes = cos.shape[-1] // 2
        twice = torch.equal(cos[..., :planes], cos[..., planes:]) and torch.equal(sin[..., :planes], sin[..., planes:])
        cos, sin = ((t[..., :planes] if twice else t[..., ::2])[:, None] / self.rotary.attention_scaling for t in (cos, sin))
        turning, still = x.float().split([2 * planes, x.shape[-1] - 2 * planes], -1)
        a, b = turning.chunk(2, -1) if self.layout == "half" else (turning[..., ::2], turning[..., 1::2])
        pair = (a * cos - b * sin, b * cos + a * sin)
        turned = torch.cat(pair, -1) if self.layout == "half" else torch.stack(pair, -1).flatten(-2)
        return torch.cat([turned, still], -1).to(x.dtype)
