"""`laid-data synth facts`: haystacks of text. A fact is a line, "red house: Alice"; a question is its beginning, "red house:".

What a key is called is drawn for every fact apart from all others, so neither the question, the other facts nor their number tell an
answer: who does not look at the one line is right once in 24. Keys are an adjective and a noun; those of the test split are in no
training sample. Every word is one token of SmolLM2's tokenizer, which makes a fact five tokens long and a question three.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from data_tools.console import show, track
from laid_ds.data.dataset import Dataset
from laid_ds.data.record import MAX_IMAGES, Sample, Turn
from laid_ds.data.writer import ShardWriter
from laid_ds.disk import whole_folder
from laid_ds.terminal import next_step

OF_KEYS = (
    "red blue green black white yellow brown gray orange purple gold old new big small hot cold dark light wild open clean empty dry wet"
    " rich poor quick slow quiet soft hard fresh sweet sharp round flat strong weak young happy lazy"
)
OF_THINGS = (
    "house car tree book boat table chair dog cat bird fish horse hat shoe bag box cup lamp door window clock ring stone flower garden"
    " bridge tower ship train plane bike truck phone camera piano guitar drum ball key knife coat shirt bottle basket mirror bed bell"
    " candle carpet coin desk doll farm fence field flag fork gate glove hammer island kite lake"
)
OF_ANSWERS = (
    "Alice Bob Carol David Emma Frank Grace Henry Jack Kate Laura Mary Nick Oliver Paul Rachel Sam Tom Anna Peter John Sarah James Lucy"
)
ADJECTIVES, NOUNS, NAMES = (tuple(words.split()) for words in (OF_KEYS, OF_THINGS, OF_ANSWERS))
SPLITS = ("train", "test")


def keys(split: str) -> list[str]:
    """The keys of a split: one half of all, drawn once and for all; the other split has the other half."""
    every = [f"{adjective} {noun}" for adjective, noun in product(ADJECTIVES, NOUNS)]
    random.Random("keys").shuffle(every)
    return every[SPLITS.index(split) :: 2]


def haystack(split: str, facts: int, questions: int, seed: str, key: str) -> Sample:
    """One haystack: `facts` lines about different keys, and `questions` of them asked, each with the place of its line as needle."""
    rng = random.Random(seed)
    told = [(thing, rng.choice(NAMES)) for thing in rng.sample(keys(split), facts)]
    turns: list[Turn] = []
    for needle in rng.sample(range(facts), questions):
        thing, name = told[needle]
        lead = () if turns else tuple(f"{other}: {owner}\n" for other, owner in told)
        turns += [Turn("user", (*lead, f"{thing}:"), needles=(needle,), choices=NAMES), Turn("assistant", (name,))]
    return Sample(key, tuple(turns), source="laid-data synth facts", licence="Apache-2.0", meta={"world": "facts in text"}, haystack=True)


def haystacks(split: str, samples: int, facts: int, questions: int, seed: int) -> Iterator[Sample]:
    """The haystacks of one data set, a pure function of its arguments. Raises ValueError for numbers that no haystack can have."""
    most = min(len(keys(split)), MAX_IMAGES)
    if facts > most:
        raise ValueError(f"--facts {facts}: a haystack holds at most {most}, each about a key of its own")
    if not 1 <= questions <= facts:
        raise ValueError(f"--questions {questions}: a haystack of {facts} facts can ask 1 to {facts} questions")
    return (haystack(split, facts, questions, f"facts {split} {seed} {i}", f"facts-{split}-{seed}-{i:06d}") for i in range(samples))


def facts_command(
    output: Annotated[Path, typer.Argument(help="Folder for the shards; must not exist.")],
    split: Annotated[str, typer.Option(help="Which keys: train or test (disjoint).")] = "train",
    samples: Annotated[int, typer.Option(min=1)] = 512,
    facts: Annotated[int, typer.Option(min=1, help="Facts in each haystack; windows are drawn from them.")] = 24,
    questions: Annotated[int, typer.Option(min=1, help="Questions in each haystack, as turns.")] = 8,
    seed: int = 0,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Haystacks of text, for the decoder of a vision-language model: facts such as "red house: Alice", and who is asked for."""
    if split not in SPLITS:
        raise ValueError(f"--split {split}: splits are {' and '.join(SPLITS)}")
    if output.exists():
        raise ValueError(f"{output} exists; choose another folder or remove it")
    made = haystacks(split, samples, facts, questions, seed)
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(output, "the data set") as folder:
        with ShardWriter(folder, samples_per_shard=256) as writer:
            for sample in track(made, "haystacks", samples):
                writer.write(sample)
        fingerprint = Dataset.open(folder).fingerprint
    show({"folder": str(output), "samples": samples, "facts": samples * facts, "fingerprint": fingerprint}, as_json)
    if not as_json:
        next_step("laid-data", "preview", output)
