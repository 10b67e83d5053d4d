"""Pieces of HTML: tables that sort, facts, text."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from laid_ds.report.palette import Style, variables
from laid_ds.terminal import cell

LONG = 28  # characters; columns with more are text, which breaks into lines


def text(value: Any) -> str:
    """A value as people read it, safe in HTML; what is not there is a dash."""
    return "–" if value is None or value == "" else html.escape(cell(value) or "none")


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], styles: dict[str, Style] | None = None) -> str:
    """A table, rows as long as its head; a click on a head sorts by it. A model's name in the first column wears its colour."""
    rows = [list(row) for row in rows]
    worded = {i for row in rows for i, value in enumerate(row) if isinstance(value, str | list | tuple) and len(text(value)) > LONG}
    kinds = [" class=text" if i in worded else "" for i in range(len(head))]
    heads = "".join(f'<th scope=col tabindex=0 title="sort"{kind}>{html.escape(name)}</th>' for name, kind in zip(head, kinds, strict=True))
    shown = ([_named(value, styles) if i == 0 else text(value) for i, value in enumerate(row)] for row in rows)
    body = "".join("<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>" for row in shown)
    return f"<div class=scroll><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"


def _named(name: Any, styles: dict[str, Style] | None) -> str:
    return f"{swatch(styles[name])}{text(name)}" if styles and name in styles else text(name)


def swatch(style: Style) -> str:
    return f'<i class=swatch style="background:var({variables()[style.colour][0]})"></i>'


def paragraph(sentence: str, kind: str = "") -> str:
    return f"<p{f' class={kind}' if kind else ''}>{html.escape(sentence)}</p>"


def fold(title: str, content: str) -> str:
    """Something that is shown when it is asked for."""
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def code(lines: str) -> str:
    return f"<pre>{html.escape(lines)}</pre>"


def figures(parts: Sequence[str]) -> str:
    return f"<div class=figures>{''.join(parts)}</div>" if parts else ""


def section(anchor: str, title: str, content: str) -> str:
    """ "" where there is nothing to say."""
    return f"<section id={anchor}><h2>{html.escape(title)}</h2>{content}</section>" if content else ""
