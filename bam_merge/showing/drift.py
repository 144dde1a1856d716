"""How `diff --seed` looks in a terminal. Builds text; cli.py prints it."""

from collections.abc import Iterator, Sequence
from itertools import combinations

from rich.console import RenderableType
from rich.text import Text

from bam_merge.comparing.drift import Drift
from bam_merge.comparing.gram import Gram
from bam_merge.showing.findings import apart, ignored
from bam_merge.showing.heatmap import HeatmapRow, heatmaps, rank
from bam_merge.showing.terminal import Terminal, grid, heading, line, padded
from bam_merge.text import percent, printable, thousandths

COLUMN, OTHERS = 7, 35
"""Characters of a column of cosines, and of what stands beside them."""


def drift_text(found: Drift, terminal: Terminal, every: bool = False) -> str:
    """What it means, then how far each expert went, then how their ways compare."""
    parts: list[RenderableType] = [Text.assemble(("seed", "bold cyan"), f"  {printable(found.seed.label)}")]
    parts += [heading("reading"), _readings(found), *apart(found.findings, every)]
    maps = []
    for expert, name in enumerate(found.names):
        aside = f"drift from the seed, |E - S| / |S|: {percent(found.overall.drift(expert))} overall"
        maps.append((printable(name, 60), aside, drift_rows(found, expert)))
    parts += [*heatmaps(maps, terminal), *_cosines(found, terminal), *_equal(found, terminal), *_layers(found, every)]
    return terminal.text(*parts, *ignored(found.left_out, every))


def _readings(found: Drift) -> RenderableType:
    table = grid("left", "left")
    for reading in found.readings:
        table.add_row(Text(reading.question, style="cyan"), Text(reading.text, style="bold red" if reading.stop else ""))
    return padded(table)


def drift_rows(found: Drift, expert: int) -> list[HeatmapRow]:
    """A heatmap's rows: roles in the layers, then what has no layer."""
    _, roles, values = found.table(expert)
    rows = []
    for index, role in sorted(enumerate(roles), key=lambda item: rank(item[1], False)):
        overall = found.part(role)
        rows.append(HeatmapRow(role, [row[index] for row in values], overall.drift(expert) if overall else None))
    return rows + [HeatmapRow(printable(role.removeprefix("? "), 40), [value], value) for role, value in found.alone(expert)]


def grams_by_role(found: Drift) -> list[tuple[str, Gram]]:
    """The sums of every role, and of all."""
    roles = sorted(found.roles, key=lambda role: rank(role, False))
    return [(role.removeprefix("? "), gram) for role in roles if (gram := found.part(role)) is not None] + [("all", found.overall)]


# ---- expert against expert -----------------------------------------------------------------------------------------------------


def _cosines(found: Drift, terminal: Terminal) -> Iterator[RenderableType]:
    """Cosines of task vectors and what averaging keeps, by role."""
    pairs = list(combinations(range(len(found.names)), 2))
    if not pairs:
        return
    names = [printable(name, 40) for name in found.names]
    columns, key = _columns(names, pairs, terminal.width - OTHERS)
    yield heading("task vectors", "cosines of what training added (E - S), and what averaging keeps")
    table = grid("left", *["right"] * (len(columns) + 3), header=("role", *columns, "noise", "kept", "noise"))
    for role, gram in grams_by_role(found):
        cosines = [gram.cosine(i, j) for i, j in pairs]
        known = [cosine for cosine in cosines if cosine is not None]
        if len(columns) != len(pairs):
            cosines = [min(known), sum(known) / len(known), max(known)] if known else [None] * 3
        shown = [thousandths(cosine) for cosine in cosines]
        kept = thousandths(gram.kept_by_averaging()), thousandths(gram.kept_if_orthogonal())
        table.add_row(Text(printable(role, 40), style="cyan"), *shown, f"{gram.noise:.1g}" if known else "-", *kept)
    yield padded(table)
    if key:
        yield line(key, "dim")
    yield line("kept: |mean drift| / mean |drift|, 1 where all went the same way; noise: of random drifts of the same norms", "dim")
    if len(columns) != len(pairs):
        yield from _matrix(found, "overall", [[found.overall.cosine(i, j) for j in range(len(names))] for i in range(len(names))])


def _columns(names: Sequence[str], pairs: Sequence[tuple[int, int]], width: int) -> tuple[list[str], str]:
    """A column per pair, called by names if they fit, or else by numbers, which the second result explains; or three for all pairs."""
    full = [f"{names[i]}, {names[j]}" for i, j in pairs]
    if sum(max(COLUMN, len(name) + 2) for name in full) <= width:
        return full, ""
    if len(pairs) * COLUMN <= width:
        return [f"{i + 1}, {j + 1}" for i, j in pairs], ", ".join(f"{i + 1} {name}" for i, name in enumerate(names))
    return ["least", "mean", "most"], ""


def _matrix(found: Drift, aside: str, values: Sequence[Sequence[float | None]]) -> Iterator[RenderableType]:
    yield heading("cosine of task vectors", aside)
    table = grid("right", "left", *["right"] * len(values), header=("", "", *(str(i + 1) for i in range(len(values)))))
    for i, row in enumerate(values):
        table.add_row(str(i + 1), Text(printable(found.names[i], 20)), *(f"{value:.2f}" if value is not None else "-" for value in row))
    yield padded(table)


def _equal(found: Drift, terminal: Terminal) -> Iterator[RenderableType]:
    """Weights in common, bit for bit."""
    overall, n = found.overall, range(len(found.names))
    count, chance = max(1, overall.count), overall.chance_equal
    unrelated = f"; unrelated models: {percent(chance)}" if chance is not None else ""
    yield heading("equal weights", f"bit for bit{unrelated}")
    names = [printable(name, 20) for name in found.names]
    wide = sum(max(5, len(name)) + 2 for name in names) + max(map(len, names)) + 12 > terminal.width
    called = [str(i + 1) if wide else name for i, name in enumerate(names)] if len(names) > 1 else []
    table = grid("left", *["right"] * (1 + len(called)), header=("", "seed", *called))
    for i in n:
        others = ["" if i == j else f"{overall.equal[i][j] / count:.1%}" for j in n] if called else []
        table.add_row(Text(f"{i + 1} {names[i]}" if wide else names[i], style="cyan"), f"{overall.equal_seed[i] / count:.1%}", *others)
    yield padded(table)


def _layers(found: Drift, every: bool) -> Iterator[RenderableType]:
    ranked = found.ranking()
    if len(ranked) < 2:
        return
    shown = ranked if every else ranked[:5]
    least = f"; least: {ranked[-1][0]} ({percent(ranked[-1][1])})" if not every else ""
    yield heading("layers by drift")
    yield line(", ".join(f"{layer} ({percent(value)})" for layer, value in shown) + least)
