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
LLAMA4 = {"intermediate_size_mlp": 32, "num_local_experts": 2, "no_rope_layers": [1, 0], "attention_chunk_size": 16}
GEMMA4 = SLIDING | {"global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128}
INTERNVL = VISION | {"image_size": [28, 28], "patch_size": [14, 14]}
PERCEIVER = {"hidden_size": 32, "resampler_n_latents": 2, "resampler_depth": 1, "resampler_n_heads": 2}
MOLMO2 = {name: value for name, value in VISION.items() if name != "image_size"}

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
    ("llava_onevision", "qwen2"): wrapped("qwen2", SIGLIP),
    ("llava", "llama"): wrapped("llama", CLIP),
    ("llava", "mistral"): wrapped("mistral", PIXTRAL, vision_feature_select_strategy="full", vision_feature_layer=-1),
    ("llava_next", "mistral"): wrapped("mistral", CLIP),
    ("llava_next", "llama"): wrapped("llama", CLIP),
    ("llava_next_video", "llama"): wrapped("llama", CLIP),
    ("video_llava", "llama"): wrapped("llama", CLIP),
    ("vipllava", "llama"): wrapped("llama", CLIP),
    ("mistral3", "mistral"): wrapped("mistral", PIXTRAL),
    ("mistral3", "ministral3"): wrapped("ministral3", PIXTRAL),
    ("lighton_ocr", "qwen3"): wrapped("qwen3", PIXTRAL),
    ("smolvlm", "llama"): wrapped("llama", VISION),
    ("idefics3", "llama"): wrapped("llama", VISION),
    ("idefics2", "mistral"): wrapped("mistral", VISION, perceiver_config=PERCEIVER | {"num_key_value_heads": 1, "resampler_head_dim": 8}),
    ("gemma3", "gemma3_text"): {"text_config": TEXT | SLIDING, "vision_config": VISION, "mm_tokens_per_image": 4},
    ("gemma4", "gemma4_text"): {"text_config": TEXT | GEMMA4, "vision_config": VISION},
    ("paligemma", "gemma"): wrapped("gemma", SIGLIP | {"projection_dim": 32}),
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
        "vision_config": VISION | {"vision_output_dim": 32, "projector_input_dim": 16, "projector_output_dim": 32},
    },
    ("phi4_multimodal", "phi4_multimodal"): TEXT
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}
    | {"vision_config": VISION | {"crop_size": 28}}
    | {"audio_config": {"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2, "nemo_conv_channels": 8}},
    ("minicpmv4_6", "qwen3"): wrapped("qwen3", VISION),
    ("lfm2_vl", "lfm2"): {
        "text_config": TEXT | {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
        "vision_config": VISION,
    },
    ("molmo2", "molmo2_text"): {
        "text_config": TEXT | {"qk_norm_type": "qwen3"},
        "vision_config": MOLMO2,
        "adapter_config": {"vision_feature_layer": [0], "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2},
    },
    ("video_llama_3", "qwen2"): wrapped("qwen2", VISION),
    ("fast_vlm", "qwen2"): wrapped("qwen2", SIGLIP),
    ("got_ocr2", "qwen2"): wrapped("qwen2", VISION | {"output_channels": 8, "global_attn_indexes": [0], "mlp_dim": 16}),
    ("deepseek_vl", "llama"): wrapped("llama", SIGLIP),
    ("aria", "aria_text"): {
        "text_config": TEXT | {"moe_num_experts": 2, "moe_topk": 1, "moe_num_shared_experts": 1},
        "vision_config": VISION,
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


IMAGES: dict[str, tuple[int, tuple[int, ...]]] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "qwen3_vl", "qwen3_vl_moe"), (4, (16, 3 * 2 * 14 * 14))),
    **dict.fromkeys(("qwen3_omni_moe_thinker", "qwen3_5", "qwen3_5_moe"), (4, (16, 3 * 2 * 14 * 14))),
    **dict.fromkeys(("glm4v", "glm46v", "glm4v_moe", "glm_ocr"), (4, (16, 3 * 2 * 14 * 14))),
    "ernie4_5_vl_moe": (4, (16, 3 * 14 * 14)),
    "paddleocr_vl": (4, (16, 3, 14, 14)),
    **dict.fromkeys(("llava", "video_llava", "deepseek_vl", "gemma3"), (4, (1, 3, 28, 28))),
    **dict.fromkeys(("internvl", "aya_vision", "lighton_ocr"), (1, (1, 3, 28, 28))),
    **dict.fromkeys(("smolvlm", "idefics3"), (1, (1, 1, 3, 28, 28))),
    "idefics2": (2, (1, 1, 3, 28, 28)),
}
"""model_type -> tokens of one image, and the shape of its pixels; families that are not here are run on text alone."""


def inputs(model_type: str, seed: int = 0, num_tokens: int = 6) -> dict[str, Tensor]:
    """One row: text, an image where the family is run with images, text."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 100, (1, num_tokens), generator=generator)
    if model_type not in IMAGES:
        return {"input_ids": text} | ({"mm_token_type_ids": torch.zeros_like(text)} if model_type == "molmo2" else {})
    tokens, shape = IMAGES[model_type]
    image = torch.tensor([[122] + [IMAGE] * tokens + [123]])
    before, after = text.tensor_split(2, 1)
    ids = torch.cat([before, image, after], 1)
    found = {"input_ids": ids, "pixel_values": torch.randn(shape, generator=generator)}
    if shape[0] == 16:
        found |= {"attention_mask": torch.ones_like(ids)} if "omni" in model_type else {}
        return found | {"image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (ids == IMAGE).long()}
    if model_type == "gemma3":
        return found | {"token_type_ids": (ids == IMAGE).long()}
    return found | ({"image_sizes": torch.tensor([[28, 28]])} if model_type == "lighton_ocr" else {})


def packed(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Several rows as one; five-dimensional pixels hold a row's images in their second dimension."""
    along = {"pixel_values": 1 if rows[0].get("pixel_values", torch.empty(0)).ndim == 5 else 0, "image_grid_thw": 0, "image_sizes": 0}
    return {name: torch.cat([row[name] for row in rows], along.get(name, 1)) for name in rows[0] if name != "attention_mask"}
