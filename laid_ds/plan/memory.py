"""Bytes that a run takes of each GPU.

Parameters, gradients and optimizer follow DeepSpeed's sharding rule and are exact. What autograd keeps of a decoder layer is read off
the meta device; the rest are formulas, each beside its reason. The peak is the sum of all terms, except that the head and the losses are
done with before the first layer's backward pass begins: of these two the larger counts. Not counted, since they are over before that peak
or come after it: the teacher's forward pass, which keeps nothing, and the fp32 gradients of one sub-group while the optimizer moves.

Where ranks share a micro-batch (sequence_parallel), each runs its slice of the tokens, while the embeddings before the cut and the keys
and values that an attention layer gathers are of all of them (docs/method.md, One sequence over several ranks).

Letters: T tokens of one micro-batch (padding included), n ranks that share it, R rows of one chunk of the head, V vocabulary, D head dim.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

from laid_ds.config import Run
from laid_ds.models.sizes import Sizes
from laid_ds.plan.pair import (
    BYTES,
    FP32,
    OPTIMIZER_BYTES,
    Machine,
    Pair,
    added_parameters,
    compared,
    has_gains,
    moves,
    reads_lessons,
    teaches_itself,
    trained_parameters,
)
from laid_ds.sequence import SequenceGroup

RESERVED = 0.08  # of the GPU: CUDA context, NCCL buffers, fragmentation
PERSISTENT = 100_000  # DeepSpeed's defaults, in elements
PREFETCHED = 50_000_000
MOST_LIVE = 1_000_000_000
BUCKET = 500_000_000
MOST_TOKENS = 1 << 24  # where the search for the tokens that fit ends


def memory(pair: Pair, machine: Machine, tokens: int, taught: int | None = None) -> dict[str, int]:
    """Bytes on each GPU, by term. taught: tokens of the teacher's rows, where these are others than the student's: no more of them can be
    answers."""
    run, student, ranks = pair.run, pair.student, machine.gpus
    zero, width = pair.student_zero, BYTES[run.student.dtype]
    trained, stage = trained_parameters(pair), zero.get("stage", 0)
    every = [*student.parameters.values(), *added_parameters(pair)]
    return {
        "parameters": width * _held(every, ranks, zero),
        "gradients": width * (_share(trained, ranks) if stage >= 2 else sum(trained)),
        "optimizer": 0 if "offload_optimizer" in zero else OPTIMIZER_BYTES * (_share(trained, ranks) if stage >= 1 else sum(trained)),
        "gradient_bucket": width * min(int(zero.get("reduce_bucket_size", BUCKET)), sum(trained)),
        "teacher_parameters": _teacher_bytes(pair, ranks),
        "live_layer": _live_bytes(pair) if ranks > 1 or "offload_param" in zero else 0,
        "pictures": _pictures(pair, tokens),
        "activations": _activations(pair, tokens),
        "masks": _masks(pair, tokens),
        "tapped_qk": _tapped(pair, tokens),
        "layer_backward": _layer_backward(pair, tokens),
        "alignment": _compared(pair, tokens),
        "logits_chunk": _logits(pair, tokens, min(tokens, taught or tokens)),
        "reserved": round(RESERVED * machine.gpu_bytes),
    }


def slice_of(run: Run, tokens: int) -> int:
    """Tokens of a micro-batch that one rank runs, padding to what can be shared included."""
    multiple = SequenceGroup(run.sequence_parallel).multiple
    return -(-tokens // multiple) * multiple // run.sequence_parallel


def peak_bytes(terms: dict[str, int]) -> int:
    """Most bytes at one time."""
    return sum(terms.values()) - min(terms["layer_backward"], terms["alignment"] + terms["logits_chunk"])


def tokens_that_fit(pair: Pair, machine: Machine, taught: int | None = None) -> int:
    """The largest T of one micro-batch that fits, on one GPU or shared by n; 0 if none does. taught: of the teacher's rows, which do not
    grow with T, where these are others."""
    return bisect_right(range(1, MOST_TOKENS), machine.gpu_bytes, key=lambda tokens: peak_bytes(memory(pair, machine, tokens, taught)))


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
    if pair.teacher is not None and reads_lessons(pair.run):  # its head, whole on each GPU
        return BYTES[pair.run.teacher.dtype] * pair.teacher.vocabulary * pair.teacher.hidden
    if pair.teacher is None or teaches_itself(pair.run):
        return 0
    return BYTES[pair.run.teacher.dtype] * _held(list(pair.teacher.parameters.values()), ranks, pair.teacher_zero)


def _live_bytes(pair: Pair) -> int:
    """Gathered parameters, of the model that needs more: the teacher's largest module, the student's as many as DeepSpeed keeps for
    reuse (stage3_max_live_parameters), and what is prefetched. The two models take turns."""
    prefetched = int(pair.student_zero.get("stage3_prefetch_bucket_size", PREFETCHED))
    kept = int(pair.student_zero.get("stage3_max_live_parameters", MOST_LIVE))
    student = min(pair.student.total(), max(pair.student.largest_module, kept) + prefetched)
    live = pair.teacher is not None and not reads_lessons(pair.run)
    teacher = min(pair.teacher.total(), pair.teacher.largest_module + prefetched) if live else 0
    return max(BYTES[pair.run.student.dtype] * student, BYTES[pair.run.teacher.dtype] * teacher if pair.teacher else 0)


def _pictures(pair: Pair, tokens: int) -> int:
    """The pixels of a step's micro-batches in fp32, were all of their tokens images. Where ranks share micro-batches, pixels wait on the
    CPU, and each GPU has those that it encodes of one at a time."""
    together = pair.run.sequence_parallel
    if together == 1:
        kept = pair.run.optimizer.accumulation * tokens
    else:
        kept = tokens / together if pair.student.shares_images else tokens
    return round(kept * FP32 * pair.student.values_per_token)


def _activations(pair: Pair, tokens: int) -> int:
    """What the student's forward pass keeps: of every layer all, or with checkpointing its input (unless that waits on the CPU); the
    embedded tokens before and after the images are put among them; the last hidden states. A trained vision tower is taken to keep as
    much per hidden element; ranks that share a micro-batch share out its images, where the family can."""
    student, width, checkpointed = pair.student, BYTES[pair.run.student.dtype], pair.run.student.gradient_checkpointing
    own, attention = slice_of(pair.run, tokens), sum(pair.student.attention.values())
    kept = student.layers * student.kept_bytes + student.outside_bytes + attention * _gain_kept(pair)
    layers = {False: kept, True: student.layers * width * student.hidden, "offload": 0}[checkpointed]
    vision = _vision_kept(student, width, checkpointed) if moves(pair.run, vision=True) else 0
    gathered = 0 if checkpointed else attention * _gathered(pair, tokens)
    encoded = own if student.shares_images else tokens
    return round(own * (layers + width * student.hidden) + encoded * vision + tokens * 2 * width * student.hidden + gathered)


def _layer_backward(pair: Pair, tokens: int) -> int:
    """Two gradients of the MLP's width, and those of gathered keys and values; with checkpointing also all that the heaviest layer keeps,
    while it is computed again."""
    own, checkpointed = slice_of(pair.run, tokens), pair.run.student.gradient_checkpointing
    again = pair.student.heaviest_bytes + _gain_kept(pair) if checkpointed else 0
    return own * (again + 2 * pair.student.widest_bytes) + (1 + bool(checkpointed)) * _gathered(pair, tokens)


def _gathered(pair: Pair, tokens: int) -> int:
    """Bytes of one layer's keys and values of the other ranks' tokens."""
    _, keys, size = pair.student.heads
    return 2 * keys * size * (tokens - slice_of(pair.run, tokens)) * BYTES[pair.run.student.dtype]


def _gain_kept(pair: Pair) -> int:
    """Bytes per token that the gain of one layer keeps: the queries before it."""
    heads, _, size = pair.student.heads
    return BYTES[pair.run.student.dtype] * heads * size if has_gains(pair.run) else 0


def _masks(pair: Pair, tokens: int) -> int:
    """Where a mask is a tensor of T x T, one of each kind lasts through the step, of one byte a cell; attention adds a copy in its own
    dtype and keeps that of each layer, or with checkpointing of one."""
    masked = {kind: number for kind, number in pair.student.attention.items() if kind.masked}
    copies = min(1, len(masked)) if pair.run.student.gradient_checkpointing else sum(masked.values())
    cells = tokens**2 // pair.run.data.micro_batch  # rows of a micro-batch do not see each other
    return cells * (len({kind.window for kind in masked}) + BYTES[pair.run.student.dtype] * copies)


def _vision_kept(student: Sizes, width: int, checkpointed: bool | str) -> float:
    """Bytes per token of the text, were all of it images."""
    per_patch = width * student.vision_hidden if checkpointed else student.kept_bytes * student.vision_hidden // student.hidden
    return student.patches_per_token * student.vision_layers * per_patch


def _tapped(pair: Pair, tokens: int) -> int:
    """Queries and keys of the compared layers. The student's are kept by autograd anyway unless it checkpoints."""
    teacher = _queries_and_keys(pair, pair.teacher, tokens) * BYTES[pair.run.teacher.dtype] if pair.teacher else 0
    student = _queries_and_keys(pair, pair.student, tokens) * BYTES[pair.run.student.dtype]
    return (teacher + (student if pair.run.student.gradient_checkpointing else 0)) * len(compared(pair))


def _compared(pair: Pair, tokens: int) -> int:
    """Alignment and matching keep the gradients of the student's queries and keys of each pair. While the queries of one layer are aligned
    there are in fp32 the teacher's, and per head of the student its own, the mixture, the error, its square and a gradient."""
    losses, width = pair.run.losses, BYTES[pair.run.student.dtype]
    if pair.teacher is None:
        return 0
    heads, (teacher_heads, _, teacher_size) = pair.student.heads[0], pair.teacher.heads
    kept = width * _queries_and_keys(pair, pair.student, tokens) * ((losses.align > 0) + (losses.match > 0)) * len(compared(pair))
    passing = FP32 * teacher_size * (teacher_heads + 5 * heads) if losses.align > 0 else 0
    return kept + slice_of(pair.run, tokens) * passing


def _logits(pair: Pair, tokens: int, taught: int) -> int:
    """Of one chunk of R rows (supposing so many are supervised): logits of both models, probabilities and the gradient in fp32, and a copy
    in the student's dtype; the gradients of the head; what the teacher shows of all rows, as logits or as the factors of them."""
    student, width, vocabulary = pair.student, BYTES[pair.run.student.dtype], pair.student.vocabulary
    tokens, taught = slice_of(pair.run, tokens), slice_of(pair.run, taught)
    rows = min(tokens, pair.run.losses.rows_per_chunk)
    own = rows * vocabulary * (4 * FP32 + (width if width != FP32 else 0)) + width * student.hidden * vocabulary
    if pair.teacher is None or pair.run.losses.kl == 0:
        return own
    copied = 0 if reads_lessons(pair.run) else vocabulary  # its head stands by itself then
    shown = min(taught * vocabulary, (taught + copied) * pair.teacher.hidden)
    return own + BYTES[pair.run.teacher.dtype] * shown


def _queries_and_keys(pair: Pair, model: Sizes, tokens: int) -> int:
    """Elements of one layer: queries of a rank's own tokens, keys of all."""
    heads, keys, size = model.heads
    return size * (heads * slice_of(pair.run, tokens) + keys * tokens)
