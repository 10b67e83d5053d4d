"""Images shared out over ranks: each is encoded once, by ranks with alike much to do."""

from __future__ import annotations

import pytest
import torch

from laid_ds.models import shared_tower as towers
from laid_ds.models.attention import group_of, listen
from laid_ds.models.cut import cut_inputs
from laid_ds.models.family import families
from laid_ds.models.shared_tower import image_sizes, shared_out, shared_tower
from laid_ds.sequence import ALONE, SequenceGroup
from tests.models.family_models import CONFIGS, IMAGES, inputs, packed, tiny_model

SHARED = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm46v", "glm4v_moe", "glm_ocr"), "patches"),
    **dict.fromkeys(("ernie4_5_vl_moe", "paddleocr_vl"), "patches"),
    **dict.fromkeys(("internvl", "llava", "vipllava", "aya_vision", "fast_vlm", "got_ocr2", "deepseek_vl", "video_llava"), "squares"),
}


def test_consecutive_images_are_shared_out_alike():
    assert shared_out([5], 3) == [range(0, 0), range(0, 1), range(1, 1)]
    assert shared_out([4, 4, 16, 8, 4], 2) == [range(0, 3), range(3, 5)]
    for sizes in ([256] * 30, [64, 1024] * 15, list(range(100, 200, 3)), [7, 1], [1] * 3):
        for ranks in (1, 2, 3, 4, 8):
            shares = shared_out(sizes, ranks)
            assert [image for share in shares for image in share] == list(range(len(sizes)))
            loads = [sum(sizes[image] for image in share) for share in shares]
            assert max(loads) <= sum(sizes) / ranks + max(sizes)


def test_images_are_told_apart_by_their_grids_or_as_squares():
    grid = torch.tensor([[1, 4, 4], [1, 2, 8]])
    assert image_sizes({"pixel_values": torch.empty(32, 12), "image_grid_thw": grid, "return_dict": True}) == [16, 16]
    assert image_sizes({"pixel_values": torch.empty(3, 3, 28, 28)}) == [1, 1, 1]
    assert image_sizes({"pixel_values": torch.empty(1, 3, 3, 28, 28)}) is None
    assert image_sizes({"pixel_values": torch.empty(3, 3, 28, 28), "image_sizes": torch.ones(3, 2)}) is None


SLICEABLE = {(row.model_type, row.decoder) for row in families() if row.sliceable}


@pytest.mark.parametrize("key", [key for key in CONFIGS if key[0] in IMAGES and key in SLICEABLE], ids="-".join)
def test_which_families_share_their_images(key, monkeypatch):
    """Of those whose rows ranks can share SHARED says it. Taken apart and put together by one rank, three images are what they were."""
    model, row = tiny_model(*key), packed([inputs(key[0], seed) for seed in range(3)])
    told = []
    monkeypatch.setattr(towers, "image_sizes", lambda given: told.append(image_sizes(given)) or told[-1])
    with torch.no_grad():
        expected = model(**row, use_cache=False).logits
        with shared_tower(model, ALONE, row) as own:
            found = model(**own, use_cache=False).logits
    assert bool(told and told[0]) == (key[0] in SHARED), told
    torch.testing.assert_close(found, expected)


def test_a_model_that_nobody_shares_is_left_alone():
    model = tiny_model("qwen2_5_vl", "qwen2_5_vl_text")
    listen(model)
    assert group_of(model) is ALONE
    group = SequenceGroup(2)
    with shared_tower(model, group, inputs("qwen2_5_vl")):
        assert "get_image_features" in vars(model.model)
    assert "get_image_features" not in vars(model.model)


def test_what_a_decoder_takes_beside_its_rows_is_refused():
    decoder = torch.nn.Identity()
    with (
        cut_inputs(decoder, SequenceGroup(2)),
        pytest.raises(ValueError, match="Identity takes attention_mask too, which ranks cannot share"),
    ):
        decoder(inputs_embeds=torch.empty(1, 8, 4), attention_mask=torch.ones(1, 8))


class Encoder(torch.nn.Module):
    def get_image_features(self, pixel_values, image_sizes=None):
        raise RuntimeError(str(pixel_values.device))


def test_pixels_that_wait_on_the_cpu_come_to_the_tokens():
    """Of both kinds of families, and all inputs where nothing is known of how a family encodes."""
    meta = torch.device("meta")
    for row in (
        {"pixel_values": torch.empty(2, 3, 28, 28)},
        {"pixel_values": torch.empty(2, 2, 3, 28, 28), "image_sizes": torch.ones(2, 2)},
    ):
        model, given = Encoder(), row | {"input_ids": torch.empty(1, 8, device=meta)}
        with shared_tower(model, SequenceGroup(2), given) as own, pytest.raises(RuntimeError, match="meta"):
            model.get_image_features(**{name: tensor for name, tensor in own.items() if name != "input_ids"})
        with shared_tower(torch.nn.Identity(), SequenceGroup(2), given) as own:
            assert {tensor.device for tensor in own.values()} == {meta}
