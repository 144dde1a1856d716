"""How `diff A B` looks in a terminal. Builds text; cli.py prints it."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.text import Text

from bam_merge.comparing.tensor_difference import DIFFERENT, EQUAL, IDENTICAL, ROUNDING, SHAPE, Difference, relative_difference
from bam_merge.comparing.two_models import Comparison
from bam_merge.showing.findings import SHOWN, apart, ignored
from bam_merge.showing.heatmap import HeatmapRow, heatmaps, rank
from bam_merge.showing.terminal import Terminal, grid, heading, line, padded
from bam_merge.text import cosine_text, count, folded, percent, printable, short
from bam_merge.values.wide import BELOW, LARGEST

OF_A_KIND = 4
"""Lines of one kind that are shown unless all are asked for."""


WORDS = {
    IDENTICAL: "identical bytes",
    EQUAL: "equal values (another dtype or layout, the sign of a zero, or the bits of a NaN)",
    ROUNDING: "within one unit in the last place",
    DIFFERENT: "different",
    SHAPE: "of unlike shapes, not compared",
}


def comparison_text(found: Comparison, terminal: Terminal, every: bool = False) -> str:
    """What tells the models apart, then how far their tensors are, by layer and role and one by one."""
    a, b = printable(found.a.label), printable(found.b.label)
    parts: list[RenderableType] = [Text.assemble(("A", "bold cyan"), f"  {a}"), Text.assemble(("B", "bold cyan"), f"  {b}")]
    parts += apart(found.findings, every)
    parts += [heading("values", count(len(found.compared), "tensor") + " compared"), _verdicts(found)]
    changed = found.changed
    if any(not d.same for d in found.compared):
        parts += heatmaps([("relative difference", "|B - A| / |A|, by role and layer", comparison_rows(found))], terminal)
    parts += _recognised(found, every)
    if changed:
        parts += _ranking(changed, every)
    parts += ignored(found.ignored, every)
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


# ---- heatmaps ----------------------------------------------------------------------------------------------------------------


def comparison_rows(found: Comparison) -> list[HeatmapRow]:
    """The heatmap of |B - A| / |A|: roles in the layers, then what has no layer."""
    groups: dict[str, dict[int | None, list[Difference]]] = {}
    for d in found.compared:
        role, layer, _ = d.place
        groups.setdefault("others" if role.startswith("? ") else role, {}).setdefault(layer, []).append(d)
    layers = sorted({d.place[1] for d in found.compared if d.place[1] is not None})
    rows = []
    for role, at in sorted(groups.items(), key=lambda item: rank(item[0], set(item[1]) == {None})):
        each = [_shade(at[layer]) if layer in at else None for layer in layers] if set(at) - {None} else [_shade(at[None])]
        rows.append(HeatmapRow(role, each, relative_difference([d for members in at.values() for d in members])))
    return rows


def _shade(members: Sequence[Difference]) -> float | None:
    """The drift of tensors; infinity where some has NaN or infinity that the other does not have."""
    found = relative_difference(members)
    return math.inf if any(d.odd for d in members) else found if found is None else min(found, LARGEST)


# ---- tensors -----------------------------------------------------------------------------------------------------------------


def remarks(d: Difference) -> Iterator[tuple[str, str]]:
    """What the figures of a tensor do not say: (kind, sentence about B)."""
    if d.change:
        yield d.change.kind, d.change.text
    for what, (in_a, in_b) in (("NaN", d.nan), ("infinity", d.inf)):
        if in_a or in_b:
            yield what, f"{what}: {in_a:,} in A, {in_b:,} in B"
    if d.odd and d.nan[0] == d.nan[1] and d.inf[0] == d.inf[1]:
        yield "elsewhere", f"NaN or infinity of another place or sign: {count(d.apart, 'element')}"
    if d.vanishing:
        beyond = f"below what figures show: |B - A| / |A| is {BELOW}"
        unseen = beyond if d.max_abs else "in their bytes, not in the values that they stand for"
        yield "vanishing", f"{count(d.changed, 'element')} differ{'s' * (d.changed == 1)} {unseen}"
    if d.nan_payloads:
        yield "NaN bits", f"{d.nan_payloads:,} NaN of other bits"
    if d.zero_signs:
        yield "-0.0", f"{count(d.zero_signs, 'zero')} of another sign (-0.0)"


def _recognised(found: Comparison, every: bool) -> Iterator[RenderableType]:
    """What was done, by kind, equal sentences with the tensors that they hold for folded into one line."""
    kinds: dict[str, dict[str, list[str]]] = {}
    moved = set(found.names("moved"))
    for d in found.compared:
        for kind, text in remarks(d):
            if kind == "unrelated" and d.name_a in moved:
                continue  # it is related to another
            kinds.setdefault(kind, {}).setdefault(text, []).append(d.name_a)
    if not kinds:
        return
    yield heading("recognised", "what B is where A's tensor stood")
    for kind, texts in kinds.items():
        lines = [(name, text) for text, names in texts.items() for name in folded(names)]
        for name, text in lines if every else lines[:OF_A_KIND]:
            yield line(f"{printable(name)}: {text}", "yellow")
        if not every and len(lines) > OF_A_KIND:
            total = sum(map(len, texts.values()))
            yield line(f"and more, {count(total, 'tensor')} of this kind, {kind} (--all lists them)", "dim", 4)


def _ranking(changed: Sequence[Difference], every: bool) -> Iterator[RenderableType]:
    shown = changed if every else changed[:SHOWN]
    yield heading("furthest apart", f"{len(shown)} of {len(changed):,}" + ("" if len(shown) == len(changed) else "; --all lists them all"))
    table = grid("left", "right", "right", "right", "right", header=("tensor", "relative", "cosine", "largest", "changed"))
    for d in shown:
        name = Text(printable(d.name_a, 200))
        if d.verdict == SHAPE:
            table.add_row(name, f"{list(d.shapes[0])}", "", f"{list(d.shapes[1])}", "shape")
            continue
        share = d.changed / d.count if d.count else 0.0
        elements = f"{d.changed:,}" if share < 0.001 else f"{share:.1%}"
        table.add_row(name, "<" * d.vanishing + percent(d.shade), cosine_text(d.cosine), short(d.max_abs), elements)
    yield padded(table)
