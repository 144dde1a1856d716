"""Of every tensor, with D_i = E_i - S: the Gram matrix of the D_i, which norms, cosines and the norm of their mean all follow from.

Sums are taken in float64 over chunks that float32 holds exactly, and any set of tensors is the sum of its members.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from bam_merge.checkpoints.dtypes import DTYPE_BITS
from bam_merge.checkpoints.pieces import numel
from bam_merge.comparing.sides import Place, Side
from bam_merge.comparing.tensor_difference import BLOCK, CHUNK, scratch
from bam_merge.errors import CheckpointError
from bam_merge.text import printable
from bam_merge.values.arrays import Array, dot, is_float, stored_integers, widen, widen_pairs


@dataclass(frozen=True)
class Gram:
    """Sums over the elements of one or more tensors. `dd` [N][N] of the experts' differences from the seed, `ss` of the seed, `se` [N]
    of the seed with each expert. `equal` [N][N] counts elements that two experts have in common, `equal_seed` [N] with the seed. `chance`:
    how many pairs of weights of the seed itself, far from each other, were looked at, and how many of them are equal."""

    count: int
    ss: float
    se: tuple[float, ...]
    dd: tuple[tuple[float, ...], ...]
    equal: tuple[tuple[int, ...], ...]
    equal_seed: tuple[int, ...]
    chance: tuple[int, int] = (0, 0)

    def drift(self, i: int) -> float | None:
        """|E_i - S| / |S|."""
        return math.sqrt(self.dd[i][i] / self.ss) if self.ss else None

    def cosine(self, i: int, j: int) -> float | None:
        """Of the task vectors of two experts; None where one of them is zero."""
        norms = math.sqrt(self.dd[i][i] * self.dd[j][j])
        return max(-1.0, min(1.0, self.dd[i][j] / norms)) if norms else None

    def seed_cosine(self, i: int) -> float | None:
        """Of expert and seed as vectors."""
        norm = math.sqrt(self.ss * max(0.0, self.dd[i][i] + 2 * self.se[i] - self.ss))
        return max(-1.0, min(1.0, self.se[i] / norm)) if norm else None

    @property
    def noise(self) -> float:
        """The standard deviation of the cosine of two random directions."""
        return 1 / math.sqrt(max(1, self.count))

    @property
    def chance_equal(self) -> float | None:
        """The share of weights that two unrelated models of this distribution would have in common."""
        return self.chance[1] / self.chance[0] if self.chance[0] else None

    def kept_by_averaging(self) -> float | None:
        """|mean of the D_i| / mean of the |D_i|: 1 where all drifted alike, 0 where their drifts cancel."""
        n = len(self.dd)
        norms = sum(math.sqrt(self.dd[i][i]) for i in range(n)) / n
        return math.sqrt(max(0.0, math.fsum(map(math.fsum, self.dd)))) / n / norms if norms else None

    def kept_if_orthogonal(self) -> float | None:
        """The same for drifts of these norms in random directions; 1 / sqrt(N) where the norms are equal."""
        squares = [self.dd[i][i] for i in range(len(self.dd))]
        norms = sum(map(math.sqrt, squares))
        return math.sqrt(math.fsum(squares)) / norms if norms else None


def total(grams: Sequence[Gram]) -> Gram:
    """The Gram matrix of several tensors as one vector."""

    def add(rows: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
        return tuple(math.fsum(column) if isinstance(column[0], float) else sum(column) for column in zip(*rows, strict=True))

    n = range(len(grams[0].dd))
    return Gram(
        sum(g.count for g in grams), math.fsum(g.ss for g in grams), add([g.se for g in grams]),
        tuple(add([g.dd[i] for g in grams]) for i in n), tuple(add([g.equal[i] for g in grams]) for i in n),
        add([g.equal_seed for g in grams]), (sum(g.chance[0] for g in grams), sum(g.chance[1] for g in grams)),
    )  # fmt: skip


def gram(sides: Sequence[Side], place: Place) -> Gram:
    """The sums of one tensor over the seed, which stands first, and the experts. Raises CheckpointError for NaN or infinity."""
    n, elements = len(sides) - 1, numel(sides[0].leaves[place])
    dtypes = [side.leaves[place].dtype for side in sides]
    sizes = [DTYPE_BITS[dtype] // 8 for dtype in dtypes]
    plain = len(set(dtypes)) == 1
    narrow = all(is_float(dtype) and dtype != "F64" for dtype in dtypes)
    models_MC = np.empty((n + 1, min(CHUNK, elements)), np.float32 if narrow else np.float64)
    alike_C = np.empty(min(CHUNK, elements), bool)
    sums, equal, chance = np.zeros((n + 1, n + 1)), np.zeros((n + 1, n + 1), np.int64), (0, 0)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, elements, BLOCK):
            stop = min(elements, start + BLOCK)
            blocks = scratch([(stop - start) * size for size in sizes])
            for side, block, size in zip(sides, blocks, sizes, strict=True):
                side.read(place, start, stop, block, size)
            for first in range(0, stop - start, CHUNK):
                last = min(stop - start, first + CHUNK)
                parts = [block[first * size : last * size] for block, size in zip(blocks, sizes, strict=True)]
                rows = [
                    (widen_pairs if plain else widen)(part, dtype, row_C)
                    for part, dtype, row_C in zip(parts, dtypes, models_MC, strict=True)
                ]
                stored = [stored_integers(part, dtypes[0]) for part in parts] if plain else rows
                if start + first == 0:
                    half = len(stored[0]) // 2
                    chance = half, int(np.count_nonzero(stored[0][:half] == stored[0][::-1][:half]))
                for i, j in combinations(range(n + 1), 2):
                    equal[i, j] += int(np.count_nonzero(np.equal(stored[i], stored[j], out=alike_C[: last - first])))
                sums += _products(sides, place, rows, models_MC)
    equal += equal.T + elements * np.eye(n + 1, dtype=np.int64)
    # The seed stands first in the products: <S, S>, <S, D_i> and <D_i, D_j>.
    return Gram(
        elements, float(sums[0, 0]), tuple(float(sums[0, 0] + sums[0, 1 + i]) for i in range(n)),
        tuple(tuple(map(float, row[1:])) for row in sums[1:]), tuple(tuple(map(int, row[1:])) for row in equal[1:]),
        tuple(map(int, equal[0, 1:])), chance,
    )  # fmt: skip


def _products(sides: Sequence[Side], place: Place, rows: list[Array], models_MC: Array) -> Array:
    """Inner products [M, M] of the seed and the differences from it, in float64. The differences are put into `models_MC`."""
    differences = [np.subtract(row_C, rows[0], out=out_C[: len(row_C)]) for row_C, out_C in zip(rows[1:], models_MC[1:], strict=True)]
    found = _dots([rows[0], *differences])
    if not np.isfinite(found).all():
        for side, row_C in zip(sides, [rows[0], *differences], strict=True):
            if not np.isfinite(row_C).all():
                raise CheckpointError(
                    f"{printable(side.label)}: {printable(side.name(place))} holds NaN or infinity. bam-merge inspect --stats counts them."
                )
        found = _dots([row_C.astype(np.float64) for row_C in (rows[0], *differences)])
    return found


def _dots(rows: list[Array]) -> Array:
    dots = [[dot(one, other) if j >= i else 0.0 for j, other in enumerate(rows)] for i, one in enumerate(rows)]
    upper: Array = np.array(dots)
    return upper + np.triu(upper, 1).T
