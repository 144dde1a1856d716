"""Numbers in words, and lists of names, for messages and tables."""

import math
import re
from collections.abc import Iterable
from math import prod

NUMBER = re.compile(r"(?<=\.)([0-9]{1,9})(?=\.)")
"""A number between dots in a tensor's name."""


def human_bytes(count: float) -> str:
    """Decimal units, as disks are sold and max_shard_size is read: 1.23 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def count(number: int, noun: str) -> str:
    """'1 file', '2,000 files'."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> '{0-2,5}'; one number stands bare."""
    if len(numbers) == 1:
        return str(numbers[0])
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) + "}"


def folded(names: Iterable[str]) -> list[str]:
    """Names that differ in their numbers alone as one: model.layers.0.x, model.layers.1.x -> model.layers.{0-1}.x."""
    groups: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in names:
        pieces = NUMBER.split(name)
        groups.setdefault(tuple(pieces[::2]), []).append(tuple(map(int, pieces[1::2])))
    lines = []
    for words, rows in groups.items():
        columns = [sorted(set(column)) for column in zip(*rows, strict=True)]
        whole = prod(map(len, columns)) == len(rows)  # every combination is there
        for row in [None] if whole else rows:
            shown = [ranges(column) for column in columns] if row is None else [str(number) for number in row]
            lines.append("".join(word + number for word, number in zip(words, [*shown, ""], strict=True)))
    return lines


def printable(text: str, limit: int = 200) -> str:
    """`text` made safe for a terminal and a log: control and format characters escaped, very long names cut."""
    if len(text) <= limit and text.isprintable():
        return text
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: limit + 1])
    return shown if len(text) <= limit else shown[:limit] + f"... ({len(text)} characters)"


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first few names and how many more there are: 'a, b, c and 7 more'."""
    items = list(names)
    text = ", ".join(printable(name) or "''" for name in items[:limit])
    return text if len(items) <= limit else f"{text} and {len(items) - limit} more"


def nearest(word: str, valid: Iterable[str]) -> str:
    """'; did you mean X?' when a valid name is close to `word`, and '' otherwise."""
    from difflib import get_close_matches

    close = get_close_matches(word, list(valid), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def percent(value: float | None) -> str:
    """'0.283%'; more than all of it as a factor, '12.3 x'."""
    if value is None:
        return "-"
    if value == math.inf:
        return ">1.8e+308 x"
    return f"{value:.3g} x" if value >= 9.995 else f"{100 * value:.3g}%"


def number(value: int | float) -> str:
    """1,234,567 while it fits a column, 671.1 G beyond."""
    if isinstance(value, float):
        return f"{value:,.0f}"
    if value < 10**10:
        return f"{value:,}"
    for unit, size in (("G", 10**9), ("T", 10**12)):
        if value < 1000 * size:
            return f"{value / size:.4g} {unit}"
    return f"{value / 10**15:,.4g} P"


def short(value: float | None) -> str:
    """Three significant digits."""
    return "-" if value is None else ">1.8e308" if value == math.inf else f"{value:.3g}"


def span(values: Iterable[float | None]) -> str:
    """From the least to the largest: '0.02 to 0.3'."""
    shown = sorted(value for value in values if value is not None)
    if not shown:
        return "-"
    low, high = short(shown[0]), short(shown[-1])
    return low if low == high else f"{low} to {high}"
