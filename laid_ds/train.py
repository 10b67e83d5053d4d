"""Build, resume, loop, stop cleanly. One process per rank, started by a launcher:

deepspeed --num_gpus 2 --module laid_ds.train recipes/demo.toml losses.match=0
"""

from __future__ import annotations

import json
import math
import random
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from laid_ds import checkpoint, config, distributed, engine, schedule
from laid_ds.align import Align, layer_pairs
from laid_ds.config import Run
from laid_ds.data.batch import Batch, Prepare
from laid_ds.data.images import Pixels
from laid_ds.data.index import Dataset
from laid_ds.data.record import DataError
from laid_ds.data.stream import Stream
from laid_ds.distill import NonFiniteLoss, Student, Teacher, train_step
from laid_ds.evaluation.spectra import profile_heads
from laid_ds.metrics import Reporter
from laid_ds.models.attention import Tap, attention_shape, enable_checkpointing, listen, vision_tower
from laid_ds.models.family import trainable
from laid_ds.models.load import PreTrainedModel, load_config, load_model
from laid_ds.models.processor import OfflineProcessor, Renderer, check_same_tokenizer, load_processor
from laid_ds.models.rope_gain import gain_shapes, responder
from laid_ds.stop import StopRequest

DONE = "done.json"
MAY_CHANGE = ("logging.", "checkpoint.", "data.workers")  # keys that do not decide the outcome of a run
SHARES_OF_BATCH = ("data.micro_batch", "optimizer.accumulation")  # may change together with the ranks; their product with them may not

Pairs = tuple[tuple[int, int], ...]


@dataclass
class Training:
    """A run's finished parts."""

    student: Any
    """DeepSpeed engine around distill.Student."""
    teacher: Any | None
    """DeepSpeed engine around distill.Teacher."""
    stream: Stream
    counted_by: dict[str, str]


def train(run: Run) -> None:
    """Run to the end, or to a stop signal, from the latest checkpoint if there is one. Every rank calls it."""
    _open_output(run)
    seed_everything(run.seed + distributed.rank())
    training = build(run)
    reporter = Reporter(run.output, run.steps, run.logging, active=distributed.rank() == 0, run=config.as_tree(run))
    saved = checkpoint.latest(run.output)
    first = _resume(run, training, saved) if saved else 0
    reporter.say(f"{run.name}: step {first} of {run.steps}, {distributed.world_size()} ranks, output {run.output}")
    try:
        finished = loop(run, training, reporter, first, StopRequest().install())
    finally:
        reporter.stop()
    if finished < run.steps:
        reporter.say(f"stopped after step {finished}; the same command goes on from there")
    elif distributed.rank() == 0:
        (run.output / DONE).write_text(json.dumps({"steps": run.steps}))
        reporter.say(f"done; next: laid export {run.output} OUT")


def loop(run: Run, training: Training, reporter: Reporter, first: int, stop: StopRequest) -> int:
    """Steps `first` to run.steps; saves at intervals, at the end, and when asked to stop. Returns the number of finished steps."""
    batches = iter(training.stream)
    device = training.student.device
    reporter.start(first)
    for step in range(first, run.steps):
        engine.set_learning_rate(training.student, schedule.learning_rate_factor(step, run.steps, run.optimizer))
        micro_batches = [batch.to(device) for batch in _next_batches(batches, run.optimizer.accumulation)]
        omega = schedule.omega(schedule.progress(step, run.steps), run.match)
        values = train_step(training.student, training.teacher, micro_batches, run.losses, omega, training.counted_by)
        seen = _attention(training, micro_batches[-1]) if _due(step + 1, run.logging.attention_every_steps) else {}
        reporter.step(step + 1, values | _details(training, micro_batches) | seen)
        stopping = stop.agreed()
        if stopping or (step + 1) % run.checkpoint.every_steps == 0 or step + 1 == run.steps:
            state = {"step": step + 1, "stream": training.stream.state_dict()}
            checkpoint.save(training.student, run.output, state, run.checkpoint)
        if stopping:
            return step + 1
    return run.steps


def _next_batches(batches: Iterator[Batch], number: int) -> list[Batch]:
    """The micro-batches of one step. A sample that cannot be read stops all ranks together, so that none waits for another for ever."""
    found, failure = [], None
    try:
        found = list(islice(batches, number))
    except DataError as error:
        failure = error
    (failures,) = distributed.add([float(failure is not None)])
    if failure is not None:
        raise failure
    if failures:
        raise StoppedByOthers
    return found


class StoppedByOthers(RuntimeError):
    """Another rank met an error and tells of it."""


def build(run: Run) -> Training:
    """Load both models sharded, connect them, start the engines and the stream. Raises ValueError for anything that does not fit."""
    dataset = Dataset.open(list(run.data.shards))
    processor = load_processor(run.student.path)
    vocabulary = len(processor.tokenizer)
    if run.teacher is not None:
        check_same_tokenizer(processor, load_processor(run.teacher.path))
    pairs = _pairs(run)
    student, align = build_student(run, pairs, vocabulary)
    teacher = build_teacher(run, pairs, vocabulary) if run.teacher is not None else None
    counted_by = {"kl": "rows", "sft": "rows"} | (align.counted_by() if align is not None else {})
    return Training(student, teacher, build_stream(run, dataset, processor), counted_by)


def build_student(run: Run, pairs: Pairs, vocabulary: int) -> tuple[Any, Align | None]:
    """The engine around the student and its Align, and the Align (None without a teacher)."""
    mechanics = engine.read_deepspeed(run.student.deepspeed, run.student.dtype, run, trains=True)
    model = load_model(run.student.path, run.student.dtype, mechanics)
    if run.student.gradient_checkpointing:
        enable_checkpointing(model)
    if run.student.freeze_vision:
        vision_tower(model).requires_grad_(False)
    align = build_align(run, pairs, model) if run.teacher is not None else None
    layout = trainable(model.config).layout
    gains = {int(layer): responder(align.gain, int(layer), layout) for layer in align.gain} if align is not None else {}
    tap = Tap([student for student, _ in pairs])
    listen(model, tap, gains)
    student = Student(model, align, tap, run.losses, vocabulary, run.match.rows)
    return engine.training_engine(student, run, mechanics), align


def build_align(run: Run, pairs: Pairs, student: PreTrainedModel) -> Align:
    """Mixtures and gains for this pair of models."""
    shape = attention_shape(student.config)
    gains = gain_shapes(student) if run.gain.enabled else {}
    teacher = load_config(run.teacher.path)
    trainable(teacher)  # its logits are taken from the head alone, too
    return Align(run.align, pairs, shape, attention_shape(teacher), gains, getattr(torch, run.student.dtype))


def build_teacher(run: Run, pairs: Pairs, vocabulary: int) -> Any:
    """The engine around the frozen teacher."""
    mechanics = engine.read_deepspeed(run.teacher.deepspeed, run.teacher.dtype, run, trains=False)
    model = load_model(run.teacher.path, run.teacher.dtype, mechanics)
    tap = Tap([teacher for _, teacher in pairs])
    listen(model, tap)
    return engine.teacher_engine(Teacher(model, tap, vocabulary, shows_logits=run.losses.kl > 0), mechanics)


def build_stream(run: Run, dataset: Dataset, processor: OfflineProcessor) -> Stream:
    """This rank's endless stream of batches."""
    data, world = run.data, distributed.world_size()
    prepare = Prepare(
        render=Renderer(processor, Pixels(data.decoder, data.resizer)),
        pad_token=processor.tokenizer.pad_token_id,
        seed=run.seed,
        global_batch=data.micro_batch * world * run.optimizer.accumulation,
        image_range=partial(schedule.image_range, steps=run.steps, data=data),
        questions=data.questions,
    )
    return Stream(
        dataset,
        micro_batch=data.micro_batch,
        rank=distributed.rank(),
        world_size=world,
        seed=run.seed,
        prepare=prepare,
        shuffle=data.shuffle,
        weights=data.weights,
        on_bad=data.on_bad,
        workers=data.workers,
    )


def _pairs(run: Run) -> Pairs:
    """The layer pairs to compare; none when attention is not compared."""
    if run.teacher is None or not run.losses.listens:
        return ()
    layers = [load_config(path).get_text_config().num_hidden_layers for path in (run.student.path, run.teacher.path)]
    return layer_pairs(run.align.pairs, *layers)


def check(run: Run) -> None:
    """Everything that can be refused before a process is started: output folder, shards, engine files, models, tokenizers.

    Raises ValueError with the first thing that is wrong.
    """
    _check_output(run)
    Dataset.open(list(run.data.shards))
    processors = []
    for model, trains in ((run.student, True), (run.teacher, False)):
        if model is not None:
            engine.read_deepspeed(model.deepspeed, model.dtype, run, trains)
            family = trainable(load_config(model.path))
            if family.image_blocks and run.losses.match > 0:
                raise ValueError(f"{model.path}: image tokens of {family.model_type} see each other both ways; set losses.match = 0")
            processors.append(load_processor(model.path))
    if len(processors) == 2:
        check_same_tokenizer(*processors)
    _pairs(run)


def _check_output(run: Run) -> None:
    """Raises ValueError unless the folder is new, or belongs to this very run and is unfinished."""
    record = run.output / "run.json"
    if (run.output / DONE).is_file():
        raise ValueError(f"{run.output} holds a finished run; give another output=... or remove the folder")
    if record.is_file():
        differing = _differences(json.loads(record.read_text())["run"], config.as_tree(run))
        differing = [name for name in differing if not name.startswith(MAY_CHANGE + SHARES_OF_BATCH)]
        if differing:
            raise ValueError(
                f"{run.output} holds another run (it differs in {', '.join(differing)}); give another output=... or remove the folder"
            )
    elif run.output.is_dir() and any(path.name != "run.json.partial" for path in run.output.iterdir()):
        raise ValueError(f"{run.output} is not empty and holds no run; give another output=...")


def _open_output(run: Run) -> None:
    """Claim the run folder by writing the resolved run into it."""
    _check_output(run)
    _check_global_batch(run)
    record = run.output / "run.json"
    distributed.barrier()
    if distributed.rank() == 0 and not record.is_file():
        run.output.mkdir(parents=True, exist_ok=True)
        versions = {name: version(name) for name in ("laid-ds", "torch", "transformers", "deepspeed")}
        resolved = {"run": config.as_tree(run), "versions": versions, "world_size": distributed.world_size()}
        checkpoint.write_durably(record, json.dumps(resolved, indent=1))
    distributed.barrier()


def _check_global_batch(run: Run) -> None:
    """Raises ValueError unless a run goes on with as many samples per step as it began with, on whatever number of ranks."""
    record = run.output / "run.json"
    if not record.is_file():
        return
    began = json.loads(record.read_text())
    shares = began["run"]["data"]["micro_batch"], began["run"]["optimizer"]["accumulation"], began["world_size"]
    now = run.data.micro_batch, run.optimizer.accumulation, distributed.world_size()
    if math.prod(shares) != math.prod(now):
        raise ValueError(
            f"{run.output} began with {math.prod(shares)} samples per step (data.micro_batch {shares[0]} x optimizer.accumulation "
            f"{shares[1]} x {shares[2]} ranks), these are {math.prod(now)} ({now[0]} x {now[1]} x {now[2]}); keep the product the same"
        )


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the values in which two resolved runs differ."""
    names = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            names += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            names.append(prefix + key)
    return names


def _resume(run: Run, training: Training, saved: Path) -> int:
    """Go on from a checkpoint. On another number of ranks the random generators start from (seed, checkpoint, rank): the stream's draws
    do not use them, but match.rows does, which then samples other rows than an uninterrupted run."""
    seed_everything(zlib.crc32(f"{run.seed} {saved.name} {distributed.rank()}".encode()))
    state = checkpoint.restore(training.student, saved)
    training.stream.load_state_dict(state["stream"])
    return state["step"]


def _details(training: Training, batches: list[Batch]) -> dict[str, Any]:
    """What is worth recording of a step beside the loss."""
    align = training.student.module.align
    mixture = {"mixture_entropy": align.mixture_entropy()} if align is not None and align.mixing else {}
    return {
        "lr": training.student.optimizer.param_groups[0]["lr"],
        "gradient_norm": float(training.student.get_global_grad_norm()),
        **mixture,
        "keys": [key for batch in batches for key in batch.keys],
    }


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0 and distributed.rank() == 0


def _attention(training: Training, batch: Batch) -> dict[str, Any]:
    """Statistics of the compared layers of both models on rank 0's last micro-batch."""
    engines = {"student": training.student, "teacher": training.teacher}
    return {
        "attention": {
            name: profile_heads(engine.module.tap.captured, batch.segments) for name, engine in engines.items() if engine is not None
        }
    }


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def main(arguments: list[str] | None = None) -> int:
    """RECIPE [section.key=value ...]; DeepSpeed's launcher puts --local_rank before them. Returns the exit status."""
    words = [word for word in (sys.argv[1:] if arguments is None else arguments) if not word.startswith("--local_rank")]
    try:
        if not words:
            raise ValueError("no recipe given; usage: deepspeed --num_gpus N --module laid_ds.train RECIPE [section.key=value ...]")
        run = config.load(words[0], words[1:])
        engine.start_processes()
        train(run)
    except StoppedByOthers:
        return 2
    except (ValueError, NonFiniteLoss) as error:
        if distributed.rank() == 0 or isinstance(error, DataError | NonFiniteLoss):
            sys.stderr.write(f"laid: {error}\n")  # one write: ranks that speak together do not mix their words
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
