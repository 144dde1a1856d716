"""Sums of squares that neither overflow nor vanish, and figures of them that a float64 and a JSON document hold.

float64 ends at 1.8e308, so that the square of 1e155 is infinity and that of 1e-170 nothing. Sums are therefore kept in the C compiler's
long double, whose exponent has 15 bits and whose significand at least 64 on x86-64 (80-bit extended) and aarch64 (IEEE 754 binary128): it
holds the square of every float64 and every 64-bit integer. It is slow, so chunks are summed in it only where float64 is not enough.
"""

import math
from typing import Any

import numpy as np

from bam_merge.checkpoints.dtypes import DTYPES
from bam_merge.values.arrays import Array, dot

Wide = np.longdouble


ZERO = Wide(0)


LARGEST, LEAST = DTYPES["F64"].largest, DTYPES["F64"].least
"""The largest float64, and the least above zero."""


ABOVE, BELOW = "above 1.8e308", "below 4.9e-324"
"""What is said of a figure that no float64 holds."""


ENOUGH = {np.dtype(np.float32): (1e-30, math.inf), np.dtype(np.float64): (1e-280, math.inf)}
"""Sums of squares in these dtypes are right between these bounds. Products that vanish below them are too small to matter there."""


def squares(x_C: Array) -> Any:
    """The sum of squares: infinity or NaN only where `x_C` holds such."""
    found = dot(x_C, x_C)
    if sound(found, x_C.dtype) or not x_C.any():
        return found
    wider = np.float64 if x_C.dtype == np.float32 else Wide
    wide_C = x_C.astype(wider)
    return np.dot(wide_C, wide_C)


def sound(found: Any, dtype: Any) -> bool:
    """Whether a sum of squares in that dtype has neither overflowed nor lost what it was made of."""
    if dtype == Wide:
        return bool(np.isfinite(found))
    least, most = ENOUGH[np.dtype(dtype)]
    return bool(least < found < most)


def inner(x_C: Array, y_C: Array) -> Any:
    """The inner product, in long double."""
    return np.dot(x_C.astype(Wide), y_C.astype(Wide))


def ratio(part: Any, whole: Any) -> float | None:
    """sqrt(part / whole); infinity beyond float64; None where the whole is zero and the part is not."""
    if not whole:
        return None if part else 0.0
    return float(np.sqrt(Wide(part) / Wide(whole)))


def cosine(product: Any, one: Any, other: Any) -> float | None:
    """`product` over the root of two sums of squares, in [-1, 1]; None where one of them is zero."""
    norms = np.sqrt(Wide(one)) * np.sqrt(Wide(other))
    return max(-1.0, min(1.0, float(Wide(product) / norms))) if norms else None


def figure(value: float | None) -> float | None:
    """As a JSON document holds it: None where it is no finite number."""
    return value if value is not None and math.isfinite(value) else None
