"""A recipe's parts, made: both models loaded sharded and connected, their engines started, the stream opened."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from laid_ds.config import Model, Run
from laid_ds.data.batch import Prepare
from laid_ds.data.dataset import Dataset
from laid_ds.data.haystack import describe_windows
from laid_ds.data.images import Pixels
from laid_ds.data.order import Packing
from laid_ds.data.stream import Stream, budgeted_lengths
from laid_ds.evaluation.progress import held_out
from laid_ds.evaluation.window import notes_on
from laid_ds.method import schedule
from laid_ds.method.align import Align, layer_pairs
from laid_ds.method.distill import Student, Teacher
from laid_ds.models.attention import Tap, attention_shape, enable_checkpointing, gives_lse, listen, vision_tower
from laid_ds.models.family import check_packable, trainable
from laid_ds.models.load import PreTrainedModel, load_config, load_model
from laid_ds.models.lora import add_lora, check_peft
from laid_ds.models.positions import position_rule
from laid_ds.models.processor import ProcessorMixin, Renderer, check_same_tokenizer, load_processor
from laid_ds.models.rope_gain import gain_shapes, responder
from laid_ds.runtime import distributed, engine

COUNTED = 64  # samples whose tokens are counted before packs are planned
Pairs = tuple[tuple[int, int], ...]


@dataclass
class Training:
    """A run's finished parts."""

    student: Any
    """DeepSpeed engine around distill.Student."""
    teacher: Any | None
    """DeepSpeed engine around distill.Teacher; None where no term of the loss asks it."""
    stream: Stream
    counted_by: dict[str, str]
    renderer: Renderer
    vocabulary: int
    """Size of the shared, real vocabulary."""


def build(run: Run) -> Training:
    """Load both models sharded, connect them, start the engines and the stream. Raises ValueError for anything that does not fit."""
    dataset = Dataset.open(list(run.data.shards))
    processor = load_processor(run.student.path)
    vocabulary = len(processor.tokenizer)
    if run.teacher is not None:
        check_same_tokenizer(processor, load_processor(run.teacher.path))
    pairs = _pairs(run)
    student, align = build_student(run, pairs, vocabulary)
    teacher = build_teacher(run, pairs, vocabulary) if run.taught else None
    counted_by = {"kl": "rows", "sft": "rows"} | (align.counted_by() if align is not None else {})
    renderer = build_renderer(run, processor)
    return Training(student, teacher, build_stream(run, dataset, renderer), counted_by, renderer, vocabulary)


def build_student(run: Run, pairs: Pairs, vocabulary: int) -> tuple[Any, Align | None]:
    """The engine around the student and its Align, and the Align (None without a teacher)."""
    mechanics = engine.read_deepspeed(run.student.deepspeed, run.student.dtype, run, trains=True)
    model = load_model(run.student.path, run.student.dtype, mechanics)
    if run.student.gradient_checkpointing:
        enable_checkpointing(model, offload=run.student.gradient_checkpointing == "offload")
    if run.student.freeze_vision:
        vision_tower(model).requires_grad_(False)
    if run.student.lora is not None:
        add_lora(model, run.student.lora, run.seed)
    align = build_align(run, pairs, model) if run.teacher is not None else None
    layout = trainable(model.config).layout
    gains = {int(layer): responder(align.gain, int(layer), layout) for layer in align.gain} if align is not None else {}
    tap = Tap([student for student, _ in pairs], lse=_asks_lse(run, run.student))
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
    tap = Tap([teacher for _, teacher in pairs], lse=_asks_lse(run, run.teacher))
    listen(model, tap)
    return engine.teacher_engine(Teacher(model, tap, vocabulary, shows_logits=run.losses.kl > 0), mechanics)


def _asks_lse(run: Run, model: Model) -> bool:
    """Whether matching takes the log-sum-exp from attention, which has it anyway: it then need not find it again."""
    return run.losses.match > 0 and gives_lse(load_config(model.path), getattr(torch, model.dtype))


def build_renderer(run: Run, processor: ProcessorMixin) -> Renderer:
    """Samples to tensors, with position ids where samples are to share a row."""
    positions = position_rule(load_config(run.student.path)) if run.data.tokens_per_pack is not None else None
    return Renderer(processor, Pixels(run.data.decoder, run.data.resizer), positions=positions)


def build_stream(run: Run, dataset: Dataset, renderer: Renderer) -> Stream:
    """This rank's endless stream of batches."""
    data, world = run.data, distributed.world_size()
    per_step = data.micro_batch * world * run.optimizer.accumulation
    prepare = Prepare(
        render=renderer,
        pad_token=renderer.processor.tokenizer.pad_token_id,
        seed=run.seed,
        global_batch=per_step,
        image_range=partial(schedule.image_range, steps=run.steps, data=data),
        questions=data.questions,
        packs=data.tokens_per_pack is not None,
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
        packing=_packing(run, dataset, renderer, per_step),
        on_bad=data.on_bad,
        workers=data.workers,
    )


def _packing(run: Run, dataset: Dataset, renderer: Renderer, packs_per_step: int = 1) -> Packing | None:
    """How packs are planned, in the student's tokens, by what it makes of some samples spread over the data; on the safe side."""
    data = run.data
    if data.tokens_per_pack is None:
        return None
    chosen = sorted({i * len(dataset) // COUNTED for i in range(COUNTED)}, key=lambda i: dataset.lengths[i])
    records = {i: dataset.record(i) for i in chosen}
    scale = 1.0
    if data.count_tokens == "estimate":  # short samples may be off by more, but by few tokens
        scale = max(renderer.count(records[i]) / int(dataset.lengths[i]) for i in chosen[len(chosen) // 2 :])
    of_image = [renderer.image_length(image.width, image.height) for record in records.values() for image in record.images]
    return Packing(
        data.tokens_per_pack,
        group=packs_per_step,
        tokens=data.count_tokens,
        scale=scale,
        images=data.images,
        image_tokens=min(of_image, default=0),
    )


def _pairs(run: Run) -> Pairs:
    """The layer pairs to compare; none when attention is not compared."""
    if run.teacher is None or not run.losses.listens:
        return ()
    layers = [load_config(path).get_text_config().num_hidden_layers for path in (run.student.path, run.teacher.path)]
    return layer_pairs(run.align.pairs, *layers)


def data_notes(run: Run) -> list[str]:
    """What a user should know of what the data allow, one sentence each. Raises ValueError where they do not allow what the run asks."""
    dataset, packed = Dataset.open(list(run.data.shards)), run.data.tokens_per_pack is not None
    of_training = describe_windows(dataset, run.data.images, packed) if run.data.images else []
    of_evaluation = [f"held out: {note}" for note in notes_on(held_out(run.evaluation).left_out)] if run.evaluation else []
    return of_training + of_evaluation


def check(run: Run) -> None:
    """What can be refused before a process is started: shards, engine files, models, tokenizers. Raises ValueError with the first thing
    that is wrong."""
    dataset = Dataset.open(list(run.data.shards))
    data_notes(run)
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
    if run.data.tokens_per_pack is not None:
        _check_packs(run, dataset, build_renderer(run, processors[0]))
    if run.student.lora is not None:
        _check_lora(run)
    _pairs(run)


def _check_lora(run: Run) -> None:
    """Raises ValueError without peft, and for compared keys that the factors cannot move."""
    check_peft()
    targets = run.student.lora.targets
    if any(layer == 0 for layer, _ in _pairs(run)) and "k_proj" not in targets:
        raise ValueError(
            f"the keys of layer 0 are compared, and LoRA on {list(targets)} cannot move them: add k_proj to student.lora.targets, or leave"
            " layer 0 out of align.pairs"
        )


def _check_packs(run: Run, dataset: Dataset, renderer: Renderer) -> None:
    """Raises ValueError unless every sample fits a pack, and both models keep the samples of a row apart and number positions alike."""
    budgeted_lengths(dataset, _packing(run, dataset, renderer))
    found = [check_packable(load_config(model.path)) for model in (run.student, run.teacher) if model is not None]
    if len({(family.positions, family.positions == "1d" or family.model_type) for family in found}) > 1:
        raise ValueError(
            f"student ({found[0].model_type}) and teacher ({found[1].model_type}) number positions in their own ways, and one packed row"
            " serves both: leave out data.tokens_per_pack"
        )
