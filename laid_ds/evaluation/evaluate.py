"""Ask several stock models about the same haystacks and keep every answer in one results file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from laid_ds.data.dataset import Dataset
from laid_ds.data.images import Pixels
from laid_ds.evaluation.haystack import ask, choices_of, read_haystacks
from laid_ds.evaluation.spectra import needle_profile
from laid_ds.models.extension import self_extend
from laid_ds.models.load import load_model
from laid_ds.models.processor import Renderer, load_processor


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

    extended: name of a model -> (group, window) of SelfExtend, with which it is asked. Raises ValueError when `out` was made with other
    questions, and when SelfExtend is not defined for a model.
    """
    dataset = Dataset.open(shards)
    setting = {
        "shards": str(shards),
        "fingerprint": dataset.fingerprint,
        "sizes": list(sizes),
        "haystacks": haystacks,
        "questions": questions,
        "choices": choices_of(dataset),
        "dtype": dtype,
        "attention": attention,
    }
    results, samples = _open_results(out, setting), read_haystacks(dataset, haystacks)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = {name: _facts(folder, (extended or {}).get(name)) for name, folder in models.items()}
    with _progress() as progress:
        for name, folder in models.items():
            if facts[name].items() <= results["models"].get(name, {}).items():
                continue
            task = progress.add_task(name, total=len(sizes))
            model, renderer = load_model(folder, dtype).to(device).eval(), Renderer(load_processor(folder), Pixels())
            if facts[name].get("self_extend"):
                self_extend(model, *facts[name]["self_extend"])
            answers = ask(model, renderer, samples, sizes, questions, tick=lambda task=task: progress.advance(task))
            results["models"][name] = facts[name] | {"answers": answers}
            if attention:
                results["models"][name]["attention"] = {
                    str(size): needle_profile(model, renderer, dataset, size, haystacks) for size in sizes
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
    if not out.is_file():
        versions = {name: version(name) for name in ("laid-ds", "torch", "transformers")}
        return {"setting": setting, "versions": versions, "models": {}}
    results = json.loads(out.read_text())
    if results["setting"] != setting:
        differing = [name for name in setting if results["setting"].get(name) != setting[name]]
        raise ValueError(f"{out} was made with other {', '.join(differing)}; give another --out or remove the file")
    return results


def _write(out: Path, results: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(json.dumps(results))
    os.replace(partial, out)


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(console=console, disable=not console.is_terminal)
