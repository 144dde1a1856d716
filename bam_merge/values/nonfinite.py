"""NaN and infinity in stored bytes, found while the bytes pass by.

The bit patterns that are no numbers lie together at the top of the patterns of either sign, so the largest pattern, once read as a
signed and once as an unsigned integer, tells whether any is there: two passes of numpy that need no memory. Only then are they
counted. Patterns: IEEE 754; bfloat16 as float32; OCP 8-bit floating point 1.0 (E4M3 has no infinity and one NaN of each sign),
microscaling 1.0 (E8M0: 255); arXiv 2206.02915 (FNUZ: minus zero is the only NaN). Floats below 8 bits have none.
"""

from typing import Any

import numpy as np

from bam_merge.checkpoints.dtypes import DTYPES, Dtype


def _lowest(dtype: Dtype) -> int:
    highest = (1 << (dtype.exponent_bits + dtype.mantissa_bits)) - 1
    return highest if dtype.special == "fn" else highest >> dtype.mantissa_bits << dtype.mantissa_bits


LOWEST = {name: _lowest(dtype) for name, dtype in DTYPES.items() if dtype.special in ("ieee", "fn")}
"""The lowest pattern that is no finite number, its sign bit aside. The numbers of C64 are pairs of float32."""


ONE_PATTERN = {name: 0xFF if dtype.special == "scale" else 0x80 for name, dtype in DTYPES.items() if dtype.special in ("scale", "fnuz")}


BYTES = {name: (1 + DTYPES[name].exponent_bits + DTYPES[name].mantissa_bits) // 8 for name in LOWEST}
"""Bytes of a pattern."""


def nonfinite_places(data: memoryview, dtype: str) -> "np.ndarray[Any, Any]":
    """The elements [n] of `data`, whole elements of a safetensors dtype, that are NaN or infinite, in order. Integers never are."""
    if dtype in ONE_PATTERN:
        return np.flatnonzero(np.frombuffer(data, np.uint8) == ONE_PATTERN[dtype])
    if dtype not in LOWEST:
        return np.empty(0, np.int64)
    size = BYTES[dtype]
    lowest, sign = LOWEST[dtype], 1 << (8 * size - 1)
    patterns, signed = np.frombuffer(data, f"<u{size}"), np.frombuffer(data, f"<i{size}")
    if not len(patterns) or (int(patterns.max()) < lowest | sign and int(signed.max()) < lowest):
        return np.empty(0, np.int64)
    places = np.flatnonzero(patterns & patterns.dtype.type(sign - 1) >= lowest)
    return np.unique(places // 2) if DTYPES[dtype].kind == "complex" else places
