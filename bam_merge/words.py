"""Numbers in words, for messages and tables."""


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
