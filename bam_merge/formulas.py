"""Formulas: how a source's tensor that no file holds is computed, row by row, from stored ones. Frozen, plain data, no torch.

One record per formula. Its kernel is in merging/formulas.py, its second way in verifying/formulas.py.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, NamedTuple

from bam_merge.records import Formula

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LowRank(Formula):
    """W + sum_i s_i B_i A_i (LoRA, arXiv 2106.09685, section 4.1). Inputs: W [R, C]; then of each adapter A_i [r, C] and B_i [R, r].

    `transposed`, for embeddings: W + sum_i s_i (B_i A_i)^T, of A_i [r, R] and B_i [C, r].
    """

    adapters: tuple[str, ...]
    scales: tuple[float, ...]
    transposed: bool = False
    name: ClassVar = "lora"

    def shown(self, inputs: Sequence[str]) -> str:
        return f"{inputs[0]} + lora({', '.join(self.adapters)})"

    def held(self, shapes: Sequence[Shape], rows: int) -> int:
        ranks = [a[0] for a in shapes[1::2]]
        kept = shapes[2::2] if self.transposed else shapes[1::2]
        return 28 * rows * shapes[0][1] + 16 * rows * sum(ranks) + 16 * sum(map(prod, kept))


class RowRun(NamedTuple):
    """Rows [first, first + rows) of the result, each the mean of one row of every input in `of` (input, its first row); zeros of none."""

    first: int
    rows: int
    of: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class ByToken(Formula):
    """Rows by an index table: row r of the result belongs to token r. `own` is what plans show of the source's own tensor, which gives
    the rows of the tokens that it has; `sources` says whose each input is; `runs` cover all rows in order.
    """

    own: str
    sources: tuple[str, ...]
    runs: tuple[RowRun, ...]
    name: ClassVar = "by_token"

    def shown(self, inputs: Sequence[str]) -> str:
        own = self.own if " " not in self.own else f"({self.own})"
        return f"{own}[by token]"

    def held(self, shapes: Sequence[Shape], rows: int) -> int:
        return 24 * rows * prod(shapes[0][1:])

    def within(self, start: int, stop: int) -> Iterator[RowRun]:
        """The runs that make up rows [start, stop)."""
        index = bisect_right(self.runs, start, key=lambda run: run.first) - 1
        while start < stop:
            run = self.runs[index]
            skip, last = start - run.first, min(stop, run.first + run.rows)
            yield RowRun(start, last - start, tuple((place, row + skip) for place, row in run.of))
            start, index = last, index + 1

    @property
    def moves(self) -> bool:
        return all(len(run.of) < 2 for run in self.runs)

    def moved(self, start: int, stop: int) -> Iterator[tuple[int | None, int, int]]:
        for run in self.within(start, stop):
            place, row = run.of[0] if run.of else (None, 0)
            yield place, row, run.rows
