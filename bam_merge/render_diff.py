"""How `diff` and `diff --seed` look in a terminal. Builds text; cli.py prints it."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

from rich.console import RenderableType
from rich.text import Text

from bam_merge.architecture import ROLES
from bam_merge.comparison import Comparison, drift
from bam_merge.difference import DIFFERENT, EQUAL, IDENTICAL, ROUNDING, SHAPE, Difference
from bam_merge.drift import Drift, Gram
from bam_merge.errors import printable
from bam_merge.heatmap import Row, heatmap, legend, percent, scale
from bam_merge.terminal import Terminal, grid, heading, line, padded, short
from bam_merge.words import count

SHOWN = 20
"""Tensors that are listed unless all are asked for."""

WORDS = {
    IDENTICAL: "identical bytes",
    EQUAL: "equal values (another dtype or layout, or the sign of a zero)",
    ROUNDING: "within one unit in the last place",
    DIFFERENT: "different",
    SHAPE: "of unlike shapes, not compared",
}

# ---- diff A B ----------------------------------------------------------------------------------------------------------------


def comparison_text(found: Comparison, terminal: Terminal, every: bool = False) -> str:
    """What tells the models apart, then how far their tensors are, by layer and role and one by one."""
    a, b = printable(found.a.label), printable(found.b.label)
    parts: list[RenderableType] = [Text.assemble(("A", "bold cyan"), f"  {a}"), Text.assemble(("B", "bold cyan"), f"  {b}")]
    if found.findings:
        parts.append(heading("apart from values"))
        parts += [line(item.text, "yellow" if item.counts else "dim") for item in found.findings]
    parts += [heading("values", count(len(found.compared), "tensor") + " compared"), _verdicts(found)]
    changed = found.changed
    if any(not d.same for d in found.compared):
        parts += _heatmaps([("relative difference", "|B - A| / |A|, by role and layer", comparison_rows(found))], terminal)
    if changed:
        parts += list(_ranking(changed, terminal, every))
    parts += list(_ignored(found.ignored, every))
    verdict = Text("\nthe same" if found.equal else "\ndifferent", style="bold green" if found.equal else "bold red")
    tolerated = [d for d in found.compared if not d.same and d not in changed]
    if tolerated:
        verdict.append(f": {count(len(tolerated), 'tensor')} within --tol {found.tol:g}", style="")
    return terminal.text(*parts, verdict)


def verdict_counts(found: Comparison) -> list[tuple[int, str]]:
    """How many tensors there are of each kind of outcome, in words."""
    verdicts = Counter(d.verdict for d in found.compared)
    return [(verdicts[verdict], words) for verdict, words in WORDS.items() if verdicts[verdict]]


def _verdicts(found: Comparison) -> RenderableType:
    table = grid("right", "left")
    for number, words in verdict_counts(found):
        table.add_row(f"{number:,}", words)
    return padded(table)


def comparison_rows(found: Comparison) -> list[Row]:
    """The heatmap of |B - A| / |A|: roles in the layers, then what has no layer."""
    groups: dict[str, dict[int | None, list[Difference]]] = {}
    for d in found.compared:
        role, layer, _ = d.place
        groups.setdefault("others" if role.startswith("? ") else role, {}).setdefault(layer, []).append(d)
    layers = sorted({d.place[1] for d in found.compared if d.place[1] is not None})
    rows = []
    for role, at in sorted(groups.items(), key=lambda item: rank(item[0], set(item[1]) == {None})):
        each = [drift(at[layer]) if layer in at else None for layer in layers] if set(at) - {None} else [drift(at[None])]
        rows.append(Row(role, each, drift([d for members in at.values() for d in members])))
    return rows


def rank(role: str, alone: bool) -> tuple[bool, int, str]:
    """Where a role stands in a table: those in layers first, in the order of the vocabulary."""
    return alone, ROLES.index(role) if role in ROLES else len(ROLES), role


def _heatmaps(maps: Sequence[tuple[str, str, Sequence[Row]]], terminal: Terminal) -> Iterator[RenderableType]:
    """Heatmaps on one scale, with one legend."""
    top, largest = scale([value for _, _, rows in maps for row in rows for value in row.values if value is not None])
    for name, aside, rows in maps:
        yield heading(name, aside)
        yield heatmap(rows, top, terminal)
    yield legend(top, largest, max((len(row.values) for _, _, rows in maps for row in rows), default=0), terminal)


def _ranking(changed: Sequence[Difference], terminal: Terminal, every: bool) -> Iterator[RenderableType]:
    shown = changed if every else changed[:SHOWN]
    yield heading("furthest apart", f"{len(shown)} of {len(changed):,}" + ("" if len(shown) == len(changed) else "; --all lists them all"))
    table = grid("left", "right", "right", "right", "right", header=("tensor", "relative", "cosine", "largest", "changed"))
    for d in shown:
        name = Text(printable(d.name_a, 200))
        if d.verdict == SHAPE:
            table.add_row(name, f"{list(d.shapes[0])}", "", f"{list(d.shapes[1])}", "shape")
            continue
        share = d.changed / d.count if d.count else 0.0
        table.add_row(
            name, percent(d.relative_l2), _cosine(d.cosine), short(d.max_abs), f"{d.changed:,}" if share < 0.001 else f"{share:.1%}"
        )
        for remark in remarks(d):
            table.add_row(Text(f"  {remark}", style="yellow"))
    yield padded(table)


def remarks(d: Difference) -> Iterator[str]:
    """What the figures of a tensor do not say."""
    for what, (in_a, in_b) in (("NaN", d.nan), ("infinite", d.inf)):
        if in_a or in_b:
            yield f"{in_a:,} {what} in A, {in_b:,} in B"
    if d.zero_signs:
        yield f"{count(d.zero_signs, 'zero')} of another sign"
    if d.changed == 1 and d.at is not None:
        yield f"only element {d.at:,}"


def _cosine(value: float | None) -> str:
    return "-" if value is None else ">0.9999" if 0.99995 <= value < 1 else f"{value:.4f}"


def _ignored(ignored: Mapping[str, str], every: bool) -> Iterator[RenderableType]:
    if not ignored:
        return
    yield heading("not compared", count(len(ignored), "tensor"))
    if every:
        yield from (line(f"{printable(name)}: {printable(reason)}", "dim") for name, reason in ignored.items())
    else:
        yield from (line(f"{number:,}  {printable(reason)}", "dim") for reason, number in Counter(ignored.values()).items())


# ---- diff --seed -------------------------------------------------------------------------------------------------------------


def drift_text(found: Drift, terminal: Terminal, every: bool = False) -> str:
    """What it means, then how far each expert went, then how their ways compare."""
    parts: list[RenderableType] = [Text.assemble(("seed", "bold cyan"), f"  {printable(found.seed.label)}")]
    parts += [heading("reading")]
    parts += [line(reading.text, "bold red" if reading.stop else "") for reading in found.readings]
    maps = []
    for expert, name in enumerate(found.names):
        aside = f"drift from the seed, |E - S| / |S|: {percent(found.overall.drift(expert))} overall"
        maps.append((printable(name, 60), aside, drift_rows(found, expert)))
    parts += [*_heatmaps(maps, terminal), *_pairs(found), *_by_role(found), *_layers(found, every)]
    parts += list(_ignored(found.left_out, every))
    return terminal.text(*parts)


def drift_rows(found: Drift, expert: int) -> list[Row]:
    """A heatmap's rows: roles in the layers, then what has no layer."""
    _, roles, values = found.table(expert)
    rows = []
    for index, role in sorted(enumerate(roles), key=lambda item: rank(item[1], False)):
        overall = found.part(role)
        rows.append(Row(role, [row[index] for row in values], overall.drift(expert) if overall else None))
    return rows + [Row(printable(role.removeprefix("? "), 40), [value], value) for role, value in found.alone(expert)]


def _pairs(found: Drift) -> Iterator[RenderableType]:
    """Expert against expert."""
    if len(found.names) < 2:
        return
    overall = found.overall
    yield heading("pairs", f"cosine of what training added (noise: 0 ± {overall.count**-0.5:.1g}), and weights in common")
    table = grid("left", "right", "right", "right", "right", header=("", "overall", "attention", "FFN", "equal weights"))
    parts = [overall, *(found.part(glob) for glob in ("attn.*", "ffn.*"))]
    for i, j in combinations(range(len(found.names)), 2):
        name = f"{printable(found.names[i], 40)}, {printable(found.names[j], 40)}"
        cosines = [_three(part.cosine(i, j) if part else None) for part in parts]
        table.add_row(Text(name), *cosines, f"{overall.equal[i][j] / max(1, overall.count):.1%}")
    for i, name in enumerate(found.names):
        table.add_row(Text(f"{printable(name, 40)}, the seed"), "", "", "", f"{overall.equal_seed[i] / max(1, overall.count):.1%}")
    yield padded(table)


def _three(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _by_role(found: Drift) -> Iterator[RenderableType]:
    """What averaging keeps of each role."""
    if len(found.names) < 2:
        return
    yield heading("averaging", "|mean drift| / mean |drift|: 1 where all went the same way")
    table = grid("left", "right", "right", "right", header=("role", "kept", "random", "mean cosine"))
    pairs = list(combinations(range(len(found.names)), 2))

    def add(name: str, gram: Gram) -> None:
        cosines = [cosine for i, j in pairs if (cosine := gram.cosine(i, j)) is not None]
        mean = sum(cosines) / len(cosines) if cosines else None
        table.add_row(
            Text(printable(name, 40), style="cyan"), _three(gram.kept_by_averaging()), _three(gram.kept_if_orthogonal()), _three(mean)
        )

    for role in sorted(found.roles, key=lambda role: rank(role, False)):
        gram = found.part(role)
        if gram is not None:
            add(role.removeprefix("? "), gram)
    add("all", found.overall)
    yield padded(table)


def _layers(found: Drift, every: bool) -> Iterator[RenderableType]:
    ranked = found.ranking()
    if len(ranked) < 2:
        return
    shown = ranked if every else ranked[:5]
    least = f"; least: {ranked[-1][0]} ({percent(ranked[-1][1])})" if not every else ""
    yield heading("layers by drift")
    yield line(", ".join(f"{layer} ({percent(value)})" for layer, value in shown) + least)
