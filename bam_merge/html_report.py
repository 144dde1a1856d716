"""`diff --html FILE`: a comparison as one page that needs nothing but itself: heatmaps, tables that sort, light and dark.

A heatmap is an SVG picture, one path per shade; its numbers are beside it in the page for the pointer to read. Every text that comes
from a checkpoint is escaped, and the page forbids itself any connection.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources
from pathlib import Path

from bam_merge.comparison import Comparison
from bam_merge.drift import Drift
from bam_merge.errors import OutputError, printable
from bam_merge.heatmap import Row, percent, scale
from bam_merge.render_diff import comparison_rows, drift_rows, rank, remarks, verdict_counts

LEVELS = 16
"""Shades of a heatmap."""

LISTED = 1500
"""Rows of the table of tensors: so a page stays below 500 kB."""


def check_free(path: Path, force: bool) -> None:
    """Raise OutputError when a report must not or cannot be written there."""
    if not path.parent.is_dir():
        raise OutputError(f"--html {printable(str(path))}: there is no folder {printable(str(path.parent))}.")
    if path.is_dir():
        raise OutputError(f"--html {printable(str(path))}: is a folder, expected a file.")
    if path.exists() and not force:
        raise OutputError(f"--html {printable(str(path))}: exists. Choose another name, or replace it with --force.")


def write_report(found: Comparison | Drift, path: Path, force: bool = False) -> None:
    """Write the page, whole or not at all. Raises OutputError."""
    check_free(path, force)
    page = report_page(found).encode()
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            file.write(page)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        if force:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)  # unlike a rename, it replaces nothing
    except OSError as error:
        raise OutputError(f"--html {printable(str(path))}: {error.strerror}.") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def report_page(found: Comparison | Drift) -> str:
    """The page as HTML."""
    title, parts = (_drift(found)) if isinstance(found, Drift) else _comparison(found)
    template = (resources.files("bam_merge") / "report.html").read_text(encoding="utf-8")
    return template.replace("@TITLE@", escape(title)).replace("@BODY@", "\n".join(parts))


def _comparison(found: Comparison) -> tuple[str, Iterator[str]]:
    a, b = printable(found.a.label, 200), printable(found.b.label, 200)

    def parts() -> Iterator[str]:
        yield f"<h1>{escape(a)} <small>and</small> {escape(b)}</h1>"
        yield f'<p class="{"same" if found.equal else "stop"}">{"the same" if found.equal else "different"}</p>'
        yield _list([(finding.text, "" if finding.counts else "aside") for finding in found.findings])
        yield _list([(f"{number:,} {words}", "") for number, words in verdict_counts(found)])
        rows = comparison_rows(found)
        if any(not d.same for d in found.compared):
            yield from _maps([("relative difference", "|B - A| / |A|", rows)])
        changed = found.changed
        if changed:
            header = ("tensor", "role", "layer", "relative", "cosine", "largest", "changed", "")
            cells = [
                [d.name_a, d.place[0], d.place[1], d.relative_l2, d.cosine, d.max_abs, d.changed / max(1, d.count), "; ".join(remarks(d))]
                for d in changed
            ]
            yield from _table("tensors that differ", header, cells)
        yield _left_out(found.ignored)

    return f"{a} and {b}", parts()


def _drift(found: Drift) -> tuple[str, Iterator[str]]:
    seed = printable(found.seed.label, 200)

    def parts() -> Iterator[str]:
        yield f"<h1>Branches of {escape(seed)}</h1>"
        yield _list([(reading.text, "stop" if reading.stop else "") for reading in found.readings])
        n = range(len(found.names))
        names = [printable(name, 60) for name in found.names]
        overall = found.overall
        maps = [(name, f"|E - S| / |S|, {percent(overall.drift(i))} overall", drift_rows(found, i)) for i, name in enumerate(names)]
        yield from _maps(maps)
        if len(names) > 1:
            cosines = [[name, *(overall.cosine(i, j) for j in n)] for i, name in enumerate(names)]
            yield from _table("cosine of what training added", ("", *names), cosines)
            equal = [
                [name, *(overall.equal[i][j] / overall.count for j in n), overall.equal_seed[i] / overall.count]
                for i, name in enumerate(names)
            ]
            yield from _table("share of equal weights", ("", *names, "seed"), equal)
            kept = []
            for role in sorted(found.roles, key=lambda role: rank(role, False)):
                gram = found.part(role)
                if gram is not None:
                    kept.append([role.removeprefix("? "), gram.kept_by_averaging(), gram.kept_if_orthogonal()])
            yield from _table("what averaging keeps of a drift's norm", ("role", "kept", "random directions"), kept)
        ranked = sorted(found.grams.items(), key=lambda item: -max(item[1].drift(i) or 0.0 for i in n))
        tensors = [[found.seed.name(place), place[0], place[1], *(gram.drift(i) for i in n)] for place, gram in ranked]
        yield from _table("tensors by drift", ("tensor", "role", "layer", *names), tensors)
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


def _maps(maps: Sequence[tuple[str, str, Sequence[Row]]]) -> Iterator[str]:
    """Heatmaps on one scale, with one legend."""
    top, largest = scale([value for _, _, rows in maps for row in rows for value in row.values if value is not None])
    for name, aside, rows in maps:
        yield f"<h2>{escape(name)} <small>{escape(aside)}</small></h2>"
        yield _map(rows, top)
    shades = "".join(f'<path class="s{level}" d="M{level * 8} 0h8v10h-8z"/>' for level in range(LEVELS + 1))
    more = f", largest {percent(largest)}" if largest > top else ""
    yield (
        f'<p class="legend"><svg width="{8 * LEVELS + 8}" height="10">{shades}</svg> 0 to {percent(top)}{escape(more)}. '
        "A row is a role, a column a layer.</p>"
    )


def _map(rows: Sequence[Row], top: float) -> str:
    """One heatmap: cells of 10 by 14, a path per shade."""
    width = max((len(row.values) for row in rows), default=0)
    side = max(4, min(18, 900 // max(1, width)))
    paths: dict[int, list[str]] = {}
    for y, row in enumerate(rows):
        for x, value in enumerate(row.values):
            if value is not None:
                level = 0 if value == 0 else 1 + min(LEVELS - 1, int(LEVELS * min(1.0, value / top))) if top else 0
                paths.setdefault(level, []).append(f"M{x * side} {y * 16}h{side - 1}v15h-{side - 1}z")
    drawn = "".join(f'<path class="s{level}" d="{"".join(cells)}"/>' for level, cells in sorted(paths.items()))
    labels = "".join(f"<div>{escape(row.name)}</div>" for row in rows)
    totals = "".join(f"<div>{percent(row.overall)}</div>" for row in rows)
    values = [[None if value is None else float(f"{value:.3g}") for value in row.values] for row in rows]
    data = escape(json.dumps({"side": side, "rows": [row.name for row in rows], "values": values}, separators=(",", ":")))
    return (
        f'<div class="map" data-map="{data}"><div class="labels">{labels}</div>'
        f'<svg width="{width * side}" height="{len(rows) * 16}" role="img" aria-label="heatmap">{drawn}</svg>'
        f'<div class="totals">{totals}</div></div>'
    )


# ---- tables ------------------------------------------------------------------------------------------------------------------


def _table(name: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """A table whose columns sort on a click."""
    aside = f" <small>the first {LISTED:,} of {len(rows):,}</small>" if len(rows) > LISTED else ""
    head = "".join(f"<th>{escape(printable(text, 60))}</th>" for text in header)
    body = "".join("<tr>" + "".join(_td(value) for value in row) + "</tr>" for row in rows[:LISTED])
    yield f"<h2>{escape(name)}{aside}</h2>"
    yield f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _td(value: object) -> str:
    if value is None:
        return "<td></td>"
    if isinstance(value, float):
        return f"<td class=n>{value:.4g}</td>" if math.isfinite(value) else "<td class=n>inf</td>"
    if isinstance(value, int):
        return f"<td class=n>{value}</td>"
    return f"<td>{escape(printable(str(value), 200))}</td>"
