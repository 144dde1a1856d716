"""How far a written number may be from the one that it stands for: rounding to a dtype by this module's own arithmetic, on bit patterns.

What wrote the number rounded with torch; what proves it does not. How many bits a dtype has is a fact, taken from the one table.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bam_merge.checkpoints.dtypes import DTYPES

_BIAS, _MANTISSA, _EXPONENT = 1023, 52, 0x7FF << 52
"""Of float64: what is added to an exponent, the bits of the mantissa below it, and the exponent's own."""


_PATTERNS = {torch.float32: ("F32", torch.int32), torch.float64: ("F64", torch.int64)}


@dataclass
class Other:
    """What rounding may have made instead of some elements [n] of a derived tensor, by flat `index`: values, and their slack."""

    index: Tensor
    value: Tensor
    slack: Tensor


@dataclass
class Derived:
    """Rows of a tensor in float64, with a bound for the error of the arithmetic before the last rounding (None: there is none).

    `others`: where an elected sign hangs on rounding, each further outcome that is as right as `value`.
    """

    value: Tensor
    slack: Tensor | None = None
    others: list[Other] = field(default_factory=list)


def half_ulp(value: Tensor, dtype: str) -> Tensor:
    """Half the distance between neighbouring numbers of `dtype` at `value` [float64]: the error of one correct rounding."""
    of = DTYPES[dtype]
    least = (of.smallest_exponent + _BIAS) << _MANTISSA  # 0 and what is below the smallest normal number have its distance
    power = (value.contiguous().view(torch.int64) & _EXPONENT).clamp_(min=max(least, 0)).view(torch.float64)
    return power.mul_(2.0 ** (-of.mantissa_bits - 1))


def nearest(value: Tensor, dtype: str) -> Tensor:
    """The numbers of `dtype` nearest to `value` (float32 or float64), ties to even, as numbers of value's own dtype."""
    (name, integer), of = _PATTERNS[value.dtype], DTYPES[dtype]
    wide = DTYPES[name]
    cut = wide.mantissa_bits - of.mantissa_bits
    if cut <= 0:
        return value
    patterns = value.contiguous().view(integer)
    last = (patterns >> cut) & 1  # of the bits that stay
    near = ((patterns + (last + ((1 << (cut - 1)) - 1))) >> cut << cut).view(value.dtype)
    if of.smallest_exponent > wide.smallest_exponent:
        near = torch.where(value.abs() < 2.0**of.smallest_exponent, (value / of.least).round() * of.least, near)
    near = torch.where(near.abs() > of.largest, value.sign() * torch.inf, near)
    return torch.where(value.isfinite(), near, value)


def worst(written: Tensor, derived: Derived, dtype: str) -> tuple[float, int]:
    """The largest error of `written` against what it should be, in units of what is allowed for it, and where.

    Allowed is one rounding to `dtype` of what the arithmetic can give; where nothing is computed before, the one number that rounding
    gives. At most 1 is right; a number rounded twice, or through a narrower type, is above it somewhere.
    """
    found = written.double().flatten()
    ratio = _ratio(found, derived.value.flatten(), None if derived.slack is None else derived.slack.flatten(), dtype)
    for other in derived.others:
        ratio[other.index] = torch.minimum(ratio[other.index], _ratio(found[other.index], other.value, other.slack, dtype))
    return _first_of_largest(ratio)


def _first_of_largest(ratio: Tensor) -> tuple[float, int]:
    """The largest, or the first NaN, and its place; that of one below 1 is not looked for, and is 0."""
    largest = float(ratio.amax())
    return largest, int(ratio.argmax()) if not largest < 1 else 0


def _ratio(found: Tensor, value: Tensor, slack: Tensor | None, dtype: str) -> Tensor:
    error = (found - value).abs_()
    allowed = half_ulp(value.abs() if slack is None else value.abs().add_(slack), dtype)
    ratio = error.div_(allowed if slack is None else allowed.add_(slack))
    # what is left in doubt: two equally near numbers, of which one is right; infinities, and NaN that --allow-nonfinite let pass
    if ratio.numel() and not ratio.amax() < 1:
        doubt = (~(ratio < 1)).nonzero()[:, 0]
        rounded = nearest(value[doubt], dtype)
        same = (found[doubt] == rounded) | (found[doubt].isnan() & value[doubt].isnan())
        off = ratio[doubt].nan_to_num(torch.inf, torch.inf)
        wrong = off if slack is not None else off.clamp(min=1 + 2.0**-20)
        ratio[doubt] = torch.where(same, off.where(off <= 1, 0.0), wrong)
    return ratio
