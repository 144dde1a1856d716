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

    Those that are `turned`, embeddings' own, are transposed: s_i (B_i A_i)^T, of A_i [r, R] and B_i [C, r]. None are where it is empty.
    """

    adapters: tuple[str, ...]
    scales: tuple[float, ...]
    turned: tuple[bool, ...] = ()
    name: ClassVar = "lora"

    def shown(self, inputs: Sequence[str]) -> str:
        return f"{inputs[0]} + lora({', '.join(self.adapters)})"

    def held(self, shapes: Sequence[Shape], rows: int) -> int:
        updates = zip(self.turned or (False,) * len(self.scales), shapes[1::2], shapes[2::2], strict=True)
        kept = [b if turned else a for turned, a, b in updates]
        return 28 * rows * shapes[0][1] + 16 * rows * sum(a[0] for a in shapes[1::2]) + 16 * sum(map(prod, kept))


@dataclass(frozen=True, slots=True)
class Dora(Formula):
    """m_i V_i / |V_i| for each row V_i of V = W + s B A (DoRA, arXiv 2402.09353, equation 5).

    Inputs: W [R, C], A [r, C], B [R, r], m [R].
    """

    adapter: str
    scale: float
    name: ClassVar = "dora"

    def shown(self, inputs: Sequence[str]) -> str:
        return f"{inputs[0]} + dora({self.adapter})"

    def held(self, shapes: Sequence[Shape], rows: int) -> int:
        rank, columns = shapes[1]
        return 36 * rows * columns + 16 * rows * (rank + 2) + 16 * rank * columns


@dataclass(frozen=True, slots=True)
class Shifted(Formula):
    """b + s c, a bias [R] and the bias of an update's B [R]: PEFT's lora_bias."""

    adapter: str
    scale: float
    name: ClassVar = "shifted"

    def shown(self, inputs: Sequence[str]) -> str:
        return f"{inputs[0]} + lora({self.adapter})"

    def held(self, shapes: Sequence[Shape], rows: int) -> int:
        return 40 * rows


@dataclass(frozen=True, slots=True)
class TokenRows(Formula):
    """W [R, C] with row rows[i] replaced by row i of D [n, C]: PEFT's trainable tokens."""

    adapter: str
    rows: tuple[int, ...]
    name: ClassVar = "tokens"

    def shown(self, inputs: Sequence[str]) -> str:
        return f"{inputs[0]} + tokens({self.adapter})"

    def held(self, shapes: Sequence[Shape], rows: int) -> int:
        return 28 * rows * shapes[0][1]


@dataclass(frozen=True, slots=True)
class Saved(Formula):
    """A tensor that was trained whole and saved in another dtype than the base's."""

    name: ClassVar = "saved"

    def shown(self, inputs: Sequence[str]) -> str:
        return f"saved({inputs[0]})"

    def held(self, shapes: Sequence[Shape], rows: int) -> int:
        return 20 * rows * prod(shapes[0][1:])


@dataclass(frozen=True, slots=True)
class Scaled(Formula):
    """w_ij * s of the block that ij is in. Inputs: w [R, C], quantised; the scales of blocks of `block` rows and columns, row by row.

    The blocks at the end may be smaller. What weight_scale_inv and weight_scale hold are factors in all formats that are read so
    (DeepSeek-V3, arXiv 2412.19437, section 3.3; transformers' Fp8Dequantize; compressed-tensors, without a zero point).
    """

    block: tuple[int, int]
    name: ClassVar = "scaled"

    def shown(self, inputs: Sequence[str]) -> str:
        return f"{inputs[0]} * {inputs[1].rpartition('.')[2]}"

    def held(self, shapes: Sequence[Shape], rows: int) -> int:
        return 25 * rows * shapes[0][1] + 16 * prod(shapes[1])

    def grid(self, shape: Shape) -> tuple[int, int]:
        """How many blocks a matrix of that shape has, down and across."""
        return -(-shape[0] // self.block[0]), -(-shape[1] // self.block[1])


@dataclass(frozen=True, slots=True)
class Columns(Formula):
    """Columns [first, stop) of W [R, C], times `scale`: a shard of an FFN's last matrix (arXiv 2410.07524, section 2.3)."""

    first: int
    stop: int
    scale: float
    name: ClassVar = "columns"

    def shown(self, inputs: Sequence[str]) -> str:
        of = inputs[0] if " " not in inputs[0] else f"({inputs[0]})"
        return f"{of}[:, {self.first}:{self.stop}] * {self.scale:g}"

    def held(self, shapes: Sequence[Shape], rows: int) -> int:
        return 24 * rows * shapes[0][1]


@dataclass(frozen=True, slots=True)
class Pairs(Formula):
    """W [R, ...] with the rows of each head in the other order of rotary pairs (RoFormer, arXiv 2104.09864, section 3.4.2).

    Of the first `turning` rows of a head, pair p is rows 2p and 2p + 1 where neighbours turn together, rows p and turning / 2 + p where
    halves do: `to_halves` brings the first to the second, else the second to the first. The other rows of a head stay where they are. A
    product of a query and a key, both in one order, is the same in either.

    Of every `block` rows of W, those in [first, first + rows) are of heads of `head` rows each; a fused tensor has others beside them.
    """

    head: int
    turning: int
    to_halves: bool
    block: int
    first: int
    rows: int
    name: ClassVar = "pairs"

    def shown(self, inputs: Sequence[str]) -> str:
        of = inputs[0] if " " not in inputs[0] else f"({inputs[0]})"
        return f"{of}[{'pairs to halves' if self.to_halves else 'halves to pairs'}]"

    def held(self, shapes: Sequence[Shape], rows: int) -> int:
        return 24 * (rows + 2 * self.head) * prod(shapes[0][1:])

    def source(self, row: int) -> int:
        """The row of W that is row `row` of the result."""
        inside = row % self.block - self.first
        place, half = inside % self.head, self.turning // 2
        if not 0 <= inside < self.rows or place >= self.turning:
            return row
        if self.to_halves:
            return row - place + (2 * place if place < half else 2 * (place - half) + 1)
        return row - place + place // 2 + half * (place % 2)

    @property
    def moves(self) -> bool:
        return True

    def moved(self, start: int, stop: int) -> Iterator[tuple[int | None, int, int]]:
        while start < stop:
            first, count = self.source(start), 1
            while start + count < stop and self.source(start + count) == first + count:
                count += 1
            yield 0, first, count
            start += count


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
