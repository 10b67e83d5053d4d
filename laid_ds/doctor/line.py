"""One line of the doctor's table: what was looked at, what was found, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

OK, SLOW, WRONG, ABSENT = "ok", "slow", "wrong", "absent"
ORDER = (OK, ABSENT, SLOW, WRONG)  # from good to bad: what several ranks say of one thing is the worst of it


@dataclass(frozen=True)
class Line:
    check: str
    verdict: str
    """`wrong` alone makes the status 1; `absent` is what this machine has not and need not have."""
    found: str
    advice: str = ""
    """What to do."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """What was measured, for programs; names carry units."""

    def as_text(self) -> str:
        text = f"{self.verdict:7}{self.check:46} {self.found}"
        return text if not self.advice else f"{text}\n{'':53} -> {self.advice}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def looked(check: str, look: Callable[[], Line]) -> Line:
    """What `look` says, or the error that it meets, which is what a run would meet there, too."""
    try:
        return look()
    except ValueError as error:  # a sentence for people, with the way out
        return Line(check, WRONG, str(error))
    except Exception as error:
        return Line(check, WRONG, sentence(error), "a run would meet the same error; its traceback tells where")


def sentence(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def merged(of_ranks: Sequence[Sequence[Line]]) -> list[Line]:
    """One line for each check, from what every rank says: the worst, with the ranks that say so where not all do."""
    checks = list(dict.fromkeys(line.check for lines in of_ranks for line in lines))
    return [_worst(check, of_ranks) for check in checks]


def _worst(check: str, of_ranks: Sequence[Sequence[Line]]) -> Line:
    said = {rank: line for rank, lines in enumerate(of_ranks) for line in lines if line.check == check}
    worst = max((line.verdict for line in said.values()), key=ORDER.index)
    ranks = [rank for rank, line in said.items() if line.verdict == worst]
    line = said[ranks[0]]
    return line if len(ranks) == len(said) else replace(line, found=f"rank {', '.join(map(str, ranks))}: {line.found}")


def status(lines: Sequence[Line]) -> int:
    return int(any(line.verdict == WRONG for line in lines))


def size(num_bytes: float) -> str:
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes:.0f} bytes"


def rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.3g} GB/s"


Room = Iterator[Line]
"""What looks at several things gives a line for each as soon as it has it."""
