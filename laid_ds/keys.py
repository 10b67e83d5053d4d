"""The keys of a recipe, read off its classes: dotted names, what may stand there in words, and what a mistyped one was meant to be."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


class Key(NamedTuple):
    """A field of a section."""

    name: str
    """Dotted, from the top of the recipe."""
    field: FieldInfo
    section: type[BaseModel] | None
    """Its class, where the key is a section itself."""

    @property
    def values(self) -> str:
        """What may stand there, in words."""
        return words(Annotated[(self.field.annotation, *self.field.metadata)] if self.field.metadata else self.field.annotation)

    @property
    def default(self) -> Any:
        """PydanticUndefined where there is none."""
        return self.field.default


def keys(of: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """All keys, each section followed by its own."""
    for name, field in of.model_fields.items():
        section = _section(field.annotation)
        yield Key(prefix + name, field, section)
        if section is not None:
            yield from keys(section, f"{prefix}{name}.")


def find(of: type[BaseModel], name: str) -> Key | None:
    """The key of this dotted name."""
    return next((key for key in keys(of) if key.name == name), None)


def meant(of: type[BaseModel], name: str) -> str | None:
    """The key that a dotted name was probably meant to be: one of its section by nearly this name, one of another section by just this
    name, or whatever is spelled most like it."""
    known = [key.name for key in keys(of)]
    section, _, last = name.rpartition(".")
    beside = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == section}
    elsewhere = [key for key in known if key.rpartition(".")[2] == last]
    whole = get_close_matches(name, known, n=1, cutoff=0.7) if not beside else []
    return next(iter([*(beside[near] for near in get_close_matches(last, beside, n=1)), *elsewhere, *whole]), None)


def words(annotation: Any) -> str:
    """An annotation as a person would say it."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _bounded(words(args[0]), args[1:])
    if origin is Literal:
        return " or ".join(f'"{value}"' for value in args)
    if origin in (Union, UnionType):
        return " or ".join(words(part) for part in args if part is not NoneType)
    if origin is tuple:
        parts = [words(part) for part in args if part is not Ellipsis]
        return f"a list, each {parts[0]}" if Ellipsis in args else f"[{', '.join(parts)}]"
    return "a section" if _section(annotation) else PLAIN[annotation]


def _bounded(what: str, marks: tuple[Any, ...]) -> str:
    if least := next((least for mark in marks if (least := _bound(mark, "min_length"))), None):
        what = what.replace("a list, each", f"a list of at least {least}, each", 1)
    bounds = [f"{said} {value:.10g}" for mark in marks for name, said in BOUNDS.items() if (value := _bound(mark, name)) is not None]
    return " ".join([what, " and ".join(bounds)]).strip()


def _bound(mark: Any, name: str) -> float | None:
    """The bound of a constraint, which may be given as a whole Field."""
    marks = mark.metadata if isinstance(mark, FieldInfo) else [mark]
    return next((getattr(one, name) for one in marks if hasattr(one, name)), None)


def _section(annotation: Any) -> type[BaseModel] | None:
    parts = [annotation, *get_args(annotation)]
    return next((part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)), None)


def must_be_given(key: Key) -> bool:
    return key.default is PydanticUndefined
