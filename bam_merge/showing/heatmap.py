"""A layer x role heatmap in a terminal: a row per role, a character per layer, all on one scale from 0."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import RenderableType
from rich.text import Text

from bam_merge.architectures.vocabulary import ROLES
from bam_merge.showing.terminal import BARS, Terminal, grid, heading, padded
from bam_merge.text import percent

COLOURS = ("blue", "cyan", "green", "yellow", "red")


LABEL, FIGURE = 16, 11
"""Characters of a row's name and of its figure."""


@dataclass(frozen=True)
class HeatmapRow:
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


def heatmap(rows: Sequence[HeatmapRow], top: float, terminal: Terminal) -> RenderableType:
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
    if not max(values):
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
        text.append_text(cell([top * ((step + 0.5) / steps)], top, terminal))
    words = f" up to {percent(top)}" + (f", the largest {percent(largest)}. " if largest > top else ". ")
    words += "A column is a layer." if together == 1 else f"A column is {together} layers, the furthest of them shown."
    return text.append(words, style="dim")


def rank(role: str, alone: bool) -> tuple[bool, int, str]:
    """Where a role stands in a table: those in layers first, in the order of the vocabulary."""
    return alone, ROLES.index(role) if role in ROLES else len(ROLES), role


def heatmaps(maps: Sequence[tuple[str, str, Sequence[HeatmapRow]]], terminal: Terminal) -> Iterator[RenderableType]:
    """Heatmaps on one scale, with one legend."""
    values = [value for _, _, rows in maps for row in rows for value in row.values if value is not None]
    top, largest = scale(values)
    for name, aside, rows in maps:
        yield heading(name, aside)
        yield heatmap(rows, top, terminal)
    layers = max((len(row.values) for _, _, rows in maps for row in rows), default=0)
    yield legend(top, largest, layers, terminal, math.inf in values)
