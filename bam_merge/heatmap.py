"""A layer x role heatmap in a terminal: a row per role, a character per layer, all on one scale from 0."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import RenderableType
from rich.text import Text

from bam_merge.terminal import BARS, Terminal, grid, padded

COLOURS = ("blue", "cyan", "green", "yellow", "red")
LABEL, FIGURE = 16, 11
"""Characters of a row's name and of its figure."""


@dataclass(frozen=True)
class Row:
    """A role: its value in each layer (None where there is none, infinity for what is no number), or one value, and over all of them."""

    name: str
    values: Sequence[float | None]
    overall: float | None


def scale(values: Sequence[float]) -> tuple[float, float]:
    """(where the scale ends, the largest value): all but the highest twentieth lie on the scale, so that one outlier hides nothing."""
    ordered = sorted(value for value in values if value < math.inf)
    if not ordered:
        return 0.0, 0.0
    return ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))] or ordered[-1], ordered[-1]


def percent(value: float | None) -> str:
    """'0.283%'; more than all of it as a factor, '12.3 x'."""
    if value is None:
        return "-"
    return f"{value:.3g} x" if value >= 9.995 else f"{100 * value:.3g}%"


def heatmap(rows: Sequence[Row], top: float, terminal: Terminal) -> RenderableType:
    """The rows; `top` is the largest value of the scale. Layers beyond the width share a character, which shows the largest of them."""
    width = max(8, terminal.width - LABEL - FIGURE - 8)
    layers = max((len(row.values) for row in rows), default=0)
    together = -(-layers // width) if layers else 1
    table = grid("left", "left", "right")
    for row in rows:
        cells = Text()
        for first in range(0, len(row.values), together):
            cells.append_text(cell([value for value in row.values[first : first + together] if value is not None], top, terminal))
        table.add_row(Text(row.name, style="cyan"), cells, Text(percent(row.overall)))
    return padded(table)


def cell(values: Sequence[float], top: float, terminal: Terminal) -> Text:
    """One character: blank where there is no value, a dot for exactly 0, a mark for infinity, else a bar that grows with the largest."""
    if not values:
        return Text(" ")
    if max(values) == math.inf:
        return Text("!", style="bold red")
    share = min(1.0, max(values) / top) if top else 0.0
    if share == 0:
        return Text("·" if terminal.unicode else "0", style="dim")
    bars = BARS[terminal.unicode]
    return Text(bars[min(len(bars) - 1, int(share * len(bars)))], style=COLOURS[min(len(COLOURS) - 1, int(share * len(COLOURS)))])


def legend(top: float, largest: float, layers: int, terminal: Terminal, odd: bool = False) -> Text:
    """What a character means."""
    width = max(8, terminal.width - LABEL - FIGURE - 8)
    together = -(-layers // width) if layers else 1
    text = Text("  ")
    text.append_text(cell([0.0], top, terminal))
    text.append(" equal  ", style="dim")
    if odd:
        text.append_text(cell([math.inf], top, terminal)).append(" NaN or infinity  ", style="dim")
    steps = len(BARS[terminal.unicode])
    for step in range(steps):
        text.append_text(cell([top * (step + 0.5) / steps], top, terminal))
    words = f" up to {percent(top)}" + (f", the largest {percent(largest)}. " if largest > top else ". ")
    words += "A column is a layer." if together == 1 else f"A column is {together} layers, the furthest of them shown."
    return text.append(words, style="dim")
