"""The lines that ask an exported model, for its card: harnesses put pixel limits of their own in the place of a folder's unless told."""

from __future__ import annotations

from typing import Any


def asking_lines(model_type: str, limits: tuple[int, int] | None, numbered: bool) -> str:
    """Markdown: the exact lines for laid eval, lmms-eval, VLMEvalKit and vLLM.

    limits: least and most pixels of an image, None where the family's processor has none.
    """
    lmms, vlm, served = _options(model_type, limits)
    note = (
        f"Images have {limits[0]} to {limits[1]} pixels, in training as below; without these numbers lmms-eval and VLMEvalKit set others."
        if limits
        else "This family's processor has no limits of pixels; the folder's own processor files say how images are sized."
    )
    told = (
        ' It was trained with numbered images ("Image 7: " before the seventh): `laid eval` writes them by itself, the others do not.'
        if numbered
        else ""
    )
    return f"""{note}{told}

```bash
laid eval TASK model=FOLDER --out results/evaluation.json
lmms-eval --model {lmms[0]} --model_args pretrained=FOLDER{lmms[1]} \\
  --include_path TASK_FOLDER --tasks TASK --log_samples --output_path results
vllm serve FOLDER --limit-mm-per-prompt '{{"image": 200}}'{served}
```

VLMEvalKit, a line in `vlmeval/config.py`:

```python
{vlm}
```
"""


def pixel_limits(processor: dict[str, Any]) -> tuple[int, int] | None:
    """(least, most) pixels of an image by a processor's file; None where its family has no such limits."""
    images = processor.get("image_processor", processor)
    size = images.get("size") or {}
    least, most = images.get("min_pixels", size.get("shortest_edge")), images.get("max_pixels", size.get("longest_edge"))
    return (least, most) if "merge_size" in images and isinstance(least, int) and isinstance(most, int) else None


LMMS = {
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "internvl": "internvl_hf",
    "llava": "llava_hf",
}
"""Family -> the name of its model in lmms-eval."""
VLMEVALKIT = {
    "qwen2_vl": "Qwen2VLChat",
    "qwen2_5_vl": "Qwen2VLChat",
    "qwen3_vl": "Qwen3VLChat",
}
"""Family -> its class in VLMEvalKit. Its classes for InternVL and LLaVA read those projects' own checkpoints, not transformers folders."""


def _options(model_type: str, limits: tuple[int, int] | None) -> tuple[tuple[str, str], str, str]:
    lmms = LMMS.get(model_type, "huggingface"), f",min_pixels={limits[0]},max_pixels={limits[1]}" if limits else ""
    kind = VLMEVALKIT.get(model_type)
    pixels = f", min_pixels={limits[0]}, max_pixels={limits[1]}, use_custom_prompt=False" if limits else ""
    vlm = f'"model": partial({kind}, model_path="FOLDER"{pixels}),' if kind else f"# VLMEvalKit: no class for {model_type} is known here"
    served = f' --mm-processor-kwargs \'{{"min_pixels": {limits[0]}, "max_pixels": {limits[1]}}}\'' if limits else ""
    return lmms, vlm, served
