"""What a run takes of each GPU and how long a step lasts, from the configs alone: nothing is loaded, no GPU is needed.

Parameters, gradients and optimizer follow DeepSpeed's sharding rule and are exact. What autograd keeps of a decoder layer is read off
the meta device; the rest are formulas, each beside its reason. The peak is the sum of all terms, except that the head and the losses are
done with before the first layer's backward pass begins: of these two the larger counts. Not counted, since they are over before that peak
or come after it: the teacher's forward pass, which keeps nothing, and the fp32 gradients of one sub-group while the optimizer moves.

Letters: T tokens of one micro-batch on one GPU (padding included), R rows of one chunk of the head, V vocabulary, D head dim.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from laid_ds.config import Model, Run
from laid_ds.method.align import layer_pairs
from laid_ds.models.sizes import Sizes, model_sizes, read_config
from laid_ds.runtime.engine import read_deepspeed

BYTES = {"float32": 4, "bfloat16": 2}
FP32 = 4
OPTIMIZER_BYTES = 12  # per parameter: master copy and two moments in fp32
RESERVED = 0.08  # of the GPU: CUDA context, NCCL buffers, fragmentation
PERSISTENT = 100_000  # DeepSpeed's defaults, in elements
PREFETCHED = 50_000_000
MOST_LIVE = 1_000_000_000
BUCKET = 500_000_000
MOST_TOKENS = 1 << 24  # where the search for the tokens that fit ends
OFFLOAD = {"offload_param": {"device": "cpu"}}


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


@dataclass(frozen=True)
class Plan:
    tokens: int
    """T."""
    terms: dict[str, int]
    """Bytes on each GPU."""
    total_bytes: int
    """The peak: see `peak_bytes`."""
    gpu_bytes: int
    fits: bool
    tokens_that_fit: int
    step_flops: float
    """Of one optimizer step on each GPU."""
    step_seconds: float
    peak_flops: float
    mfu: float
    suggestion: str | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def as_text(self) -> str:
        """A table in GiB, and what follows from it."""
        rows = [f"{name.replace('_', ' '):24}{size / 2**30:10.2f} GiB" for name, size in self.terms.items()]
        sums = [f"{'peak':24}{self.total_bytes / 2**30:10.2f} GiB of {self.gpu_bytes / 2**30:.2f} on each GPU"]
        verdict = f"{self.tokens:,} tokens per GPU {'fit' if self.fits else 'do not fit'}; at most {self.tokens_that_fit:,} do"
        speed = f"{self.mfu:.0%} of {self.peak_flops / 1e12:g} TFLOP/s, both assumed"
        time = f"a step takes about {self.step_seconds:.1f} s ({self.step_flops:.3g} FLOPs per GPU at {speed})"
        return "\n".join([*rows, *sums, verdict, time, *([f"suggestion: {self.suggestion}"] if self.suggestion else [])])


def read_pair(run: Run, student_config: Path | None = None, teacher_config: Path | None = None) -> Pair:
    """What a plan needs of a recipe: configs of the models' folders, or of the JSON files given instead, and of the engines.

    Raises ValueError for a missing or wrong file.
    """

    def sizes(model: Model, path: Path | None) -> Sizes:
        return model_sizes(read_config(path or model.path / "config.json"), model.dtype)

    student = sizes(run.student, student_config)
    if not run.taught:
        return Pair(run, student, None, _zero(run.student, run, True), {})
    return Pair(run, student, sizes(run.teacher, teacher_config), _zero(run.student, run, True), _zero(run.teacher, run, False))


def _zero(model: Model, run: Run, trains: bool) -> dict[str, Any]:
    return read_deepspeed(model.deepspeed, model.dtype, run, trains).get("zero_optimization", {})


def plan(pair: Pair, machine: Machine, tokens: int) -> Plan:
    """The plan of one micro-batch of `tokens` tokens on each GPU."""
    terms = memory(pair, machine, tokens)
    total, flops = peak_bytes(terms), step_flops(pair, tokens)
    fits = total <= machine.gpu_bytes
    return Plan(
        tokens=tokens,
        terms=terms,
        total_bytes=total,
        gpu_bytes=machine.gpu_bytes,
        fits=fits,
        tokens_that_fit=tokens_that_fit(pair, machine),
        step_flops=flops,
        step_seconds=flops / (machine.peak_flops * machine.mfu),
        peak_flops=machine.peak_flops,
        mfu=machine.mfu,
        suggestion=None if fits else suggestion(pair, machine, tokens),
    )


def memory(pair: Pair, machine: Machine, tokens: int) -> dict[str, int]:
    """Bytes on each GPU, by term."""
    run, student, ranks = pair.run, pair.student, machine.gpus
    zero, width = pair.student_zero, BYTES[run.student.dtype]
    added, stage = align_parameters(pair) + lora_parameters(pair), zero.get("stage", 0)
    every = [*student.parameters.values(), *added]
    trained = [size for name, size in student.parameters.items() if _moves(run, name in student.vision)] + added
    return {
        "parameters": width * _held(every, ranks, zero),
        "gradients": width * (_share(trained, ranks) if stage >= 2 else sum(trained)),
        "optimizer": 0 if "offload_optimizer" in zero else OPTIMIZER_BYTES * (_share(trained, ranks) if stage >= 1 else sum(trained)),
        "gradient_bucket": width * min(int(zero.get("reduce_bucket_size", BUCKET)), sum(trained)),
        "teacher_parameters": _teacher_bytes(pair, ranks),
        "live_layer": _live_bytes(pair) if ranks > 1 or "offload_param" in zero else 0,
        "activations": _activations(pair, tokens),
        "tapped_qk": _tapped(pair, tokens),
        "layer_backward": _layer_backward(pair, tokens),
        "alignment": _compared(pair, tokens),
        "logits_chunk": _logits(pair, tokens),
        "reserved": round(RESERVED * machine.gpu_bytes),
    }


def _moves(run: Run, vision: bool) -> bool:
    """Whether the student's own parameters are trained: those of the vision tower, or all others."""
    return run.student.lora is None and not (vision and run.student.freeze_vision)


def lora_parameters(pair: Pair) -> list[int]:
    """Elements of the factors beside the student's linear layers."""
    lora = pair.run.student.lora
    if lora is None:
        return []
    sizes = [(outputs, inputs) for name, outputs, inputs in pair.student.linear if name in lora.targets]
    return [lora.rank * size for pair_of_sizes in sizes for size in pair_of_sizes]


def align_parameters(pair: Pair) -> list[int]:
    """Elements of the parameters of `Align`: mixtures of each pair, gains of each student layer."""
    run, student, teacher = pair.run, pair.student, pair.teacher
    if teacher is None:
        return []
    (heads, keys, size), (teacher_heads, teacher_keys, teacher_size) = student.heads, teacher.heads
    mixing = [heads * teacher_heads] + ([keys * teacher_keys] if run.align.mixing == "separate" else [])
    projection = [2 * size * teacher_size] if size != teacher_size else []
    return (mixing + projection) * len(_pairs(pair)) + [heads * student.planes] * (student.layers if run.gain.enabled else 0)


def peak_bytes(terms: dict[str, int]) -> int:
    """Most bytes at one time."""
    return sum(terms.values()) - min(terms["layer_backward"], terms["alignment"] + terms["logits_chunk"])


def tokens_that_fit(pair: Pair, machine: Machine) -> int:
    """The largest T that fits, 0 if none does."""
    return bisect_right(range(1, MOST_TOKENS), machine.gpu_bytes, key=lambda tokens: peak_bytes(memory(pair, machine, tokens)))


def suggestion(pair: Pair, machine: Machine, tokens: int) -> str:
    """The first change that makes T tokens fit: checkpointing, also on the CPU, the teacher on the CPU, more GPUs; else fewer tokens."""
    checkpointed, waiting = (replace(pair, run=_with_checkpointing(pair.run, how)) for how in (True, "offload"))
    offloaded = replace(pair, teacher_zero=pair.teacher_zero | OFFLOAD)
    both = replace(checkpointed, teacher_zero=offloaded.teacher_zero)
    every = replace(waiting, teacher_zero=offloaded.teacher_zero)
    changes = [
        ("set student.gradient_checkpointing = true", checkpointed, machine.gpus),
        ("keep the teacher on the CPU (teacher.deepspeed = ds_configs/zero3_teacher_offload.json)", offloaded, machine.gpus),
        ("checkpoint the student's activations and keep the teacher on the CPU", both, machine.gpus),
        ('keep the teacher and the checkpointed activations (student.gradient_checkpointing = "offload") on the CPU', every, machine.gpus),
        *((f"use {gpus} GPUs", pair, gpus) for gpus in (8, 16, 32, 64, 128) if gpus > machine.gpus),
    ]
    for sentence, changed, gpus in changes:
        other = replace(machine, gpus=gpus)
        if peak_bytes(memory(changed, other, tokens)) <= machine.gpu_bytes:
            return f"{sentence}; then {tokens_that_fit(changed, other):,} tokens fit"
    fitting = {gpus: tokens_that_fit(every, replace(machine, gpus=gpus)) for gpus in (machine.gpus, 128)}
    return (
        f"no single change is enough; with the teacher and checkpointed activations on the CPU {fitting[machine.gpus]:,} tokens fit on "
        f"{machine.gpus} GPUs and {fitting[128]:,} on 128: use shorter samples"
    )


def step_flops(pair: Pair, tokens: int) -> float:
    """Of one optimizer step on each GPU, recomputation included."""
    return pair.run.optimizer.accumulation * _row_flops(pair, tokens, 4 if pair.run.student.gradient_checkpointing else 3)


def model_flops(pair: Pair, samples: float, tokens: float) -> float:
    """Of one optimizer step over all ranks as MFU counts them, without recomputation; all samples are taken to have the mean length."""
    return samples * _row_flops(pair, tokens / samples, 3)


def _row_flops(pair: Pair, tokens: float, passes: int) -> float:
    """Of one row of T tokens: 2 per parameter and token forward, twice that backward (3 passes), once more for a recomputation (4)."""
    seen = passes if _moves(pair.run, vision=True) else 1
    student = passes * _forward_flops(pair.student, tokens) + seen * _vision_flops(pair.student, tokens)
    teacher = _forward_flops(pair.teacher, tokens) + _vision_flops(pair.teacher, tokens) if pair.teacher else 0
    return student + teacher + _matching_flops(pair, tokens)


def _held(sizes: list[int], ranks: int, zero: dict[str, Any]) -> int:
    """Elements between steps: a share of each parameter, and small ones whole beside it (they are never released)."""
    if zero.get("stage", 0) < 3:
        return sum(sizes)
    threshold = int(zero.get("stage3_param_persistence_threshold", PERSISTENT))
    resident = sum(size for size in sizes if size <= threshold)
    return resident + (0 if "offload_param" in zero else _share(sizes, ranks))


def _share(sizes: list[int], ranks: int) -> int:
    """Each parameter is cut into equal parts on its own, the last one padded."""
    return sum(-(-size // ranks) for size in sizes)


def _teacher_bytes(pair: Pair, ranks: int) -> int:
    if pair.teacher is None:
        return 0
    return BYTES[pair.run.teacher.dtype] * _held(list(pair.teacher.parameters.values()), ranks, pair.teacher_zero)


def _live_bytes(pair: Pair) -> int:
    """Gathered parameters, of the model that needs more: the teacher's largest module, the student's as many as DeepSpeed keeps for
    reuse (stage3_max_live_parameters), and what is prefetched. The two models take turns."""
    prefetched = int(pair.student_zero.get("stage3_prefetch_bucket_size", PREFETCHED))
    kept = int(pair.student_zero.get("stage3_max_live_parameters", MOST_LIVE))
    student = min(pair.student.total(), max(pair.student.largest_module, kept) + prefetched)
    teacher = min(pair.teacher.total(), pair.teacher.largest_module + prefetched) if pair.teacher else 0
    return max(BYTES[pair.run.student.dtype] * student, BYTES[pair.run.teacher.dtype] * teacher if pair.teacher else 0)


def _activations(pair: Pair, tokens: int) -> int:
    """What the student's forward pass keeps: of every layer all, or with checkpointing its input (unless that waits on the CPU); the
    embedded tokens before and after the images are put among them; the last hidden states. A trained vision tower is taken to keep as
    much per hidden element."""
    student, width, checkpointed = pair.student, BYTES[pair.run.student.dtype], pair.run.student.gradient_checkpointing
    of_layer = {False: _layer_kept(pair), True: width * student.hidden, "offload": 0}[checkpointed]
    layers = student.layers * of_layer
    vision = _vision_kept(student, width, checkpointed) if _moves(pair.run, vision=True) else 0
    return tokens * (layers + 3 * width * student.hidden + vision)


def _layer_backward(pair: Pair, tokens: int) -> int:
    """Two gradients of the MLP's width; with checkpointing also all that the layer keeps, while it is computed again."""
    again = _layer_kept(pair) if pair.run.student.gradient_checkpointing else 0
    return tokens * (again + 2 * pair.student.widest_bytes)


def _layer_kept(pair: Pair) -> int:
    """Bytes per token that one layer keeps; a gain keeps the queries before it as well."""
    heads, _, size = pair.student.heads
    gains = BYTES[pair.run.student.dtype] * heads * size if pair.teacher and pair.run.gain.enabled else 0
    return pair.student.kept_bytes + gains


def _vision_kept(student: Sizes, width: int, checkpointed: bool) -> int:
    """Bytes per token of the text, were all of it images."""
    per_patch = width * student.vision_hidden if checkpointed else student.kept_bytes * student.vision_hidden // student.hidden
    return student.patches_per_token * student.vision_layers * per_patch


def _tapped(pair: Pair, tokens: int) -> int:
    """Queries and keys of the compared layers. The student's are kept by autograd anyway unless it checkpoints."""
    teacher = _rows(pair.teacher) * BYTES[pair.run.teacher.dtype] if pair.teacher else 0
    student = _rows(pair.student) * BYTES[pair.run.student.dtype] if pair.run.student.gradient_checkpointing else 0
    return tokens * (student + teacher) * len(_pairs(pair))


def _compared(pair: Pair, tokens: int) -> int:
    """Alignment and matching keep the gradients of the student's queries and keys of each pair. While the queries of one layer are aligned
    there are in fp32 the teacher's, and per head of the student its own, the mixture, the error, its square and a gradient."""
    losses, width = pair.run.losses, BYTES[pair.run.student.dtype]
    if pair.teacher is None:
        return 0
    heads, (teacher_heads, _, teacher_size) = pair.student.heads[0], pair.teacher.heads
    kept = width * _rows(pair.student) * ((losses.align > 0) + (losses.match > 0)) * len(_pairs(pair))
    passing = FP32 * teacher_size * (teacher_heads + 5 * heads) if losses.align > 0 else 0
    return tokens * (kept + passing)


def _logits(pair: Pair, tokens: int) -> int:
    """Of one chunk of R rows (supposing so many are supervised): logits of both models, probabilities and the gradient in fp32, and a copy
    in the student's dtype; the gradients of the head; what the teacher shows of all rows, as logits or as the factors of them."""
    student, width, vocabulary = pair.student, BYTES[pair.run.student.dtype], pair.student.vocabulary
    rows = min(tokens, pair.run.losses.rows_per_chunk)
    own = rows * vocabulary * (4 * FP32 + (width if width != FP32 else 0)) + width * student.hidden * vocabulary
    if pair.teacher is None or pair.run.losses.kl == 0:
        return own
    shown = min(tokens * vocabulary, (tokens + vocabulary) * pair.teacher.hidden)
    return own + BYTES[pair.run.teacher.dtype] * shown


def _forward_flops(model: Sizes, tokens: float) -> float:
    heads, _, size = model.heads
    language = sum(count for name, count in model.parameters.items() if name not in model.vision)
    return 2 * language * tokens + 4 * heads * size * model.layers * tokens**2 / 2  # causal: half of the scores exist


def _vision_flops(model: Sizes, tokens: float) -> float:
    return 2 * sum(model.parameters[name] for name in model.vision) * tokens * model.patches_per_token


def _matching_flops(pair: Pair, tokens: float) -> float:
    """Scores of both models and their mixture, forward and twice backward."""
    if pair.teacher is None or pair.run.losses.match == 0:
        return 0
    (heads, _, size), (teacher_heads, _, teacher_size) = pair.student.heads, pair.teacher.heads
    rows = min(tokens, pair.run.match.rows or tokens)
    per_score = heads * size + teacher_heads * teacher_size + heads * teacher_heads
    return 3 * 2 * per_score * rows * tokens / 2 * len(_pairs(pair))


def _rows(model: Sizes) -> int:
    """Elements of one token's query and key in one layer."""
    heads, keys, size = model.heads
    return (heads + keys) * size


def _pairs(pair: Pair) -> tuple[tuple[int, int], ...]:
    if pair.teacher is None or not pair.run.losses.listens:
        return ()
    return layer_pairs(pair.run.align.pairs, pair.student.layers, pair.teacher.layers)


def _with_checkpointing(run: Run, how: bool | str) -> Run:
    return run.model_copy(update={"student": run.student.model_copy(update={"gradient_checkpointing": how})})
