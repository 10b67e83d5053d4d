"""Greedy answers with the model's own `generate`: the most likely token each time, whatever the folder says of sampling and penalties."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from laid_ds.models.attention import whole_rows


@dataclass(frozen=True)
class Reply:
    """What a model said."""

    said: str
    ended: bool
    """It came to an end by itself, before the most tokens that it was given."""


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Tensor],
    max_new_tokens: int,
    in_step: bool = False,
) -> list[Reply]:
    """A reply to each row of input_ids [B, T] (prompts that end together; attention_mask [B, T] and the images beside them).

    The keys and values of what was read are kept, and the head runs on the last position alone: memory grows linearly with T where no row
    is padded. in_step: under ZeRO-3 every rank makes as many forward passes as the rank that says most; all ranks must call it.
    Raises ValueError when the model computes NaN.
    """
    ends = _ends(model, tokenizer)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends),
        use_cache=True,
        return_dict_in_generate=False,
    )
    with whole_rows(model) if inputs["attention_mask"].all() else nullcontext():
        made = model.generate(**inputs, generation_config=config, synced_gpus=in_step, logits_processor=[_check_finite])
    return [_reply(tokenizer, ids, ends) for ids in made[:, inputs["input_ids"].shape[1] :].tolist()]


def _check_finite(input_ids: Tensor, scores: Tensor) -> Tensor:
    """transformers' interface of what changes scores [B, vocabulary]: changes nothing."""
    if scores.isnan().any():
        raise ValueError("the model gives numbers that are not finite; its weights are broken")
    return scores


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer: by the folder's generation config, by its config, by its tokenizer. Raises ValueError for none."""
    told = [model.generation_config.eos_token_id, model.config.get_text_config().eos_token_id, tokenizer.eos_token_id]
    ends = {token for one in told if one is not None for token in (one if isinstance(one, list) else [one])}
    if not ends:
        raise ValueError("no token ends an answer: eos_token_id stands neither in generation_config.json nor in the tokenizer's files")
    return ends


def _reply(tokenizer: PreTrainedTokenizerBase, ids: list[int], ends: set[int]) -> Reply:
    length = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    said = tokenizer.decode(ids[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Reply(said, ended=length < len(ids))
