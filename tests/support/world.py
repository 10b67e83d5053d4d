"""A small world: real shards, a tiny teacher and a tiny student of the real class, all as ordinary folders."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from data_tools.synth import haystacks
from laid_ds.config import Run
from laid_ds.data.batch import Prepare
from laid_ds.data.images import Pixels
from laid_ds.data.index import Dataset, ShardWriter
from laid_ds.models.load import load_model, write_new_model
from laid_ds.models.processor import Renderer, load_processor

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "ds_configs" / "zero3_cpu.json"


@dataclass(frozen=True)
class World:
    folder: Path

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

    @property
    def student(self) -> Path:
        return self.folder / "student"

    @property
    def vocabulary(self) -> int:
        return len(load_processor(self.student).tokenizer)

    def run(self, output: Path, **changes) -> Run:
        """A short distillation run with every term of the loss; `changes` replace sections or values by name."""
        tree = {
            "name": "tiny",
            "output": output,
            "steps": 4,
            "student": {"path": self.student, "dtype": "float32", "deepspeed": ENGINE, "gradient_checkpointing": False},
            "teacher": {"path": self.teacher, "dtype": "float32", "deepspeed": ENGINE, "check_answers": False},
            "data": {"shards": [str(self.shards)], "images": [1, 4], "questions": 2, "micro_batch": 2},
            "optimizer": {"lr": 1e-3, "mixing_lr": 1e-3, "gain_lr": 1e-3},
            "match": {"frontier_tokens": [2, 20], "width_tokens": 4},
            "checkpoint": {"every_steps": 2},
        }
        for name, value in changes.items():
            tree[name] = tree[name] | value if isinstance(value, dict) and name in tree else value
        return Run.model_validate(tree)

    def batch(self, samples: int = 3, images: int = 4):
        """A micro-batch of the first samples, with windows of 1 to `images` images so that rows differ in length."""
        dataset, processor = Dataset.open(self.shards), load_processor(self.student)
        render = Renderer(processor, Pixels())
        prepare = Prepare(render, processor.tokenizer.pad_token_id, image_range=lambda step: (1, images), questions=2)
        return prepare([(i, dataset.read(i)) for i in range(samples)])

    def load(self, who: str, attention: str | None = None):
        """A fresh model in fp32."""
        model = load_model(self.folder / who)
        if attention:
            model.model.language_model.set_attn_implementation(attention)
        return model


def make_world(folder: Path) -> World:
    """12 haystacks of 6 images; a teacher of 4 query and 2 key heads, a student of 2 and 1."""
    with ShardWriter(folder / "shards", samples_per_shard=5) as writer:
        for sample in haystacks("train", 12, 6, 3, ("colour",), seed=0, num_scenes=576):
            writer.write(sample)
    dataset = Dataset.open(folder / "shards")
    corpus = [dataset.read(i) for i in range(len(dataset))]
    for who, hidden, heads, keys in (("teacher", 64, 4, 2), ("student", 32, 2, 1)):
        tree = json.loads((ROOT / "recipes" / f"demo_{who}_model.json").read_text())
        sizes = {"hidden_size": hidden, "intermediate_size": hidden, "num_attention_heads": heads, "num_key_value_heads": keys}
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
        tree["text_config"] |= sizes | {"head_dim": 16, "rope_parameters": rope}
        tree["vision_config"] |= {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": hidden}
        (folder / f"{who}.json").write_text(json.dumps(tree))
        write_new_model(folder / f"{who}.json", folder / who, corpus, vocabulary=300, image_tokens=1, seed=1)
    return World(folder)
