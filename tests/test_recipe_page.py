"""docs/recipe.md is what config.py says: every key, with its meaning, its default, what it may be, and when to change it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from laid_ds import config
from laid_ds.keys import find, keys, meant, must_be_given
from laid_ds.recipe_page import page, paragraphs

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "recipe.md"
LEAVES = [key for key in keys(config.Run) if key.section is None]


def test_the_page_is_what_the_code_says():
    found, expected = PAGE.read_text() if PAGE.is_file() else "", page()
    PAGE.write_text(expected)
    assert found == expected, "docs/recipe.md was not up to date; it is now"


def cells_of(name: str) -> list[str]:
    (line,) = [line for line in page().splitlines() if line.startswith(f"| `{name}` |")]
    return [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")]


@pytest.mark.parametrize("key", LEAVES, ids=lambda key: key.name)
def test_every_key_has_its_row_and_the_default_there_is_the_one_of_the_code(key):
    _, default, may_be, what, when = cells_of(key.name)
    assert len(what) > 10
    assert len(when) > 10
    assert may_be
    if default == "must be given":
        assert must_be_given(key)
    elif default == "none":
        assert key.default is None
    else:
        value = tomllib.loads(f"value = {default.strip('`')}")["value"]
        assert (tuple(value) if isinstance(value, list) else value) == key.default


def test_the_keys_are_all_that_a_recipe_can_hold():
    """Counted another way: by the JSON schema of the run."""
    schema = config.Run.model_json_schema()

    def names(tree: dict, prefix: str) -> set[str]:
        found = set()
        for name, field in tree["properties"].items():
            place = next((one["$ref"] for one in [field, *field.get("anyOf", [])] if "$ref" in one), None)
            found |= names(schema["$defs"][place.rsplit("/", 1)[1]], f"{prefix}{name}.") if place else {prefix + name}
        return found

    assert {key.name for key in LEAVES} == names(schema, "")


def test_a_key_of_which_the_code_does_not_say_when_to_change_it_is_told_of():
    class Said(BaseModel):
        model_config = ConfigDict(use_attribute_docstrings=True)
        half: int = 1
        """What it is, and no more."""

    with pytest.raises(ValueError, match=r"half in laid_ds/config.py needs two paragraphs"):
        paragraphs(find(Said, "half"))


@pytest.mark.parametrize(
    "name, key",
    [
        ("optimizer.lrr", "optimizer.lr"),
        ("optimiser", "optimizer"),
        ("studnt.dtype", "student.dtype"),
        ("losses.lr", "optimizer.lr"),
        ("lr", "optimizer.lr"),
        ("evaluation.size", "evaluation.sizes"),
        ("student.lora.dropuot", "student.lora.dropout"),
        ("optimizer.momentum", None),
        ("zzz", None),
    ],
)
def test_a_mistyped_key_is_answered_with_the_one_that_was_meant(name, key):
    assert meant(config.Run, name) == key
