"""Numbers in words, and lists of names, for messages and tables."""

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
