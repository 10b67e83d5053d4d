"""A model around a pretrained decoder says what the decoder says; a model of some layers is the model with the others passed over."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from laid_ds import cli
from laid_ds.models.attention import decoder
from laid_ds.models.load import load_config, load_model
from laid_ds.models.processor import Renderer, load_processor

WORDS = ["<unk>", "<pad>", "<end>", *["red", "blue", "house", "car", "Alice", "Bob", ":", "user"]]
TEMPLATE = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}<end>{% endfor %}"


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def text_model(request, tmp_path_factory):
    """A small causal language model as a folder, and its tokenizer."""
    folder = tmp_path_factory.mktemp("text") / "model"
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="<end>")
    torch.manual_seed(0)
    shape = {"hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "num_key_value_heads": 3}
    config = LlamaConfig(vocab_size=len(WORDS), tie_word_embeddings=request.param, initializer_range=0.2, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def around(text_model, tmp_path_factory):
    """The stock Idefics3 around it."""
    folder = tmp_path_factory.mktemp("around")
    vision = {
        "hidden_size": 24,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    (folder / "model.json").write_text(json.dumps({"model_type": "idefics3", "scale_factor": 2, "vision_config": vision}))
    (folder / "chat.jinja").write_text(TEMPLATE)
    assert said(f"{folder}/model.json", f"{folder}/out", "--decoder", text_model, "--template", f"{folder}/chat.jinja") == 0
    return folder / "out"


def said(*arguments) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["init", *map(str, arguments)])
    return stopped.value.code


def test_it_says_what_the_decoder_says(text_model, around):
    text, whole = LlamaForCausalLM.from_pretrained(text_model, dtype=torch.float32), load_model(around)
    ids = torch.randint(0, len(WORDS), (2, 19), generator=torch.Generator().manual_seed(1))
    assert decoder(whole)(input_ids=ids).last_hidden_state.equal(text.model(input_ids=ids).last_hidden_state)
    logits = whole(input_ids=ids).logits
    assert logits.shape[-1] > len(WORDS)
    assert torch.allclose(logits[..., : len(WORDS)], text(input_ids=ids).logits, atol=1e-5)


def test_its_tokens_are_the_decoders_and_after_them_those_of_images(text_model, around):
    old, processor = PreTrainedTokenizerFast.from_pretrained(text_model).get_vocab(), load_processor(around)
    new = processor.tokenizer.get_vocab()
    assert {token: new[token] for token in old} == old
    assert {"<image>", "<fake_token_around_image>", "<global-img>"} <= new.keys() - old.keys()
    config = load_config(around)
    assert config.image_token_id == processor.image_token_id == new["<image>"]
    assert config.get_text_config().vocab_size == len(processor.tokenizer)
    assert config.tie_word_embeddings == load_config(text_model).tie_word_embeddings
    assert processor.chat_template == TEMPLATE
    assert type(AutoProcessor.from_pretrained(around)).__name__ == "Idefics3Processor"


def test_the_same_seed_makes_the_same_tower(text_model, around, tmp_path):
    common = around.parent / "model.json", "--decoder", text_model, "--template", around.parent / "chat.jinja"
    assert said(common[0], tmp_path / "again", *common[1:]) == said(common[0], tmp_path / "other", *common[1:], "--seed=1") == 0
    ours, again, other = (load_model(folder).state_dict() for folder in (around, tmp_path / "again", tmp_path / "other"))
    assert all(ours[name].equal(again[name]) for name in ours)
    changed = {name.split(".")[1] for name in ours if not ours[name].equal(other[name])}
    assert changed == {"vision_model", "connector"}


@pytest.mark.parametrize("kept", [[0, 2], [3], [0, 1, 2, 3], [2, 0, 1]])
def test_some_layers_are_the_model_with_the_others_passed_over(around, tmp_path, kept):
    assert said(around, tmp_path / "part", "--layers", ",".join(map(str, kept))) == 0
    part, whole = load_model(tmp_path / "part"), load_model(around)
    assert len(decoder(part).layers) == part.config.get_text_config().num_hidden_layers == len(kept)
    ids = torch.randint(0, len(WORDS), (1, 9), generator=torch.Generator().manual_seed(1))
    states = whole.get_input_embeddings()(ids)
    turned = decoder(whole).rotary_emb(states, torch.arange(9)[None])
    for layer in kept:
        states = decoder(whole).layers[layer](states, position_embeddings=turned)
        states = states[0] if isinstance(states, tuple) else states
    expected = whole.get_output_embeddings()(decoder(whole).norm(states))
    assert torch.allclose(part(input_ids=ids).logits, expected, atol=1e-5)
    assert load_processor(tmp_path / "part").chat_template == TEMPLATE


def test_lists_of_a_config_keep_what_belongs_to_the_layers_that_stay(world, tmp_path):
    assert said(world.teacher, tmp_path / "last", "--layers", "1") == 0
    before, after = load_config(world.teacher).get_text_config(), load_config(tmp_path / "last").get_text_config()
    assert after.num_hidden_layers == 1
    assert getattr(after, "layer_types", None) == (getattr(before, "layer_types", None) or [None, None])[1:2] or before.layer_types is None


def test_a_made_model_renders_text_and_stands_in_an_image(around):
    from laid_ds.data.images import Pixels
    from laid_ds.data.record import Sample, Turn

    row = Renderer(load_processor(around), Pixels())(Sample("k", (Turn("user", ("red house :",)), Turn("assistant", ("Alice",)))))
    words = load_processor(around).tokenizer.convert_ids_to_tokens(row.tokens["input_ids"][row.supervised].tolist())
    assert (words, row.trailing > 0) == (["Alice", "<end>"], True)


def test_what_cannot_be_made_is_one_sentence(around, text_model, tmp_path, capsys):
    model, out = around.parent / "model.json", tmp_path / "out"
    shutil.copytree(text_model, tmp_path / "bare")
    (tmp_path / "llava.json").write_text('{"model_type": "llava", "vision_config": {"model_type": "clip_vision_model"}}')
    (tmp_path / "bert.json").write_text('{"model_type": "bert"}')
    cases = {
        "give one of --corpus": (model, out),
        "give one of --corpus (": (model, out, "--layers=0", "--decoder", text_model),
        "is for --decoder, and without it would do nothing": (around, out, "--layers=0", "--template", model),
        "--vocabulary 300 is for --corpus, and": (around, out, "--layers=0", "--vocabulary=300"),
        "--image-tokens 4 is for --corpus or --decoder, and": (around, out, "--layers=0", "--image-tokens=4"),
        "--steps 4 is for --captions, and": (around, out, "--layers=0", "--steps=4"),
        "exists; choose another folder": (model, around, "--decoder", text_model),
        "no decoder at": (model, out, "--decoder", tmp_path / "nowhere"),
        "has no chat template": (model, out, "--decoder", text_model),
        "is no causal language model": (model, out, "--decoder", model),
        "no processor is made for model_type 'bert'": (tmp_path / "bert.json", out, "--decoder", text_model),
        "name some of the layers 0 to 3": (around, out, "--layers=0,4"),
        "each once": (around, out, "--layers=0,0"),
        "give whole numbers": (around, out, "--layers=a"),
    }
    for sentence, arguments in cases.items():
        assert said(*arguments) == 2
        error = capsys.readouterr().err
        assert sentence in error, error
        assert "Traceback" not in error
        assert not out.exists()
