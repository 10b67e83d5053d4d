"""From a run folder to a stock model folder: weights from the latest checkpoint, gain folded in, a model card that says how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laid_ds.commands import asking_lines, pixel_limits
from laid_ds.config import Run
from laid_ds.evaluation.window import curve
from laid_ds.files import read_json, read_json_lines
from laid_ds.method.losses import TERMS
from laid_ds.models.export import write_student
from laid_ds.models.lora import merge_lora
from laid_ds.runtime import checkpoint, engine


def export_run(folder: Path, output: Path, step: int | None = None) -> None:
    """Write the student of the run in `folder` to `output`, as it was after `step` (default: the latest checkpoint).

    Raises ValueError when there is no run, no such checkpoint in it, or a damaged one.
    """
    record = folder / "run.json"
    if not record.is_file():
        raise ValueError(f"no run at {folder} (no run.json)")
    resolved = read_json(record)
    saved = checkpoint.of_step(folder, step) if step is not None else checkpoint.latest(folder)
    if saved is None:
        raise ValueError(f"the run at {folder} has no checkpoint yet")
    run = Run.model_validate(resolved["run"])
    weights = _weights(saved)
    model = {name.removeprefix("model."): w for name, w in weights.items() if name.startswith("model.")}
    if run.student.lora is not None:
        model = merge_lora(model, run.student.lora.alpha / run.student.lora.rank)
    gains = {int(name.rsplit(".", 1)[1]): w for name, w in weights.items() if name.startswith("align.gain.")}
    write_student(
        run.student.path,
        model,
        gains,
        run.student.dtype,
        output,
        model_card(run, resolved["versions"], saved.name, results(folder, saved.name)) + _asking(run),
        run.student.trust_remote_code,
        run.data.image_pixels,
        run.data.number_images,
    )


def _weights(saved: Path) -> dict[str, Any]:
    """Raises ValueError for a checkpoint that the run, which may be running, has removed meanwhile."""
    try:
        return engine.checkpoint_weights(saved)
    except FileNotFoundError:
        if (saved / "manifest.json").is_file():
            raise
        raise ValueError(f"the run goes on and has removed checkpoint {saved} while it was read; export again") from None


def _asking(run: Run) -> str:
    """The card's lines that ask the model, with the run's pixel limits, else those of the student's processor, which the folder keeps."""
    student = Path(run.student.path)
    names = [name for name in ("processor_config.json", "preprocessor_config.json") if (student / name).is_file()]
    processors = [read_json(student / name, plain=True) for name in names]
    limits = next(filter(None, map(pixel_limits, processors)), None)
    limits = limits and (run.data.image_pixels or limits)
    model_type = read_json(student / "config.json", plain=True).get("model_type", "")
    return f"\n## Asking it\n\n{asking_lines(model_type, limits, run.data.number_images)}"


def results(folder: Path, step: str) -> str:
    """What the run folder holds of measurements up to a checkpoint, as Markdown; "" if nothing.

    metrics.jsonl: the losses of that step. evaluation.jsonl: the last held-out accuracy. evaluation.json: what `laid eval` wrote there.
    """
    number, parts = int(step.rsplit("_", 1)[1]), []
    window = [_most(folder / "metrics.jsonl", number, name) for name in ("most_images", "longest_tokens")]
    if all(window):
        parts.append(f"Trained on windows of at most {window[0]:,} images, and of at most {window[1]:,} tokens.")
    losses = _last(folder / "metrics.jsonl", number)
    if losses is not None:
        named = [f"{name} {losses[name]:.4g}" for name in ("loss", *TERMS) if name in losses]
        parts.append(f"Training after step {losses['step']} of the run: {', '.join(named)}.")
    held_out = _last(folder / "evaluation.jsonl", number)
    if held_out is not None:
        measured = f"Held out after step {held_out['step']}, accuracy by number of images: {_curve(held_out['accuracy'])}."
        if held_out["threshold"] is not None:
            bound = "at least " if held_out["censored"] else ""
            measured += f" Window: {bound}{held_out['window']:.1f} images (accuracy >= {held_out['threshold']:.3f})."
        parts.append(measured)
    if (folder / "evaluation.json").is_file():
        for name, model in read_json(folder / "evaluation.json")["models"].items():
            parts.append(f"Evaluated, {name}, accuracy by number of images: {_curve(curve(model['answers']))}.")
    return "\n\n".join(parts)


def _last(path: Path, step: int) -> dict[str, Any] | None:
    """The last line of a JSON lines file that is not after a step."""
    return max((line for line in read_json_lines(path) if line["step"] <= step), key=lambda line: line["step"], default=None)


def _most(path: Path, step: int, name: str) -> int:
    """The largest value of a name in the lines up to a step, 0 if none has it."""
    return max((line.get(name, 0) for line in read_json_lines(path) if line["step"] <= step), default=0)


def _curve(accuracy: Mapping[Any, float]) -> str:
    return ", ".join(f"{size}: {share:.2f}" for size, share in accuracy.items())


def model_card(run: Run, versions: dict[str, Any], step: str, measured: str) -> str:
    """The README.md of an exported model."""
    made = "distilled" if run.taught else "trained"
    source = f" from the teacher `{run.teacher.path}`" if run.taught else ""
    resolved = json.dumps(run.model_dump(mode="json"), indent=1)
    found = f"## Results\n\n{measured}\n\n" if measured else ""
    used = ", ".join(f"{name} {number}" for name, number in versions.items())
    limits = run.data.image_pixels
    images = f"at an area of {limits[0]:,} to {limits[1]:,} pixels" if limits else "in the sizes that its stock processor chose"
    sizes = f"Images were shown {images}; the processor in this folder does the same. A program that overrides it shows other images."
    return (
        f"---\nlibrary_name: transformers\ntags: [laid-ds, long-context, distillation]\n---\n\n# {run.name}\n\n"
        f"Student `{run.student.path}`, {made}{source} with laid_ds ({step}). A stock checkpoint: it loads without laid_ds.\n\n{sizes}\n\n"
        f"Versions: {used}.\n\n{found}## The run\n\n```json\n{resolved}\n```\n"
    )
