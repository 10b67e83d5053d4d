"""The keys of a study's file as a part of docs/study.md, written from the classes of file.py."""

from __future__ import annotations

import json

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from laid_ds.study.file import Arm, Asked, Study, Sweep

INTRODUCTION = """## The file of a study

A TOML file; unknown keys are refused. `recipes/study/small.toml` is a short one to start from. In texts, {world} is the folder of
`--world`, {teacher} that of the teacher in turn, {seed} the seed in turn. `section.key=value` is what `laid train RECIPE section.key=value`
takes."""
TABLES = (("At the top", Study), ("`[asked]`", Asked), ("`[sweep]`, may be left out", Sweep), ("`[arms.NAME]`, one for each arm", Arm))


def format_section() -> str:
    """Markdown: a table for each section."""
    return "\n\n".join([INTRODUCTION, *(f"### {title}\n\n{_table(section)}" for title, section in TABLES)]) + "\n"


def _table(section: type[BaseModel]) -> str:
    rows = ["| key | default | what it is |", "|---|---|---|"]
    for name, field in section.model_fields.items():
        if name not in ("asked", "sweep", "arms"):
            rows.append(f"| `{name}` | {_default(field.default)} | {' '.join((field.description or '').split())} |")
    return "\n".join(rows)


def _default(value: object) -> str:
    if value is PydanticUndefined:
        return "must be given"
    if value in (None, "", (), {}):
        return "none"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"
