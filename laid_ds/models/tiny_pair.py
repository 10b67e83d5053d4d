"""A teacher and a student of a real class, small and random, with one batch for both: for trying the machinery, never for learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

VOCABULARY, IMAGE, VISION_START, VISION_END = 512, 500, 501, 502
PATCH, MERGE, GRID = 14, 2, 4  # an image of 4 x 4 patches, seen as 2 x 2 tokens
IMAGE_TOKENS = (GRID // MERGE) ** 2
SIZES = {"teacher": (128, 4, 2), "student": (64, 2, 1)}  # hidden size, query heads, key heads; both of head dim 32
LAYERS = 2


def tiny_model(who: str) -> PreTrainedModel:
    """The "teacher" or the "student": Qwen2.5-VL of two layers in float32 on the CPU, the same in every process."""
    hidden, heads, key_heads = SIZES[who]
    text = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        "initializer_range": 0.1,
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": hidden,
        "window_size": 2 * PATCH * MERGE,
    }
    vision |= {"patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2, "fullatt_block_indexes": [0]}
    tokens = {"image_token_id": IMAGE, "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
    config = AutoConfig.for_model(
        "qwen2_5_vl", text_config=text, vision_config=vision, tie_word_embeddings=False, use_cache=False, **tokens
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(who))
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    model.config.use_cache = False
    return model.eval()


def write_tiny_model(who: str, folder: Path) -> None:
    """The same as a folder, on whatever rank: `save_pretrained` writes on the first one only."""
    model = tiny_model(who)
    folder.mkdir()
    (folder / "config.json").write_text(model.config.to_json_string())
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"})


def tiny_inputs(rows: int = 2, tokens: int = 96) -> tuple[dict[str, Any], Tensor]:
    """(the model's inputs, labels [B, T] shifted by one) of `rows` rows with one random image each; the last third is the answer."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, IMAGE, (rows, tokens), generator=generator)
    ids[:, 0], ids[:, 1 : 1 + IMAGE_TOKENS], ids[:, 1 + IMAGE_TOKENS] = VISION_START, IMAGE, VISION_END
    labels = torch.full_like(ids, -100)
    labels[:, tokens * 2 // 3 : -1] = ids[:, tokens * 2 // 3 + 1 :]
    pixels = torch.randn(rows * GRID**2, 3 * 2 * PATCH**2, generator=generator)
    grid = torch.tensor([[1, GRID, GRID]] * rows)
    inputs = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": (ids == IMAGE).int()}
    return inputs, labels
