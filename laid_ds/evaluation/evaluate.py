"""Ask several stock models about the same haystacks and keep every answer in one results file."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from laid_ds.data.dataset import Dataset
from laid_ds.data.images import Pixels
from laid_ds.disk import writing
from laid_ds.evaluation.haystack import ask, read_haystacks, survey
from laid_ds.evaluation.report import read_results
from laid_ds.evaluation.spectra import check_needles, needle_profile
from laid_ds.evaluation.window import notes_on
from laid_ds.models.extension import self_extend
from laid_ds.models.load import load_config, load_model
from laid_ds.models.processor import Renderer, load_processor

DTYPES = ("float32", "bfloat16")
SECONDS_PER_LINE = 30  # of progress, where no terminal shows a bar

Tick = Callable[[int, int], None]


def evaluate_models(
    shards: Path,
    models: Mapping[str, Path],
    out: Path,
    sizes: Sequence[int],
    haystacks: int,
    questions: int,
    dtype: str,
    attention: bool = False,
    extended: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, Any]:
    """Evaluate each model that the results file `out` does not hold yet, or that has changed since; the file is rewritten after each model.

    Sizes that the haystacks do not hold are left out, and `out` and stderr say why. extended: name of a model -> (group, window) of
    SelfExtend, with which it is asked. Raises ValueError when a model is no folder, when nothing can be measured, when `out` was made
    with other questions or cannot be written, and when SelfExtend is not defined for a model.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r} is none of {', '.join(DTYPES)}")
    for folder in models.values():
        load_config(folder)
    dataset = Dataset.open(shards)
    found = survey(dataset, haystacks, sizes)
    for note in notes_on(found.left_out):
        print(note, file=sys.stderr)
    if attention:
        check_needles(dataset, haystacks)
    setting = {
        "shards": str(shards),
        "fingerprint": dataset.fingerprint,
        "sizes": found.sizes,
        "haystacks": haystacks,
        "questions": questions,
        "choices": found.choices,
        "dtype": dtype,
        "attention": attention,
    }
    results, samples = _open_results(out, setting), read_haystacks(dataset, haystacks)
    results["left_out"] = {str(size): reason for size, reason in found.left_out.items()}
    _check_writable(out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = {name: _facts(folder, (extended or {}).get(name)) for name, folder in models.items()}
    for name, folder in models.items():
        if facts[name].items() <= results["models"].get(name, {}).items():
            continue
        model, renderer = load_model(folder, dtype).to(device).eval(), Renderer(load_processor(folder), Pixels())
        if facts[name].get("self_extend"):
            self_extend(model, *facts[name]["self_extend"])
        with _progress(name, haystacks, len(found.sizes)) as tick:
            answers = ask(model, renderer, samples, found.sizes, questions, tick=tick)
        results["models"][name] = facts[name] | {"answers": answers}
        if attention:
            results["models"][name]["attention"] = {
                str(size): needle_profile(model, renderer, dataset, size, haystacks) for size in found.sizes
            }
        _write(out, results)
    return results


def _facts(folder: Path, extension: tuple[int, int] | None) -> dict[str, Any]:
    """What must be the same for a model's answers to be kept."""
    return {"folder": str(folder), "files": _files(folder), "self_extend": list(extension) if extension else None}


def _files(folder: Path) -> list[list[Any]]:
    """Name, size and time of each file of a model folder: what tells one model from another without reading it."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(Path(folder).glob("*.*"))]


def _open_results(out: Path, setting: dict[str, Any]) -> dict[str, Any]:
    if not out.exists():
        versions = {name: version(name) for name in ("laid-ds", "torch", "transformers")}
        return {"setting": setting, "versions": versions, "models": {}}
    results = read_results(out)
    if results["setting"] != setting:
        differing = [name for name in setting if results["setting"].get(name) != setting[name]]
        raise ValueError(f"{out} was made with other {', '.join(differing)}; give another --out or remove the file")
    return results


def _check_writable(out: Path) -> None:
    """Raises ValueError now rather than after the first model."""
    partial = _partial(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise ValueError(f"the results cannot be written to {out}: {error.strerror}") from None


def _write(out: Path, results: dict[str, Any]) -> None:
    with writing(out.parent, out.name):
        _partial(out).write_text(json.dumps(results, allow_nan=False))
        os.replace(_partial(out), out)


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


@contextmanager
def _progress(name: str, haystacks: int, sizes: int) -> Iterator[Tick]:
    """Tells on stderr how far a model is: a bar in a terminal, else a plain line at the end of each size and now and then before."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(name, haystacks)
        return
    with Progress(console=console) as progress:
        task = progress.add_task(name, total=haystacks * sizes)
        yield lambda size, answered: progress.advance(task, answered)


def _lines(name: str, haystacks: int) -> Tick:
    done, told = 0, time.monotonic()

    def tick(size: int, answered: int) -> None:
        nonlocal done, told
        done += answered
        if done == haystacks or time.monotonic() - told >= SECONDS_PER_LINE:
            print(f"{name}: {done} of {haystacks} haystacks of {size} images", file=sys.stderr, flush=True)
            told = time.monotonic()
        done %= haystacks

    return tick
