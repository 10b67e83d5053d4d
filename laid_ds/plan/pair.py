"""What decides the memory and the time of a run: its recipe, the sizes of both models, the mechanics of both engines, the machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laid_ds.config import Model, Run
from laid_ds.method.align import compared_heads, layer_pairs
from laid_ds.models.family import check_sliceable
from laid_ds.models.sizes import Sizes, model_sizes, read_config
from laid_ds.runtime.engine import read_deepspeed

BYTES = {"float32": 4, "bfloat16": 2}
FP32 = 4
OPTIMIZER_BYTES = 12  # per parameter: master copy and two moments in fp32


@dataclass(frozen=True)
class Machine:
    gpus: int
    gpu_bytes: int
    peak_flops: float
    """Per second and GPU, in the dtype of the run."""
    mfu: float
    """Share of the peak that is reached (model FLOPs utilisation); an assumption."""


@dataclass(frozen=True)
class Pair:
    """Everything of a run that decides its memory."""

    run: Run
    student: Sizes
    teacher: Sizes | None
    student_zero: dict[str, Any]
    """`zero_optimization` of the engine's JSON."""
    teacher_zero: dict[str, Any]

    @property
    def sliceable(self) -> bool:
        """Whether ranks can share the rows of both models."""
        return self.student.sliceable and (self.teacher is None or self.teacher.sliceable)


def read_pair(run: Run, student_config: Path | None = None, teacher_config: Path | None = None) -> Pair:
    """What a plan needs of a recipe: configs of the models' folders, or of the JSON files given instead, and of the engines.

    Raises ValueError for a missing or wrong file, for a family that cannot be trained or planned, and for what it cannot do: a gain where
    none folds, freezing a vision tower that is not found, rows that several ranks share.
    """

    def sizes(model: Model, path: Path | None) -> Sizes:
        path = path or model.path / "config.json"
        try:
            config = read_config(path)
            if run.sequence_parallel > 1:
                check_sliceable(config)
            return model_sizes(config, model.dtype)
        except ValueError as error:
            raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error

    student = sizes(run.student, student_config)
    if run.student.freeze_vision and run.student.lora is None and student.vision is None:
        raise ValueError(f"{student.name} has no vision tower that we know by its name; set student.freeze_vision = false")
    if has_gains(run) and student.gains is None:
        raise ValueError(f"a RoPE gain folds nowhere in {student.name}: set gain.enabled=false")
    if not run.taught:
        return Pair(run, student, None, _zero(run.student, run, True), {})
    teacher = sizes(run.teacher, teacher_config or (student_config if run.teacher.self else None))
    return Pair(run, student, teacher, _zero(run.student, run, True), _zero(run.teacher, run, False))


def _zero(model: Model, run: Run, trains: bool) -> dict[str, Any]:
    return read_deepspeed(model.deepspeed, model.dtype, run, trains).get("zero_optimization", {})


def compared(pair: Pair) -> tuple[tuple[int, int], ...]:
    """The (student, teacher) layers whose attention is compared."""
    if pair.teacher is None or not pair.run.losses.listens:
        return ()
    return layer_pairs(pair.run.align.pairs, pair.student.layers, pair.teacher.layers)


def moves(run: Run, vision: bool) -> bool:
    """Whether the student's own parameters are trained: those of the vision tower, or all others."""
    return run.student.lora is None and not (vision and run.student.freeze_vision)


def trained_parameters(pair: Pair) -> list[int]:
    """Elements of each parameter that the optimizer moves."""
    vision = pair.student.vision or frozenset()
    still = pair.student.constant | ({pair.student.embedding} if pair.run.student.freeze_embeddings else set())
    own = {name: size for name, size in pair.student.parameters.items() if name not in still}
    return [size for name, size in own.items() if moves(pair.run, name in vision)] + added_parameters(pair)


def added_parameters(pair: Pair) -> list[int]:
    """Elements of each parameter that training puts beside the student."""
    return align_parameters(pair) + lora_parameters(pair)


def lora_parameters(pair: Pair) -> list[int]:
    """Elements of the factors beside the student's linear layers."""
    lora = pair.run.student.lora
    if lora is None:
        return []
    sizes = [(outputs, inputs) for name, outputs, inputs in pair.student.linear if name in lora.targets]
    return [lora.rank * size for pair_of_sizes in sizes for size in pair_of_sizes]


def align_parameters(pair: Pair) -> list[int]:
    """Elements of the parameters of `Align`: mixtures of each pair, gains of each student layer that has attention."""
    run, student, teacher = pair.run, pair.student, pair.teacher
    gains = [rows * planes for rows, planes in student.gains or ()] if has_gains(run) else []
    if teacher is None:
        return gains
    (heads, keys, size), (teacher_heads, teacher_keys, teacher_size) = student.heads, teacher.heads
    mixing = [heads * teacher_heads] + ([keys * teacher_keys] if run.align.mixing == "separate" else [])
    projection = [2 * size * teacher_size] if size != teacher_size else []
    chosen = compared_heads(run.align.heads, compared(pair), heads, teacher_heads)
    of_pairs = [(mixing if couples is None and not run.keeps_one_hot else []) + projection for couples in chosen]
    return [size for sizes in of_pairs for size in sizes] + gains


def teaches_itself(run: Run) -> bool:
    """Whether the student's own weights teach without the factors beside them: no second model is loaded then, in any case."""
    return run.teacher is not None and run.teacher.self and run.student.lora is not None


def reads_lessons(run: Run) -> bool:
    """Whether what the teacher shows was recorded: of it only the head is in memory then."""
    return run.taught and run.teacher.lessons is not None


def has_gains(run: Run) -> bool:
    """Whether the student's queries go through gains: they come with a [teacher]."""
    return run.teacher is not None and run.gain.enabled
