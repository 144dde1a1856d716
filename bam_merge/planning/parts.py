"""A plan in parts, for several processes or machines: whole files of the result, balanced by bytes.

Everybody computes the same parts from the plan and their number, so that nobody has to tell anybody.
"""

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from bam_merge import expressions
from bam_merge.errors import RecipeError
from bam_merge.planning.plan import Plan
from bam_merge.planning.steps import grouped
from bam_merge.text import count


@dataclass(frozen=True)
class Part:
    """Part `number` (from 1) of `of`: the files of the result that it makes, in their order, and the bytes of these."""

    number: int
    of: int
    files: tuple[str, ...]
    nbytes: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def parts_of(plan: Plan, number: int) -> tuple[Part, ...]:
    """The files of `plan` in so many parts: the largest first, each to the part with the fewest bytes until then, so that no two parts
    differ by more than the largest file. Raises RecipeError when there are more parts than files."""
    if number > len(plan.shards):
        raise RecipeError(_too_many(plan, number))
    loads = [(0, index) for index in range(number)]
    files: list[list[int]] = [[] for _ in range(number)]
    for place in sorted(range(len(plan.shards)), key=lambda place: (-plan.shards[place].nbytes, place)):
        nbytes, index = heapq.heappop(loads)
        files[index].append(place)
        heapq.heappush(loads, (nbytes + plan.shards[place].nbytes, index))
    return tuple(
        Part(index + 1, number, tuple(plan.shards[place].file for place in sorted(mine)), sum(plan.shards[place].nbytes for place in mine))
        for index, mine in enumerate(files)
    )


def plan_of(plan: Plan, part: Part) -> Plan:
    """What of `plan` a part makes: its files, and the tensors in them. The fingerprint stays that of the whole."""
    mine = set(part.files)
    return replace(
        plan,
        steps=tuple(step for step in plan.steps if step.file in mine),
        shards=tuple(shard for shard in plan.shards if shard.file in mine),
        calibration=None,  # routers from texts are made of the whole
    )


def parts_document(plan: Plan, number: int) -> list[dict[str, Any]]:
    """The parts as `plan --json --parts` prints them. `bytes` are written, `bytes_read` those of every operand, once."""
    read: Counter[str] = Counter()
    for step in plan.steps:
        read[step.file] += expressions.bytes_read(step.expr)
    return [
        {"part": part.number, "files": list(part.files), "bytes": part.nbytes, "bytes_read": sum(read[file] for file in part.files)}
        for part in parts_of(plan, number)
    ]


def _too_many(plan: Plan, number: int) -> str:
    """What is said of more parts than files, with the largest plain max_shard_size that gives enough of them."""
    files = len(plan.shards)
    fewer = f"Use {files}{' or fewer' if files > 1 else ''}"
    said = f"{number} parts were asked for, and the result has {count(files, 'file')}; a part is whole files. {fewer}"
    if number > len(plan.steps):
        return f"{said}: there are {count(len(plan.steps), 'tensor')}, and a tensor is in one file."
    for size, text in _plain_sizes():
        found = len(grouped(plan.steps, size))
        if found >= number:
            return f"{said}, or a smaller output.max_shard_size: {text} gives about {found} files."
    return f"{said}, or a smaller output.max_shard_size."


def _plain_sizes() -> Iterator[tuple[int, str]]:
    """Sizes of files, the largest first, as a recipe has them."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        for number in (500, 200, 100, 50, 20, 10, 5, 2, 1):
            yield number * 10**power, f"{number}{unit}"
