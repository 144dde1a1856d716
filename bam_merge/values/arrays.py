"""The values of stored tensors as numpy arrays, which start in a tenth of the time that torch takes."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


BITS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8",
        "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?"}  # fmt: skip


FLOAT8 = {
    "F8_E4M3": (4, 7, "fn"),
    "F8_E5M2": (5, 15, "ieee"),
    "F8_E4M3FNUZ": (4, 8, "fnuz"),
    "F8_E5M2FNUZ": (5, 16, "fnuz"),
    "F8_E8M0": (8, 127, "scale"),
}
"""Exponent bits, bias, and what is no number: OCP 8-bit floating point specification 1.0, microscaling 1.0, and arXiv 2206.02915."""


INTEGERS64 = {"I64", "U64"}
"""What float64 does not hold exactly; numpy's longdouble does."""


COMPUTED = {*BITS, *FLOAT8}
"""The dtypes that there are values of; the others (below a byte, complex) are compared as bytes."""


def is_float(dtype: str) -> bool:
    return dtype in FLOAT8 or dtype in ("F64", "F32", "F16", "BF16")


def stored_integers(data: memoryview | bytearray, dtype: str) -> Array:
    """The stored bits of each element as an unsigned integer."""
    size = 1 if dtype in FLOAT8 else np.dtype(BITS[dtype]).itemsize
    return np.frombuffer(data, f"<u{size}")


def largest_of(dtype: str) -> float:
    """The largest finite number of a dtype of floats."""
    if dtype in FLOAT8:
        return float(_table(dtype)[np.isfinite(_table(dtype))].max())
    return 2.0**128 - 2.0**120 if dtype == "BF16" else float(np.finfo(BITS[dtype]).max)


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
    values = _table(dtype)[np.frombuffer(data, np.uint8)] if dtype in FLOAT8 else np.frombuffer(data, BITS[dtype])
    if values.dtype == out.dtype and dtype not in FLOAT8:
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
    exponent_bits, bias, kind = FLOAT8[dtype]
    codes = np.arange(256)
    if kind == "scale":
        powers: Array = np.where(codes == 255, np.nan, np.exp2(codes - float(bias))).astype(np.float32)
        return powers
    mantissa_bits = 7 - exponent_bits
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


def _bfloat16(x: Array) -> Array:
    bits = x.astype("<f4").view("<u4")
    rounded: Array = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(np.int16).astype(np.int64)
    return rounded


STEPS: dict[str, tuple[float, Callable[[Array], Array]]] = {
    "BF16": (2.0**-7, lambda x: _bfloat16(x)),
    "F16": (2.0**-10, lambda x: x.astype("<f2").view("<i2").astype(np.int64)),
    "F32": (2.0**-23, lambda x: x.astype("<f4").view("<i4").astype(np.int64)),
    "F64": (2.0**-52, lambda x: x.astype("<f8").view("<i8")),
}
"""Of each float: the distance from 1 to the next, and the bits of values that are rounded to it, as signed integers."""


def steps_apart(a: Array, b: Array, dtype: str) -> int:
    """The largest distance of two arrays' elements, counted in values of `dtype` between them after rounding to it."""
    lowest = {"BF16": -(2**15), "F16": -(2**15), "F32": -(2**31), "F64": -(2**63)}[dtype]
    with np.errstate(over="ignore"):
        places = [np.where(bits < 0, lowest - bits, bits) for bits in (STEPS[dtype][1](x) for x in (a, b))]  # in the order of the values
        high, low = np.maximum(*places), np.minimum(*places)
        return int((high - low).view(np.uint64).max(initial=0))  # float64 of unlike signs are further apart than int64 reaches
