"""`diff --html FILE`: a comparison as one page that needs nothing but itself: heatmaps, tables that sort, light and dark.

A heatmap is an SVG picture, one path per shade; its numbers are beside it in the page for the pointer to read. Every text that comes
from a checkpoint is escaped, and the page forbids itself any connection.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib import resources
from pathlib import Path

from bam_merge.comparing.drift import Drift
from bam_merge.comparing.gram import Gram
from bam_merge.comparing.tensor_difference import ROUNDING, SHAPE, Difference
from bam_merge.comparing.two_models import Comparison
from bam_merge.errors import OutputError
from bam_merge.files import mode_of_new_files
from bam_merge.showing.comparison import comparison_rows, remarks, verdict_counts
from bam_merge.showing.drift import drift_rows, grams_by_role
from bam_merge.showing.heatmap import HeatmapRow, scale
from bam_merge.system import name_new, sync
from bam_merge.text import in_percent, percent, printable

LEVELS = 16
"""Shades of a heatmap."""


AXIS = 16
"""Height of the row of layer numbers in a heatmap."""


LISTED = 1500
"""Rows of the table of tensors: so a page stays below 500 kB."""


def check_free(path: Path, force: bool) -> None:
    """Raise OutputError when a report must not or cannot be written there."""
    if not path.parent.is_dir():
        raise OutputError(f"--html {printable(str(path))}: there is no folder {printable(str(path.parent))}.")
    if path.is_dir():
        raise OutputError(f"--html {printable(str(path))}: is a folder, expected a file.")
    if path.exists() and not path.is_file():
        raise OutputError(f"--html {printable(str(path))}: is a device, pipe or socket, which no file takes the place of. Name a file.")
    if path.exists() and not force:
        raise OutputError(f"--html {printable(str(path))}: exists. Choose another name, or replace it with --force.")


def write_page(found: Comparison | Drift, path: Path, force: bool = False) -> None:
    """Write the page, whole or not at all. Raises OutputError."""
    write_html(page_of(found), path, force)


def write_html(text: str, path: Path, force: bool) -> None:
    """Write a page, whole or not at all. Raises OutputError."""
    check_free(path, force)
    page = text.encode()
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".bam-merge.", delete=False) as file:
            temporary = file.name
            file.write(page)
            file.flush()
            os.fchmod(file.fileno(), mode_of_new_files())
            sync(file.fileno())
        if force:
            os.replace(temporary, path)
        else:
            name_new(temporary, path)
    except OSError as error:
        raise OutputError(f"--html {printable(str(path))}: {error.strerror}.") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def page_of(found: Comparison | Drift) -> str:
    """The page as HTML."""
    title, parts = (_drift(found)) if isinstance(found, Drift) else _comparison(found)
    return filled("diff", title, parts)


def filled(command: str, title: str, parts: Iterable[str]) -> str:
    """The page of a command, with its parts in the body."""
    template = (resources.files("bam_merge.showing") / "page.html").read_text(encoding="utf-8")
    return template.replace("@TITLE@", escape(title)).replace("@COMMAND@", command).replace("@BODY@", "\n".join(parts))


def _comparison(found: Comparison) -> tuple[str, Iterator[str]]:
    a, b = printable(found.a.label, 200), printable(found.b.label, 200)

    def parts() -> Iterator[str]:
        yield f"<h1>{escape(a)} <small>(A) and</small> {escape(b)} <small>(B)</small></h1>"
        yield f'<p class="{"same" if found.equal else "stop"}">{"the same" if found.equal else "different"}</p>'
        yield _list([(finding.text, "" if finding.counts else "aside") for finding in found.findings[:LISTED]])
        yield _list([(f"{number:,} {words}", "") for number, words in verdict_counts(found)])
        rows = comparison_rows(found)
        if any(not d.same for d in found.compared):
            yield from _maps([("relative difference", "|B - A| / |A|", rows)])
        moved = set(found.names("moved"))
        told = [d for d in found.compared if not d.same or d.zero_signs or any((*d.nan, *d.inf))]
        if told:
            header = ("tensor", "role", "layer", "relative", "cosine", "largest", "changed", "B is")
            cells = [
                [d.name_a, d.place[0], d.place[1], _Share(d.shade), d.cosine, d.max_abs, _Share(d.changed / max(1, d.count)),
                 "shape " + " and ".join(str(list(shape)) for shape in d.shapes) if d.verdict == SHAPE else _told(d, d.name_a in moved)]
                for d in sorted(told, key=lambda d: -math.inf if d.relative_l2 is None or d.odd else -d.relative_l2)
            ]  # fmt: skip
            yield from _table("tensors that differ", "a click on a column sorts by it", header, cells)
        yield _left_out(found.ignored)

    return f"{a} and {b}", parts()


def _told(d: Difference, moved: bool) -> str:
    words = [text for kind, text in remarks(d) if not (moved and kind == "unrelated")] + ["what stood elsewhere"] * moved
    return "; ".join(words or ["within one unit in the last place"] * (d.verdict == ROUNDING))


def _drift(found: Drift) -> tuple[str, Iterator[str]]:
    seed = printable(found.seed.label, 200)

    def parts() -> Iterator[str]:
        yield f"<h1>Branches of {escape(seed)}</h1>"
        answers = ((escape(reading.question), escape(reading.text), ' class="stop"' * reading.stop) for reading in found.readings)
        yield f"<dl>{''.join(f'<dt>{question}</dt><dd{style}>{answer}</dd>' for question, answer, style in answers)}</dl>"
        yield _list([(finding.text, "" if finding.counts else "aside") for finding in found.findings[:LISTED]])
        n = range(len(found.names))
        names = [printable(name, 60) for name in found.names]
        overall, roles = found.overall, grams_by_role(found)
        yield from _maps(
            [(name, f"|E - S| / |S|, {percent(overall.drift(i))} overall", drift_rows(found, i)) for i, name in enumerate(names)]
        )
        if len(names) > 1:
            squares = "".join(_square(role, names, gram) for role, gram in (roles[-1], *roles[:-1]))
            yield "<h2>cosines of task vectors <small>what training added, E - S, by role; random directions have 0</small></h2>"
            yield f'<div class="squares">{squares}</div>'
            yield '<div class="beside">'
            chance = f"bit for bit; unrelated models: {percent(overall.chance_equal)}" if overall.chance_equal is not None else ""
            total = max(1, overall.count)
            equal = [
                [name, _Share(overall.equal_seed[i] / total), *(_Share(overall.equal[i][j] / total) for j in n)]
                for i, name in enumerate(names)
            ]
            yield from _table("equal weights", chance, ("", "seed", *names), equal)
            kept = [[role, gram.kept_by_averaging(), gram.kept_if_orthogonal()] for role, gram in roles]
            yield from _table("what averaging keeps", "|mean drift| / mean |drift|", ("role", "kept", "of random drifts"), kept)
        layers = [[layer, _Share(value)] for layer, value in found.ranking()]
        yield from _table("layers by drift", "mean over the experts", ("layer", "drift"), layers)
        yield "</div>" * (len(names) > 1)
        ranked = sorted(found.grams.items(), key=lambda item: -max(item[1].drift(i) or 0.0 for i in n))
        tensors = [[found.seed.name(place), place[0], place[1], *(_Share(gram.drift(i)) for i in n)] for place, gram in ranked]
        yield from _table("tensors by drift", "a click on a column sorts by it", ("tensor", "role", "layer", *names), tensors)
        yield _left_out(found.left_out)

    return f"Branches of {seed}", parts()


def _list(items: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f'<li class="{style}">{escape(printable(text, 2000))}</li>' for text, style in items)
    return f"<ul>{rows}</ul>" if rows else ""


def _left_out(left_out: object) -> str:
    assert hasattr(left_out, "items")
    rows = [f"{name}: {reason}" for name, reason in left_out.items()]
    more = [f"and {len(rows) - LISTED:,} more"] * (len(rows) > LISTED)
    inside = _list([(row, "") for row in rows[:LISTED] + more])
    return f"<details><summary>{len(rows):,} tensors not compared</summary>{inside}</details>" if rows else ""


# ---- heatmaps ----------------------------------------------------------------------------------------------------------------


def _maps(maps: Sequence[tuple[str, str, Sequence[HeatmapRow]]]) -> Iterator[str]:
    """Heatmaps on one scale, with one legend."""
    top, largest = scale([value for _, _, rows in maps for row in rows for value in row.values if value is not None])
    for name, aside, rows in maps:
        yield f"<h2>{escape(name)} <small>{escape(aside)}</small></h2>"
        yield heatmap_picture(name, rows, top)
    shades = "".join(f'<path class="s{level}" d="M{level * 8} 0h8v10h-8z"/>' for level in range(LEVELS + 1))
    more = f", the largest {percent(largest)}" if largest > top else ""
    odd = " Framed: NaN or infinity in one of the two." if any(math.inf in row.values for _, _, rows in maps for row in rows) else ""
    yield (
        f'<p class="legend"><svg width="{8 * LEVELS + 8}" height="10">{shades}</svg> 0 to {percent(top)}{escape(more)}. '
        f"A row is a role, a column a layer.{odd}</p>"
    )


def heatmap_picture(name: str, rows: Sequence[HeatmapRow], top: float) -> str:
    """One heatmap: roles in layers above the layers' numbers, what has no layer below; a path per shade."""
    width = max((len(row.values) for row in rows), default=0)
    side = max(4, min(26, 840 // max(1, width)))
    split = sum(len(row.values) > 1 for row in rows) or len(rows)
    paths: dict[str, list[str]] = {}
    for y, row in enumerate(rows):
        for x, value in enumerate(row.values):
            if value is not None:
                level = _level(value, top)
                above = y * 16 + (AXIS if y >= split else 0)
                paths.setdefault(level, []).append(f"M{x * side} {above}h{side - 1}v15h-{side - 1}z")
    drawn = "".join(f'<path class="{level}" d="{"".join(cells)}"/>' for level, cells in sorted(paths.items()))
    step = next(step for step in (1, 2, 5, 10, 20, 50, 10**6) if step * side >= 26)
    ticks = "".join(f'<text x="{x * side + side // 2}" y="{split * 16 + 11}">{x}</text>' for x in range(0, width, step) if width > 1)
    columns = ['<div class="axis">layer</div>' if width > 1 else '<div class="axis"></div>', '<div class="axis"></div>']
    labels, totals = [escape(row.name) for row in rows], [percent(row.overall) for row in rows]
    beside = [
        "".join(f"<div>{text}</div>" for text in texts[:split]) + between + "".join(f"<div>{text}</div>" for text in texts[split:])
        for texts, between in zip((labels, totals), columns, strict=True)
    ]
    values = [[_pointed(value) for value in row.values] for row in rows]
    data = {"side": side, "split": split, "axis": AXIS, "rows": [row.name for row in rows], "values": values}
    size = f'width="{width * side}" height="{len(rows) * 16 + AXIS}"'
    return (
        f'<div class="map" {_data(data)}><div class="labels">{beside[0]}</div>'
        f'<svg {size} role="img" aria-label="heatmap of {escape(name)}">{drawn}{ticks}</svg>'
        f'<div class="totals">{beside[1]}</div></div>'
    )


def _level(value: float, top: float) -> str:
    """The class of a cell: its shade, or that it is no number."""
    if value == math.inf:
        return "odd"
    return f"s{0 if not value or not top else 1 + min(LEVELS - 1, int(LEVELS * min(1.0, value / top)))}"


def _pointed(value: float | None) -> float | str | None:
    """What the pointer shows: three digits."""
    if value is None or value == math.inf:
        return value if value is None else "NaN or infinity"
    rounded = float(f"{value:.3g}")
    return rounded if math.isfinite(rounded) else value  # the largest float64 would be rounded up to infinity


def _square(role: str, names: Sequence[str], gram: Gram) -> str:
    """The cosines of every expert with every other, as a picture: the stronger the colour, the further from 0."""
    n = range(len(names))
    side = 20 if len(names) <= 8 else 10
    cosines = [[gram.cosine(i, j) for j in n] for i in n]
    cells = "".join(
        f'<path class="{"c" if value >= 0 else "d"}" fill-opacity="{min(1.0, abs(value)):.2g}" '
        f'd="M{j * side} {i * side}h{side - 1}v{side - 1}h-{side - 1}z"/>'
        for i, row in enumerate(cosines) for j, value in enumerate(row) if value is not None
    )  # fmt: skip
    others = [value for i, row in enumerate(cosines) for j, value in enumerate(row) if j > i and value is not None]
    moved = [name for i, name in enumerate(names) if gram.moved(i)]
    still = f"only {escape(moved[0])} drifted" if moved else "no drift"
    mean = f"{sum(others) / len(others):.3f}<br>noise ±{gram.noise:.1g}" if others else still
    values = [[_pointed(value) for value in row] for row in cosines]
    data = {"side": side, "height": side, "rows": names, "columns": names, "values": values}
    return (
        f'<figure class="map" {_data(data)}><svg width="{len(names) * side}" height="{len(names) * side}" role="img" '
        f'aria-label="cosines of {escape(role)}">{cells}</svg>'
        f"<figcaption>{escape(printable(role, 40))}<br><small>{mean}</small></figcaption></figure>"
    )


def _data(values: object) -> str:
    """What the pointer reads off a picture."""
    return f'data-map="{escape(json.dumps(values, separators=(",", ":"), allow_nan=False))}"'


# ---- tables ------------------------------------------------------------------------------------------------------------------


class _Share(float):
    """A number that is shown as a percentage."""

    def __new__(cls, value: float | None) -> "_Share":
        return super().__new__(cls, math.nan if value is None else value)


def _table(name: str, aside: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """A table whose columns sort on a click."""
    if not rows:
        return
    aside = f"the first {LISTED:,} of {len(rows):,}; {aside}" if len(rows) > LISTED else aside
    numeric = [any(isinstance(row[column], int | float) for row in rows) for column in range(len(header))]
    head = "".join(
        f"<th{' class=n' if right else ''}>{escape(printable(text, 60))}</th>" for text, right in zip(header, numeric, strict=True)
    )
    body = "".join("<tr>" + "".join(_td(value) for value in row) + "</tr>" for row in rows[:LISTED])
    yield f"<section><h2>{escape(name)} <small>{escape(aside)}</small></h2>"
    yield f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>'


def _td(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "<td></td>"
    if isinstance(value, float):
        shown = in_percent(value) if isinstance(value, _Share) else f"{value:.{6 if 0.999 < value < 1 else 4}g}"
        return f"<td class=n>{shown if math.isfinite(value) else '&gt;1.8e308'}</td>"
    if isinstance(value, int):
        return f"<td class=n>{value}</td>"
    return f"<td>{escape(printable(str(value), 200))}</td>"
