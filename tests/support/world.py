"""A small world: real shards, a tiny teacher and a tiny student of the real class, all as ordinary folders."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from data_tools.synth import haystacks
from laid_ds.config import Run
from laid_ds.data.batch import Prepare
from laid_ds.data.dataset import Dataset
from laid_ds.data.images import Pixels
from laid_ds.data.writer import ShardWriter
from laid_ds.models.load import load_config, load_model
from laid_ds.models.new_model import write_new_model
from laid_ds.models.positions import position_rule
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
            "losses": {"align": 1.0, "match": 1.0},
            "match": {"omega": "frontier", "frontier_tokens": [2, 20], "width_tokens": 4},
            "gain": {"enabled": True},
            "checkpoint": {"every_steps": 2},
        }
        for name, value in changes.items():
            tree[name] = tree[name] | value if isinstance(value, dict) and name in tree else value
        return Run.model_validate(tree)

    def batch(self, samples: int = 3, images: int = 4, packed: bool = False):
        """A micro-batch of the first samples, with windows of 1 to `images` images so that rows differ in length; or one packed row."""
        dataset, processor = Dataset.open(self.shards), load_processor(self.student)
        render = Renderer(processor, Pixels(), positions=position_rule(load_config(self.student)) if packed else None)
        prepare = Prepare(render, processor.tokenizer.pad_token_id, image_range=lambda step: (1, images), questions=2, packs=packed)
        items = [(i, dataset.read(i)) for i in range(samples)]
        return prepare([items] if packed else items)

    def load(self, who: str, attention: str | None = None):
        """A fresh model in fp32."""
        model = load_model(self.folder / who)
        if attention:
            model.model.language_model.set_attn_implementation(attention)
        return model


def make_world(folder: Path, family: str = "qwen2_5_vl", image_side: int = 32) -> World:
    """12 haystacks of 6 images; a teacher of 4 query and 2 key heads, a student of 2 and 1. image_side: of families that see squares."""
    with ShardWriter(folder / "shards", samples_per_shard=5) as writer:
        for sample in haystacks("train", 12, 6, 3, ("colour",), seed=0, num_scenes=576):
            writer.write(sample)
    dataset = Dataset.open(folder / "shards")
    corpus = [dataset.read(i) for i in range(len(dataset))]
    for who in ("teacher", "student"):
        (folder / f"{who}.json").write_text(json.dumps(tiny_config(who, family, image_side)))
        write_new_model(folder / f"{who}.json", folder / who, corpus, vocabulary=300, image_tokens=1, seed=1)
    return World(folder)


TINY_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
OTHER_DECODERS = {"qwen3_vl": "qwen3_vl_text", "internvl": "qwen2", "llava": "llama", "idefics3": "llama"}
OTHER_TOWERS = {
    "qwen3_vl": {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    "internvl": TINY_VISION | {"image_size": [32, 32], "patch_size": [16, 16]},
    "idefics3": TINY_VISION | {"image_size": 32, "patch_size": 16},
    "llava": TINY_VISION | {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 16},
}


def tiny_config(who: str, family: str, image_side: int = 32) -> dict:
    """The demo's teacher or student, smaller, and as another family where asked."""
    hidden, heads, keys = {"teacher": (64, 4, 2), "student": (32, 2, 1)}[who]
    tree = json.loads((ROOT / "recipes" / f"demo_{who}_model.json").read_text())
    sizes = {"hidden_size": hidden, "intermediate_size": hidden, "num_attention_heads": heads, "num_key_value_heads": keys}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    tree["text_config"] |= sizes | {"head_dim": 16, "rope_parameters": rope}
    tree["vision_config"] |= {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": hidden}
    if family == "qwen2_5_vl":
        return tree
    if family == "qwen2_vl":
        vision = {name: tree["vision_config"][name] for name in ("depth", "num_heads", "patch_size", "spatial_merge_size")}
        return tree | {
            "model_type": family,
            "text_config": tree["text_config"] | {"model_type": "qwen2_vl_text"},
            "vision_config": vision | {"embed_dim": 16, "hidden_size": hidden},
        }
    text = tree["text_config"] | {"model_type": OTHER_DECODERS[family]}
    for name in ("layer_types", "use_sliding_window", "sliding_window", "max_window_layers"):
        text.pop(name)
    vision = OTHER_TOWERS[family] if "num_hidden_layers" in OTHER_TOWERS[family] else tree["vision_config"] | OTHER_TOWERS[family]
    if family == "qwen3_vl":
        vision = {name: value for name, value in vision.items() if name not in ("model_type", "window_size", "fullatt_block_indexes")}
    else:
        text["rope_parameters"].pop("mrope_section")
        vision = vision | {"image_size": [image_side, image_side] if family == "internvl" else image_side}
    return tree | {"model_type": family, "text_config": text, "vision_config": vision}
