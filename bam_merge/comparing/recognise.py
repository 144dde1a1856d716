"""What was done to a tensor, where its difference has a form that has a name: from sums over all of it, and a sample of its rows.

The names are claims that hold for what was measured, and a difference that fits none has none: training looks like that.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import xxhash

from bam_merge.checkpoints.dtypes import DTYPE_BITS, MEASURED
from bam_merge.comparing.sides import Place, Side
from bam_merge.comparing.tensor_difference import BLOCK, DIFFERENT, Change, Difference
from bam_merge.text import count, in_percent, ranges
from bam_merge.values.arrays import Array, is_float, stored_integers, widen
from bam_merge.values.wide import Wide

ALONG = 0.98
"""Cosine of B - A with A from which B is a multiple of A. Rounding a bfloat16 tensor times 1.004 leaves that much."""


UNRELATED = 0.05
"""Cosine of A and B below which they have nothing to do with each other; independent tensors of n elements have 1 / sqrt(n)."""


HEAD, DROP = 0.75, 4.0
"""A low rank holds HEAD of a difference's energy, and what follows it is smaller by DROP (energies, so a factor 2 of singular values)."""


RESOLVED = 1e-4
"""Relative difference from which sums of float32 products, exact to 2e-7 of |A|^2, tell its direction."""


BEGINNING = 16
"""Bytes of a row that are compared before all of it is."""


ENOUGH = 1024
"""Elements below which nothing is said about distributions."""


def named(a: Side, b: Side, found: Difference) -> Difference:
    """`found` with its change, where that has a name, and without its sample. Raises CheckpointError when a file cannot be read."""
    change = None
    if found.changed and set(found.dtypes) <= MEASURED:
        change = next(_names(a, b, found), None)
    return replace(found, change=change, sample_PQ=None)


def _names(a: Side, b: Side, found: Difference) -> Iterator[Change]:
    if found.changed == 1 and found.first is not None:
        yield _single_element(a, b, found, found.first)
    if found.zeroed == found.changed or (len(found.shapes[0]) == 2 and 2 * found.zeroed >= min(found.shapes[0])):
        yield from _zeroed_parts(a, b, found)
    finite = not any((*found.nan, *found.inf))
    if finite and found.verdict == DIFFERENT and found.squares and found.relative_l2 and found.relative_l2 > RESOLVED:
        yield from _told_by_sums(a, b, found)
        if found.sample_PQ is not None and found.sample_PQ.size >= ENOUGH:
            yield from _told_by_sample(found, found.sample_PQ)


# ---- single elements -----------------------------------------------------------------------------------------------------------


def _single_element(a: Side, b: Side, found: Difference, at: int) -> Change:
    """The only element that differs, and whether a single bit of it does."""
    stored: list[tuple[int, float | int]] = []
    for side, dtype in zip((a, b), found.dtypes, strict=True):
        data = bytearray(DTYPE_BITS[dtype] // 8)
        side.read(found.place, at, at + 1, memoryview(data))
        value = widen(memoryview(data), dtype, np.empty(1, Wide))[0]
        stored.append((int(stored_integers(data, dtype)[0]), float(value) if is_float(dtype) else int(value)))
    (bits_a, value_a), (bits_b, value_b) = stored
    shown = [f"{value:.6g}" if isinstance(value, float) else str(value) for value in (value_a, value_b)]
    if shown[0] == shown[1]:
        shown = [str(value) for value in (value_a, value_b)] if value_a != value_b else [f"{bits:#x}" for bits in (bits_a, bits_b)]
    index = ", ".join(str(int(i)) for i in np.unravel_index(at, found.shapes[0])) if found.shapes[0] else ""
    text = f"only element [{index}]: {shown[0]} in A, {shown[1]} in B"
    flipped = bits_a ^ bits_b
    if found.dtypes[0] == found.dtypes[1] and flipped.bit_count() == 1:
        return Change("bit", f"{text}; bit {flipped.bit_length() - 1} is flipped")
    return Change("element", text)


# ---- zeros ---------------------------------------------------------------------------------------------------------------------


def _zeroed_parts(a: Side, b: Side, found: Difference) -> Iterator[Change]:
    """Rows or columns that are zero in B only; or elements all over."""
    alone = found.zeroed == found.changed
    rest = "" if alone else ", and other elements differ"
    if not found.squares_b and not any((*found.nan, *found.inf)):
        yield Change("zeroed", "all zero")
        return
    if len(found.shapes[0]) == 2:
        for kind, gone, length in zip(("rows", "columns"), _lines_zero_in_b_alone(a, b, found), found.shapes[0][::-1], strict=True):
            if 2 * len(gone) * length > found.zeroed:  # or else they are a part of a pruning
                which = ranges(gone) if len(gone) <= 8 else f"{gone[0]} to {gone[-1]}"
                yield Change(kind, f"{count(len(gone), kind[:-1])} zeroed ({which}){rest}")
    if alone:
        share = f"{found.zeroed / found.count:.1%} of the elements"
        yield Change("zeroed", f"pruned: {share} set to zero, the largest of them {found.max_abs:.3g}")


def _lines_zero_in_b_alone(a: Side, b: Side, found: Difference) -> tuple[list[int], list[int]]:
    """The rows and the columns of a matrix that are zero in B and not in A."""
    columns = np.zeros((2, found.shapes[0][1]), bool)
    rows: list[int] = []
    for first, pair in _blocks_of_rows(a, b, found):
        used = [values != 0 for values in pair]
        rows += [first + int(row) for row in np.flatnonzero(used[0].any(1) & ~used[1].any(1))]
        columns |= [values.any(0) for values in used]
    return rows, np.flatnonzero(columns[0] & ~columns[1]).tolist()


def _blocks_of_rows(a: Side, b: Side, found: Difference) -> Iterator[tuple[int, list[Array]]]:
    """Both matrices some whole rows at a time: the first row's number, and the values in float64."""
    rows, row = found.shapes[0][0], math.prod(found.shapes[0][1:])
    step = max(1, BLOCK // 4 // max(1, row))
    for first in range(0, rows, step):
        last = min(rows, first + step)
        sides = zip((a, b), found.dtypes, strict=True)
        yield first, [_stored_values(side, found.place, dtype, first * row, last * row).reshape(-1, row) for side, dtype in sides]


def _stored_bytes(side: Side, place: Place, start: int, stop: int, size: int) -> memoryview:
    """Elements [start, stop) of what stands there, of `size` bytes each."""
    data = memoryview(bytearray((stop - start) * size))
    side.read(place, start, stop, data)
    return data


def _stored_values(side: Side, place: Place, dtype: str, start: int, stop: int) -> Array:
    """Elements [start, stop) of what stands there, in float32 where that holds them."""
    data = _stored_bytes(side, place, start, stop, DTYPE_BITS[dtype] // 8)
    return widen(data, dtype, np.empty(stop - start, np.float32 if is_float(dtype) and dtype != "F64" else np.float64))


# ---- all of it -----------------------------------------------------------------------------------------------------------------


def _told_by_sums(a: Side, b: Side, found: Difference) -> Iterator[Change]:
    """Changes that the sums show: a multiple, other rows' order, a stranger."""
    aa, dd, cosine = found.squares, found.squared_difference, found.cosine
    assert cosine is not None or not aa
    bb, along = found.squares_b, found.product - aa  # <A, B - A>
    if abs(along) >= ALONG * np.sqrt(aa * dd) and found.count >= 16:
        factor = 1 + along / aa
        times = f"{float(factor):.5g}" if math.isfinite(float(factor)) else np.format_float_scientific(factor, precision=4, trim="-")
        rest = math.sqrt(max(0.0, float(1 - along * along / (aa * dd))))
        yield Change("scaled", f"{times} x A" + (f" (but for {rest:.2g} of the difference)" if rest > 0.01 else ""))
    if (
        abs(bb - aa) <= 1e-3 * dd
        and len(found.shapes[0]) > 1
        and found.dtypes[0] == found.dtypes[1]
        and _has_rows_of_a_permuted(a, b, found)
    ):
        yield Change("permuted", "the rows of A in another order")
    if cosine is not None and abs(cosine) < UNRELATED and found.count >= ENOUGH:
        yield Change("unrelated", f"unrelated to A (cosine {cosine:.3f})")


def _has_rows_of_a_permuted(a: Side, b: Side, found: Difference) -> bool:
    """Whether both have the same rows. Most of what gets here has not, which the first row shows without a digest of any."""
    if not _has_first_row_of_a(a, b, found):
        return False
    rows: list[list[bytes]] = [[], []]
    for _, pair in _blocks_of_rows(a, b, found):
        for seen, values in zip(rows, pair, strict=True):
            seen += [xxhash.xxh3_128_digest(row) for row in values]
    return sorted(rows[0]) == sorted(rows[1])


def _has_first_row_of_a(a: Side, b: Side, found: Difference) -> bool:
    """Whether the first row of A is a row of B, byte for byte."""
    rows, row = found.shapes[0][0], math.prod(found.shapes[0][1:])
    size = DTYPE_BITS[found.dtypes[0]] // 8
    first_B = np.frombuffer(_stored_bytes(a, found.place, 0, row, size), np.uint8)
    step = max(1, BLOCK // row)
    for start in range(0, rows, step):
        rows_RB = np.frombuffer(_stored_bytes(b, found.place, start * row, min(rows, start + step) * row, size), np.uint8).reshape(
            -1, row * size
        )
        begin_alike = (rows_RB[:, :BEGINNING] == first_B[:BEGINNING]).all(1)
        if any(np.array_equal(rows_RB[index], first_B) for index in np.flatnonzero(begin_alike)):
            return True
    return False


def _told_by_sample(found: Difference, d_PQ: Array) -> Iterator[Change]:
    """Changes that the sample shows: a low rank, or noise.

    The energies e (squared singular values) of P x Q independent elements have (sum e)^2 / sum e^2 = PQ / (P + Q + 1), of rank r at most r.
    """
    P, Q = d_PQ.shape
    gram_PP = d_PQ @ d_PQ.T if P <= Q else d_PQ.T @ d_PQ
    energy, fourth = float(np.trace(gram_PP)), float(np.square(gram_PP).sum())
    if not energy or min(P, Q) < 16:
        return
    spread, full = energy * energy / fourth, P * Q / (P + Q + 1)
    if spread < 0.5 * full:
        rank, head = _rank_of_difference(gram_PP)
        if rank:
            rest = f", which is {head:.0%} of the squared difference" if head < 0.995 else ""
            yield Change("low rank", f"A plus a matrix of rank {rank}{rest}")
        return
    centred = d_PQ - d_PQ.mean()
    kurtosis = float((centred**4).mean() / np.square(centred).mean() ** 2)
    uneven = float(np.square(d_PQ).sum(1).std() / np.square(d_PQ).sum(1).mean()) / math.sqrt(max(kurtosis - 1, 0.1) / Q)
    if spread > 0.95 * full and uneven < 1.5 and found.changed > 0.9 * found.count:
        for kind, expected in (("normal", 3.0), ("uniform", 1.8)):
            if abs(kurtosis - expected) < 0.2:
                yield Change("noise", f"A plus {kind} noise of {in_percent(found.relative_l2 or 0.0)} of its norm")


def _rank_of_difference(gram_PP: Array) -> tuple[int, float]:
    """The rank after which the energies fall off, and its share of them; 0 where they do not."""
    energies = np.linalg.eigvalsh(gram_PP)[::-1].clip(0)
    energies += 1e-12 * energies[0]  # below that they are rounding
    heads = energies.cumsum() / energies.sum()
    falls = (energies[:-1] >= DROP * energies[1:]) & (heads[:-1] >= HEAD)
    last = np.flatnonzero(falls[: len(energies) // 4])[-1:]
    return (int(last[0]) + 1, float(heads[last[0]])) if len(last) else (0, 0.0)
