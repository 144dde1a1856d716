"""Numbers in words, and lists of names, for messages and tables."""

import math
import re
from collections.abc import Callable, Collection, Iterable
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


def count(number: int, noun: str, plural: str | None = None) -> str:
    """'1 file', '2,000 files'; a noun that takes no s comes with its plural."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


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


def listed(words: Collection[str]) -> str:
    """All of them: 'a', 'a and b', 'a, b and c'."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def nearest(word: str, valid: Iterable[str]) -> str:
    """'; did you mean X?' when a valid name is close to `word`, and '' otherwise."""
    from difflib import get_close_matches

    close = get_close_matches(word, list(valid), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


# ---- numbers -------------------------------------------------------------------------------------------------------------------


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


def bound(value: int | float) -> str:
    """A limit as its user would write it: '1,000', '0.5'."""
    return f"{value:g}" if isinstance(value, float) else f"{value:,}"


def short(value: float | None) -> str:
    """Three significant digits."""
    return "-" if value is None else ">1.8e308" if value == math.inf else f"{value:.3g}"


def fixed(value: float | None, digits: int) -> str:
    """So many digits after the point, and no '-0.00'; None is zero."""
    return ">1.8e308" if value == math.inf else f"{round(value or 0.0, digits) + 0.0:.{digits}f}"


def thousandths(value: float | None) -> str:
    """Three digits after the point and none before it, for narrow columns: '.283'."""
    return "-" if value is None else f"{value:.3f}".replace("0.", ".", 1)


def cosine_text(value: float | None, estimate: bool = False) -> str:
    """Four digits after the point, '1.0000' only for 1, which an estimate never is."""
    if value is None:
        return "-"
    return ">0.9999" if (value > 0.9999 if estimate else 0.99995 <= value < 1) else f"{value:.4f}"


def multiple(value: float) -> str:
    """A number that something was multiplied with."""
    return f"{value:.3g}" if math.isfinite(value) else "more than 1.8e308"


def times(value: float) -> str:
    """How many times as much, as in 'x times as far': about two significant digits."""
    return f"{value:.2f}" if 0.1 <= value < 10 else f"{value:.2g}" if value < 0.1 else f"{value:.0f}"


def in_percent(value: float) -> str:
    """'0.283%', in three significant digits."""
    return f"{100 * value:.3g}%"


def percent(value: float | None) -> str:
    """'0.283%'; more than all of it as a factor, '12.3 x'."""
    if value is None:
        return "-"
    if value == math.inf:
        return ">1.8e+308 x"
    return f"{value:.3g} x" if value >= 9.995 else in_percent(value)


def drift_percent(value: float | None) -> str:
    """A drift that is none of zero, '0.283%' or '1.23e+03%'."""
    if value is None:
        return "an unknown share"
    return ">1.8e310%" if value == math.inf else in_percent(value) if value else "<4.9e-322%"


def share_percent(value: float) -> str:
    """A share in three digits, but 100% only for all of it."""
    return ">99.9%" if 0.9995 <= value < 1 else in_percent(value)


def whole_percent(value: float) -> str:
    """A share in whole percents, but 0% and 100% only for what is exactly that."""
    rounded = f"{abs(value):.0%}"
    return "<1%" if rounded == "0%" and value > 1e-9 else ">99%" if rounded == "100%" and value < 1 - 1e-9 else rounded


def span(values: Iterable[float | None], text: Callable[[float], str] = short) -> str:
    """From the least to the largest, each as `text` has it: '0.02 to 0.3'."""
    shown = sorted(value for value in values if value is not None)
    if not shown:
        return "-"
    low, high = text(shown[0]), text(shown[-1])
    return low if low == high else f"{low} to {high}"


def duration(seconds: float) -> str:
    """About how long: '20 seconds', '12 minutes', '3.5 hours'."""
    if seconds < 90:
        return count(max(1, round(seconds)), "second")
    return f"{round(seconds / 60)} minutes" if seconds < 5400 else f"{seconds / 3600:.2g} hours"
