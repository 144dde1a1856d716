"""How two tensors differ: streamed in chunks, equal bytes passed over as bytes, differences summed up in float64."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from bam_merge.checkpoints.dtypes import DTYPE_BITS, MEASURED
from bam_merge.checkpoints.pieces import Read, numel, stored
from bam_merge.comparing.sides import Place, Side
from bam_merge.comparing.tally import CHUNK, Tally
from bam_merge.values.arrays import Array
from bam_merge.values.threads import scratch
from bam_merge.values.wide import ABOVE, BELOW, LEAST, ZERO, Wide, cosine, figure, ratio

BLOCK = 2 * CHUNK
"""Elements that a worker reads of each tensor at a time."""


IDENTICAL, EQUAL, ROUNDING, DIFFERENT, SHAPE = "identical", "equal", "rounding", "different", "shape"
"""identical: the same bytes; equal: the same values in another dtype or layout, or zeros of another sign, or NaN of
another payload; rounding: each element within
one unit in the last place of the coarser dtype; different; shape: of unlike shapes, and not compared."""


@dataclass(frozen=True)
class Difference:
    """Tensor `name_b` of B against `name_a` of A. Figures are over elements that are finite in both, the others are counted apart.

    `relative_l2` is |b - a| / |a| (None where a is zero and b is not), `cosine` that of a and b as vectors, `max_abs` the largest
    |b - a|, at `at`, an element in C order; figures beyond float64 are infinity or zero (`out_of_range`). `changed` counts elements whose
    values differ (NaN equals NaN), the first of them is `first`, and `zeroed` those that are zero in B only; `ulps` is the largest
    distance in units in the last place of the coarser dtype, where the verdict is rounding. `zero_signs` counts zeros whose sign
    differs, `nan_payloads` NaN with other bits, `apart` elements of which one is NaN or infinity and the other not the same; `nan` and
    `inf` are the counts in A and in B. `squares` and `squares_b` are |a|^2 and |b|^2, `squared_difference` |b - a|^2, `product` <a, b>.
    `prints` are unlike for unlike bytes, nearly always. `change` says what was done to the tensor, where that has a name (recognise.py).
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
    max_abs: float | None = 0.0
    at: int | None = None
    first: int | None = None
    zeroed: int = 0
    ulps: int | None = None
    zero_signs: int = 0
    nan_payloads: int = 0
    apart: int = 0
    nan: tuple[int, int] = (0, 0)
    inf: tuple[int, int] = (0, 0)
    squares: Wide = ZERO
    squares_b: Wide = ZERO
    squared_difference: Wide = ZERO
    product: Wide = ZERO
    prints: tuple[object, object] = (None, None)
    change: "Change | None" = None
    sample_PQ: Array | None = field(default=None, repr=False, compare=False)

    @property
    def same(self) -> bool:
        return self.verdict in (IDENTICAL, EQUAL)

    @property
    def odd(self) -> bool:
        """Whether NaN or infinity appeared, went, or stands elsewhere."""
        return self.apart > 0

    @property
    def vanishing(self) -> bool:
        """Whether finite elements differ by less than the relative difference can show."""
        return self.changed > self.apart and self.relative_l2 == 0

    @property
    def shade(self) -> float | None:
        """`relative_l2`, but above zero for whatever differs."""
        return LEAST if self.vanishing else self.relative_l2

    @property
    def out_of_range(self) -> dict[str, str]:
        """Which figures are beyond float64, and on which side."""
        said = {name: ABOVE for name in ("relative_l2", "max_abs") if getattr(self, name) == math.inf}
        return {**said, **({"relative_l2": BELOW} if self.vanishing and self.max_abs else {})}

    def document(self) -> dict[str, Any]:
        """As `diff --json` prints it."""
        role, layer, expert = self.place
        return {
            "name": self.name_a, "name_b": self.name_b, "role": None if role.startswith("? ") else role, "layer": layer, "expert": expert,
            "equal": self.same, "verdict": self.verdict, "dtypes": list(self.dtypes), "shapes": [list(shape) for shape in self.shapes],
            "count": self.count, "changed": self.changed, "relative_l2": figure(self.relative_l2), "cosine": self.cosine,
            "max_abs": figure(self.max_abs), "out_of_range": self.out_of_range, "max_abs_at": self.at, "ulps": self.ulps,
            "zeroed": self.zeroed, "zero_signs": self.zero_signs, "nan_payloads": self.nan_payloads, "apart": self.apart,
            "nan": list(self.nan), "inf": list(self.inf), "change": self.change.document() if self.change else None,
        }  # fmt: skip


def difference(a: Side, b: Side, place: Place) -> Difference:
    """Compare what stands at `place` in both. Raises CheckpointError when a file cannot be read or has changed."""
    leaves = a.leaves[place], b.leaves[place]
    dtypes, shapes = (leaves[0].dtype, leaves[1].dtype), (leaves[0].shape, leaves[1].shape)
    names = a.name(place), b.name(place)
    if shapes[0] != shapes[1]:
        return Difference(place, *names, SHAPE, dtypes, shapes, relative_l2=None, cosine=None)
    if not set(dtypes) <= MEASURED:
        return _bytes_only(a, b, place, names, dtypes, shapes)
    tally, count = Tally(dtypes, shapes[0]), numel(leaves[0])
    sizes = [DTYPE_BITS[dtype] // 8 for dtype in dtypes]
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are counted
        for start in range(0, count, BLOCK):
            stop = min(count, start + BLOCK)
            blocks = scratch([(stop - start) * size for size in sizes])
            for side, block in zip((a, b), blocks, strict=True):
                side.read(place, start, stop, block)
            tally.add(blocks[0], blocks[1], start)
    return _result(tally, place, names, shapes, count, all(isinstance(leaf, Read) for leaf in leaves))


def _result(tally: Tally, place: Place, names: tuple[str, str], shapes: Any, count: int, whole: bool) -> Difference:
    if tally.changed:
        verdict = ROUNDING if tally.ulps is not None else DIFFERENT
    else:
        verdict = IDENTICAL if tally.identical and whole else EQUAL
    alike = cosine(tally.ab, tally.aa, tally.bb)
    return Difference(
        place, *names, verdict, tally.dtypes, shapes, count, tally.changed,
        relative_l2=ratio(tally.dd, tally.aa), cosine=1.0 if alike is None and not tally.dd else alike,
        max_abs=float(tally.max_abs), at=tally.at, first=tally.first, zeroed=tally.zeroed,
        ulps=tally.ulps if verdict == ROUNDING else None, zero_signs=tally.zero_signs,
        nan_payloads=tally.nan_payloads, apart=tally.apart, nan=(tally.nan[0], tally.nan[1]), inf=(tally.inf[0], tally.inf[1]),
        squares=tally.aa, squares_b=tally.bb, squared_difference=tally.dd, product=tally.ab, prints=(tally.aa, tally.bb),
        sample_PQ=tally.sample.values() if tally.sample and tally.changed else None,
    )  # fmt: skip


def digest(side: Side, place: Place) -> str:
    """XXH3-128 of the bytes of what stands there. Raises CheckpointError when they cannot be read."""
    leaf = side.leaves[place]
    found, entry = xxhash.xxh3_128(), side.checkpoint.tensors[stored(leaf).tensor]
    if leaf.dtype in MEASURED:
        count, size = numel(leaf), DTYPE_BITS[leaf.dtype] // 8
    else:  # below a byte: no part of it stands alone
        whole = Read(stored(leaf).source, entry.name, "U8", (entry.nbytes,))
        side, count, size = Side(side.label, side.anatomy, None, {place: whole}, {}), entry.nbytes, 1
    for start in range(0, count, BLOCK):
        stop = min(count, start + BLOCK)
        (block,) = scratch([(stop - start) * size])
        side.read(place, start, stop, block)
        found.update(block)
    return found.hexdigest()


def _bytes_only(a: Side, b: Side, place: Place, names: tuple[str, str], dtypes: tuple[str, str], shapes: Any) -> Difference:
    """Dtypes that no arithmetic is done with (below a byte, complex): equal bytes or not."""
    digests = digest(a, place), digest(b, place)
    same = dtypes[0] == dtypes[1] and digests[0] == digests[1]
    count = numel(a.leaves[place])
    return Difference(
        place, *names, IDENTICAL if same else DIFFERENT, dtypes, shapes, count, 0 if same else count,
        relative_l2=0.0 if same else None, cosine=1.0 if same else None, max_abs=0.0 if same else None, prints=digests,
    )  # fmt: skip


@dataclass(frozen=True)
class Change:
    """`kind`: bit, element, zeroed, rows, columns, scaled, permuted, low rank, noise, unrelated. `text` says it of B."""

    kind: str
    text: str

    def document(self) -> dict[str, str]:
        return {"kind": self.kind, "text": self.text}


def relative_difference(members: Iterable[Difference]) -> float | None:
    """|b - a| / |a| of several tensors as one vector; None where a is zero or of a dtype without arithmetic, and
    never 0 where something differs."""
    found = list(members)
    relative = ratio(sum((d.squared_difference for d in found), ZERO), sum((d.squares for d in found), ZERO))
    if relative == 0 and any(d.changed for d in found):
        return LEAST if any(d.vanishing for d in found) else None if not any(d.odd for d in found) else 0.0
    return relative
