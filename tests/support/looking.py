"""A model of the small world with a head that is known to look at images: alike at all that it sees, and at nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from laid_ds.data.batch import collate
from laid_ds.data.dataset import Dataset
from laid_ds.data.images import Pixels
from laid_ds.models.processor import Renderer, load_processor
from tests.support.world import World

SLOW = 7  # of the 8 planes of a head's 16 dims, that which RoPE turns least: 3e-4 a token
STRONG = 100.0


@torch.no_grad()
def looking(world: World, who: str, layer: int, head: int, folder: Path) -> Path:
    """A copy of the model in which this head's query is one vector, and its key tells an image's token from a text's: its attention is
    1 / (images seen so far) on each. An image is one token in the small world."""
    model = world.load(who).eval()
    renderer, dataset = Renderer(load_processor(world.teacher), Pixels()), Dataset.open(world.shards)
    attention, seen = model.model.language_model.layers[layer].self_attn, []
    attention.k_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    targets = []
    for i in range(len(dataset)):
        row = renderer(dataset.read(i))
        model.model(**collate([row], ["k"], 0).inputs, use_cache=False)
        targets.append(torch.where(row.shows >= 0, 1.0, -1.0))
    hidden, target = torch.cat(seen), torch.cat(targets)
    ones = torch.cat([hidden, torch.ones(len(hidden), 1)], 1)
    weight = torch.where(target > 0, 1 / (target > 0).sum(), 1 / (target < 0).sum()).sqrt()[:, None].double()  # images are few
    fitted = torch.linalg.lstsq(ones.double() * weight, target.double()[:, None] * weight, driver="gelsd").solution[:, 0].float()
    width = attention.head_dim
    key_row = head // attention.num_key_value_groups * width + SLOW
    attention.k_proj.weight[key_row], attention.k_proj.bias[key_row] = fitted[:-1], fitted[-1]
    attention.k_proj.weight[key_row + width // 2], attention.k_proj.bias[key_row + width // 2] = 0, 0
    own = slice(head * width, (head + 1) * width)
    attention.q_proj.weight[own], attention.q_proj.bias[own] = 0, 0
    attention.q_proj.bias[head * width + SLOW] = STRONG
    shutil.copytree(world.folder / who, folder)
    model.save_pretrained(folder)
    return folder
