"""The running figures of two tensors that come by in chunks: sums for norms and cosine, and what differs, by the stored bits."""

import math
from bisect import bisect_left, bisect_right

import numpy as np

from bam_merge.checkpoints.dtypes import ARITHMETIC_DTYPES, DTYPE_BITS, DTYPES
from bam_merge.values.arrays import (
    INTEGERS64,
    Array,
    in_order,
    in_pairs,
    is_float,
    steps_apart,
    stored_integers,
    widen,
    widen_pairs,
)
from bam_merge.values.wide import ZERO, Wide, inner, squares

CHUNK = 2**18
"""Elements that are computed with at a time: few enough to stay in a processor's cache, and enough to be worth the calls."""


FEW = 1024


OBLIQUE = 1e4
"""Sums of squares of A and B that are within this factor give their product as (|A|^2 + |B|^2 - |B - A|^2) / 2; beyond it, that cancels."""


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
        """The difference, in float64; that of float64 tensors over its largest magnitude, so that its powers are in range."""
        size = len(self.taken[0]) * 8 // DTYPE_BITS[self.dtypes[0]]
        long = "F64" in self.dtypes
        a, b = (
            widen(memoryview(taken), dtype, np.empty(size, Wide if long else np.float64))
            for taken, dtype in zip(self.taken, self.dtypes, strict=True)
        )
        with np.errstate(invalid="ignore", over="ignore"):
            d = b - a
            if long and 0 < (largest := np.abs(d).max(initial=0)) < math.inf:
                d = (d / largest).astype(np.float64)
            return d.reshape(-1, self.width)


class Tally:
    """Running figures of one pair of tensors. `aa`, `bb`, `dd` are |A|^2, |B|^2 and |B - A|^2, `ab` is their product."""

    def __init__(self, dtypes: tuple[str, str], shape: tuple[int, ...]) -> None:
        self.dtypes, self.plain = dtypes, dtypes[0] == dtypes[1]
        self.sample = _Sample(shape, dtypes) if len(shape) > 1 and 0 not in shape and all(map(is_float, dtypes)) else None
        self.sizes = [DTYPE_BITS[dtype] // 8 for dtype in dtypes]
        self.identical, self.floats = self.plain, is_float(dtypes[1])
        self.widen = widen_pairs if self.plain else widen
        self.aa = self.bb = self.dd = self.ab = ZERO
        self.changed = self.zeroed = self.zero_signs = self.nan_payloads = self.apart = 0
        self.max_abs = ZERO
        self.at: int | None = None
        self.first: int | None = None
        self.nan, self.inf = [0, 0], [0, 0]
        floats = [dtype for dtype in dtypes if dtype in ARITHMETIC_DTYPES]
        self.coarse = max(floats, key=lambda dtype: DTYPES[dtype].step) if len(floats) == 2 else None
        self.ulps: int | None = None if self.coarse is None else 0
        # 64-bit integers need more than float64; sums of float64, and of integers that float32 does not hold, need that; the others are
        # exact enough in float32, chunk by chunk.
        narrow = all(is_float(dtype) and dtype != "F64" for dtype in dtypes)
        held = Wide if INTEGERS64 & set(dtypes) else np.float32 if narrow else np.float64
        self.a, self.b, self.c = (np.empty(CHUNK, held) for _ in range(3))
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
        aa = squares(a_C)
        if same and np.isfinite(aa):
            self.aa, self.bb, self.ab = self.aa + aa, self.bb + aa, self.ab + aa
            return
        b_C = self.widen(b, self.dtypes[1], self.b)
        bb = squares(b_C)
        d_C = np.subtract(b_C, a_C, out=self.b[: len(a_C)])  # where B was, which few chunks need again: memory that a cache holds
        sums = aa, bb, squares(d_C)
        whole = all(map(np.isfinite, sums))
        bits_a, bits_b = stored_integers(a, self.dtypes[0]), stored_integers(b, self.dtypes[1])
        oblique = not whole or not aa <= OBLIQUE * bb <= OBLIQUE**2 * aa
        if not self.plain or self.ulps is not None or oblique:
            b_C = self.widen(b, self.dtypes[1], self.c)
        if not self.plain or not whole or self.ulps is not None:
            odd_C: Array | None = None
            if not whole:
                a_C, b_C, d_C, odd_C = self.set_apart(a_C, b_C, bits_a, bits_b)
                sums = squares(a_C), squares(b_C), squares(d_C)
            unlike_C = self.unlike_places(d_C, odd_C, self.zeros(a_C, b_C), bits_a, bits_b)
            if sums[2]:
                self.round(a_C, b_C)
        else:
            signs = self.zero_bits(bits_a, bits_b) if self.has_zeros(bits_b) else 0
            unlike_C = self.unlike_places(d_C, None, signs, bits_a, bits_b)
        self.aa, self.bb, self.dd = (total + new for total, new in zip((self.aa, self.bb, self.dd), sums, strict=True))
        self.ab += inner(a_C, b_C) if oblique else (Wide(sums[0]) + sums[1] - sums[2]) / 2
        unlike = int(np.count_nonzero(unlike_C))
        self.changed += unlike
        if unlike and self.first is None:
            self.first = start + int(unlike_C.argmax())
        if sums[2]:
            self.furthest(d_C, start)

    def unlike_places(self, d_C: Array, odd_C: Array | None, signs: int, bits_a: Array, bits_b: Array) -> Array:
        """Where the values differ: of one dtype by bits, whatever a figure can show of it, but not for zeros of unlike signs."""
        if not self.plain or odd_C is not None:
            apart_C: Array = d_C != 0
            return self.ordered(apart_C if odd_C is None else apart_C | odd_C)
        unlike_C = np.not_equal(bits_a, bits_b, out=self.unlike[: len(d_C)])
        if signs:
            unlike_C &= np.bitwise_and(bits_a | bits_b, self.magnitude(bits_b)) != 0
        return unlike_C

    def ordered(self, x_C: Array) -> Array:
        """What was widened in pairs, in the order in which it is stored."""
        return x_C.reshape(2, -1).T.reshape(-1) if self.plain and in_pairs(self.dtypes[0], len(x_C)) else x_C

    def furthest(self, d_C: Array, start: int) -> None:
        """Note the largest |d|, if it is larger than those before."""
        largest, least = Wide(d_C.max()), Wide(d_C.min())
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

    def magnitude(self, bits: Array) -> Array:
        """The bits of a stored number without its sign."""
        size = 8 * bits.itemsize
        mask: Array = np.array(2 ** (size - 1) - 1 if self.floats else 2**size - 1, bits.dtype)
        return mask

    def zero_bits(self, bits_a: Array, bits_b: Array) -> int:
        """As `zeros`, of one dtype and finite values."""
        magnitude = self.magnitude(bits_b)
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

    def set_apart(self, a_C: Array, b_C: Array, bits_a: Array, bits_b: Array) -> tuple[Array, Array, Array, Array]:
        """Count what is not finite, and put zeros in its place in both: A, B, their difference, and where such elements are not alike."""
        for index, x_C in enumerate((a_C, b_C)):
            self.nan[index] += int(np.count_nonzero(np.isnan(x_C)))
            self.inf[index] += int(np.count_nonzero(np.isinf(x_C)))
        odd_C = ~(np.isfinite(a_C) & np.isfinite(b_C))
        both_nan_C = np.isnan(a_C) & np.isnan(b_C)
        unlike_C = odd_C & ~((a_C == b_C) | both_nan_C)
        if self.plain:
            self.nan_payloads += int(np.count_nonzero(self.ordered(both_nan_C) & (bits_a != bits_b)))
        self.apart += int(np.count_nonzero(unlike_C))
        self.ulps = None if self.apart else self.ulps
        a_C, b_C = (np.where(odd_C, 0.0, x_C.astype(np.result_type(x_C, np.float64))) for x_C in (a_C, b_C))
        d_C = b_C - a_C
        if not np.isfinite(d_C).all():
            d_C = b_C.astype(Wide) - a_C.astype(Wide)
        return a_C, b_C, d_C, unlike_C
