"""The dtypes of safetensors files: the one table of what each is. What numpy, torch or config.json make of it follows from it elsewhere.

Sources: the format's own list (safetensors, "Format"); IEEE 754-2019, table 3.5; bfloat16 as the upper half of float32; OCP 8-bit floating
point specification 1.0; OCP microscaling formats 1.0 (F4, F6, E8M0); arXiv 2206.02915 (FNUZ).
"""

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["bool", "unsigned", "signed", "float", "complex"]


Special = Literal["ieee", "fn", "fnuz", "scale", "none"]
"""Which patterns of a float are no finite numbers. ieee: those with the highest exponent; fn: the highest of either sign, NaN; fnuz: minus
zero, NaN; scale: 255, NaN, in a number that is nothing but an exponent; none."""


@dataclass(frozen=True, slots=True)
class Dtype:
    """One dtype: `bits` of an element; `torch` and `numpy`, what those call it, None where they do not have it.

    A float is (-1)^sign * 1.mantissa * 2^(exponent - bias), `mantissa_bits` after the point; at the exponent 0 it is 0.mantissa *
    2^(1 - bias). A complex number is two floats of that kind, and a scale 2^(exponent - bias) alone.
    """

    name: str
    bits: int
    kind: Kind
    torch: str | None = None
    numpy: str | None = None
    exponent_bits: int = 0
    mantissa_bits: int = 0
    bias: int = 0
    special: Special = "none"

    @property
    def smallest_exponent(self) -> int:
        """Of the smallest number that has all its mantissa's digits."""
        return -self.bias if self.special == "scale" else 1 - self.bias

    @property
    def step(self) -> float:
        """From 1 to the next number."""
        return 2.0**-self.mantissa_bits

    @property
    def least(self) -> float:
        """The smallest number above zero."""
        return math.ldexp(1, self.smallest_exponent - self.mantissa_bits)

    @property
    def largest(self) -> float:
        """The largest finite number."""
        highest = 2**self.exponent_bits - 1 - self.bias - (self.special in ("ieee", "scale"))
        return math.ldexp(2 - self.step * (2 if self.special == "fn" else 1), highest)


_FLOATS = (
    # name, bits, kind, torch, numpy, exponent_bits, mantissa_bits, bias, special
    Dtype("F64", 64, "float", "float64", "<f8", 11, 52, 1023, "ieee"),
    Dtype("F32", 32, "float", "float32", "<f4", 8, 23, 127, "ieee"),
    Dtype("F16", 16, "float", "float16", "<f2", 5, 10, 15, "ieee"),
    Dtype("BF16", 16, "float", "bfloat16", None, 8, 7, 127, "ieee"),
    Dtype("F8_E5M2", 8, "float", "float8_e5m2", None, 5, 2, 15, "ieee"),
    Dtype("F8_E4M3", 8, "float", "float8_e4m3fn", None, 4, 3, 7, "fn"),
    Dtype("F8_E5M2FNUZ", 8, "float", "float8_e5m2fnuz", None, 5, 2, 16, "fnuz"),
    Dtype("F8_E4M3FNUZ", 8, "float", "float8_e4m3fnuz", None, 4, 3, 8, "fnuz"),
    Dtype("F8_E8M0", 8, "float", "float8_e8m0fnu", None, 8, 0, 127, "scale"),
    Dtype("F6_E3M2", 6, "float", None, None, 3, 2, 3),
    Dtype("F6_E2M3", 6, "float", None, None, 2, 3, 1),
    Dtype("F4", 4, "float", None, None, 2, 1, 1),  # torch has float4_e2m1fn_x2, whose elements are pairs
    Dtype("C64", 64, "complex", "complex64", "<c8", 8, 23, 127, "ieee"),
)


_OTHERS = (
    Dtype("I64", 64, "signed", "int64", "<i8"),
    Dtype("I32", 32, "signed", "int32", "<i4"),
    Dtype("I16", 16, "signed", "int16", "<i2"),
    Dtype("I8", 8, "signed", "int8", "i1"),
    Dtype("U64", 64, "unsigned", "uint64", "<u8"),
    Dtype("U32", 32, "unsigned", "uint32", "<u4"),
    Dtype("U16", 16, "unsigned", "uint16", "<u2"),
    Dtype("U8", 8, "unsigned", "uint8", "u1"),
    Dtype("BOOL", 8, "bool", "bool", "?"),
)


DTYPES = {dtype.name: dtype for dtype in (*_FLOATS, *_OTHERS)}


DTYPE_BITS = {dtype.name: dtype.bits for dtype in DTYPES.values()}


ARITHMETIC_DTYPES = ("F64", "F32", "F16", "BF16")
"""The dtypes that are computed with. Others are only ever copied, byte for byte."""


MEASURED = frozenset(dtype.name for dtype in DTYPES.values() if dtype.bits % 8 == 0 and dtype.kind != "complex")
"""The dtypes whose values are looked at, to count and compare them; the others (below a byte, complex) are bytes."""


DTYPE_NAMES = {DTYPES[name].torch: name for name in ARITHMETIC_DTYPES}
"""The dtypes that are computed with, by the names that recipes and config.json have for them."""


def config_name(dtype: str) -> str:
    """What config.json calls it."""
    return (dtype in ARITHMETIC_DTYPES and DTYPES[dtype].torch) or dtype.lower()
