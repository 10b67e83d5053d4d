"""Which heads retrieve, and which look near or far, by the attention that each has, and which heads of a student shall learn from those
that retrieve: numbers alone, no model. `laid probe` writes them (`Looks`, `Probe`), and a recipe's `align.pairs`, `align.heads` and
`align.start` = "probed" read them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from laid_ds.files import read_json

CLEAR = 0.1  # mass on the needle below which no head is called retrieving
SHARE = 0.5  # of the best head's mass: from there on a head is called retrieving, too
NEAR, FAR = 0.05, 0.25  # of a head's attention beyond half of the longest distance, where even attention has about a half
MORE = 2.0  # times the mass of a head that looks everywhere alike: in a window of few images that one, too, has much on the needle

Couples = list[tuple[int, int]]


def retrieving_heads(mass: Mapping[int, Sequence[float]], flat: float = 0.0) -> list[tuple[int, int, float]]:
    """(layer, head, mass) of the heads that retrieve, most first: each at least CLEAR, MORE times `flat`, and SHARE of the best head's mass
    (ours).

    mass: decoder layer -> mean share of attention on the needle's tokens, one number per query head; flat: that of a head that looks
    everywhere alike, where it is known.
    """
    every = [(layer, head, share) for layer, shares in mass.items() for head, share in enumerate(shares)]
    least = max(CLEAR, MORE * flat, SHARE * max((share for _, _, share in every), default=0))
    return sorted((found for found in every if found[2] >= least), key=lambda found: -found[2])


def head_kinds(far_mass: Mapping[int, Sequence[float]]) -> dict[str, int]:
    """How many heads are "local" (at most NEAR of their attention lies beyond half of the longest distance), "global" (at least FAR), and
    "between" (ours). far_mass: decoder layer -> that share, one number per query head."""
    shares = [share for layer in far_mass.values() for share in layer]
    near, far = sum(share <= NEAR for share in shares), sum(share >= FAR for share in shares)
    return {"local": near, "between": len(shares) - near - far, "global": far}


@dataclass(frozen=True)
class Looks:
    """Where one model looks when it answers."""

    path: str
    files: dict[str, dict[str, Any]]
    """Of its folder, what tells it from others (models.identity)."""
    layers: int
    """Of the decoder."""
    images: int
    """In each haystack; in one of text, its texts."""
    haystacks: int
    flat: float
    """Mass on the needle of a head that looks everywhere alike."""
    mass: dict[int, list[float]]
    """Decoder layer -> mean share of attention on the needle's tokens, one number per query head."""
    key_heads: dict[int, int]
    """Decoder layer -> its key heads; each serves as many query heads in a row."""

    def __post_init__(self) -> None:
        if not self.mass or not all(self.mass.values()):
            raise ValueError("a layer or more must be looked at, each with a head or more")
        if self.mass.keys() != self.key_heads.keys() or any(
            self.key_heads[n] < 1 or len(heads) % self.key_heads[n] for n, heads in self.mass.items()
        ):
            raise ValueError("key_heads must divide the heads of each layer in mass")
        if not all(0 <= layer < self.layers for layer in self.mass):
            raise ValueError(f"mass names layers beyond the {self.layers} of the decoder")

    def heads(self) -> list[tuple[int, int, float]]:
        """(layer, head, mass) of the heads that retrieve, most first."""
        return retrieving_heads(self.mass, self.flat)

    def heads_in(self, layer: int) -> list[int]:
        """Those of one layer, most first."""
        return [head for of, head, _ in self.heads() if of == layer]

    def group(self, layer: int, head: int) -> int:
        """The key head that a query head reads."""
        return head * self.key_heads[layer] // len(self.mass[layer])

    def best(self) -> str:
        """The head with the most mass, in words."""
        layer, head, share = max(((n, i, x) for n, shares in self.mass.items() for i, x in enumerate(shares)), key=lambda found: found[2])
        return f"head {head} of layer {layer} with {share:.3f}"


@dataclass(frozen=True)
class Choice:
    """What a probe proposes to compare; nothing where no head of the teacher retrieves."""

    pairs: Couples
    heads: list[Couples] | None
    """For each of `pairs`; None where the student has too few heads."""
    why: str
    """What is missing, in a sentence; "" if nothing is."""

    def as_json(self) -> dict[str, Any]:
        return {"pairs": self.pairs, "heads": self.heads} | ({"why": self.why} if self.why else {})

    def as_text(self, file: Path | None) -> str:
        """Lines for a recipe; file: where the probe was written."""
        if self.heads is None or not self.pairs:
            return self.why
        lists = [f"pairs = {json.dumps(self.pairs)}", f"heads = {json.dumps(self.heads)}"]
        if file is None:
            return "\n".join(["[align]    # (student, teacher) layers, and for each pair (student, teacher) heads", *lists])
        probed = [f"probe = {json.dumps(str(file))}", 'pairs = "probed"', 'heads = "probed"']
        return "\n".join(["[align]", *probed, *(f"# {line}" for line in lists)])


@dataclass(frozen=True)
class Probe:
    """A teacher and a student, looked at on the same haystacks."""

    teacher: Looks
    student: Looks

    def pairs(self) -> Couples:
        """(student layer, teacher layer), ascending, for each teacher layer with a head that retrieves (ours).

        The student's layer lies at the same share of its depth, round((t + 1) L_s / L_t) - 1; where the student has layers that retrieve,
        it is the nearest of those. Of several teacher layers for one student layer, that with the most mass. Raises ValueError where no
        head of the teacher retrieves.
        """
        if not self.teacher.heads():
            raise ValueError(
                f"no head of {self.teacher.path} retrieves in haystacks of {self.teacher.images}: {self.teacher.best()} has the most"
                f" attention on the needle, and a head that looks everywhere alike has {self.teacher.flat:.3f}. `laid probe` with fewer"
                " --images, or another teacher"
            )
        own = sorted({layer for layer, _, _ in self.student.heads()})
        chosen: dict[int, int] = {}
        for layer, _, _ in self.teacher.heads():
            depth = max(0, round((layer + 1) * self.student.layers / self.teacher.layers) - 1)
            there = own or sorted(self.student.mass)
            chosen.setdefault(min(there, key=lambda one: abs(one - depth)), layer)
        return sorted(chosen.items())

    def proposed(self) -> Choice:
        """What `laid probe` prints."""
        pairs: Couples = []
        try:
            pairs = self.pairs()
            return Choice(pairs, self.couples(pairs), "")
        except ValueError as error:
            return Choice(pairs, None if pairs else [], str(error))

    def couples(self, pairs: Sequence[tuple[int, int]]) -> list[Couples]:
        """For each of `pairs` (student head, teacher head) of the teacher layer's heads that retrieve, most first; no student head twice
        (ours).

        Of the student's free heads that one is taken (1) whose key head serves no teacher head of another key head yet, while there is
        one, and the other way round, (2) that itself retrieves, most first, (3) that lies at the same share of its heads,
        floor(j H_s / H_t), or next after it. Raises ValueError for a layer that does not exist, a teacher layer without such heads, and
        one with more than the student layer has heads.
        """
        taken: dict[int, set[int]] = {}
        return [self._couples(student, teacher, taken.setdefault(student, set())) for student, teacher in pairs]

    def _couples(self, student: int, teacher: int, taken: set[int]) -> Couples:
        self._check_pair(student, teacher)
        retrieving, own = self.teacher.heads_in(teacher), self.student.heads_in(student)
        ours, theirs = len(self.student.mass[student]), len(self.teacher.mass[teacher])
        if len(retrieving) > ours - len(taken):
            raise ValueError(
                f"{len(retrieving)} heads of layer {teacher} of {self.teacher.path} retrieve ({retrieving}), and layer {student} of"
                f" {self.student.path} has {ours - len(taken)} heads left for them: name fewer in align.heads yourself"
            )
        found: Couples = []
        groups: set[tuple[int, int]] = set()
        for head in retrieving:
            asked, share = self.teacher.group(teacher, head), head * ours // theirs

            def cost(one: int, asked: int = asked, share: int = share) -> tuple[bool, int, int]:
                group = self.student.group(student, one)
                clash = any((group == s) != (asked == t) for s, t in groups)
                return clash, own.index(one) if one in own else len(own), (one - share) % ours

            chosen = min((one for one in range(ours) if one not in taken), key=cost)
            taken.add(chosen)
            groups.add((self.student.group(student, chosen), asked))
            found.append((chosen, head))
        return found

    def _check_pair(self, student: int, teacher: int) -> None:
        for who, looks, layer in (("student", self.student, student), ("teacher", self.teacher, teacher)):
            if layer not in looks.mass:
                raise ValueError(f"layer {layer} of the {who} was not looked at; {looks.path} has the layers {sorted(looks.mass)}")
        if not self.teacher.heads_in(teacher):
            there = sorted({layer for layer, _, _ in self.teacher.heads()})
            raise ValueError(
                f"no head of layer {teacher} of {self.teacher.path} retrieves (the most attention on the needle is"
                f" {max(self.teacher.mass[teacher]):.3f}); those that do are in the layers {there}"
            )


def as_tree(looks: Looks) -> dict[str, Any]:
    """As JSON, which `read_probe` reads again."""
    return asdict(looks)


def read_probe(path: Path) -> Probe:
    """What `laid probe TEACHER SHARDS --student S --out FILE` wrote. Raises ValueError, one sentence, for a file that is none, or one that
    says nothing of a student."""
    if not path.is_file():
        raise ValueError(f"no probe at {path}: `laid probe TEACHER SHARDS --student STUDENT --out {path}` writes it")
    tree, looks = read_json(path), TypeAdapter(Looks)
    try:
        teacher = looks.validate_python(tree)
        if "student" not in tree:
            raise ValueError(f"{path} says nothing of a student: `laid probe TEACHER SHARDS --student STUDENT --out {path}` does")
        return Probe(teacher, looks.validate_python(tree["student"]))
    except ValidationError as error:
        first = error.errors()[0]
        words = [*map(str, first["loc"]), first["msg"].removeprefix("Value error, ")]
        raise ValueError(f"{path} is not as `laid probe` writes it: {': '.join(words)}") from None
