"""Tiny configs of every row of the table of families, and inputs for them: two layers, random weights, a few thousand parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from laid_ds.models.attention import attention_layers
from laid_ds.models.load import model_class

IMAGE = 120
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "depth": 1,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": 32,
}
AUDIO = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "num_mel_bins": 8,
    "output_dim": 32,
    "downsample_hidden_size": 8,
}
TOKENS = {
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
    "video_token_id": 121,
    "video_token_index": 121,
    "vision_start_token_id": 122,
    "vision_end_token_id": 123,
    "image_start_token_id": 122,
    "image_end_token_id": 123,
    "audio_token_id": 124,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
DELTA = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
HALF_LINEAR = DELTA | {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16, "shared_expert_intermediate_size": 16}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
DEEPSTACK = VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
CLIP, SIGLIP, PIXTRAL = (VISION | {"model_type": kind} for kind in ("clip_vision_model", "siglip_vision_model", "pixtral"))


def rope(*sections: int, **more: Any) -> dict[str, Any]:
    """RoPE parameters with planes per position axis."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)} | more}


def wrapped(decoder: str, vision: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A wrapper around a decoder that has a model_type of its own."""
    return {"text_config": TEXT | {"model_type": decoder}, "vision_config": vision} | more


MROPE, GLM_ROPE, QWEN3_5_ROPE = rope(2, 1, 1), rope(1, 1, 0, partial_rotary_factor=0.5), rope(2, 1, 1, partial_rotary_factor=0.5)
GLM_EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
ERNIE_EXPERTS = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [16, 16]}
PINPOINTS = {"image_grid_pinpoints": [[28, 28]]}
LLAMA4 = {"intermediate_size_mlp": 32, "num_local_experts": 2, "no_rope_layers": [1, 0], "attention_chunk_size": 16}
GEMMA4 = (
    SLIDING
    | {"use_bidirectional_attention": "vision"}
    | {"global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128}
)
INTERNVL = VISION | {"image_size": [28, 28], "patch_size": [14, 14]}
PERCEIVER = {"hidden_size": 32, "resampler_n_latents": 2, "resampler_depth": 1, "resampler_n_heads": 2}
MOLMO2 = {name: value for name, value in VISION.items() if name not in ("image_size", "patch_size")}
MOLMO2 |= {"image_default_input_size": [28, 28], "image_num_pos": 4, "image_patch_size": 14, "num_key_value_heads": 2}
GEMMA4_VISION = VISION | {"num_key_value_heads": 2, "head_dim": 8, "pooling_kernel_size": 2, "position_embedding_size": 16}
LLAMA4_VISION = VISION | {"intermediate_size": 64, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}

CONFIGS: dict[tuple[str, str], dict[str, Any]] = {
    ("qwen2_vl", "qwen2_vl_text"): {"text_config": TEXT | MROPE, "vision_config": VISION | {"embed_dim": 16, "hidden_size": 32}},
    ("qwen2_5_vl", "qwen2_5_vl_text"): {"text_config": TEXT | MROPE, "vision_config": VISION | {"fullatt_block_indexes": [0]}},
    ("qwen3_vl", "qwen3_vl_text"): {"text_config": TEXT | MROPE, "vision_config": DEEPSTACK},
    ("qwen3_vl_moe", "qwen3_vl_moe_text"): {"text_config": TEXT | MROPE | EXPERTS, "vision_config": DEEPSTACK},
    ("qwen3_5", "qwen3_5_text"): {"text_config": TEXT | HALF_LINEAR | QWEN3_5_ROPE, "vision_config": DEEPSTACK},
    ("qwen3_5_moe", "qwen3_5_moe_text"): {"text_config": TEXT | EXPERTS | HALF_LINEAR | QWEN3_5_ROPE, "vision_config": DEEPSTACK},
    ("qwen2_5_omni_thinker", "qwen2_5_omni_text"): {
        "text_config": TEXT | MROPE,
        "vision_config": VISION | {"fullatt_block_indexes": [0]},
        "audio_config": AUDIO,
    },
    ("qwen3_omni_moe_thinker", "qwen3_omni_moe_text"): {
        "text_config": TEXT | MROPE | EXPERTS,
        "vision_config": DEEPSTACK,
        "audio_config": AUDIO,
    },
    ("internvl", "qwen2"): wrapped("qwen2", INTERNVL),
    ("internvl", "qwen3"): wrapped("qwen3", INTERNVL),
    ("llava_onevision", "qwen2"): wrapped("qwen2", SIGLIP, **PINPOINTS),
    ("llava", "llama"): wrapped("llama", CLIP),
    ("llava", "mistral"): wrapped("mistral", PIXTRAL, vision_feature_select_strategy="full", vision_feature_layer=-1),
    ("llava_next", "mistral"): wrapped("mistral", CLIP, **PINPOINTS),
    ("llava_next", "llama"): wrapped("llama", CLIP, **PINPOINTS),
    ("llava_next_video", "llama"): wrapped("llama", CLIP, **PINPOINTS),
    ("video_llava", "llama"): wrapped("llama", CLIP),
    ("vipllava", "llama"): wrapped("llama", CLIP, vision_feature_layers=[-1]),
    ("mistral3", "mistral"): wrapped("mistral", PIXTRAL),
    ("mistral3", "ministral3"): wrapped("ministral3", PIXTRAL),
    ("lighton_ocr", "qwen3"): wrapped("qwen3", PIXTRAL),
    ("smolvlm", "llama"): wrapped("llama", VISION),
    ("idefics3", "llama"): wrapped("llama", VISION),
    ("idefics2", "mistral"): wrapped("mistral", VISION, perceiver_config=PERCEIVER | {"num_key_value_heads": 1, "resampler_head_dim": 8}),
    ("gemma3", "gemma3_text"): {"text_config": TEXT | SLIDING, "vision_config": VISION, "mm_tokens_per_image": 4},
    ("gemma4", "gemma4_text"): {"text_config": TEXT | GEMMA4, "vision_config": GEMMA4_VISION},
    ("paligemma", "gemma"): wrapped("gemma", SIGLIP, projection_dim=32),
    ("glm4v", "glm4v_text"): {"text_config": TEXT | GLM_ROPE, "vision_config": VISION},
    ("glm46v", "glm4v_text"): {
        "text_config": TEXT | GLM_ROPE | {"model_type": "glm4v_text"},
        "vision_config": VISION | {"model_type": "glm4v_vision"},
    },
    ("glm4v_moe", "glm4v_moe_text"): {"text_config": TEXT | EXPERTS | GLM_EXPERTS | GLM_ROPE, "vision_config": VISION},
    ("glm_ocr", "glm_ocr_text"): {"text_config": TEXT | MROPE, "vision_config": VISION},
    ("ernie4_5_vl_moe", "ernie4_5_vl_moe_text"): {
        "text_config": TEXT | ERNIE_EXPERTS | rope(3, 3, 2) | {"head_dim": 16},
        "vision_config": VISION,
    },
    ("paddleocr_vl", "paddleocr_vl_text"): {"text_config": TEXT | MROPE, "vision_config": VISION},
    ("aya_vision", "cohere2"): {"text_config": TEXT | SLIDING | {"model_type": "cohere2"}, "vision_config": SIGLIP},
    ("llama4", "llama4_text"): {
        "text_config": TEXT | LLAMA4,
        "vision_config": LLAMA4_VISION,
    },
    ("phi4_multimodal", "phi4_multimodal"): TEXT
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}
    | {"vision_config": VISION | {"crop_size": 28, "image_token_id": IMAGE}}
    | {"audio_config": {"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2, "nemo_conv_channels": 8}},
    ("minicpmv4_6", "qwen3"): wrapped("qwen3", VISION, insert_layer_id=0),
    ("lfm2_vl", "lfm2"): {
        "text_config": TEXT | {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
        "vision_config": VISION,
    },
    ("molmo2", "molmo2_text"): {
        "text_config": TEXT | {"qk_norm_type": "qwen3"},
        "vision_config": MOLMO2,
        "adapter_config": {
            "vision_feature_layer": [0],
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "text_hidden_size": 32,
        },
        "video_token_id": IMAGE,  # an alias of image_patch_id
    },
    ("video_llama_3", "qwen2"): wrapped("qwen2", VISION),
    ("fast_vlm", "qwen2"): wrapped("qwen2", SIGLIP),
    ("got_ocr2", "qwen2"): wrapped(
        "qwen2", VISION | {"output_channels": 8, "global_attn_indexes": [0], "mlp_dim": 16, "initializer_range": 0.1}
    ),
    ("deepseek_vl", "llama"): wrapped("llama", SIGLIP),
    ("aria", "aria_text"): {
        "text_config": TEXT | {"moe_num_experts": 2, "moe_topk": 1, "moe_num_shared_experts": 1},
        "vision_config": VISION,
        "projector_patch_to_query_dict": {4: 2},
        "max_value_projector_patch_to_query_dict": 2,
    },
}


def tiny_model(model_type: str, decoder: str) -> PreTrainedModel:
    """A model of random weights in evaluation mode. What starts as ones or zeros is random too, and attention is sharp enough to matter."""
    config = AutoConfig.for_model(model_type, **(TOKENS | CONFIGS[model_type, decoder]))
    torch.manual_seed(0)
    model = model_class(config).from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, 0.2)
        elif not parameter.any():
            nn.init.normal_(parameter, 0, 0.1)
    with torch.no_grad():
        for attention in attention_layers(model).values():
            for parameter in attention.parameters():
                parameter.mul_(4 if parameter.ndim == 2 else 1)
    model.config.use_cache = False
    return model


PATCHES = {"pixel_values": (16, 3 * 2 * 14 * 14), "image_grid_thw": [[1, 4, 4]]}
SQUARE = {"pixel_values": (1, 3, 28, 28)}
SIZED = {"image_sizes": [[28, 28]]}
TILES = {"pixel_values": (1, 2, 3, 28, 28)} | SIZED
GRID = [[[x, y] for x in range(4) for y in range(4)]]
IMAGES: dict[str, tuple[int, dict[str, Any]]] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "qwen3_vl", "qwen3_vl_moe"), (4, PATCHES)),
    **dict.fromkeys(("qwen3_omni_moe_thinker", "qwen3_5", "qwen3_5_moe"), (4, PATCHES)),
    **dict.fromkeys(("glm4v", "glm46v", "glm4v_moe", "glm_ocr"), (4, PATCHES)),
    "ernie4_5_vl_moe": (4, PATCHES | {"pixel_values": (16, 3 * 14 * 14)}),
    "paddleocr_vl": (4, PATCHES | {"pixel_values": (16, 3, 14, 14)}),
    "video_llama_3": (4, PATCHES | {"pixel_values": (16, 3 * 14 * 14), "image_merge_sizes": [2]}),
    **dict.fromkeys(("llava", "video_llava", "vipllava", "deepseek_vl", "gemma3", "paligemma"), (4, SQUARE)),
    **dict.fromkeys(("internvl", "aya_vision", "got_ocr2", "llama4"), (1, SQUARE)),
    "lighton_ocr": (1, SQUARE | SIZED),
    "mistral3": (4, {"pixel_values": (1, 3, 56, 56), "image_sizes": [[56, 56]]}),
    **dict.fromkeys(("llava_onevision", "llava_next", "llava_next_video"), (10, TILES)),
    **dict.fromkeys(("smolvlm", "idefics3"), (1, {"pixel_values": (1, 1, 3, 28, 28)})),
    "idefics2": (2, {"pixel_values": (1, 1, 3, 28, 28)}),
    "phi4_multimodal": (5, SIZED | {"image_pixel_values": (1, 2, 3, 28, 28), "image_attention_mask": [[[[1.0] * 2] * 2] * 2]}),
    "minicpmv4_6": (1, {"pixel_values": (1, 3, 14, 14 * 16), "target_sizes": [[4, 4]]}),
    "aria": (2, SQUARE | {"pixel_mask": [[[True] * 28] * 28]}),
    "lfm2_vl": (1, {"pixel_values": (1, 4, 588), "spatial_shapes": [[2, 2]], "pixel_attention_mask": [[1] * 4]}),
    "molmo2": (
        2,
        {"pixel_values": (1, 4, 588), "image_token_pooling": [[0, 1], [2, 3]], "image_grids": [[1, 1, 1, 1]], "image_num_crops": [1]},
    ),
    "gemma4": (4, {"pixel_values": (1, 16, 588), "image_position_ids": GRID}),
}
"""model_type -> tokens of one image, and its tensors: a shape to fill at random, or the values; families that are not here are run on text
alone."""
TYPE_NAMES = {"gemma3": "token_type_ids", "paligemma": "token_type_ids"} | dict.fromkeys(("molmo2", "gemma4"), "mm_token_type_ids")


def inputs(model_type: str, seed: int = 0, num_tokens: int = 6) -> dict[str, Tensor]:
    """One row: text, an image where the family is run with images, text."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 100, (1, num_tokens), generator=generator)
    if model_type not in IMAGES:
        return {"input_ids": text}
    tokens, tensors = IMAGES[model_type]
    image = torch.tensor([[122] + [IMAGE] * tokens + [123]])
    before, after = text.tensor_split(2, 1)
    ids = torch.cat([before, image, after], 1)
    made = {n: torch.randn(v, generator=generator) if isinstance(v, tuple) else torch.tensor(v) for n, v in tensors.items()}
    names = [TYPE_NAMES[model_type]] if model_type in TYPE_NAMES else ["mm_token_type_ids"] if PATCHES.keys() == tensors.keys() else []
    found = {"input_ids": ids} | made | {name: (ids == IMAGE).long() for name in names}
    return found | ({"attention_mask": torch.ones_like(ids)} if "omni" in model_type else {})


def packed(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Several rows as one; pixels of some families hold a row's images in another dimension than the first."""
    tokens = dict.fromkeys(("input_ids", "mm_token_type_ids", "token_type_ids"), 1)
    nested = "image_sizes" not in rows[0] and rows[0].get("pixel_values", torch.empty(0)).ndim == 5
    along = tokens | {"pixel_values": 3 if "target_sizes" in rows[0] else 1 if nested else 0}
    return {name: torch.cat([row[name] for row in rows], along.get(name, 0)) for name in rows[0] if name != "attention_mask"}
