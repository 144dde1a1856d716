"""How two tensors differ: streamed in chunks, equal bytes passed over as bytes, differences summed up in float64."""

import math
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from bam_merge.checkpoints.dtypes import DTYPE_BITS
from bam_merge.checkpoints.pieces import Read, numel, stored
from bam_merge.comparing.sides import Place, Side
from bam_merge.values.arrays import (
    COMPUTED,
    FLOAT8,
    STEPS,
    Array,
    dot,
    in_order,
    in_pairs,
    is_float,
    steps_apart,
    stored_integers,
    widen,
    widen_pairs,
)

CHUNK = 2**18
"""Elements that are computed with at a time: few enough to stay in a processor's cache, and enough to be worth the calls."""


BLOCK = 2 * CHUNK
"""Elements that a worker reads of each tensor at a time."""


FEW = 1024


IDENTICAL, EQUAL, ROUNDING, DIFFERENT, SHAPE = "identical", "equal", "rounding", "different", "shape"
"""identical: the same bytes; equal: the same values in another dtype or layout, or zeros of another sign; rounding: each element within
one unit in the last place of the coarser dtype; different; shape: of unlike shapes, and not compared."""


@dataclass(frozen=True)
class Difference:
    """Tensor `name_b` of B against `name_a` of A. Figures are over elements that are finite in both, the others are counted apart.

    `relative_l2` is |b - a| / |a| (None where a is zero and b is not), `cosine` that of a and b as vectors, `max_abs` the largest
    |b - a|, at `at`, an element in C order; `changed` counts elements whose values differ (NaN equals NaN), the first of them is `first`,
    and `zeroed` those that are zero in B only; `ulps` is the largest distance in units in the last place of the coarser dtype, where
    the verdict is rounding. `zero_signs` counts zeros whose sign differs; `nan` and `inf` are the counts in A and in B. `squares`
    are |a|^2 and |b|^2, `squared_difference` |b - a|^2. `prints` are
    unlike for unlike bytes, nearly always. `change` says what was done to the tensor, where that has a name (change.py).
    """

    place: Place
    name_a: str
    name_b: str
    verdict: str
    dtypes: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    count: int = 0
    changed: int = 0
    relative_l2: float | None = 0.0
    cosine: float | None = 1.0
    max_abs: float = 0.0
    at: int | None = None
    first: int | None = None
    zeroed: int = 0
    ulps: int | None = None
    zero_signs: int = 0
    nan: tuple[int, int] = (0, 0)
    inf: tuple[int, int] = (0, 0)
    squares: float = 0.0
    squares_b: float = 0.0
    squared_difference: float = 0.0
    prints: tuple[object, object] = (None, None)
    change: "Change | None" = None
    sample_PQ: Array | None = field(default=None, repr=False, compare=False)

    @property
    def same(self) -> bool:
        return self.verdict in (IDENTICAL, EQUAL)

    @property
    def odd(self) -> bool:
        """Whether NaN or infinity appeared, or went."""
        return self.nan[0] != self.nan[1] or self.inf[0] != self.inf[1]

    def document(self) -> dict[str, Any]:
        """As `diff --json` prints it."""
        role, layer, expert = self.place
        return {
            "name": self.name_a, "name_b": self.name_b, "role": None if role.startswith("? ") else role, "layer": layer, "expert": expert,
            "equal": self.same, "verdict": self.verdict, "dtypes": list(self.dtypes), "shapes": [list(shape) for shape in self.shapes],
            "count": self.count, "changed": self.changed, "relative_l2": self.relative_l2, "cosine": self.cosine, "max_abs": self.max_abs,
            "max_abs_at": self.at, "ulps": self.ulps, "zeroed": self.zeroed, "zero_signs": self.zero_signs,
            "nan": list(self.nan), "inf": list(self.inf), "change": self.change.document() if self.change else None,
        }  # fmt: skip


def difference(a: Side, b: Side, place: Place) -> Difference:
    """Compare what stands at `place` in both. Raises CheckpointError when a file cannot be read or has changed."""
    leaves = a.leaves[place], b.leaves[place]
    dtypes, shapes = (leaves[0].dtype, leaves[1].dtype), (leaves[0].shape, leaves[1].shape)
    names = a.name(place), b.name(place)
    if shapes[0] != shapes[1]:
        return Difference(place, *names, SHAPE, dtypes, shapes, relative_l2=None, cosine=None)
    if not set(dtypes) <= COMPUTED:
        return _bytes_only(a, b, place, names, dtypes, shapes)
    tally, count = _Tally(dtypes, shapes[0]), numel(leaves[0])
    sizes = [DTYPE_BITS[dtype] // 8 for dtype in dtypes]
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are counted
        for start in range(0, count, BLOCK):
            stop = min(count, start + BLOCK)
            blocks = scratch([(stop - start) * size for size in sizes])
            for side, block, size in zip((a, b), blocks, sizes, strict=True):
                side.read(place, start, stop, block, size)
            tally.add(blocks[0], blocks[1], start)
    return tally.result(place, names, shapes, count, all(isinstance(leaf, Read) for leaf in leaves))


_of_thread = threading.local()


def scratch(sizes: Sequence[int]) -> list[memoryview]:
    """Memory of this thread's, one piece per size in bytes; a later call gives out the same memory again."""
    kept: list[bytearray] = _of_thread.__dict__.setdefault("kept", [])
    for index, size in enumerate(sizes):
        if index == len(kept):
            kept.append(bytearray(size))
        elif len(kept[index]) < size:
            kept[index] = bytearray(size)
    return [memoryview(block)[:size] for block, size in zip(kept, sizes, strict=False)]


def digest(side: Side, place: Place) -> str:
    """XXH3-128 of the bytes of what stands there. Raises CheckpointError when they cannot be read."""
    leaf = side.leaves[place]
    found, entry = xxhash.xxh3_128(), side.checkpoint.tensors[stored(leaf).tensor]
    if leaf.dtype in COMPUTED:
        count, size = numel(leaf), DTYPE_BITS[leaf.dtype] // 8
    else:  # below a byte: no part of it stands alone
        whole = Read(stored(leaf).source, entry.name, "U8", (entry.nbytes,))
        side, count, size = Side(side.label, side.anatomy, None, {place: whole}, {}), entry.nbytes, 1
    for start in range(0, count, BLOCK):
        stop = min(count, start + BLOCK)
        (block,) = scratch([(stop - start) * size])
        side.read(place, start, stop, block, size)
        found.update(block)
    return found.hexdigest()


def _bytes_only(a: Side, b: Side, place: Place, names: tuple[str, str], dtypes: tuple[str, str], shapes: Any) -> Difference:
    """Dtypes that no arithmetic is done with (below a byte, complex): equal bytes or not."""
    digests = digest(a, place), digest(b, place)
    same = dtypes[0] == dtypes[1] and digests[0] == digests[1]
    count = numel(a.leaves[place])
    return Difference(
        place, *names, IDENTICAL if same else DIFFERENT, dtypes, shapes, count, 0 if same else count,
        relative_l2=0.0 if same else None, cosine=1.0 if same else None, prints=digests,
    )  # fmt: skip


SAMPLE = (128, 256)
"""Rows, and elements side by side in each, that a matrix's difference is sampled in: enough to tell a low rank from noise."""


class _Sample:
    """A sample [P, Q] of the difference of two matrices, taken as their blocks come by: the same elements for the same shape."""

    def __init__(self, shape: tuple[int, ...], dtypes: tuple[str, str]) -> None:
        rows, row = shape[0], int(np.prod(shape[1:]))
        generator = np.random.default_rng(0)
        self.dtypes, self.width = dtypes, min(SAMPLE[1], row)
        chosen = np.sort(generator.choice(rows, min(SAMPLE[0], rows), replace=False, shuffle=False))
        self.starts: list[int] = (chosen * row + int(generator.integers(row - self.width + 1))).tolist()
        self.taken = bytearray(), bytearray()

    def take(self, blocks: tuple[memoryview, memoryview], start: int, stop: int) -> None:
        """Take what is wholly in the block of elements [start, stop)."""
        inside = self.starts[bisect_left(self.starts, start) : bisect_right(self.starts, stop - self.width)]
        for taken, block, dtype in zip(self.taken, blocks, self.dtypes, strict=True):
            size = DTYPE_BITS[dtype] // 8
            for first in inside:
                taken += block[(first - start) * size : (first - start + self.width) * size]

    def values(self) -> Array:
        """The difference, in float64."""
        size = len(self.taken[0]) * 8 // DTYPE_BITS[self.dtypes[0]]
        a, b = (widen(memoryview(taken), dtype, np.empty(size)) for taken, dtype in zip(self.taken, self.dtypes, strict=True))
        with np.errstate(invalid="ignore", over="ignore"):
            return (b - a).reshape(-1, self.width)


class _Tally:
    """Running figures of one pair of tensors."""

    def __init__(self, dtypes: tuple[str, str], shape: tuple[int, ...]) -> None:
        self.dtypes, self.plain = dtypes, dtypes[0] == dtypes[1]
        self.sample = _Sample(shape, dtypes) if len(shape) > 1 and 0 not in shape and all(map(is_float, dtypes)) else None
        self.sizes = [DTYPE_BITS[dtype] // 8 for dtype in dtypes]
        self.identical, self.floats = self.plain, is_float(dtypes[1])
        self.widen = widen_pairs if self.plain else widen
        self.aa = self.bb = self.dd = 0.0
        self.changed = self.zeroed = self.zero_signs = 0
        self.max_abs = 0.0
        self.at: int | None = None
        self.first: int | None = None
        self.nan, self.inf = [0, 0], [0, 0]
        floats = [dtype for dtype in dtypes if is_float(dtype) and dtype not in FLOAT8]
        self.coarse = max(floats, key=lambda dtype: STEPS[dtype][0]) if len(floats) == 2 else None
        self.ulps: int | None = None if self.coarse is None else 0
        # Sums of float64, or of integers that float32 does not hold, need float64; the others are exact enough in float32, chunk by chunk.
        narrow = all(is_float(dtype) and dtype != "F64" for dtype in dtypes)
        self.a, self.b, self.c = (np.empty(CHUNK, np.float32 if narrow else np.float64) for _ in range(3))
        self.unlike = np.empty(CHUNK, bool)

    def add(self, a: memoryview, b: memoryview, start: int) -> None:
        """Take in the same elements of both, which begin at element `start`."""
        same = self.plain and a[:FEW] == b[:FEW] and self.equal(a, b)
        self.identical &= same
        if self.sample is not None:
            self.sample.take((a, b), start, start + len(a) // self.sizes[0])
        views, sizes = (a, b), self.sizes
        for first in range(0, len(a) // sizes[0], CHUNK):
            one, other = (view[first * size : (first + CHUNK) * size] for view, size in zip(views, sizes, strict=True))
            self.chunk(one, other, start + first, same)

    def equal(self, a: memoryview, b: memoryview) -> bool:
        one, other = (stored_integers(data, dtype) for data, dtype in zip((a, b), self.dtypes, strict=True))
        return bool(np.array_equal(one, other))

    def chunk(self, a: memoryview, b: memoryview, start: int, same: bool) -> None:
        a_C = self.widen(a, self.dtypes[0], self.a)
        squares = _dot(a_C)
        if same and math.isfinite(squares):
            self.aa, self.bb = self.aa + squares, self.bb + squares
            return
        b_C = self.widen(b, self.dtypes[1], self.b)
        squares_b = _dot(b_C)
        d_C = np.subtract(b_C, a_C, out=self.b[: len(a_C)])  # where B was, which few chunks need again: memory that a cache holds
        sums = squares, squares_b, _dot(d_C)
        whole = all(map(math.isfinite, sums))
        bits_a, bits_b = stored_integers(a, self.dtypes[0]), stored_integers(b, self.dtypes[1])
        if not self.plain or not whole or self.ulps is not None:
            b_C = self.widen(b, self.dtypes[1], self.c)
            odd_C: Array | None = None
            if not whole:
                a_C, b_C, d_C, odd_C = self.set_apart(a_C, b_C)
                sums = _dot(a_C), _dot(b_C), _dot(d_C)
            unlike_C = self.unlike_places(d_C, odd_C, self.zeros(a_C, b_C), bits_a, bits_b)
            if sums[2]:
                self.round(a_C, b_C)
        else:
            signs = self.zero_bits(bits_a, bits_b) if self.has_zeros(bits_b) else 0
            unlike_C = self.unlike_places(d_C, None, signs, bits_a, bits_b)
        self.aa, self.bb, self.dd = (total + new for total, new in zip((self.aa, self.bb, self.dd), sums, strict=True))
        unlike = int(np.count_nonzero(unlike_C))
        self.changed += unlike
        if unlike and self.first is None:
            self.first = start + int(unlike_C.argmax())
        if sums[2]:
            self.furthest(d_C, start)

    def unlike_places(self, d_C: Array, odd_C: Array | None, signs: int, bits_a: Array, bits_b: Array) -> Array:
        """Where the values differ: by bits, right for integers that no float tells apart, but not for zeros of unlike signs."""
        if self.plain and odd_C is None and not signs:
            return np.not_equal(bits_a, bits_b, out=self.unlike[: len(d_C)])
        return self.ordered(d_C != 0 if odd_C is None else (d_C != 0) | odd_C)

    def ordered(self, x_C: Array) -> Array:
        """What was widened in pairs, in the order in which it is stored."""
        return x_C.reshape(2, -1).T.reshape(-1) if self.plain and in_pairs(self.dtypes[0], len(x_C)) else x_C

    def furthest(self, d_C: Array, start: int) -> None:
        """Note the largest |d|, if it is larger than those before."""
        largest, least = float(d_C.max()), float(d_C.min())
        if max(largest, -least) > self.max_abs:
            self.max_abs = max(largest, -least)
            at = int(d_C.argmax() if largest >= -least else d_C.argmin())
            self.at = start + (in_order(at, self.dtypes[0], len(d_C)) if self.plain else at)

    def round(self, a_C: Array, b_C: Array) -> None:
        """Note how many units in the last place are between them, as long as it is one at most."""
        if self.ulps is not None:
            assert self.coarse is not None
            few = steps_apart(a_C[:FEW], b_C[:FEW], self.coarse)  # nearly always enough to see that it is no rounding
            found = few if few > 1 else steps_apart(a_C, b_C, self.coarse)
            self.ulps = None if found > 1 else max(self.ulps, found)

    def has_zeros(self, bits: Array) -> bool:
        """Whether there may be a zero: as unsigned integers 0 is the least, as signed ones -0.0 is."""
        if self.dtypes[1] == "F8_E8M0":
            return False
        if not bits.min():
            return True
        return self.floats and int(bits.view(f"<i{bits.itemsize}").min()) == -1 << (8 * bits.itemsize - 1)

    def zero_bits(self, bits_a: Array, bits_b: Array) -> int:
        """As `zeros`, of one dtype and finite values."""
        size = 8 * bits_b.itemsize
        magnitude = bits_b.dtype.type(2 ** (size - 1) - 1 if self.floats else 2**size - 1)
        at_Z = np.flatnonzero(np.bitwise_and(bits_b, magnitude) == 0)
        a_Z, b_Z = bits_a[at_Z], bits_b[at_Z]
        was_Z = np.bitwise_and(a_Z, magnitude) == 0
        signs = int(np.count_nonzero(was_Z & (a_Z != b_Z)))
        self.zeroed += int(np.count_nonzero(~was_Z))
        self.zero_signs += signs
        return signs

    def zeros(self, a_C: Array, b_C: Array) -> int:
        """Count the zeros that are in B only, and those in both that have another sign; returns the latter."""
        zero_C = b_C == 0
        self.zeroed += int(np.count_nonzero(zero_C & (a_C != 0)))
        signs = int(np.count_nonzero(zero_C & (a_C == 0) & (np.signbit(a_C) != np.signbit(b_C))))
        self.zero_signs += signs
        return signs

    def set_apart(self, a_C: Array, b_C: Array) -> tuple[Array, Array, Array, Array]:
        """Count what is not finite, and put zeros in its place in both: A, B, their difference, and where such elements are not alike."""
        for index, x_C in enumerate((a_C, b_C)):
            self.nan[index] += int(np.count_nonzero(np.isnan(x_C)))
            self.inf[index] += int(np.count_nonzero(np.isinf(x_C)))
        odd_C = ~(np.isfinite(a_C) & np.isfinite(b_C))
        alike_C = (a_C == b_C) | (np.isnan(a_C) & np.isnan(b_C))
        unlike_C = odd_C & ~alike_C
        self.ulps = None if unlike_C.any() else self.ulps
        a_C, b_C = (np.where(odd_C, 0.0, x_C.astype(np.float64)) for x_C in (a_C, b_C))
        return a_C, b_C, b_C - a_C, unlike_C

    def result(self, place: Place, names: tuple[str, str], shapes: Any, count: int, whole: bool) -> Difference:
        if self.changed:
            verdict = ROUNDING if self.ulps is not None else DIFFERENT
        else:
            verdict = IDENTICAL if self.identical and whole else EQUAL
        norms = math.sqrt(self.aa * self.bb)
        relative = math.sqrt(self.dd / self.aa) if self.aa else (0.0 if not self.dd else None)
        cosine = (self.aa + self.bb - self.dd) / 2 / norms if norms else (1.0 if not self.dd else None)
        return Difference(
            place, *names, verdict, self.dtypes, shapes, count, self.changed,
            relative_l2=relative, cosine=None if cosine is None else max(-1.0, min(1.0, cosine)), max_abs=self.max_abs, at=self.at,
            first=self.first, zeroed=self.zeroed, ulps=self.ulps if verdict == ROUNDING else None, zero_signs=self.zero_signs,
            nan=(self.nan[0], self.nan[1]), inf=(self.inf[0], self.inf[1]),
            squares=self.aa, squares_b=self.bb, squared_difference=self.dd, prints=(self.aa, self.bb),
            sample_PQ=self.sample.values() if self.sample and self.changed else None,
        )  # fmt: skip


def _dot(x_C: Array) -> float:
    """The sum of squares; in float64 where float32 would overflow or lose it."""
    found = dot(x_C, x_C)
    if 1e-30 < found < math.inf or x_C.dtype == np.float64:
        return found
    wide_C = x_C.astype(np.float64)
    return float(np.dot(wide_C, wide_C))


@dataclass(frozen=True)
class Change:
    """`kind`: bit, element, zeroed, rows, columns, scaled, permuted, low rank, noise, unrelated. `text` says it of B."""

    kind: str
    text: str

    def document(self) -> dict[str, str]:
        return {"kind": self.kind, "text": self.text}


def drift(members: Iterable[Difference]) -> float | None:
    """|b - a| / |a| of several tensors as one vector; None where a is zero."""
    pairs = [(d.squares, d.squared_difference) for d in members]
    squares, differences = (math.fsum(column) for column in zip(*pairs, strict=True)) if pairs else (0.0, 0.0)
    return math.sqrt(differences / squares) if squares else (None if differences else 0.0)
