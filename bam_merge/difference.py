"""How two tensors differ: streamed in chunks, equal bytes passed over as bytes, differences summed up in float64."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from bam_merge import ops
from bam_merge.matching import Place, Side
from bam_merge.roles import stored
from bam_merge.safetensors_header import DTYPE_BITS
from bam_merge.tensor_stats import COMPUTED
from bam_merge.tensors import buffer

CHUNK = 2**18
"""Elements that a worker holds of each tensor at a time: few enough to stay in a processor's cache."""

IDENTICAL, EQUAL, ROUNDING, DIFFERENT, SHAPE = "identical", "equal", "rounding", "different", "shape"
"""identical: the same bytes; equal: the same values in another dtype or layout, or zeros of another sign; rounding: each element within
one unit in the last place of the coarser dtype; different; shape: of unlike shapes, and not compared."""


@dataclass(frozen=True)
class Difference:
    """Tensor `name_b` of B against `name_a` of A. Figures are over elements that are finite in both, the others are counted apart.

    `relative_l2` is |b - a| / |a| (None where a is zero and b is not), `cosine` that of a and b as vectors, `max_abs` the largest
    |b - a|, at element `at` in C order; `changed` counts elements whose values differ (NaN equals NaN), `ulps` is the largest
    distance in units in the last place of the coarser dtype, where the verdict is rounding. `zero_signs` counts zeros whose sign
    differs; `nan` and `inf` are the counts in A and in B. `squares` is |a|^2 and `squared_difference` |b - a|^2.
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
    ulps: int | None = None
    zero_signs: int = 0
    nan: tuple[int, int] = (0, 0)
    inf: tuple[int, int] = (0, 0)
    squares: float = 0.0
    squared_difference: float = 0.0
    digests: tuple[str, str] = ("", "")

    @property
    def same(self) -> bool:
        return self.verdict in (IDENTICAL, EQUAL)

    def document(self) -> dict[str, Any]:
        """As `diff --json` prints it."""
        role, layer, expert = self.place
        return {
            "name": self.name_a, "name_b": self.name_b, "role": None if role.startswith("? ") else role, "layer": layer, "expert": expert,
            "equal": self.same, "verdict": self.verdict, "dtypes": list(self.dtypes), "shapes": [list(shape) for shape in self.shapes],
            "count": self.count, "changed": self.changed, "relative_l2": self.relative_l2, "cosine": self.cosine, "max_abs": self.max_abs,
            "max_abs_at": self.at, "ulps": self.ulps, "zero_signs": self.zero_signs, "nan": list(self.nan), "inf": list(self.inf),
        }  # fmt: skip


def difference(a: Side, b: Side, place: Place) -> Difference:
    """Compare what stands at `place` in both. Raises CheckpointError when a file cannot be read or has changed."""
    leaves = a.leaves[place], b.leaves[place]
    dtypes, shapes = (leaves[0].dtype, leaves[1].dtype), (leaves[0].shape, leaves[1].shape)
    names = a.name(place), b.name(place)
    if shapes[0] != shapes[1]:
        return Difference(place, *names, SHAPE, dtypes, shapes, relative_l2=None, cosine=None)
    whole = all(isinstance(leaf, ops.Read) for leaf in leaves)
    plain = dtypes[0] == dtypes[1] and DTYPE_BITS[dtypes[0]] >= 8
    if not set(dtypes) <= COMPUTED.keys():
        return _bytes_only(a, b, place, names, dtypes, shapes)
    tally = _Tally(dtypes, plain)
    count = ops.numel(leaves[0])
    for start in range(0, count, CHUNK):
        stop = min(count, start + CHUNK)
        chunks = []
        for side, dtype in ((a, dtypes[0]), (b, dtypes[1])):
            itemsize = DTYPE_BITS[dtype] // 8
            bytes_B, view = buffer((stop - start) * itemsize)
            side.read(place, start, stop, view, itemsize)
            chunks.append((bytes_B, view))
        tally.add(chunks[0], chunks[1], start)
    return tally.result(place, names, shapes, count, whole)


def _bytes_only(a: Side, b: Side, place: Place, names: tuple[str, str], dtypes: tuple[str, str], shapes: Any) -> Difference:
    """Dtypes that no arithmetic is done with (below a byte, complex): equal bytes or not."""
    digests = []
    for side in (a, b):
        leaf = side.leaves[place]
        entry, digest = side.checkpoint.tensors[stored(leaf).tensor], xxhash.xxh3_128()
        whole = ops.Read(stored(leaf).source, entry.name, "U8", (entry.nbytes,))
        reader = Side(side.label, side.anatomy, None, {place: whole}, {})
        for start in range(0, entry.nbytes, CHUNK):
            _, view = buffer(min(CHUNK, entry.nbytes - start))
            reader.read(place, start, start + len(view), view, 1)
            digest.update(view)
        digests.append(digest.hexdigest())
    same = dtypes[0] == dtypes[1] and digests[0] == digests[1]
    verdict, unknown = (IDENTICAL, 1.0) if same else (DIFFERENT, None)
    count = ops.numel(a.leaves[place])
    return Difference(
        place, *names, verdict, dtypes, shapes, count, 0 if same else count,
        relative_l2=0.0 if same else None, cosine=unknown, digests=(digests[0], digests[1]),
    )  # fmt: skip


class _Tally:
    """Running figures of one pair of tensors."""

    def __init__(self, dtypes: tuple[str, str], plain: bool) -> None:
        self.dtypes, self.plain = dtypes, plain
        self.types = COMPUTED[dtypes[0]], COMPUTED[dtypes[1]]
        self.digest_a = xxhash.xxh3_128()
        self.digest_b: Any = None
        self.aa = self.bb = self.dd = 0.0
        self.changed = self.zero_signs = 0
        self.max_abs = 0.0
        self.at: int | None = None
        self.nan, self.inf = [0, 0], [0, 0]
        self.ulps: int | None = 0
        self.coarse = _coarser(self.types)
        # Sums of float64, or of integers that float32 does not hold, need float64; the others are exact enough in float32, chunk by chunk.
        narrow = all(kind.is_floating_point and kind.itemsize <= 4 for kind in self.types)
        self.wide = torch.float32 if narrow else torch.float64

    def add(self, a: tuple[Tensor, memoryview], b: tuple[Tensor, memoryview], start: int) -> None:
        """Take in the same elements of both, which begin at element `start`."""
        before = None if self.digest_b is not None else self.digest_a.copy()
        self.digest_a.update(a[1])
        same = self.plain and _same_bytes(a[0], b[0])
        if self.digest_b is not None:
            self.digest_b.update(b[1])
        elif not same:
            self.digest_b = before
            assert self.digest_b is not None
            self.digest_b.update(b[1])
        a_C, b_C = (_widen(bytes_B, kind, self.wide) for (bytes_B, _), kind in zip((a, b), self.types, strict=True))
        squares = _dot(a_C)
        if same and math.isfinite(squares):
            self.aa, self.bb = self.aa + squares, self.bb + squares
            return
        exact = self.plain and not self.types[0].is_floating_point  # integers beyond 2^53 may differ by less than float64 shows
        unlike = torch.count_nonzero(_integers(a[0], self.types[0]) != _integers(b[0], self.types[0])) if exact else None
        self.compare(a_C, b_C, start, None if unlike is None else int(unlike))

    def compare(self, a_C: Tensor, b_C: Tensor, start: int, unlike: int | None) -> None:
        d_C = b_C - a_C
        squares = _dot(a_C), _dot(b_C), _dot(d_C)
        if not all(map(math.isfinite, squares)):
            a_C, b_C, d_C = self.set_apart(a_C, b_C)
            squares = _dot(a_C), _dot(b_C), _dot(d_C)
        self.aa, self.bb, self.dd = (total + new for total, new in zip((self.aa, self.bb, self.dd), squares, strict=True))
        moved = int(torch.count_nonzero(d_C))
        self.changed += moved if unlike is None else unlike
        if moved:
            largest_C = d_C.abs_()
            at = int(largest_C.argmax())
            if float(largest_C[at]) > self.max_abs:
                self.max_abs, self.at = float(largest_C[at]), start + at
            if self.ulps is not None:
                found = _ulps(a_C, b_C, self.coarse)
                self.ulps = None if found is None or found > 1 else max(self.ulps, found)
        if moved < len(a_C):
            zero_C = (a_C == 0) & (b_C == 0)
            self.zero_signs += int((zero_C & (a_C.signbit() != b_C.signbit())).sum()) if bool(zero_C.any()) else 0

    def set_apart(self, a_C: Tensor, b_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Count what is not finite, and put zeros in its place in both; what is so in one only, or differs, counts as changed."""
        for index, x_C in enumerate((a_C, b_C)):
            self.nan[index] += int(x_C.isnan().sum())
            self.inf[index] += int(x_C.isinf().sum())
        odd_C = ~(a_C.isfinite() & b_C.isfinite())
        alike_C = (a_C == b_C) | (a_C.isnan() & b_C.isnan())
        unlike = int((odd_C & ~alike_C).sum())
        self.changed += unlike
        self.ulps = None if unlike else self.ulps
        a_C, b_C = (x_C.masked_fill(odd_C, 0).double() for x_C in (a_C, b_C))
        return a_C, b_C, b_C - a_C

    def result(self, place: Place, names: tuple[str, str], shapes: Any, count: int, whole: bool) -> Difference:
        one_digest = self.digest_a.hexdigest()
        digests = one_digest, (one_digest if self.digest_b is None else self.digest_b.hexdigest())
        if self.changed:
            verdict = ROUNDING if self.ulps is not None else DIFFERENT
        else:
            verdict = IDENTICAL if self.digest_b is None and self.plain and whole else EQUAL
        norms = math.sqrt(self.aa * self.bb)
        relative = math.sqrt(self.dd / self.aa) if self.aa else (0.0 if not self.dd else None)
        cosine = (self.aa + self.bb - self.dd) / 2 / norms if norms else (1.0 if not self.dd else None)
        return Difference(
            place, *names, verdict, self.dtypes, shapes, count, self.changed,
            relative_l2=relative, cosine=None if cosine is None else max(-1.0, min(1.0, cosine)), max_abs=self.max_abs, at=self.at,
            ulps=self.ulps if verdict == ROUNDING else None, zero_signs=self.zero_signs,
            nan=(self.nan[0], self.nan[1]), inf=(self.inf[0], self.inf[1]),
            squares=self.aa, squared_difference=self.dd, digests=digests,
        )  # fmt: skip


def _same_bytes(a_B: Tensor, b_B: Tensor) -> bool:
    size = len(a_B) // 8 * 8
    return torch.equal(a_B[:size].view(torch.int64), b_B[:size].view(torch.int64)) and torch.equal(a_B[size:], b_B[size:])


def _widen(bytes_B: Tensor, kind: torch.dtype, wide: torch.dtype) -> Tensor:
    values_C = bytes_B.view(kind)
    if kind.itemsize == 1 and kind.is_floating_point:
        values_C = values_C.to(torch.float32)
    return values_C.to(wide)


def _integers(bytes_B: Tensor, kind: torch.dtype) -> Tensor:
    """The stored bits as integers."""
    return bytes_B.view(_INTEGERS[kind.itemsize])


def _dot(x_C: Tensor) -> float:
    """The sum of squares; in float64 where float32 would overflow or lose it."""
    found = float(torch.dot(x_C, x_C))
    return found if 1e-30 < found < math.inf else float(x_C.double().square().sum())


def _coarser(types: tuple[torch.dtype, torch.dtype]) -> torch.dtype | None:
    """The floating dtype with the longer steps; None for integers."""
    floats = [kind for kind in types if kind.is_floating_point and kind.itemsize > 1]
    return max(floats, key=lambda kind: torch.finfo(kind).eps) if len(floats) == 2 else None


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _ulps(a_C: Tensor, b_C: Tensor, kind: torch.dtype | None) -> int | None:
    """The largest distance of the elements in steps of `kind`, when both are rounded to it; None where it has no steps."""
    if kind is None:
        return None
    places = []
    for x_C in (a_C, b_C):
        bits_C = x_C.to(kind).view(_INTEGERS[kind.itemsize]).long()
        lowest = torch.iinfo(_INTEGERS[kind.itemsize]).min
        places.append(torch.where(bits_C < 0, lowest - bits_C, bits_C))  # in the order of the values, both zeros at 0
    return int((places[0] - places[1]).abs_().max())
