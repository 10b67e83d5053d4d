"""What a study would run, and how long that takes by what was measured before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from laid_ds.study.jobs import Job, check_asked, next_command
from laid_ds.study.runner import Work, expected_seconds


@dataclass(frozen=True)
class Plan:
    rows: list[Mapping[str, Any]]
    """Of each job that has no line."""
    done: int
    at_once: int

    @property
    def seconds(self) -> float | None:
        """CPU seconds of all rows; None where none of their kind has been measured."""
        known = [row["cpu_seconds"] for row in self.rows]
        return None if None in known else sum(known)

    def as_json(self) -> dict[str, Any]:
        return {"jobs": list(self.rows), "done": self.done, "at_once": self.at_once, "cpu_seconds": self.seconds}

    def as_text(self) -> str:
        width = max((len(row["job"]) for row in self.rows), default=0)
        lines = [
            f"{row['job']:{width}}  {row['next']:7}  {_seconds(row['cpu_seconds']):>10}  {' '.join(row['changes'])}".rstrip()
            for row in self.rows
        ]
        return "\n".join([*lines, self.sentence()])

    def sentence(self) -> str:
        number = len(self.rows)
        if not number:
            return f"nothing to run: all {self.done} jobs are done"
        if self.seconds is None:
            lasts = "how long they take is not known before one of their kind is finished"
        else:
            minutes = self.seconds / 60
            lasts = f"about {minutes:.0f} CPU minutes by those that are finished, {minutes / self.at_once:.0f} on free cores"
        return f"{number} jobs to run, {self.at_once} at a time, and {self.done} done; {lasts}"


def told(work: Work, at_once: int) -> Plan:
    """Raises ValueError for what the study cannot be, for lines that were made otherwise, and for haystacks that cannot be asked so."""
    todo = work.open_jobs()
    check_asked(todo)
    rows = [
        {"job": job.name, "next": _next(work, job), "cpu_seconds": expected_seconds(work, job), "changes": list(job.changes)}
        for job in todo
    ]
    return Plan(rows, len(work.jobs()) - len(todo), at_once)


def _next(work: Work, job: Job) -> str:
    """The command that a job comes to next: one that was interrupted may have its training behind it."""
    words = next_command(job)
    return "nothing" if words is None else words[0]


def _seconds(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds:,.0f} CPU s"
