"""What asking costs beside the forward passes alone: `laid eval` renders ahead in workers, so that the process that runs the model does
little else.

    python -m benchmarks.asking --json

A model with random weights answers questions about haystacks of 32 photographs. Everything that asking does is counted (reading shards,
decoding, batching, generating, writing answers), against `generate` on the same batches, made before. CPU seconds of the asking process, in
turns within one run; medians of the ratios. `cpu_ratio_with_workers` counts what the workers spend, too, and `cpu_ratio_same_thread` is
without workers.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.stream import photographs
from laid_ds.data.batch import collate_prompts
from laid_ds.data.images import Pixels
from laid_ds.data.record import Sample, Turn
from laid_ds.data.writer import ShardWriter
from laid_ds.evaluation.answers import appending
from laid_ds.evaluation.asking import Asker, ask_items, by_tokens, rows_ahead
from laid_ds.evaluation.tasks import Wish, items_of, open_tasks
from laid_ds.models.attention import listen_to_windows
from laid_ds.models.generate import generate
from laid_ds.models.load import load_model
from laid_ds.models.new_model import write_new_model
from laid_ds.models.processor import Renderer, load_processor
from laid_ds.runtime.engine import choose_accelerator

IMAGES, SAMPLES, NEW_TOKENS = 32, 6, 8
TEXT = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2}
VISION = {"hidden_size": 128, "intermediate_size": 256, "depth": 4, "num_heads": 4, "out_hidden_size": 256, "patch_size": 14}


def write_world(folder: Path) -> None:
    """Shards of haystacks of photographs, and a model with random weights that takes up to 64 tokens of each."""
    pool = photographs(SAMPLES * IMAGES)
    samples = [
        Sample(
            f"sample-{i}",
            (Turn("user", (*range(IMAGES), "Is there a dog?"), (0,), ("yes", "no")), Turn("assistant", ("yes",))),
            tuple(pool[i * IMAGES : (i + 1) * IMAGES]),
        )
        for i in range(SAMPLES)
    ]
    with ShardWriter(folder / "shards") as writer:
        for sample in samples:
            writer.write(sample)
    tree = json.loads((Path(__file__).parents[1] / "recipes" / "demo_student_model.json").read_text())
    for name in ("layer_types", "use_sliding_window", "sliding_window", "max_window_layers"):
        tree["text_config"].pop(name, None)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    tree["text_config"] |= TEXT | {"head_dim": 32, "rope_parameters": rope, "max_position_embeddings": 32768}
    tree["vision_config"] |= VISION
    (folder / "model.json").write_text(json.dumps(tree))
    write_new_model(folder / "model.json", folder / "model", samples, vocabulary=300, image_tokens=64, seed=0)


def cpu_seconds() -> tuple[float, float]:
    """(of this process, of children that have ended)."""
    usages = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return tuple(usage.ru_utime + usage.ru_stime for usage in usages)


def spent(work) -> tuple[float, float]:
    """CPU seconds of this process, and with those of the children that it had."""
    before = cpu_seconds()
    work()
    own, children = (after - first for after, first in zip(cpu_seconds(), before, strict=True))
    return own, own + children


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    choose_accelerator()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_world(folder)
        figures = asking(folder, options.rounds)
    measure.append("asking", "cpu", f"{SAMPLES} haystacks of {IMAGES} photographs", figures, ("transformers",))
    measure.show(figures, options.json)


def asking(folder: Path, rounds: int) -> dict[str, float]:
    """The figures; rounds of the three ways in turns."""
    tasks = open_tasks([folder / "shards"], Wish([IMAGES], SAMPLES, mode="generate"))
    items = list(items_of(0, tasks[0]))
    model = load_model(folder / "model").eval()
    listen_to_windows(model)
    processor = load_processor(folder / "model")

    def asker(workers: int) -> Asker:
        return Asker(model, Renderer(processor, Pixels()), torch.device("cpu"), NEW_TOKENS, 1, workers)

    batches = [
        collate_prompts([row.rendered for row in part], processor.tokenizer.pad_token_id)
        for part in by_tokens(rows_ahead(asker(0), tasks, items), 1)
    ]
    tokens = sum(batch["input_ids"].numel() for batch in batches)

    def alone() -> None:
        for batch in batches:
            generate(model, processor.tokenizer, batch, NEW_TOKENS)

    def asked(workers: int) -> None:
        with appending(folder / "answers.jsonl", 0) as append:
            for answers in ask_items(asker(workers), tasks, items):
                append(answers)

    alone(), asked(1)
    found = []
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        forward, same, ahead = spent(alone), spent(lambda: asked(0)), spent(lambda: asked(1))
        found.append((ahead[0] / forward[0], ahead[1] / forward[0], same[0] / forward[0], forward[0]))
    names = ("cpu_ratio_vs_forward", "cpu_ratio_with_workers", "cpu_ratio_same_thread", "forward_cpu_seconds")
    return {name: statistics.median(column) for name, column in zip(names, zip(*found, strict=True), strict=True)} | {"tokens": tokens}


if __name__ == "__main__":
    main()
