"""A recipe's parts, made: both models loaded sharded and connected, their engines started, the stream opened."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from laid_ds.config import Model, Run
from laid_ds.data.batch import Prepare
from laid_ds.data.dataset import Dataset
from laid_ds.data.images import Pixels
from laid_ds.data.stream import Stream
from laid_ds.evaluation.heads import read_probe
from laid_ds.method import schedule
from laid_ds.method.align import Align, compared_heads, layer_pairs
from laid_ds.method.distill import OwnTeacher, RecordedTeacher, Student, Teacher
from laid_ds.models.attention import Tap, attention_shape, enable_checkpointing, gives_lse, listen, vision_tower
from laid_ds.models.family import check_sliceable, trainable
from laid_ds.models.identity import difference, model_marks, read_whole
from laid_ds.models.image_pixels import limit_pixels
from laid_ds.models.load import PretrainedConfig, PreTrainedModel, load_config, load_model
from laid_ds.models.lora import add_lora
from laid_ds.models.positions import position_rule
from laid_ds.models.processor import ProcessorMixin, Renderer, check_same_tokenizer, load_processor
from laid_ds.models.rope_gain import gain_shapes, responder
from laid_ds.plan.lengths import build_packing
from laid_ds.run.lessons import load_head, with_lessons
from laid_ds.runtime import distributed, engine
from laid_ds.sequence import ALONE, SequenceGroup

Pairs = tuple[tuple[int, int], ...]


@dataclass
class Training:
    """A run's finished parts."""

    student: Any
    """DeepSpeed engine around distill.Student."""
    teacher: Any | None
    """DeepSpeed engine around distill.Teacher, or what shows recorded lessons; None where no term of the loss asks it."""
    stream: Stream
    counted_by: dict[str, str]
    renderer: Renderer
    vocabulary: int
    """Size of the shared, real vocabulary."""


def build(run: Run) -> Training:
    """Load both models sharded, connect them, start the engines and the stream. Raises ValueError for anything that does not fit."""
    check_shared_rows(run)
    dataset = Dataset.open(list(run.data.shards))
    processor = load_processor(run.student.path, run.student.trust_remote_code)
    vocabulary = len(processor.tokenizer)
    if run.teacher is not None:
        check_same_tokenizer(processor, load_processor(run.teacher.path, run.teacher.trust_remote_code))
    distributed.on_rank_0(partial(check_probed, run, read=False))
    pairs = build_pairs(run)
    group = distributed.sequence_group(run.sequence_parallel)
    student, align = build_student(run, pairs, vocabulary, group)
    recorded = run.taught and run.teacher.lessons is not None
    if recorded:
        teacher = RecordedTeacher(load_head(run), student.device, vocabulary, run.losses.kl > 0, group)
    else:
        teacher = build_teacher(run, pairs, vocabulary, student, group=group) if run.taught else None
    counted_by = {"kl": "rows", "sft": "rows"} | (align.counted_by(run.match.rows_from) if align is not None else {})
    renderer = build_renderer(run, processor)
    stream = build_stream(run, dataset, renderer)
    if recorded:
        stream = with_lessons(run, pairs, stream, samples_per_step(run))
    return Training(student, teacher, stream, counted_by, renderer, vocabulary)


def check_shared_rows(run: Run) -> None:
    """Raises ValueError where ranks are to share rows and one of the models cannot be run on a slice of them."""
    if run.sequence_parallel == 1:
        return
    for model in filter(None, (run.student, run.teacher)):
        check_sliceable(config_of(model))
    if dropout := getattr(config_of(run.student).get_text_config(), "attention_dropout", 0.0):
        raise ValueError(
            f"{run.student.path}: attention_dropout is {dropout}, and attention over rows that ranks share has none: set it to 0 in the"
            " config, or sequence_parallel = 1"
        )


def build_student(run: Run, pairs: Pairs, vocabulary: int, group: SequenceGroup = ALONE) -> tuple[Any, Align | None]:
    """The engine around the student and its Align, and the Align (None without a teacher). group: the ranks that share each batch."""
    mechanics = engine.read_deepspeed(run.student.deepspeed, run.student.dtype, run, trains=True)
    model = load_model(run.student.path, run.student.dtype, mechanics, run.student.trust_remote_code)
    if run.student.gradient_checkpointing:
        enable_checkpointing(model, offload=run.student.gradient_checkpointing == "offload")
    if run.student.freeze_vision:
        vision_tower(model).requires_grad_(False)
    if run.student.freeze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    if run.student.lora is not None:
        add_lora(model, run.student.lora, run.seed)
    align = build_align(run, pairs, model) if run.teacher is not None else None
    layout = trainable(model.config).layout
    gains = {int(layer): responder(align.gain, int(layer), layout) for layer in align.gain} if align is not None else {}
    tap = Tap([student for student, _ in pairs], lse=asks_lse(run, run.student))
    listen(model, tap, gains, group=group)
    student = Student(model, align, tap, run.losses, vocabulary, run.match)
    return engine.training_engine(student, run, mechanics), align


def build_align(run: Run, pairs: Pairs, student: PreTrainedModel) -> Align:
    """Mixtures and gains for this pair of models."""
    gains = gain_shapes(student) if run.gain.enabled else {}
    teacher = config_of(run.teacher)
    trainable(teacher)  # its logits are taken from the head alone, too
    shapes = [_shape(config, [pair[i] for pair in pairs]) for i, config in enumerate((student.config, teacher))]
    return Align(run.align, pairs, *shapes, gains, getattr(torch, run.student.dtype), run.keeps_one_hot)


def _shape(config: PretrainedConfig, layers: list[int]) -> tuple[int, int, int]:
    """(H, K, D) of the compared layers. Raises ValueError where they differ."""
    found = {attention_shape(config, layer) for layer in layers or [-1]}
    if len(found) > 1:
        raise ValueError(
            f"the compared layers {layers} of {config.model_type} differ in their heads (number, of keys, size: {sorted(found)}); let"
            " align.pairs name layers of one kind"
        )
    return found.pop()


def build_teacher(
    run: Run, pairs: Pairs, vocabulary: int, student: Any = None, kind: type[Teacher] = Teacher, group: SequenceGroup = ALONE
) -> Any:
    """The engine around the frozen teacher; or, of a student with LoRA that teaches itself, the same model without what was learned."""
    if run.teacher.self and run.student.lora is not None:
        tap = Tap([teacher for _, teacher in pairs], lse=asks_lse(run, run.student))
        return OwnTeacher(student, tap, vocabulary, shows_logits=run.losses.kl > 0)
    mechanics = engine.read_deepspeed(run.teacher.deepspeed, run.teacher.dtype, run, trains=False)
    model = load_model(run.teacher.path, run.teacher.dtype, mechanics, run.teacher.trust_remote_code)
    tap = Tap([teacher for _, teacher in pairs], lse=asks_lse(run, run.teacher))
    listen(model, tap, group=group)
    return engine.teacher_engine(kind(model, tap, vocabulary, shows_logits=run.losses.kl > 0), mechanics)


def config_of(model: Model) -> PretrainedConfig:
    """The config in a model's folder. Raises ValueError when there is none that may be used."""
    return load_config(model.path, model.trust_remote_code)


def asks_lse(run: Run, model: Model) -> bool:
    """Whether matching takes the log-sum-exp from attention, which has it anyway: it then need not find it again."""
    return run.losses.match > 0 and gives_lse(config_of(model), getattr(torch, model.dtype))


def build_renderer(run: Run, processor: ProcessorMixin) -> Renderer:
    """Samples to tensors, their images within the run's limits, with position ids where samples are to share a row. Raises ValueError for
    limits that the family cannot keep."""
    positions = position_rule(config_of(run.student)) if run.data.tokens_per_pack is not None else None
    limited, pixels = limit_pixels(processor, run.data.image_pixels), Pixels(run.data.decoder, run.data.resizer)
    return Renderer(limited, pixels, positions=positions, number_images=run.data.number_images)


def samples_per_step(run: Run) -> int:
    """Samples (with packing packs) of an optimizer step of these ranks. Raises ValueError unless sequence_parallel divides them."""
    return run.data.micro_batch * run.optimizer.accumulation * run.groups(distributed.world_size())


def build_prepare(run: Run, renderer: Renderer, per_step: int) -> Prepare:
    """What a data worker makes of the samples at their positions; per_step: samples per optimizer step over all ranks."""
    return Prepare(
        render=renderer,
        pad_token=renderer.processor.tokenizer.pad_token_id,
        seed=run.seed,
        global_batch=per_step,
        image_range=partial(schedule.image_range, steps=run.steps, data=run.data),
        questions=run.data.questions,
        packs=run.data.tokens_per_pack is not None,
        multiple=SequenceGroup(run.sequence_parallel).multiple,
        distractors=run.teacher.distractors if run.taught and run.teacher.sees == "needles" and run.teacher.lessons is None else None,
    )


def build_stream(run: Run, dataset: Dataset, renderer: Renderer, per_step: int | None = None) -> Stream:
    """This rank's endless stream of batches. per_step: samples of an optimizer step, where these ranks, each alone, are not the run's."""
    data, shared = run.data, 1 if per_step else run.sequence_parallel
    per_step = per_step or samples_per_step(run)
    return Stream(
        dataset,
        micro_batch=data.micro_batch,
        rank=distributed.rank() // shared,
        world_size=distributed.world_size() // shared,
        seed=run.seed,
        prepare=build_prepare(run, renderer, per_step),
        shuffle=data.shuffle,
        weights=data.weights,
        packing=build_packing(run, dataset, renderer, per_step),
        on_bad=data.on_bad,
        workers=data.workers,
    )


def build_pairs(run: Run) -> Pairs:
    """The layer pairs to compare; none when attention is not compared. Raises ValueError for layers or heads that do not exist."""
    if run.teacher is None or not run.losses.listens:
        return ()
    configs = [config_of(model) for model in (run.student, run.teacher)]
    pairs = layer_pairs(run.align.pairs, *(config.get_text_config().num_hidden_layers for config in configs))
    for key, heads in (("heads", run.align.heads), ("start", run.align.start)):
        compared_heads(heads, pairs, *(attention_shape(config)[0] for config in configs), key=key)
    return pairs


def check_probed(run: Run, read: bool) -> None:
    """Raises ValueError unless the probe looked at the weights that the run starts from: by the sizes of their files and, with `read`, by
    all of them whose time differs."""
    if not run.losses.listens or run.align.probe is None or not run.align.probe.is_file():
        return
    probe = read_probe(run.align.probe)
    for who, looks, model in (("student", probe.student, run.student), ("teacher", probe.teacher, run.teacher)):
        marks = model_marks(model.path, [looks.files])
        why = difference(looks.files, marks)
        if why is None and read:
            why = difference(looks.files, read_whole(model.path, marks))
        if why is not None:
            raise ValueError(
                f"{run.align.probe} is a probe of another {who} than {model.path}: {why}; `laid probe {run.teacher.path} SHARDS"
                f" --student {run.student.path} --out {run.align.probe}` writes that of this pair"
            )
