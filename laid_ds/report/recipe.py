"""Can it be done again: resolved recipes, versions, data, hardware, and the commands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from laid_ds.data.dataset import Dataset
from laid_ds.data.record import DataError
from laid_ds.report.html_parts import code, fold, paragraph, table
from laid_ds.report.palette import Style
from laid_ds.report.sources import Evaluation, RunFolder
from laid_ds.report.training import attempts


def recipes_part(runs: Sequence[RunFolder], styles: Mapping[str, Style]) -> str:
    """One recipe whole; of several the keys in which they differ, and the rest folded away."""
    trees = {run.name: flat(run.recipe) for run in runs if run.recipe}
    if not trees:
        return ""
    keys = list(dict.fromkeys(key for tree in trees.values() for key in tree))
    names = list(trees)
    absent = "not a key of its version"
    differing = [key for key in keys if len({json.dumps(tree.get(key, absent)) for tree in trees.values()}) > 1]
    rows = {key: (key, *(trees[name].get(key, absent) for name in names)) for key in keys}
    facts = table(("", *names), _facts(runs, names))
    if len(trees) == 1:
        return facts + fold(f"The resolved recipe, {len(keys)} keys", table(("key", "value"), rows.values()))
    shown = table(("key", *names), [rows[key] for key in differing]) if differing else paragraph("The recipes do not differ.")
    alike = fold(
        f"{len(keys) - len(differing)} keys that are alike",
        table(("key", "value"), [rows[key][:2] for key in keys if key not in differing]),
    )
    return f"{facts}<h3>Where the recipes differ</h3>{shown}{alike}"


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names of all values."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found


def _facts(runs: Sequence[RunFolder], names: Sequence[str]) -> list[tuple[Any, ...]]:
    kept = [run for run in runs if run.name in names]
    versions = list(dict.fromkeys(name for run in kept for name in run.record.get("versions", {})))
    rows = [(name, *(run.record.get("versions", {}).get(name) for run in kept)) for name in versions]
    rows.append(("machine", *(_machines(run) for run in kept)))
    rows.append(("data fingerprint", *(_fingerprint(run.recipe) for run in kept)))
    return rows


def _machines(run: RunFolder) -> str:
    said = dict.fromkeys(f"{one.get('ranks')} ranks, {one.get('device')}, {one.get('host')}" for one in attempts(run))
    return "; ".join(said) or f"{run.record.get('world_size', '?')} ranks; the device was not recorded"


def _fingerprint(recipe: Mapping[str, Any]) -> str:
    """Of the training shards as they are now, which a checkpoint compares with; or why it cannot be told."""
    places = (recipe.get("data") or {}).get("shards") or []
    if not places or not all(isinstance(place, str) and Path(place).is_dir() for place in places):
        return "the shards are not here any more"
    try:
        return Dataset.open(places).fingerprint[:16]
    except (DataError, OSError) as error:
        return f"the shards cannot be read: {error}"


def commands_part(runs: Sequence[RunFolder], evaluations: Sequence[Evaluation], report: Sequence[str]) -> str:
    """The commands that make all this again, `report` the last, and a recipe file for each run."""
    lines = []
    for run in (run for run in runs if run.recipe):
        ranks = run.record.get("world_size")
        lines.append(shlex.join(["laid", "train", f"{_file(run)}.toml", *(["--ranks", str(ranks)] if ranks else [])]))
        lines.append(shlex.join(["laid", "export", str(run.folder), f"models/{_file(run)}"]))
    lines += [line for evaluation in evaluations for line in _asking(evaluation)]
    lines.append(shlex.join(report))
    files = "".join(fold(f"{_file(run)}.toml", code(as_toml(run.recipe))) for run in runs if run.recipe)
    return code("\n".join(lines)) + files


def _file(run: RunFolder) -> str:
    return run.name.replace("/", "-")


def _asking(evaluation: Evaluation) -> list[str]:
    setting = evaluation.results.get("setting", {})
    models = [f"{name}={model['folder']}" for name, model in evaluation.results.get("models", {}).items() if model.get("folder")]
    if not isinstance(setting.get("shards"), str) or not models:
        return []
    options = {"--sizes": ",".join(map(str, setting.get("sizes") or [])), "--haystacks": setting.get("haystacks")}
    options |= {"--questions": setting.get("questions"), "--dtype": setting.get("dtype"), "--depths": setting.get("depths")}
    words = [str(word) for name, value in options.items() if value for word in (name, value)]
    attention = ["--attention"] if setting.get("attention") else []
    out = str(evaluation.folder / "evaluation.json")
    return [shlex.join(["laid", "eval", setting["shards"], *models, "--out", out, *words, *attention])]


def as_toml(tree: Mapping[str, Any]) -> str:
    """A resolved recipe as a file for `laid train`: what is none is left out."""
    return "\n".join(_lines(tree, "")).strip() + "\n"


def _lines(tree: Mapping[str, Any], section: str) -> list[str]:
    own = {key: value for key, value in tree.items() if value is not None and not isinstance(value, Mapping)}
    lines = [f"\n[{section}]"] if section and own else []
    lines += [f"{key} = {_toml(value)}" for key, value in own.items()]
    for key, value in tree.items():
        if isinstance(value, Mapping):
            lines += _lines(value, f"{section}.{key}" if section else key)
    return lines


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value) if isinstance(value, bool | str) else repr(value)
