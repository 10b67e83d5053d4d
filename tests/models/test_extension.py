"""YaRN is a stock folder that is still its family; SelfExtend is the plain model where it groups nothing, and decodes as it prefills."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from laid_ds.models.attention import decoder
from laid_ds.models.extension import self_extend, write_yarn, yarn
from laid_ds.models.load import load_model
from laid_ds.models.probe import probe
from tests.models.family_models import CONFIGS, TOKENS, inputs, tiny_model

FAMILIES = [
    ("qwen2_5_vl", "qwen2_5_vl_text"),
    ("qwen3_vl", "qwen3_vl_text"),
    ("internvl", "qwen2"),
    ("glm4v", "glm4v_text"),
    ("ernie4_5_vl_moe", "ernie4_5_vl_moe_text"),
    ("phi4_multimodal", "phi4_multimodal"),
]


@pytest.mark.parametrize("key", FAMILIES[:4], ids=lambda key: key[0])
def test_yarn_is_a_stock_folder_that_is_still_its_family(key, tmp_path):
    model = tiny_model(*key)
    model.save_pretrained(tmp_path / "stock")
    write_yarn(tmp_path / "stock", tmp_path / "yarn", 4)
    stretched = load_model(tmp_path / "yarn")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), stretched.parameters(), strict=True))
    ratios = decoder(model).rotary_emb.inv_freq / decoder(stretched).rotary_emb.inv_freq
    assert ratios.min() >= 1 - 1e-6
    assert 1 < ratios.max() <= 4 + 1e-5
    assert decoder(stretched).rotary_emb.attention_scaling == pytest.approx(1.1386, abs=1e-4)
    assert probe(stretched) == probe(model)
    assert stretched.config.get_text_config().max_position_embeddings == 1024


def test_yarn_is_refused_where_it_is_not_defined():
    with pytest.raises(ValueError, match="gemma3 has rope_parameters"):
        yarn(AutoConfig.for_model("gemma3", **(TOKENS | CONFIGS["gemma3", "gemma3_text"])), 4)
    for factor in (1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"factor of {factor} stretches nothing"):
            yarn(AutoConfig.for_model("internvl"), factor)


def logits(model, batch, **more):
    with torch.no_grad():
        return model(**batch, **more).logits


def extended(key, group, window):
    model = tiny_model(*key)
    self_extend(model, group, window)
    return model


@pytest.mark.parametrize("key", FAMILIES, ids=lambda key: key[0])
@pytest.mark.parametrize("group, window", [(1, 3), (4, 1000)])
def test_groups_of_one_and_a_window_over_all_change_nothing(key, group, window):
    batch = inputs(key[0], num_tokens=20)
    expected = logits(tiny_model(*key), batch, use_cache=False)
    torch.testing.assert_close(logits(extended(key, group, window), batch, use_cache=False), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("key", FAMILIES, ids=lambda key: key[0])
def test_decoding_with_a_cache_is_prefill(key):
    batch = inputs(key[0], num_tokens=20)
    model = extended(key, 3, 5)
    expected = logits(model, batch, use_cache=False)
    assert (expected - logits(tiny_model(*key), batch, use_cache=False)).abs().max() > 1e-4
    tokens = batch["input_ids"].shape[1]
    first = {name: tensor[:, :-2] if name in ("input_ids", "mm_token_type_ids") else tensor for name, tensor in batch.items()}
    with torch.no_grad():
        found = model(**first, use_cache=True)
        for token in range(tokens - 2, tokens):
            found = model(input_ids=batch["input_ids"][:, token : token + 1], past_key_values=found.past_key_values, use_cache=True)
            torch.testing.assert_close(found.logits[:, -1], expected[:, token], rtol=0, atol=2e-6)


def test_the_first_layer_is_selfextend_by_its_definition():
    """Brute force from queries and keys before RoPE: each pair is rotated by its own distance."""
    group, window, heads, dim = 3, 5, 4, 8
    model, found, seen = extended(("llava", "llama"), group, window), [], []
    layer = decoder(model).layers[0].self_attn
    layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True)
    layer.o_proj.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    logits(model, inputs("llava", num_tokens=20), use_cache=False)
    with torch.no_grad():
        query, key, value = (p(seen[0])[0].unflatten(-1, (-1, dim)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    inv_freq, num_tokens = decoder(model).rotary_emb.inv_freq.double(), query.shape[0]
    expected = torch.zeros(num_tokens, heads, dim, dtype=torch.double)
    for m in range(num_tokens):
        for h in range(heads):
            scores = []
            for n in range(m + 1):
                distance = m - n if m - n < window else m // group + window - window // group - n // group
                q, k = query[m, h].double(), key[n, h // 2].double()
                a, b = torch.complex(q[: dim // 2], q[dim // 2 :]), torch.complex(k[: dim // 2], k[dim // 2 :])
                scores.append((a * b.conj() * torch.polar(torch.ones(dim // 2).double(), distance * inv_freq)).real.sum() * dim**-0.5)
            expected[m, h] = torch.stack(scores).softmax(0) @ value[: m + 1, h // 2].double()
    torch.testing.assert_close(found[0][0].double(), expected.flatten(1), rtol=0, atol=1e-6)


def test_what_selfextend_cannot_do_is_refused():
    with pytest.raises(ValueError, match="group=0"):
        self_extend(tiny_model("internvl", "qwen2"), 0, 8)
    for key in (("gemma3", "gemma3_text"), ("llama4", "llama4_text"), ("aya_vision", "cohere2")):
        with pytest.raises(ValueError, match=f"{key[0]} does not rotate all its layers"):
            self_extend(tiny_model(*key), 2, 8)
    model, batch = tiny_model("internvl", "qwen2"), inputs("internvl")
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        self_extend(model, 2, 8)
        with pytest.raises(ValueError, match="keys that SelfExtend has not seen"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache, use_cache=True)
