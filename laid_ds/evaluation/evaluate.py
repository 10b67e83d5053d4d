"""Ask several models the questions of several tasks, alone or with other ranks: every answer is kept as text, and a results file says what
they are worth (results.py)."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from laid_ds.data.images import Pixels
from laid_ds.evaluation.answers import answers_file, appending
from laid_ds.evaluation.asking import TOKENS_PER_BATCH, Asker, ask_items
from laid_ds.evaluation.results import add_model, claimed, open_files, unanswered
from laid_ds.evaluation.spectra import check_needles, needle_profile
from laid_ds.evaluation.summary import read_results
from laid_ds.evaluation.tasks import FORCED, Item, Task, Wish, open_tasks
from laid_ds.evaluation.telling import telling
from laid_ds.evaluation.window import notes_on
from laid_ds.models.attention import listen_to_windows
from laid_ds.models.extension import self_extend
from laid_ds.models.image_pixels import OPTION, Limits, limit_pixels, sizing_note
from laid_ds.models.load import PreTrainedModel, load_config, load_model, open_model
from laid_ds.models.numbering import numbering_note, numbers_images
from laid_ds.models.processor import ProcessorMixin, Renderer, load_processor
from laid_ds.runtime import distributed, engine

BYTES = {"float32": 4, "bfloat16": 2}
FULL = 0.7  # of a device's memory, which a whole model may take: the rest is for what it reads


@dataclass(frozen=True)
class How:
    """How models are asked."""

    dtype: str = "float32"
    max_new_tokens: int = 64
    tokens_per_batch: int = TOKENS_PER_BATCH
    attention: bool = False
    """Whether to record what each head attends to, too."""
    extended: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Name of a model -> (group, window) of SelfExtend, with which it is asked."""
    zero3: bool | None = None
    """Models sharded over the ranks, or whole on each; None: sharded where one device is too small."""
    workers: int = 0
    """Processes of each rank that render ahead."""
    again: bool = False
    """Ask models that have changed since anew, which is refused otherwise."""
    number_images: bool | None = None
    """Whether "Image 7: " stands before the seventh image; None: as the model was trained."""
    image_pixels: Limits | None = None
    """Least and most pixels of each picture; None: as the model's folder says."""

    def processor(self, folder: Path) -> ProcessorMixin:
        return limit_pixels(load_processor(folder), self.image_pixels, OPTION)

    def numbers(self, folder: Path) -> bool:
        return numbers_images(folder) if self.number_images is None else self.number_images

    def of(self, name: str, folder: Path) -> dict[str, Any]:
        """A model as it is asked."""
        group_and_window = self.extended.get(name)
        extension = list(group_and_window) if group_and_window else None
        pixels = list(self.image_pixels) if self.image_pixels else None
        return {"folder": str(folder), "self_extend": extension, "number_images": self.numbers(folder) or None, "image_pixels": pixels}


def evaluate_models(
    folders: Sequence[Path], models: Mapping[str, Path], out: Path, wish: Wish | None = None, how: How | None = None
) -> dict[str, Any]:
    """Ask each model whatever it has not answered yet by the files of `out`; returns the content of the results file, which is rewritten
    after each model. Collective where there are ranks: each asks its share.

    Sizes that the haystacks do not hold are left out, and `out` and stderr say why. Raises ValueError when a model is no folder, when a
    task cannot be asked, when the files of `out` were made with other tasks, settings or models of these names, or cannot be written, and
    when SelfExtend is not defined for a model.
    """
    how = how or How()
    tasks = check(folders, models, wish or Wish(), how, distributed.world_size())
    first = distributed.rank() == 0
    with claimed(out) if first else nullcontext():
        notes = [note for task in tasks for note in notes_on(task.left_out)]
        notes += [numbering_note(name, numbers_images(folder), how.numbers(folder)) for name, folder in models.items()]
        if first and len(models) > 1:
            notes.append(sizing_note({name: how.processor(folder) for name, folder in models.items()}))
        for note in filter(None, notes) if first else ():
            print(note, file=sys.stderr)
        if first:
            open_files(out, _setting(tasks, how), {name: how.of(name, folder) for name, folder in models.items()}, tasks, how.again)
        distributed.barrier()
        for name, folder in models.items():
            if name in read_results(out)["models"]:
                continue
            attention = _ask_model(name, folder, tasks, out, how)
            distributed.barrier()
            if first:
                add_model(out, name, tasks, attention)
            distributed.barrier()
        return read_results(out)


def check(folders: Sequence[Path], models: Mapping[str, Path], wish: Wish, how: How, ranks: int) -> list[Task]:
    """The tasks. Raises ValueError for what can be known before a model is loaded."""
    if how.dtype not in BYTES:
        raise ValueError(f"--dtype {how.dtype!r} is none of {', '.join(BYTES)}")
    if not folders or not models:
        raise ValueError("give at least one folder of shards, and at least one model as NAME=FOLDER")
    for folder in models.values():
        load_config(folder)
        if how.image_pixels is not None:
            how.processor(folder)
    tasks = open_tasks(folders, wish)
    for task in tasks if how.attention else ():
        if task.mode != FORCED or task.depths is not None or len(tasks) > 1:
            raise ValueError(f"--attention looks at one task of haystacks that are asked by teacher forcing, and {task.name} is not that")
        check_needles(task.dataset, task.samples, "--attention")
    if how.zero3 and how.attention:
        raise ValueError("--attention needs whole models: leave out --zero3")
    if how.zero3 and ranks == 1:
        raise ValueError("--zero3 shards models over ranks, and there is one: give --ranks, or leave out --zero3")
    for name, group_and_window in how.extended.items():
        self_extend(open_model(models[name]), *group_and_window)
    return tasks


def _setting(tasks: Sequence[Task], how: How) -> dict[str, Any]:
    """What must be the same for answers to be kept."""
    common: dict[str, Any] = {"dtype": how.dtype, "attention": how.attention}
    if any(task.mode != FORCED for task in tasks):
        common["max_new_tokens"] = how.max_new_tokens
    return (tasks[0].setting() if len(tasks) == 1 else {"tasks": {task.name: task.setting() for task in tasks}}) | common


def _ask_model(name: str, folder: Path, tasks: Sequence[Task], out: Path, how: How) -> dict[str, Any] | None:
    """Ask this rank's share of what the model has not answered yet; the answers are appended to this rank's file. What its attention
    looks at, where that was asked for."""
    done, pending = unanswered(out, name, tasks)
    distributed.barrier()  # from here on the files change
    if not pending and not how.attention:
        return None
    rank, ranks = distributed.rank(), distributed.world_size()
    device = _device()
    sharded = _is_sharded(folder, how, device, ranks)
    with ExitStack() as stack:
        model = stack.enter_context(_loaded(folder, how.dtype, device, sharded))
        listen_to_windows(model)
        if how.extended.get(name):
            self_extend(model, *how.extended[name])
        renderer = Renderer(how.processor(folder), Pixels(), number_images=how.numbers(folder))
        asker = Asker(model, renderer, device, how.max_new_tokens, how.tokens_per_batch, how.workers, in_step=sharded)
        append = stack.enter_context(appending(answers_file(out), rank))
        phases = _phases(pending)
        mine = [item for phase in phases for item in phase[rank::ranks]]
        told = name if ranks == 1 else f"{name}, rank 0 of {ranks}"
        tick = stack.enter_context(telling(told, tasks, done[rank::ranks], mine)) if rank == 0 else lambda answers: None
        for phase in phases:
            for answers in ask_items(asker, tasks, phase[rank::ranks], spare=phase[0]):
                append([answer | {"model": name} for answer in answers])
                tick(answers)
        if how.attention and rank == 0:
            (task,) = tasks
            return {str(size): needle_profile(model, renderer, task.dataset, size, task.samples) for size in task.sizes}
    return None


def _phases(items: Sequence[Item]) -> list[list[Item]]:
    """The items in parts that every rank asks at the same time: of one task, and with images or without."""
    phases: dict[tuple[int, bool], list[Item]] = {}
    for item in items:
        phases.setdefault((item.task, item.num_images > 0), []).append(item)
    return list(phases.values())


def _device() -> torch.device:
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")


def _is_sharded(folder: Path, how: How, device: torch.device, ranks: int) -> bool:
    """Whether the model is spread over the ranks. Raises ValueError for one that is too large for one device, where there is only one."""
    if how.zero3 is not None:
        return how.zero3 and ranks > 1
    if device.type != "cuda":
        return False
    needed = sum(parameter.numel() for parameter in open_model(folder).parameters()) * BYTES[how.dtype]
    memory = torch.cuda.get_device_properties(device).total_memory
    if needed > FULL * memory and ranks == 1:
        raise ValueError(
            f"the model at {folder} takes {needed / 1e9:.0f} GB in {how.dtype}, and this device has {memory / 1e9:.0f} GB: give --ranks to"
            " shard it over several devices"
        )
    return needed > FULL * memory and not how.attention


@contextmanager
def _loaded(folder: Path, dtype: str, device: torch.device, sharded: bool) -> Iterator[PreTrainedModel]:
    """A model in evaluation mode, whole on the device or sharded over all ranks; its memory is free again afterwards."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if sharded:
        config = engine.sharded_config(dtype)
        held = engine.teacher_engine(load_model(folder, dtype, config), config)
        yield held.module
        held.destroy()
    else:
        held = load_model(folder, dtype).to(device).eval()
        yield held
    del held
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
