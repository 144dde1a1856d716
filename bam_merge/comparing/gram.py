"""Of every tensor, with D_i = E_i - S: the Gram matrix of the D_i, which norms, cosines and the norm of their mean all follow from.

Sums are taken in float64 over chunks that float32 holds exactly, or in long double where float64 is not enough (wide.py), and any set of
tensors is the sum of its members.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from bam_merge.checkpoints.dtypes import DTYPE_BITS
from bam_merge.checkpoints.pieces import numel
from bam_merge.comparing.sides import Place, Side
from bam_merge.comparing.tally import CHUNK
from bam_merge.comparing.tensor_difference import BLOCK
from bam_merge.errors import CheckpointError
from bam_merge.text import printable
from bam_merge.values.arrays import INTEGERS64, Array, dot, is_float, stored_integers, widen, widen_pairs
from bam_merge.values.threads import scratch
from bam_merge.values.wide import ZERO, Wide, cosine, ratio, sound


@dataclass(frozen=True)
class Gram:
    """Sums over the elements of one or more tensors. `dd` [N][N] of the experts' differences from the seed, `ss` of the seed, `se` [N]
    of the seed with each expert. `equal` [N][N] counts elements that two experts have in common, `equal_seed` [N] with the seed. `chance`:
    how many pairs of weights of the seed itself, far from each other, were looked at, and how many of them are equal."""

    count: int
    ss: Wide
    se: tuple[Wide, ...]
    dd: tuple[tuple[Wide, ...], ...]
    equal: tuple[tuple[int, ...], ...]
    equal_seed: tuple[int, ...]
    chance: tuple[int, int] = (0, 0)

    def drift(self, i: int) -> float | None:
        """|E_i - S| / |S|; None where the seed is zero, infinity where float64 does not hold it."""
        return ratio(self.dd[i][i], self.ss) if self.ss else None

    def moved(self, i: int) -> bool:
        """Whether any value left the seed's. Zeros of another sign are other bits, but not that."""
        return bool(self.dd[i][i] > 0)

    def stretch(self, i: int) -> tuple[float, float] | None:
        """The multiple of the seed that is nearest to the expert, and its share of the squared drift; None where the seed is zero."""
        if not self.ss:
            return None
        along = self.se[i] / self.ss - 1
        return float(1 + along), float(along * along * self.ss / self.dd[i][i]) if self.dd[i][i] else 0.0

    def remaining(self, i: int) -> float | None:
        """|E_i| / |S|; what is below 1e-3 is not told from zero."""
        return ratio(max(ZERO, self.dd[i][i] + 2 * self.se[i] - self.ss), self.ss) if self.ss else None

    def cosine(self, i: int, j: int) -> float | None:
        """Of the task vectors of two experts; None where one of them is zero."""
        return cosine(self.dd[i][j], self.dd[i][i], self.dd[j][j])

    def seed_cosine(self, i: int) -> float | None:
        """Of expert and seed as vectors."""
        return cosine(self.se[i], self.ss, max(ZERO, self.dd[i][i] + 2 * self.se[i] - self.ss))

    @property
    def noise(self) -> float:
        """The standard deviation of the cosine of two random directions."""
        return float(max(1, self.count) ** -0.5)

    @property
    def chance_equal(self) -> float | None:
        """The share of weights that two unrelated models of this distribution would have in common."""
        return self.chance[1] / self.chance[0] if self.chance[0] else None

    def kept_by_averaging(self) -> float | None:
        """|mean of the D_i| / mean of the |D_i|: 1 where all drifted alike, 0 where their drifts cancel."""
        norms = self._norms()
        return min(1.0, float(np.sqrt(max(ZERO, sum(map(sum, self.dd), ZERO))) / norms)) if norms else None

    def kept_if_orthogonal(self) -> float | None:
        """The same for drifts of these norms in random directions; 1 / sqrt(N) where the norms are equal."""
        norms = self._norms()
        return float(np.sqrt(sum((self.dd[i][i] for i in range(len(self.dd))), ZERO)) / norms) if norms else None

    def _norms(self) -> Any:
        return sum((np.sqrt(self.dd[i][i]) for i in range(len(self.dd))), ZERO)


def total(grams: Sequence[Gram]) -> Gram:
    """The Gram matrix of several tensors as one vector."""

    def add(rows: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
        return tuple(sum(column) for column in zip(*rows, strict=True))

    n = range(len(grams[0].dd))
    return Gram(
        sum(g.count for g in grams), sum((g.ss for g in grams), ZERO), add([g.se for g in grams]),
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
    held = Wide if INTEGERS64 & set(dtypes) else np.float32 if narrow else np.float64
    models_MC = np.empty((n + 1, min(CHUNK, elements)), held)
    alike_C = np.empty(min(CHUNK, elements), bool)
    sums, equal, chance = np.zeros((n + 1, n + 1), Wide), np.zeros((n + 1, n + 1), np.int64), (0, 0)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, elements, BLOCK):
            stop = min(elements, start + BLOCK)
            blocks = scratch([(stop - start) * size for size in sizes])
            for side, block in zip(sides, blocks, strict=True):
                side.read(place, start, stop, block)
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
                found = _products(rows, models_MC)
                sums += _wide_products(sides, place, parts, dtypes, held) if found is None else found
    equal += equal.T + elements * np.eye(n + 1, dtype=np.int64)
    # The seed stands first in the products: <S, S>, <S, D_i> and <D_i, D_j>.
    return Gram(
        elements, sums[0, 0], tuple(sums[0, 0] + sums[0, 1 + i] for i in range(n)), tuple(tuple(row[1:]) for row in sums[1:]),
        tuple(tuple(map(int, row[1:])) for row in equal[1:]),
        tuple(map(int, equal[0, 1:])), chance,
    )  # fmt: skip


def _products(rows: list[Array], models_MC: Array) -> Array | None:
    """Inner products [M, M] of the seed and the differences from it, which are put into `models_MC` in place of the models; None where a
    sum is beyond what this dtype's sums hold, or no number."""
    differences = [np.subtract(row_C, rows[0], out=out_C[: len(row_C)]) for row_C, out_C in zip(rows[1:], models_MC[1:], strict=True)]
    vectors = [rows[0], *differences]
    found = _dots(vectors)
    right = all(sound(found[i, i], row_C.dtype) or (not found[i, i] and not row_C.any()) for i, row_C in enumerate(vectors))
    return found if right else None


def _wide_products(sides: Sequence[Side], place: Place, parts: Sequence[memoryview], dtypes: Sequence[str], held: Any) -> Array:
    """The same from the stored values, in float64 for what float32 holds and in long double for float64. Raises CheckpointError for NaN or
    infinity."""
    wider = np.float64 if held == np.float32 else Wide
    size = len(parts[0]) * 8 // DTYPE_BITS[dtypes[0]]
    rows = [widen(part, dtype, np.empty(size, wider)) for part, dtype in zip(parts, dtypes, strict=True)]
    for side, row_C in zip(sides, rows, strict=True):
        if not np.isfinite(row_C).all():
            raise CheckpointError(
                f"{printable(side.label)}: {printable(side.name(place))} holds NaN or infinity. bam-merge inspect --stats counts them."
            )
    return _dots([rows[0], *(row_C - rows[0] for row_C in rows[1:])])


def _dots(rows: list[Array]) -> Array:
    dots = [[dot(one, other) if j >= i else 0.0 for j, other in enumerate(rows)] for i, one in enumerate(rows)]
    upper: Array = np.array(dots)
    return upper + np.triu(upper, 1).T
