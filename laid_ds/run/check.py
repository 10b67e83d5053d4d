"""What `laid train` refuses before a process is started, so that what it accepts also runs: engine files, model folders down to the
headers of their weights, real samples rendered as a worker would, and room on the disk. Nothing is loaded and nothing is written, but
that the teacher of recorded lessons was read (run/lessons.py).
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from contextlib import suppress

import numpy as np

from laid_ds.config import Model, Run
from laid_ds.data.batch import Prepare
from laid_ds.data.dataset import Dataset
from laid_ds.data.haystack import LOOKED_AT, describe_windows
from laid_ds.data.lessons import read_manifest
from laid_ds.data.record import DataError, Sample, num_pieces
from laid_ds.data.stream import Stream, budgeted_lengths
from laid_ds.disk import no_room
from laid_ds.evaluation.progress import held_out
from laid_ds.evaluation.window import notes_on
from laid_ds.models.attention import vision_tower
from laid_ds.models.chat import learn_template, template_note
from laid_ds.models.family import check_packable, trainable
from laid_ds.models.image_pixels import limit_pixels
from laid_ds.models.load import PreTrainedModel, open_model
from laid_ds.models.lora import check_peft, factor_elements
from laid_ds.models.processor import (
    ProcessorMixin,
    Renderer,
    check_chat_template,
    check_same_pictures,
    check_same_tokenizer,
    check_tokens,
    load_processor,
)
from laid_ds.plan.lengths import build_packing
from laid_ds.plan.pair import BYTES, OPTIMIZER_BYTES, read_pair
from laid_ds.run.build import (
    build_align,
    build_pairs,
    build_prepare,
    build_renderer,
    build_stream,
    check_probed,
    check_shared_rows,
    config_of,
)
from laid_ds.run.lessons import load_head, with_lessons
from laid_ds.run.metrics import check_loggers
from laid_ds.runtime import checkpoint, engine

SAMPLES = 64  # of each source that are rendered
IMAGES = 640  # of all sources that are rendered, after the first few samples: some 30 s of photographs
LEAST_SAMPLES = 4


def check(run: Run) -> None:
    """Raises ValueError with the first thing that is wrong."""
    check_loggers(run.logging)
    dataset = Dataset.open(list(run.data.shards))
    processor = _check_folders(run)
    data_notes(run)
    check_probed(run, read=True)
    pairs = build_pairs(run)
    if run.student.lora is not None:
        _check_lora(run)
    student = _open(run.student, processor)
    if run.taught:
        _open(run.teacher, processor)
    if run.taught and run.teacher.lessons is not None:
        check_lessons(run)
    trained, frozen = _elements(run, student)
    if run.teacher is not None:
        trained += sum(parameter.numel() for parameter in build_align(run, pairs, student).parameters())
    if run.logging.peak_tflops:
        read_pair(run)
    renderer = build_renderer(run, processor)
    if run.data.tokens_per_pack is not None:
        _check_packs(run, dataset, renderer)
    check_samples(run, dataset, renderer)
    check_room(run, trained, frozen)


def data_notes(run: Run) -> list[str]:
    """What a user should know of what the data allow, one sentence each. Raises ValueError where they do not allow what the run asks."""
    dataset, packed = Dataset.open(list(run.data.shards)), run.data.tokens_per_pack is not None
    of_training = describe_windows(dataset, run.data.images, packed) if run.data.images else []
    of_evaluation = [f"held out: {note}" for note in notes_on(held_out(run.evaluation).left_out)] if run.evaluation else []
    return of_training + of_evaluation + _known_notes(run, dataset) + _number_notes(run, dataset) + _template_notes(run, dataset)


def _known_notes(run: Run, dataset: Dataset) -> list[str]:
    """Whether what is held out is trained on: the same sample, by its key and its bytes, as the indices say."""
    if run.evaluation is None:
        return []
    asked = Dataset.open(run.evaluation.shards)
    held = _samples(asked, range(min(run.evaluation.haystacks, len(asked))))
    same = np.flatnonzero(np.isin(_checksums(dataset), [crc32 for _, crc32 in held]))
    known = held & _samples(dataset, same.tolist())
    if not known:
        return []
    return [
        f"held out: {len(known)} of the {len(held)} haystacks of {run.evaluation.shards} are among the training samples"
        f" ({min(known)[0].decode()} is one): what is measured on them is learned by heart; hold out other ones"
    ]


def _samples(dataset: Dataset, indices: Iterable[int]) -> set[tuple[bytes, int]]:
    """(key, crc32) of some samples."""
    keys, crc32 = dataset.keys, _checksums(dataset)
    return {(bytes(keys[i]), int(crc32[i])) for i in indices}


def _checksums(dataset: Dataset) -> np.ndarray:
    return np.concatenate([shard.crc32 for shard in dataset.shards])


def _number_notes(run: Run, dataset: Dataset) -> list[str]:
    """Numbers that the data or the run are too short for: nothing happens as they say."""
    notes, images, warmup = [], run.data.images, run.optimizer.warmup_steps
    if images is not None:
        chosen = [i for number in range(len(run.data.shards)) for i in dataset.spread(number, LOOKED_AT)]
        most = max((num_pieces(dataset.record(i)) for i in chosen), default=0)
        if most < images[0]:
            notes.append(f"data.images is {list(images)}, and the samples looked at have {most} images at most: none gets a smaller window")
    if warmup >= run.steps:
        notes.append(f"optimizer.warmup_steps is {warmup} of {run.steps} steps: no rate gets where the recipe says; 5 % is usual")
    return notes


def check_lessons(run: Run) -> Stream:
    """Raises ValueError unless the recorded lessons of a run are its own, whole in size, and enough; a stream that reads them.

    The ranks are not there yet: how many samples a step has is taken from the recording, and looked at again by them."""
    recorded = read_manifest(run.teacher.lessons)["per_step"]
    dataset, processor = Dataset.open(list(run.data.shards)), load_processor(run.student.path, run.student.trust_remote_code)
    stream = build_stream(run, dataset, build_renderer(run, processor), recorded)
    load_head(run)
    return with_lessons(run, build_pairs(run), stream, recorded)


def _template_notes(run: Run, dataset: Dataset) -> list[str]:
    """Whether the teacher is shown another text than its own chat template would write, by a few samples of each source."""
    if not run.taught:
        return []
    student, teacher = (load_processor(model.path, model.trust_remote_code) for model in (run.student, run.teacher))
    if student.chat_template == teacher.chat_template or teacher.chat_template is None:
        return []
    try:
        own, shown = learn_template(teacher), learn_template(student)
    except ValueError as error:
        return [f"the teacher's own chat template cannot be compared with the student's, which it is shown: {error}"]
    chosen = [i for number in range(len(run.data.shards)) for i in dataset.spread(number, LEAST_SAMPLES)]
    for i in chosen:
        with suppress(ValueError):  # a sample that cannot be read, or not be written by the student's template, is told of by its key
            if note := template_note(shown, own, dataset.record(i).turns):
                return [note]
    return []


def _check_folders(run: Run) -> ProcessorMixin:
    """The small files of both models: engines, configs, processors, tokenizers. Returns the student's processor."""
    check_shared_rows(run)
    processors = []
    for model, trains in ((run.student, True), (run.teacher, False)):
        if model is not None:
            engine.read_deepspeed(model.deepspeed, model.dtype, run, trains)
            family = trainable(config_of(model))
            if family.image_blocks and run.losses.match > 0:
                raise ValueError(f"{model.path}: image tokens of {family.model_type} see each other both ways; set losses.match = 0")
            processors.append(load_processor(model.path, model.trust_remote_code))
    check_chat_template(processors[0], run.student.path)
    for processor in processors:
        limit_pixels(processor, run.data.image_pixels)
    if len(processors) == 2:
        check_same_tokenizer(*processors)
        check_same_pictures(*processors)
    return processors[0]


def _open(model: Model, processor: ProcessorMixin) -> PreTrainedModel:
    """The model on the meta device. Raises ValueError when its weights do not load, or lack tokens that the processor writes."""
    opened = open_model(model.path, model.trust_remote_code)
    check_tokens(processor, opened.config, opened.get_output_embeddings().weight.shape[0], model.path)
    return opened


def _elements(run: Run, student: PreTrainedModel) -> tuple[int, int]:
    """How many elements of the student, or of factors beside it, the optimizer moves, and how many stand still."""
    total = student.num_parameters()
    if run.student.lora is not None:
        return factor_elements(student, run.student.lora), total
    frozen = vision_tower(student).num_parameters() if run.student.freeze_vision else 0
    frozen += student.get_input_embeddings().weight.numel() if run.student.freeze_embeddings else 0
    return total - frozen, frozen


def _check_lora(run: Run) -> None:
    """Raises ValueError without peft, and for compared keys that the factors cannot move."""
    check_peft()
    targets = run.student.lora.targets
    if any(layer == 0 for layer, _ in build_pairs(run)) and "k_proj" not in targets:
        raise ValueError(
            f"the keys of layer 0 are compared, and LoRA on {list(targets)} cannot move them: add k_proj to student.lora.targets, or leave"
            " layer 0 out of align.pairs"
        )


def _check_packs(run: Run, dataset: Dataset, renderer: Renderer) -> None:
    """Raises ValueError unless every sample fits a pack, and both models keep the samples of a row apart and number positions alike."""
    found = [check_packable(config_of(model)) for model in (run.student, run.teacher) if model is not None]
    if len({(family.positions, family.positions == "1d" or family.model_type) for family in found}) > 1:
        raise ValueError(
            f"student ({found[0].model_type}) and teacher ({found[1].model_type}) number positions in their own ways, and one packed row"
            " serves both: leave out data.tokens_per_pack"
        )
    budgeted_lengths(dataset, build_packing(run, dataset, renderer))


def check_samples(run: Run, dataset: Dataset, renderer: Renderer) -> None:
    """Render samples spread over each source, with windows from all over the run. Raises DataError for the first that cannot be rendered
    or has no answer to learn from, and ValueError for a source none of whose windows has one.

    Where bad samples are to be replaced (`data.on_bad`), a source is refused only when all that were looked at are bad.
    """
    prepare = build_prepare(run, renderer, run.data.micro_batch * run.optimizer.accumulation)
    for number, source in enumerate(run.data.shards):
        chosen = dataset.spread(number, SAMPLES)
        random.Random(number).shuffle(chosen)  # a source is not looked at to its end where its samples hold many images
        _check_source(run, dataset, prepare, source, chosen, IMAGES // len(run.data.shards))


def _check_source(run: Run, dataset: Dataset, prepare: Prepare, source: str, indices: list[int], most_images: int) -> None:
    looked_at, images, answered, refused = 0, 0, 0, []
    for turn, index in enumerate(indices):
        if turn >= LEAST_SAMPLES and images >= most_images:
            break
        looked_at += 1
        position = turn * run.steps // len(indices) * prepare.global_batch + turn % prepare.global_batch
        try:
            supervised, num_images = _rendered(prepare, position, dataset.read(index))
            images, answered = images + num_images, answered + supervised
        except DataError as error:
            if run.data.on_bad == "raise":
                raise
            refused.append(error)
    if len(refused) == looked_at:
        raise ValueError(f"all {looked_at} samples of {source} that were looked at are bad, the first: {refused[0] if refused else 'none'}")
    if not answered:
        raise ValueError(
            f"none of the {looked_at} windows of {source} that were looked at holds an answer to learn from, though the samples do: change"
            " data.images or data.questions"
        )


def _rendered(prepare: Prepare, position: int, sample: Sample) -> tuple[bool, int]:
    """Whether the sample at this position of the stream has a supervised token, and its images. Raises DataError when it can have none."""
    batch = prepare.batch(prepare.windows([[(position, sample)]] if prepare.packs else [(position, sample)]))
    if batch.supervised.any():
        return True, batch.num_images
    if prepare.batch([sample]).supervised.any():  # only this window has no such question
        return False, batch.num_images
    spoken = any(turn.role == "assistant" for turn in sample.turns)
    cause = "none of the tokens of its assistant turns is one" if spoken else "it has no assistant turn"
    raise DataError(f"the sample has no answer to learn from: {cause}; mend it, or leave it out of the shards").at(sample.origin)


def check_room(run: Run, trained: int, frozen: int) -> None:
    """Raises ValueError unless the disk has room for the checkpoints that come next: two of a new run, one where two are there.

    trained, frozen: elements. A checkpoint holds fp32 weights and two moments of what is trained, and the rest in its own dtype.
    """
    each = OPTIMIZER_BYTES * trained + BYTES[run.student.dtype] * frozen
    saves = -(-run.steps // run.checkpoint.every_steps)
    number = max(1, min(2, saves) - len(checkpoint.all_saved(run.output)))
    lacking = no_room(run.output, f"{number} checkpoint{'s' * (number > 1)} of this run", number * each)
    if lacking:
        raise ValueError(lacking)
