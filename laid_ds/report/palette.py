"""One colour, dash and place for each model on the whole page, in light and in dark.

A figure is drawn in the light colours; in the page each of them is a CSS variable, which dark mode sets anew.
"""

from __future__ import annotations

from dataclasses import dataclass

INK, MUTED, GRID, PAPER = "#1c1d1f", "#62666b", "#dcdee1", "#fdfdfc"
SHADES = {INK: ("ink", "#e7e8ea"), MUTED: ("muted", "#a2a7ad"), GRID: ("grid", "#3a3e43"), PAPER: ("paper", "#17191c")}
MODELS = (
    ("#0b5fa5", "#6cb6ff"),
    ("#c2410d", "#ff9d5c"),
    ("#15803e", "#5fd07f"),
    ("#a21cae", "#e58bf5"),
    ("#8a6304", "#e8c547"),
    ("#0e7491", "#5cd3e6"),
    ("#be123d", "#ff8aa0"),
    ("#4d4e52", "#c3c6cb"),
)
DASHES = ("-", "--", ":", "-.")
MARKS = "osD^vPX*"


@dataclass(frozen=True)
class Style:
    colour: str
    dash: str
    mark: str


def styles(names: list[str]) -> dict[str, Style]:
    """Name -> its style, by its place; after eight the colours come again with another dash."""
    unique = list(dict.fromkeys(names))
    return {
        name: Style(MODELS[i % len(MODELS)][0], DASHES[i // len(MODELS) % len(DASHES)], MARKS[i % len(MARKS)])
        for i, name in enumerate(unique)
    }


def variables() -> dict[str, tuple[str, str, str]]:
    """Light colour -> (CSS variable, light, dark)."""
    named = {light: (f"--{name}", light, dark) for light, (name, dark) in SHADES.items()}
    return named | {light: (f"--model-{i}", light, dark) for i, (light, dark) in enumerate(MODELS)}
