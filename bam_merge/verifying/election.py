"""What an election of signs (TIES, DARE-TIES) may come to: one value nearly everywhere, a few where rounding decides.

The formula (arXiv 2306.01708, section 4): the elected sign of an entry is that of the weighted sum of its differences, and the result
base + scale * mean of the differences that have it. A difference of negative
weight is the opposite one with the weight's magnitude. Where the sum is 0 no difference has its sign, and the result is the base: a tie
is an outcome like any other. The sum is of float64 products with whole-numbered weights (expressions.proportion), whose rounding IEEE 754
fixes; only the order in which they are summed is free. So the sign is in doubt only where three or more products cancel to within
the rounding of their sum, and not even there if they lie on a grid on which every partial sum is exact.

On purpose apart from merging/kernels/, which makes such tensors: only the whole-numbered weights are of one function.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bam_merge import expressions
from bam_merge.verifying.rounding import Derived, Other


def elect(
    method: expressions.Ties | expressions.DareTies,
    deltas: list[Tensor],
    base: Tensor,
    unit: float,
    least: float,
    shares: Sequence[float] | None = None,
) -> Derived:
    """The merged rows of the trimmed or kept differences, all in float64; every outcome that rounding may lead to.

    `unit` is the relative error of an operation of the merge, `least` the error of one that underflows. `shares` are the whole-numbered
    weights of the election, where they are not those of the mean.
    """
    d_KE = torch.stack([d.flatten() for d in deltas])
    shares_K1 = torch.tensor(shares or expressions.proportion(method.weights), dtype=torch.float64)[:, None]
    p_KE = d_KE * shares_K1
    sum_E = p_KE.sum(0)
    sign_E = sum_E.sign().masked_fill(sum_E.isnan(), torch.nan)
    value_E, slack_E = _outcome(method, d_KE, base.flatten(), sign_E, unit, least)
    others = []
    doubtful_U = _doubtful(p_KE, sum_E)
    if len(doubtful_U):
        for sign in (-1.0, 0.0, 1.0):  # the right one among them once more, which does no harm
            sign_U = torch.full_like(sum_E[doubtful_U], sign)
            others.append(Other(doubtful_U, *_outcome(method, d_KE[:, doubtful_U], base.flatten()[doubtful_U], sign_U, unit, least)))
    return Derived(value_E.view(base.shape), slack_E.view(base.shape), others)


def _outcome(
    method: expressions.Ties | expressions.DareTies, d_KE: Tensor, base_E: Tensor, sign_E: Tensor, unit: float, least: float
) -> tuple[Tensor, Tensor]:
    """base + scale * mean [E] of the differences with the given signs, and the error it may have before the last addition."""
    count, density = len(d_KE), method.density if isinstance(method, expressions.DareTies) else 1.0
    total_E, mass_E = torch.zeros_like(base_E), torch.zeros_like(base_E)
    for d_E, weight in zip(d_KE, method.weights, strict=True):
        agrees_E = (d_E != 0) & ((d_E > 0) == ((sign_E > 0) == (weight > 0))) & (sign_E.abs() == 1) & (weight != 0)
        total_E += torch.where(agrees_E, d_E * (weight / density), 0.0)
        mass_E += agrees_E.double() * abs(weight)
    step_E = method.scale * torch.where(mass_E != 0, total_E / mass_E, 0.0).masked_fill(sign_E.isnan(), torch.nan)
    # weights, density, products and their sum 2 + 2 + K, the mass 1 + K, the quotient and the scale 3: of one sign all, so relative to it
    underflow = (
        (count + 3) * least * (1 + abs(method.scale) * (1 + 1 / min((abs(weight) for weight in method.weights if weight), default=1.0)))
    )
    return base_E + step_E, step_E.abs() * ((2 * count + 8) * unit) + torch.where(mass_E != 0, underflow, 0.0)


def _doubtful(p_KE: Tensor, sum_E: Tensor) -> Tensor:
    """Indices of the entries whose products, summed in another order, might have a sum of another sign."""
    size_E = p_KE.abs().sum(0)
    close_E = (sum_E.abs() <= size_E * (len(p_KE) * 2.0**-52)) & (size_E > 0)
    if len(p_KE) < 3 or not close_E.any():
        return torch.empty(0, dtype=torch.int64)
    close_U = close_E.nonzero()[:, 0]
    p_KU = p_KE[:, close_U]
    several_U = (p_KU != 0).sum(0) > 2  # the sum of two is rounded once, which keeps its sign
    exact_U = size_E[close_U] <= _lowest_bit(p_KU).amin(0) * 2.0**53
    return close_U[several_U & ~exact_U]


def _lowest_bit(x: Tensor) -> Tensor:
    """The value of the last bit that is set in each number, infinite for 0: every number is a whole multiple of its own."""
    mantissa, exponent = torch.frexp(x)
    whole = (mantissa * 2.0**53).long()
    return torch.ldexp((whole & -whole).double(), exponent - 53).masked_fill(x == 0, torch.inf)
