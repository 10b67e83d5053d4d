"""What we expect of each family of vision-language models. The table is small because it is only expectation: `probe` measures a model.

A family is a wrapper (model_type) around a text decoder, and all that matters here is the decoder's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from transformers import PretrainedConfig


@dataclass(frozen=True)
class Decoder:
    """What we expect of a text decoder."""

    layout: str
    """Coordinates of rotary plane f: f and f + P ("half"), or 2f and 2f + 1 ("interleaved")."""
    positions: str
    """One position per token ("1d"); or time, height and width in stretches of planes ("mrope") or mixed ("mrope_interleaved")."""
    gain: str
    """Where a gain folds: per head ("head"), shared by a layer's heads ("layer"), or nowhere ("none")."""
    packable: bool = True
    """Several samples in one row, told apart by their position ids, give what each gives alone."""
    image_blocks: bool = False
    """Tokens of one image see each other in both directions, so that the mask is dense."""
    whole: str = ""
    """Why no rank can run a slice of its rows (sequence_parallel), as the rest of a sentence; empty where ranks can."""


STATE = "its linear attention carries a state along the row"
DENSE = "its mask is dense"
OF_ALL = "its decoder is handed masks and token types of the whole row"

DECODERS = {
    "qwen2_vl_text": Decoder("half", "mrope", "head"),
    "qwen2_5_vl_text": Decoder("half", "mrope", "head"),
    "qwen2_5_omni_text": Decoder("half", "mrope", "head", whole=OF_ALL),
    "qwen3_vl_text": Decoder("half", "mrope_interleaved", "layer"),
    "qwen3_vl_moe_text": Decoder("half", "mrope_interleaved", "layer"),
    "qwen3_omni_moe_text": Decoder("half", "mrope_interleaved", "layer", whole=OF_ALL),
    "qwen3_5_text": Decoder("half", "mrope_interleaved", "layer", packable=False, whole=STATE),
    "qwen3_5_moe_text": Decoder("half", "mrope_interleaved", "layer", packable=False, whole=STATE),
    "qwen2": Decoder("half", "1d", "head"),
    "qwen3": Decoder("half", "1d", "layer"),
    "llama": Decoder("half", "1d", "head"),
    "mistral": Decoder("half", "1d", "head"),
    "ministral3": Decoder("half", "1d", "head"),
    "glm4v_text": Decoder("interleaved", "mrope", "head"),
    "glm4v_moe_text": Decoder("half", "mrope", "head"),  # not the layout of the dense model
    "glm_ocr_text": Decoder("interleaved", "mrope", "head"),
    "ernie4_5_vl_moe_text": Decoder("interleaved", "mrope_interleaved", "head"),
    "paddleocr_vl_text": Decoder("half", "mrope", "head"),
    "phi4_multimodal": Decoder("half", "1d", "head", whole="it merges images inside its decoder"),
    "aria_text": Decoder("half", "1d", "head"),
    "cohere2": Decoder("interleaved", "1d", "head"),
    "lfm2": Decoder("half", "1d", "layer", packable=False, whole="its convolutions reach over the border of a slice"),
    "gemma": Decoder("half", "1d", "head", packable=False, image_blocks=True, whole=DENSE),
    "molmo2_text": Decoder("half", "1d", "layer", packable=False, image_blocks=True, whole=DENSE),
    "gemma3_text": Decoder("half", "1d", "layer", packable=False, image_blocks=True, whole=DENSE),
    "gemma4_text": Decoder("half", "1d", "layer", packable=False, image_blocks=True, whole=DENSE),
    "llama4_text": Decoder("interleaved", "1d", "none", packable=False, whole="its chunks are counted from the start of the row"),
}

ONE_AXIS_WITHOUT_MASK = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
"""Families whose forward numbers the axes of images only when it gets an attention_mask or position ids."""

ENCODED_BY_ALL = (
    *("llava_onevision", "llava_next", "llava_next_video", "mistral3", "lighton_ocr", "smolvlm", "idefics3", "idefics2"),
    *("video_llama_3", "minicpmv4_6", "aria"),
)
"""Families whose images each of the ranks that share a batch encodes, all of them: their encoders are handed more than patches with their
grids, or squares of one size (shared_tower.py)."""

FAMILIES = {
    "qwen2_vl": ("qwen2_vl_text",),
    "qwen2_5_vl": ("qwen2_5_vl_text",),
    "qwen2_5_omni_thinker": ("qwen2_5_omni_text",),
    "qwen3_vl": ("qwen3_vl_text",),
    "qwen3_vl_moe": ("qwen3_vl_moe_text",),
    "qwen3_omni_moe_thinker": ("qwen3_omni_moe_text",),
    "qwen3_5": ("qwen3_5_text",),
    "qwen3_5_moe": ("qwen3_5_moe_text",),
    "internvl": ("qwen2", "qwen3"),
    "llava_onevision": ("qwen2",),
    "llava": ("llama", "mistral"),
    "llava_next": ("llama", "mistral"),
    "llava_next_video": ("llama",),
    "video_llava": ("llama",),
    "vipllava": ("llama",),
    "mistral3": ("mistral", "ministral3"),
    "lighton_ocr": ("qwen3",),
    "smolvlm": ("llama",),
    "idefics3": ("llama",),
    "idefics2": ("mistral",),
    "glm4v": ("glm4v_text",),
    "glm46v": ("glm4v_text",),
    "glm4v_moe": ("glm4v_moe_text",),
    "glm_ocr": ("glm_ocr_text",),
    "ernie4_5_vl_moe": ("ernie4_5_vl_moe_text",),
    "paddleocr_vl": ("paddleocr_vl_text",),
    "video_llama_3": ("qwen2",),
    "fast_vlm": ("qwen2",),
    "got_ocr2": ("qwen2",),
    "deepseek_vl": ("llama",),
    "phi4_multimodal": ("phi4_multimodal",),
    "minicpmv4_6": ("qwen3",),
    "aria": ("aria_text",),
    "aya_vision": ("cohere2",),
    "lfm2_vl": ("lfm2",),
    "molmo2": ("molmo2_text",),
    "paligemma": ("gemma",),
    "gemma3": ("gemma3_text",),
    "gemma4": ("gemma4_text",),
    "llama4": ("llama4_text",),
}


@dataclass(frozen=True)
class Family(Decoder):
    """A row of the table."""

    model_type: str = ""
    decoder: str = ""
    """model_type of the text decoder."""

    @property
    def tier(self) -> str:
        """A: trains, folds and packs. B: trains and folds. C: trains without a gain."""
        return "C" if self.gain == "none" else "A" if self.packable else "B"

    @property
    def sliceable(self) -> bool:
        """Whether ranks can share a row, each running a slice of it through the decoder (sequence_parallel)."""
        return not self.whole

    @property
    def shares_images(self) -> bool:
        """Whether ranks that share a row encode its images once, each some of them."""
        return self.sliceable and self.model_type not in ENCODED_BY_ALL


def family(config: PretrainedConfig) -> Family:
    """The expectations for a model's config. Raises ValueError for a family or a decoder that is not in the table."""
    text = config.get_text_config()
    if getattr(text, "attn_logit_softcapping", None) is not None:
        raise ValueError(
            f"{config.model_type} caps its attention scores (attn_logit_softcapping={text.attn_logit_softcapping}), which neither SDPA nor"
            " our losses compute; choose a family of `laid models`"
        )
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model_type {config.model_type!r} is not in the table of families; choose one of `laid models`, or add a line to"
            " laid_ds/models/family.py and a tiny config to tests/models/family_models.py"
        )
    if text.model_type not in FAMILIES[config.model_type]:
        known = ", ".join(FAMILIES[config.model_type])
        raise ValueError(
            f"{config.model_type} with the text decoder {text.model_type!r} is not in the table of families (known: {known}); add it to"
            " laid_ds/models/family.py and a tiny config to tests/models/family_models.py"
        )
    return _row(config.model_type, text.model_type)


def trainable(config: PretrainedConfig) -> Family:
    """The same for a model in training. Raises ValueError too when logits are more than the head's product: our losses compute no more."""
    expected, cap = family(config), getattr(config.get_text_config(), "final_logit_softcapping", None)
    if cap is not None:
        raise ValueError(
            f"{config.model_type} caps its logits (final_logit_softcapping={cap}), which our losses do not compute; choose a family of"
            " `laid models` without it"
        )
    return expected


def check_packable(config: PretrainedConfig) -> Family:
    """The expectations again. Raises ValueError too when samples in one row would see each other."""
    expected = family(config)
    if not expected.packable:
        raise ValueError(
            f"{expected.model_type} with {expected.decoder} mixes samples that share a row (packable is no in `laid models`): leave out"
            " data.tokens_per_pack and set data.micro_batch"
        )
    return expected


def check_sliceable(config: PretrainedConfig) -> Family:
    """The expectations again. Raises ValueError too when no rank can run a slice of a row."""
    expected = family(config)
    if not expected.sliceable:
        raise ValueError(
            f"rows of {expected.model_type} with {expected.decoder} cannot be shared by several ranks (sliceable is no in `laid models`):"
            f" {expected.whole}; set sequence_parallel = 1"
        )
    return expected


def families() -> Iterator[Family]:
    """All rows of the table, in its order."""
    return (_row(model_type, decoder) for model_type, decoders in FAMILIES.items() for decoder in decoders)


def table() -> list[dict[str, str | bool]]:
    """The rows as printed."""
    names = ("model_type", "decoder", "layout", "positions", "gain", "packable", "sliceable", "shares_images", "image_blocks", "tier")
    return [{name: getattr(row, name) for name in names} for row in families()]


def _row(model_type: str, decoder: str) -> Family:
    return Family(**asdict(DECODERS[decoder]), model_type=model_type, decoder=decoder)
