"""docs/recipe.md, written from the classes of config.py: `python -m laid_ds.recipe_page > docs/recipe.md`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from laid_ds.config import Run
from laid_ds.keys import Key, keys, must_be_given

INTRODUCTION = """# The recipe

Written by `python -m laid_ds.recipe_page` from `laid_ds/config.py`; do not edit it by hand (`pytest tests/test_recipe_page.py` writes it).

A run is one TOML file. Everything that decides its outcome stands there, unknown keys are refused, and what is not given has the default
below. On the command line any key can be given by its dotted name, which then wins; `none` removes a key or a section:

    laid train recipes/demo.toml optimizer.lr=1e-4 data.images='[2, 16]' evaluation=none

Paths are taken from where the command is started, `~` is your home folder, and nothing is downloaded. Where no file of yours has that name,
`ds_configs/NAME` (and a recipe `recipes/NAME`) is the one that comes with the package; `run.json` in the run folder says which file was
read, and under `engines` what stood in it. What to choose on a real pair is in [choosing.md](choosing.md), what the losses are in
[method.md](method.md).

A run that has begun goes on with the same recipe. Only `logging`, `checkpoint`, `evaluation`, `stop`, `data.workers` and `align.probe` may
change, `steps` may grow, and `data.micro_batch`, `optimizer.accumulation` and `sequence_parallel` may change where the samples per step
stay the same.
"""


def page() -> str:
    """The whole page."""
    of_run = [key for key in keys(Run) if "." not in key.name]
    parts = [INTRODUCTION, _table("The run", "", [key for key in of_run if key.section is None])]
    for key in keys(Run):
        if key.section is not None:
            parts.append(_section(key, [one for one in keys(Run) if one.section is None and one.name.rpartition(".")[0] == key.name]))
    return "\n".join(parts)


def paragraphs(key: Key) -> tuple[str, str]:
    """(what a key is, when to change it). Raises ValueError for a key of which config.py does not say both."""
    said = [" ".join(part.split()) for part in (key.field.description or "").split("\n\n")]
    if len(said) != 2 or not all(said):
        raise ValueError(f"{key.name} in laid_ds/config.py needs two paragraphs under it: what it is, and when to change it")
    return said[0], said[1]


def _section(key: Key, own: list[Key]) -> str:
    words = [" ".join(text.split()) for text in (key.section.__doc__, key.field.description) if text]
    given = {None: "Left out unless you write it."}.get(key.default, "Must be there." if must_be_given(key) else "")
    return _table(f"`[{key.name}]`", " ".join([*dict.fromkeys(words), given]).strip(), own)


def _table(title: str, text: str, own: list[Key]) -> str:
    lines = ["| key | default | may be | what it is | when to change it |", "|---|---|---|---|---|"]
    for key in own:
        cells = (f"`{key.name}`", _default(key), key.values, *paragraphs(key))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([f"## {title}\n", *([text, ""] if text else []), *lines, ""])


def _default(key: Key) -> str:
    if must_be_given(key):
        return "must be given"
    return "none" if key.default is None else f"`{_toml(key.default)}`"


def _toml(value: Any) -> str:
    """A value as it stands in a recipe."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool | str | Path):
        return json.dumps(value if isinstance(value, bool) else str(value))
    assert not isinstance(value, BaseModel)
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    print(page(), end="")
