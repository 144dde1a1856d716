"""How what routers did with held-out text looks in a terminal: where each domain's tokens go, accuracy by layer, and what it means."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from bam_merge.comparing.drift import Reading
from bam_merge.showing.heatmap import HeatmapRow, heatmap
from bam_merge.showing.terminal import Terminal, grid, heading, line, padded
from bam_merge.text import printable, whole_percent


def held_out_tables(found: Mapping[str, Any], experts: Sequence[str], terminal: Terminal) -> Iterator[RenderableType]:
    """For each router a table over all layers, a row for each domain, and a picture of the accuracy by layer."""
    for overall in found["overall"]:
        router = overall["router"]
        yield heading(
            f"{router} router on held-out text", f"means over the layers; all: the load; chance is {whole_percent(found['chance'])}"
        )
        yield padded(_overall(overall, experts))
        sites = [site for site in found["routers"] if site["router"] == router]
        rows = []
        for index, row in enumerate(overall["of"]):
            by_layer: list[float | None] = [site["of"][index]["accuracy"] for site in sites]
            rows.append(HeatmapRow(printable(row["domain"], 14), by_layer, row["accuracy"]))
        yield line("accuracy by layer, from 0 to 100%, and over all", "dim")
        yield heatmap(rows, 1.0, terminal)


def _overall(overall: Mapping[str, Any], experts: Sequence[str]) -> Table:
    names = [f"{index} {printable(name, 14)}" for index, name in enumerate(experts)]
    header = ("for", "right", "of windows", "entropy", *(f"to {name}" for name in names))
    table = grid("left", *["right"] * (len(header) - 1), header=header)
    for row in overall["of"]:
        own = [name == row["domain"] for name in experts]
        taken = [Text(whole_percent(share), "green" if mine else "") for share, mine in zip(row["first"], own, strict=True)]
        table.add_row(Text(printable(row["domain"]), "cyan"), *_figures(row), *taken)
    loads = (whole_percent(share) for share in overall["load"])
    table.add_row("all", *_figures(overall), *loads)
    return table


def _figures(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return whole_percent(row["accuracy"]), whole_percent(row["windows"]), f"{row['entropy']:.2f}"


def readings_table(readings: Sequence[Reading]) -> Iterator[RenderableType]:
    """What the figures mean, a question and its answers."""
    yield heading("what this means")
    before = None
    for reading in readings:
        if reading.question != before:
            yield line(reading.question, "cyan")
        yield line(reading.text, "bold red" if reading.stop else "", indent=4)
        before = reading.question
