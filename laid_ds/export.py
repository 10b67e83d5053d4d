"""From a run folder to a stock model folder: weights from the latest checkpoint, gain folded in, a model card that says how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from laid_ds import checkpoint, engine
from laid_ds.config import Run
from laid_ds.models.export import write_student
from laid_ds.models.lora import merge_lora


def export_run(folder: Path, output: Path, step: int | None = None) -> None:
    """Write the student of the run in `folder` to `output`, as it was after `step` (default: the latest checkpoint).

    Raises ValueError when there is no run, no such checkpoint in it, or a damaged one.
    """
    record = folder / "run.json"
    if not record.is_file():
        raise ValueError(f"no run at {folder} (no run.json)")
    saved = checkpoint.of_step(folder, step) if step is not None else checkpoint.latest(folder)
    if saved is None:
        raise ValueError(f"the run at {folder} has no checkpoint yet")
    resolved = json.loads(record.read_text())
    run = Run.model_validate(resolved["run"])
    weights = engine.checkpoint_weights(saved)
    model = {name.removeprefix("model."): w for name, w in weights.items() if name.startswith("model.")}
    if run.student.lora is not None:
        model = merge_lora(model, run.student.lora.alpha / run.student.lora.rank)
    gains = {int(name.rsplit(".", 1)[1]): w for name, w in weights.items() if name.startswith("align.gain.")}
    write_student(run.student.path, model, gains, run.student.dtype, output, model_card(run, resolved["versions"], saved.name))


def model_card(run: Run, versions: dict[str, Any], step: str) -> str:
    """The README.md of an exported model."""
    made = "distilled" if run.teacher is not None else "trained"
    source = f" from the teacher `{run.teacher.path}`" if run.teacher is not None else ""
    resolved = json.dumps(run.model_dump(mode="json"), indent=1)
    return (
        f"---\nlibrary_name: transformers\ntags: [laid-ds, long-context, distillation]\n---\n\n# {run.name}\n\n"
        f"Student `{run.student.path}`, {made}{source} with laid_ds ({step}). A stock checkpoint: it loads without laid_ds.\n\n"
        f"Versions: {', '.join(f'{name} {number}' for name, number in versions.items())}.\n\n## The run\n\n```json\n{resolved}\n```\n"
    )
