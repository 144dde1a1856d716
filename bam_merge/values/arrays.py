"""The values of stored tensors as numpy arrays, which start in a tenth of the time that torch takes."""

from functools import cache
from typing import Any

import numpy as np

from bam_merge.checkpoints.dtypes import DTYPES

Array = np.ndarray[Any, Any]


INTEGERS64 = {name for name, dtype in DTYPES.items() if dtype.bits == 64 and dtype.kind in ("signed", "unsigned")}
"""What float64 does not hold exactly; numpy's longdouble does."""


def is_float(dtype: str) -> bool:
    return DTYPES[dtype].kind == "float"


def stored_integers(data: memoryview | bytearray, dtype: str) -> Array:
    """The stored bits of each element as an unsigned integer."""
    return np.frombuffer(data, f"<u{DTYPES[dtype].bits // 8}")


def widen(data: memoryview | bytearray, dtype: str, out: Array) -> Array:
    """The elements as float32 (for floats of up to 4 bytes), float64 or longdouble, whichever `out` is: in its first places, or `data`
    itself where that is what it holds. Exact, but for 64-bit integers in float64."""
    if dtype == "BF16":  # the upper half of a float32
        bits = np.frombuffer(data, "<u2")
        view = out[: len(bits)]
        if out.dtype == np.float32:
            places = view.view(np.uint32)
            np.copyto(places, bits)
            np.left_shift(places, 16, out=places)
        else:
            _fill(view, (bits.astype(np.uint32) << 16).view(np.float32))
        return view
    native = DTYPES[dtype].numpy
    values = np.frombuffer(data, native) if native else _table(dtype)[np.frombuffer(data, np.uint8)]
    if values.dtype == out.dtype and native:
        return values
    view = out[: len(values)]
    _fill(view, values)
    return view


def widen_pairs(data: memoryview | bytearray, dtype: str, out: Array) -> Array:
    """As `widen`, but bfloat16 in another order, three times as fast: the elements at even places, then those at odd ones (in_order)."""
    if not in_pairs(dtype, len(data) // 2) or out.dtype != np.float32:
        return widen(data, dtype, out)
    pairs = np.frombuffer(data, "<u4")
    half = len(pairs)
    view = out[: 2 * half]
    places = view.view(np.uint32)
    np.left_shift(pairs, 16, out=places[:half])
    np.bitwise_and(pairs, np.uint32(0xFFFF0000), out=places[half:])
    return view


def in_pairs(dtype: str, count: int) -> bool:
    return dtype == "BF16" and count % 2 == 0


def in_order(place: int, dtype: str, count: int) -> int:
    """Where the element stood that `widen_pairs` put at `place` of `count`."""
    if not in_pairs(dtype, count):
        return place
    half = count // 2
    return 2 * place if place < half else 2 * (place - half) + 1


def _fill(view: Array, values: Array) -> None:
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        view[:] = values


ROW = 512
"""Products of float32 that are summed in float32; float64 takes the sums. 2^18 at once cost some processors' BLAS 7e-6 of the value,
512 at a time 2e-7."""


def dot(a: Array, b: Array) -> Any:
    """The inner product of two vectors of one float dtype; as longdouble of such."""
    if a.dtype != np.float32:
        return np.dot(a, b)
    whole = len(a) // ROW * ROW
    sums_R = np.matmul(a[:whole].reshape(-1, 1, ROW), b[:whole].reshape(-1, ROW, 1))  # an inner product of BLAS for every row
    found = float(np.add.reduce(sums_R, axis=None, dtype=np.float64))
    return found if whole == len(a) else found + float(np.dot(a[whole:], b[whole:]))


@cache
def _table(dtype: str) -> Array:
    """The 256 values of an 8-bit float."""
    found, codes = DTYPES[dtype], np.arange(256)
    mantissa_bits, exponent_bits, bias, kind = found.mantissa_bits, found.exponent_bits, found.bias, found.special
    if kind == "scale":
        powers: Array = np.where(codes == 255, np.nan, np.exp2(codes - float(bias))).astype(np.float32)
        return powers
    exponents, mantissas = (codes >> mantissa_bits) & (2**exponent_bits - 1), (codes & (2**mantissa_bits - 1)) / 2**mantissa_bits
    values = np.where(exponents == 0, mantissas * 2.0 ** (1 - bias), (1 + mantissas) * np.exp2(exponents - float(bias)))
    values = np.where(codes >= 128, -values, values)
    top = exponents == 2**exponent_bits - 1
    if kind == "ieee":
        values = np.where(top, np.where(mantissas == 0, np.copysign(np.inf, values), np.nan), values)
    elif kind == "fn":
        values = np.where(top & (mantissas == mantissas.max()), np.nan, values)
    else:
        values[128] = np.nan
    table: Array = values.astype(np.float32)
    return table


def bfloat16_bits(x: Array) -> Array:
    """The bits, unsigned, of float32 numbers that are rounded to bfloat16, its upper half: to nearest, ties to even."""
    bits = x.astype("<f4", copy=False).view("<u4")
    rounded: Array = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return rounded


def _bits(x: Array, dtype: str) -> Array:
    """The bits of values that are rounded to a dtype that is computed with, as signed integers."""
    native = DTYPES[dtype].numpy
    rounded = x.astype(native, copy=False) if native else bfloat16_bits(x)
    signed: Array = rounded.view(f"<i{rounded.itemsize}").astype(np.int64, copy=False)
    return signed


def steps_apart(a: Array, b: Array, dtype: str) -> int:
    """The largest distance of two arrays' elements, counted in values of `dtype` between them after rounding to it."""
    lowest = -(2 ** (DTYPES[dtype].bits - 1))
    with np.errstate(over="ignore"):
        places = [np.where(bits < 0, lowest - bits, bits) for bits in (_bits(x, dtype) for x in (a, b))]  # in the order of the values
        high, low = np.maximum(*places), np.minimum(*places)
        return int((high - low).view(np.uint64).max(initial=0))  # float64 of unlike signs are further apart than int64 reaches
