"""Recording lessons: the teacher alone, over exactly the samples that a run will read, on any number of ranks.

A file holds some micro-batches that follow each other in the stream. Those that are missing are dealt to the ranks, each is written whole
or not at all, and none of their bytes depends on the ranks: a recording that was killed goes on with the same command.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save as save_tensors

from laid_ds.config import Run
from laid_ds.data.batch import Batch, Prepare
from laid_ds.data.dataset import Dataset
from laid_ds.data.lessons import ENDING, HEAD, MANIFEST, Layout, check_facts, cut, file_name, replace_file, write_file, write_index
from laid_ds.data.stream import Stream
from laid_ds.disk import no_room
from laid_ds.files import read_json
from laid_ds.method.distill import Recorder
from laid_ds.models.identity import model_marks, read_whole
from laid_ds.models.processor import check_same_tokenizer, load_processor
from laid_ds.run.build import asks_lse, build_pairs, build_renderer, build_stream, build_teacher, check_probed, samples_per_step
from laid_ds.run.first_look import BATCHES, look_at_teacher
from laid_ds.run.lessons import check_teacher, facts_of, layout_of
from laid_ds.run.loop import next_batches
from laid_ds.run.sight import doubles, look_at_images
from laid_ds.runtime import distributed, lock
from laid_ds.runtime.stop import STOP, StopRequest, clear
from laid_ds.terminal import say, working

CLAIM = "recording.json"
FILE_BYTES = 64 << 20  # a file's lessons, roughly
LEAST_FILES = 32  # so that ranks have alike much to do
COUNTED = 8  # slots that are rendered to foresee the bytes


@dataclass(frozen=True)
class Positioned:
    """What a data worker makes of a micro-batch: the samples' positions beside their tensors."""

    prepare: Prepare

    def __call__(self, items: list) -> tuple[list[int], Batch]:
        return self.prepare.positions(items), self.prepare(items)


@dataclass
class Recording:
    """A recording's finished parts."""

    run: Run
    stream: Stream
    """Its batches come with their positions."""
    layout: Layout
    per_step: int
    slots: int
    vocabulary: int
    pairs: tuple[tuple[int, int], ...]
    num_bytes: int
    """Foreseen."""


def foresee(run: Run, steps: int | None = None, per_step: int | None = None) -> Recording:
    """What is to be recorded. steps: of the run (default: all); per_step: samples (with packing packs) of one step of the run, over all its
    ranks; default: those of these ranks. Raises ValueError for a run that no teacher teaches."""
    if not run.taught:
        raise ValueError("no term of the loss asks a teacher (losses.kl, losses.align, losses.match): there is nothing to record")
    if run.sequence_parallel > 1:
        raise ValueError(
            f"sequence_parallel is {run.sequence_parallel}: lessons are recorded of whole rows, whatever ranks share them"
            " later; set sequence_parallel=1, and give --batch the samples of a step of the run"
        )
    alone = {  # a student with LoRA that teaches itself does so as its folder is: without the factors, which are never there
        "teacher": run.teacher.model_copy(update={"lessons": None, "lessons_repeat": False}),
        "student": run.student.model_copy(update={"lora": None}),
    }
    run = run.model_copy(update=alone)
    dataset, processor = Dataset.open(list(run.data.shards)), load_processor(run.student.path, run.student.trust_remote_code)
    check_same_tokenizer(processor, load_processor(run.teacher.path, run.teacher.trust_remote_code))
    check_probed(run, read=False)
    pairs = build_pairs(run)
    per_step = per_step or samples_per_step(run)
    stream = build_stream(run, dataset, build_renderer(run, processor), per_step)
    layout = layout_of(run, pairs, asks_lse(run, run.teacher))
    slots = (steps or run.steps) * per_step
    shown = [stream.peek(k) for k in sorted({i * slots // COUNTED for i in range(COUNTED)})]
    each = sum(layout.num_bytes(int((b.segments >= 0).sum()), int(b.supervised.sum())) for b in shown) / len(shown)
    stream = stream.with_prepare(Positioned(stream.prepare))
    return Recording(run, stream, layout, per_step, slots, len(processor.tokenizer), pairs, round(each * slots))


def teach(run: Run, out: Path, steps: int | None, per_step: int | None, stop: StopRequest) -> bool:
    """Record the lessons of a run into a folder, or go on with it; whether it came to its end. Every rank calls it.

    Raises ValueError for a folder of other lessons, for too little room, and for a teacher that does not know or see (as `laid train`)."""
    active = distributed.rank() == 0
    with working("looking at what is to be recorded", active=active):
        recording = foresee(run, steps, per_step)
    handle = distributed.on_rank_0(lambda: lock.take(out))  # open as long as the process lives
    per_file = _begin(recording, out, stop.started)
    missing, files = _missing(recording, out, per_file)
    if active:
        say(f"{out}: {files - len(missing):,} of {files:,} files of {per_file} micro-batches are there")
    _check_room(recording, out, len(missing), files)
    with working("loading the teacher", active=active):
        teacher = build_teacher(recording.run, recording.pairs, recording.vocabulary, kind=Recorder)
    scales = _look(recording, teacher, out)
    stop.listen_to_ctrl_c()
    with working("recording files", len(missing), active) as advance:
        for turn, number, lessons in _record(recording, teacher, missing, per_file):
            if lessons is not None:
                write_file(out / file_name(number), lessons)
            distributed.barrier()
            advance(turn)
            if reason := stop.agreed(out, recording.run.stop.after_minutes):
                if active:
                    say(f"stopped ({reason}); the same command goes on from there")
                return False
    distributed.on_rank_0(lambda: _finish(recording, out, files, scales))
    del handle
    return True


def check_teaching(run: Run, out: Path, steps: int | None, per_step: int) -> str:
    """What is to be recorded, as a sentence. Raises ValueError, before a process is started, for what `teach` would refuse."""
    recording = foresee(run, steps, per_step)
    _check_folder(out, _claim(recording), run.teacher.path)
    if lacking := no_room(out, "the lessons", recording.num_bytes):
        raise ValueError(lacking)
    each = recording.num_bytes / max(recording.slots // per_step, 1)
    return (
        f"{out}: lessons of {recording.slots // per_step:,} steps, {recording.slots:,} samples or packs, about"
        f" {recording.num_bytes / 1e9:,.3f} GB ({each / 1e6:,.1f} MB a step)"
    )


def _claim(recording: Recording) -> dict[str, Any]:
    """What recording.json says from the first moment on, beside the marks of the teacher's files."""
    run, micro_batches = recording.run, -(-recording.slots // recording.run.data.micro_batch)
    each = max(1, recording.num_bytes // micro_batches)
    claim = {
        "facts": facts_of(run, recording.stream, recording.per_step),
        "layout": asdict(recording.layout),
        "micro_batch": run.data.micro_batch,
        "per_file": int(max(1, min(FILE_BYTES // each, micro_batches // LEAST_FILES))),
    }
    return json.loads(json.dumps(claim))


def _check_folder(out: Path, claim: dict[str, Any], teacher: Path) -> dict[str, Any]:
    """The claim of a folder that holds a part of these lessons, or {} of one without any: empty, or left by a recording that was refused.
    Raises ValueError for any other."""
    found = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if (out / CLAIM).is_file() and any(name == MANIFEST or name.endswith(ENDING) for name in found):
        there = read_json(out / CLAIM)
        check_facts(out, there.get("facts", {}), claim["facts"])
        for name in ("layout", "micro_batch"):
            if there.get(name) != claim[name]:
                raise ValueError(f"{out} was begun with another {name}: {there.get(name)}, this is {claim[name]}; give another folder")
        check_teacher(out, there["facts"].get("teacher"), teacher)
        return there
    own = (lock.FILE, STOP, CLAIM, HEAD)
    if others := [name for name in found if name not in own and not name.startswith((".", f"{CLAIM}.", f"{HEAD}."))]:
        raise ValueError(f"{out} is not empty and holds no lessons ({others[0]}); give another folder")
    return {}


def _begin(recording: Recording, out: Path, started: float) -> int:
    """Make the folder this recording's, or find that it is; returns the micro-batches of a file."""
    claim, teacher = _claim(recording), recording.run.teacher.path

    def act() -> int:
        there = _check_folder(out, claim, teacher)
        clear(out, started)
        for half in out.glob("*.partial"):  # of a recording that was killed
            half.unlink()
        if not there:
            claim["facts"]["teacher"] = read_whole(teacher, model_marks(teacher))
            replace_file(out / CLAIM, [json.dumps(claim, indent=1).encode()])
        return (there or claim)["per_file"]

    found = distributed.on_rank_0(act)
    return int(distributed.largest([found or 0])[0])


def _missing(recording: Recording, out: Path, per_file: int) -> tuple[list[int], int]:
    """Numbers of the files that are not there, and how many there must be. Every rank finds the same: none writes yet."""
    files = -(-recording.slots // (recording.run.data.micro_batch * per_file))
    found = distributed.on_rank_0(lambda: [n for n in range(files) if not (out / file_name(n)).is_file()])
    return next(missing for missing in distributed.gathered(found) if missing is not None), files


def _check_room(recording: Recording, out: Path, missing: int, files: int) -> None:
    needed = recording.num_bytes * missing // max(files, 1)
    lacking = distributed.on_rank_0(lambda: no_room(out, "the lessons", needed))
    (lacks,) = distributed.largest([float(bool(lacking))])
    if lacks:
        raise ValueError(lacking or "refused by rank 0, which says why")


def _look(recording: Recording, teacher: Any, out: Path) -> dict[int, tuple[float, int | None]]:
    """Does the teacher know and see, as before a run; writes its head; scale and window of its listened layers."""
    run, stream, device = recording.run, recording.stream, teacher.device
    plain = stream.with_prepare(stream.prepare.prepare)
    batches = [plain.peek(k).to(device) for k in range(BATCHES)]
    nats, cut_mass = look_at_teacher(run, teacher, batches, recording.vocabulary)
    if distributed.rank() == 0:
        say(f"first look, nats per answer token: teacher {nats:.2f} (cut mass {cut_mass:.1e})")
    if run.teacher.check_answers:
        pairs = ((own.to(device), others.to(device)) for own, others in doubles(plain))
        for sentence in look_at_images(run, None, teacher, pairs, recording.vocabulary):
            if distributed.rank() == 0:
                say(sentence)
    lesson = teacher(batches[0].for_teacher, with_head=True)
    if distributed.rank() == 0:
        named = {"weight": lesson.logits.weight, "bias": lesson.logits.bias}
        head = save_tensors({name: tensor.cpu().contiguous() for name, tensor in named.items() if tensor is not None})
        replace_file(out / HEAD, [head])
    return {layer: (captured.scale, captured.window) for layer, captured in lesson.heads.items()}


def _record(recording: Recording, teacher: Any, missing: list[int], per_file: int) -> Iterator[tuple[int, int, list | None]]:
    """Files of all ranks in each turn, this rank's own and its lessons, None where others have one more: a sharded teacher needs
    every rank for each batch."""
    size, world, rank = recording.run.data.micro_batch, distributed.world_size(), distributed.rank()
    turns = [missing[first : first + world] for first in range(0, len(missing), world)]
    mine = [turn[min(rank, len(turn) - 1)] for turn in turns]

    def micro_batches() -> Iterator[list]:
        for number in mine:
            for k in range(per_file):
                yield recording.stream.slots((number * per_file + k) * size, size)

    prepared = recording.stream.read(micro_batches())
    for turn, number in zip(turns, mine, strict=True):
        lessons = []
        for _ in range(per_file):
            ((positions, batch),) = next_batches(prepared, 1)
            shown = teacher(batch.to(teacher.device).for_teacher)
            told = cut(recording.layout, batch, shown.logits.rows, shown.heads)
            lessons += [(position, *lesson) for position, lesson in zip(positions, told, strict=True)]
        yield len(turn), number, lessons if rank < len(turn) else None


def _finish(recording: Recording, out: Path, files: int, scales: dict[int, tuple[float, int | None]]) -> None:
    claim = read_json(out / CLAIM)
    layers = [{"layer": layer, "scale": scale, "window": window} for layer, (scale, window) in sorted(scales.items())]
    slots = files * claim["per_file"] * claim["micro_batch"]
    head = zlib.crc32((out / HEAD).read_bytes())
    manifest = {"facts": claim["facts"], "layout": claim["layout"], "per_step": recording.per_step, "layers": layers, "slots": slots}
    write_index(out, files, manifest | {"head_crc32": head})
