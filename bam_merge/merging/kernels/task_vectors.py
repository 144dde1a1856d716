"""Kernels of the methods that merge differences from a base (task vectors)."""

import math
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import Tensor

from bam_merge import expressions
from bam_merge.merging.kernels.chunks import Chunk, Chunks, combine, survey, weighted_sum
from bam_merge.merging.kernels.surveys import cosine as cosine_of
from bam_merge.merging.kernels.surveys import dot, gram, kth_largest
from bam_merge.values.streams import uniforms


@combine.register
def task_arithmetic(method: expressions.TaskArithmetic, chunk: Chunk, known: None) -> Tensor:
    """base + scale * sum_i w_i (x_i - base) (arXiv 2212.04089, section 2)."""
    assert chunk.base is not None
    return weighted_sum(chunk.deltas, method.weights).mul_(method.scale).add_(chunk.base)


@combine.register
def dare_linear(method: expressions.DareLinear, chunk: Chunk, known: None) -> Tensor:
    """DARE (arXiv 2311.03099, section 3.2: drop with probability 1 - density, rescale by 1 / density), then the sum of task arithmetic."""
    assert chunk.base is not None
    total_C = weighted_sum(_dropped(method, chunk), tuple(weight / method.density for weight in method.weights))
    return total_C.mul_(method.scale).add_(chunk.base)


def _dropped(method: expressions.DareLinear | expressions.DareTies, chunk: Chunk) -> Iterator[Tensor]:
    """The differences' chunks, with the entries that were drawn, each with probability `density`, and 0 for the others. What is no
    number is not dropped, here and wherever entries are: it is the caller's to find."""
    for d_C, stream in zip(chunk.deltas, method.streams, strict=True):
        keep_C = torch.from_numpy(uniforms(method.seed, stream, chunk.start, d_C.numel()) < method.density)
        yield torch.where(keep_C | ~d_C.isfinite(), d_C, 0.0)


@survey.register
def breadcrumbs_bounds(method: expressions.Breadcrumbs, chunks: Chunks, numel: int) -> list[tuple[float, float]]:
    """For each operand the least and the largest magnitude that are kept (`Breadcrumbs.kept`)."""
    first, last = method.kept(numel)
    if last - first == numel:
        return [(0.0, math.inf)] * len(method.weights)
    found = kth_largest(chunks, _deltas, [[numel - first, numel - last + 1]] * len(method.weights))
    return [(least, most) for least, most in found]


@combine.register
def breadcrumbs(method: expressions.Breadcrumbs, chunk: Chunk, known: list[tuple[float, float]]) -> Tensor:
    """base + scale * sum_i w_i d_i without the largest and the smallest entries of each d_i (arXiv 2312.06795, section 3)."""
    assert chunk.base is not None
    pairs = zip(chunk.deltas, known, strict=True)
    kept = (d_C.masked_fill_((d_C.abs() < least) | ((d_C.abs() > most) & ~d_C.isinf()), 0.0) for d_C, (least, most) in pairs)
    return weighted_sum(kept, method.weights).mul_(method.scale).add_(chunk.base)


@combine.register
def ram(method: expressions.Ram, chunk: Chunk, known: None) -> Tensor:
    """base + mean of the differences that are larger than epsilon, where any is (arXiv 2601.13572)."""
    assert chunk.base is not None
    total_C, count_C = torch.zeros_like(chunk.base), torch.zeros_like(chunk.base)
    for d_C in chunk.deltas:
        active_C = ~(d_C.abs() <= _at_most(method.epsilon, d_C.dtype))  # NaN is active, so that it is found
        total_C += d_C.masked_fill_(~active_C, 0.0)
        count_C += active_C
    return total_C.div_(count_C.clamp_(min=1)).add_(chunk.base)


def _at_most(value: float, dtype: torch.dtype) -> float:
    """The largest number of `dtype` that is not above `value`: comparing with it is comparing with `value`."""
    near = torch.tensor(value, dtype=dtype)
    return float(near if float(near) <= value else torch.nextafter(near, torch.tensor(-math.inf, dtype=dtype)))


# ---- Model Stock -----------------------------------------------------------------------------------------------------------


@survey.register
def model_stock_share(method: expressions.ModelStock, chunks: Chunks, numel: int) -> float:
    """The share t = N c / (1 + (N - 1) c) of the mean, with c the mean cosine between two differences; 0 where that is unbounded."""
    gram_KK = gram(chunks, _deltas)
    count = len(gram_KK)
    cosines = [cosine_of(gram_KK, i, j) for i in range(count) for j in range(i)]
    cosine = math.fsum(cosines) / len(cosines) if cosines else 1.0
    denominator = 1 + (count - 1) * cosine
    return count * cosine / denominator if denominator >= expressions.STOCK_LEAST else 0.0


@combine.register
def model_stock(method: expressions.ModelStock, chunk: Chunk, known: float) -> Tensor:
    """t mean(x_1 ... x_N) + (1 - t) base (arXiv 2403.19522, section 4)."""
    assert chunk.base is not None
    count = len(chunk.operands)
    return weighted_sum([*chunk.operands, chunk.base], (*[known / count] * count, 1 - known))


# ---- TIES --------------------------------------------------------------------------------------------------------------------


@survey.register
def ties_thresholds(method: expressions.Ties, chunks: Chunks, numel: int) -> list[float]:
    """For each operand the magnitude of its k-th largest difference, k = floor(density * numel), at least 1."""
    keep = max(1, math.floor(method.density * numel))
    if keep >= numel:
        return [0.0] * len(method.weights)
    return [least for (least,) in kth_largest(chunks, _deltas, [[keep]] * len(method.weights))]


def _deltas(chunk: Chunk) -> Iterator[Tensor]:
    return chunk.deltas


@combine.register
def ties(method: expressions.Ties, chunk: Chunk, known: list[float]) -> Tensor:
    """base + scale * disjoint mean of the trimmed task vectors (arXiv 2306.01708, section 4).

    Trim keeps every entry whose magnitude reaches the threshold, equal ones included, as the authors' code does; and NaN, which is
    the caller's to find.
    """
    trimmed = [d_C.masked_fill_(d_C.abs() < least, 0.0) for d_C, least in zip(chunk.deltas, known, strict=True)]
    assert chunk.base is not None
    return _disjoint_mean(trimmed, method.weights).mul_(method.scale).add_(chunk.base)


def _disjoint_mean(
    deltas: list[Tensor], weights: tuple[float, ...], density: float = 1.0, shares: tuple[float, ...] | None = None
) -> Tensor:
    """Elect the sign of the weighted sum, then average the non-zero entries that have it, by weight, each divided by `density`.

    `shares` are the weights of the election, where they are not those of the mean.

    A difference of negative weight stands for the opposite one, with the weight's magnitude: so it votes, and so it is averaged. 0 where
    none has it, which is where the sum is 0: a tie gives the base. So that it is the formula that makes a tie and not the rounding of
    float32, the sum is of float64 and whole weights, before the division.
    """
    elected_C = torch.zeros_like(deltas[0], dtype=torch.float64)
    for d_C, share in zip(deltas, shares or expressions.proportion(weights), strict=True):
        elected_C += d_C if share == 1 else d_C.double() * share
    lost_C = elected_C.isnan()
    elected_C = elected_C.sign_().to(deltas[0].dtype)
    total_C, mass_C = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for d_C, weight in zip(deltas, weights, strict=True):
        if weight == 0:
            continue
        agrees_C = ((d_C.sign() if weight > 0 else -d_C.sign()) == elected_C) & (d_C != 0)
        total_C += torch.where(agrees_C, (d_C if density == 1 else d_C / density) * weight, 0.0)
        mass_C += agrees_C.to(mass_C.dtype) * abs(weight)
    return torch.where(mass_C != 0, total_C / torch.where(mass_C != 0, mass_C, 1.0), 0.0).masked_fill_(lost_C, math.nan)


@combine.register
def dare_ties(method: expressions.DareTies, chunk: Chunk, known: None) -> Tensor:
    """DARE (arXiv 2311.03099, section 3.2: drop with probability 1 - density, rescale by 1 / density) in the place of TIES's trim."""
    kept = list(_dropped(method, chunk))
    assert chunk.base is not None
    return _disjoint_mean(kept, method.weights, method.density).mul_(method.scale).add_(chunk.base)


# ---- DELLA -----------------------------------------------------------------------------------------------------------------


@survey.register
def della_sorted(method: expressions.Della, chunks: Chunks, numel: int) -> list[Tensor] | None:
    """For each operand its sorted magnitudes, where the tensor is a single row; the rows of others are ranked as they come."""
    if method.density == 1 or next(chunks()).row is not None:
        return None
    whole = [list(deltas) for deltas in zip(*(chunk.deltas for chunk in chunks()), strict=True)]
    return [_ranked(torch.cat(parts)).sort().values for parts in whole]


@combine.register
def della(method: expressions.Della, chunk: Chunk, known: list[Tensor] | None) -> Tensor:
    """Keep entries with a probability that rises with the rank of their magnitude, rescale each by it (arXiv 2406.11617, section 3)."""
    assert chunk.base is not None
    kept = [_pruned(method, chunk, index, d_C, known) for index, d_C in enumerate(chunk.deltas)]
    return chunk.base + _disjoint_mean(kept, method.weights).mul_(method.scale).to(chunk.base.dtype)


def _pruned(method: expressions.Della, chunk: Chunk, index: int, d_C: Tensor, known: list[Tensor] | None) -> Tensor:
    """The difference's chunk in float64: what is kept divided by the probability that it was, 0 elsewhere.

    The rank of an entry is the number of those in its row that are smaller, and half of the others that are equal.
    """
    if method.density == 1:
        return d_C.double()
    d_RC = d_C.view(-1, chunk.row or d_C.numel())
    if known is None:
        p_RC, columns = _twice_the_ranks(_ranked(d_RC).numpy()), d_RC.shape[1]
    else:
        p_RC, columns = _twice_the_ranks_among(known[index], _ranked(d_RC)), len(known[index])
    p_RC.div_(max(1, columns - 1)).sub_(1).mul_(method.epsilon if columns > 1 else 0.0).add_(method.density)
    keep_RC = torch.from_numpy(uniforms(method.seed, method.streams[index], chunk.start, d_C.numel())).view_as(p_RC) < p_RC
    return torch.where(keep_RC | ~d_RC.isfinite(), d_RC / p_RC, 0.0).flatten()


def _ranked(d_C: Tensor) -> Tensor:
    """The magnitudes that are ranked; what is no number has the rank of infinity."""
    return d_C.abs().nan_to_num_(math.inf, math.inf)


def _twice_the_ranks(x_RC: "numpy.ndarray[Any, Any]") -> Tensor:
    """2 r in float64, r the rank of each element in its row, from 0: of equal ones the first of theirs and the last, added.

    By numpy's sort, which takes a fifth of the time of torch's.
    """
    order_RC = numpy.argsort(x_RC, axis=1)
    sorted_RC = numpy.take_along_axis(x_RC, order_RC, 1)
    first_RC = numpy.broadcast_to(numpy.arange(x_RC.shape[1], dtype=numpy.int32), x_RC.shape).copy()
    last_RC = first_RC.copy()
    equal_RC = sorted_RC[:, 1:] == sorted_RC[:, :-1]
    first_RC[:, 1:][equal_RC] = 0
    last_RC[:, :-1][equal_RC] = x_RC.shape[1]
    first_RC = numpy.maximum.accumulate(first_RC, axis=1)
    first_RC += numpy.minimum.accumulate(last_RC[:, ::-1], axis=1)[:, ::-1]
    numpy.put_along_axis(last_RC, order_RC, first_RC, 1)
    return torch.from_numpy(last_RC).double()


def _twice_the_ranks_among(sorted_N: Tensor, x_RC: Tensor) -> Tensor:
    """The same of some elements of a row that is given whole, in order."""
    left_RC, right_RC = (torch.searchsorted(sorted_N, x_RC, right=right) for right in (False, True))
    return (left_RC + right_RC - 1).double()


# ---- SCE -------------------------------------------------------------------------------------------------------------------


@survey.register
def sce_weights(method: expressions.Sce, chunks: Chunks, numel: int) -> tuple[float, tuple[float, ...]]:
    """(the least deviation that is selected, the models' weights): sums of squares of the selected differences, as shares.

    Where a difference is no number, it is selected, and none of the others there weighs anything.
    """
    least = 0.0
    if method.density < 1:
        apart = sum(int((_deviation(chunk) != 0).sum()) for chunk in chunks())
        keep = math.floor(method.density * apart)
        least = kth_largest(chunks, lambda chunk: [_deviation(chunk)], [[keep]])[0][0] if keep else math.inf
    parts = []
    for chunk in chunks():
        kept = list(_selected(chunk, least))
        lost_C = _lost(kept)
        parts.append([dot(d_C, d_C) for d_C in (d_C.masked_fill_(lost_C, 0.0) for d_C in kept)])
    squares = list(map(math.fsum, zip(*parts, strict=True)))
    total = math.fsum(squares)
    return least, tuple(square / total for square in squares) if total > 0 else (1 / len(squares),) * len(squares)


def _deviation(chunk: Chunk) -> Tensor:
    """The standard deviation over the models of each entry of the differences; 0 where all are equal, and only there.

    From the differences to the first one, in float64: N sum e^2 - (sum e)^2 is N^2 times the variance. Rounded to the computing dtype,
    which leaves no trace of the order of the sums: what is equally far apart is selected alike.
    """
    assert chunk.base is not None
    first_C, *others = (d_C.double() for d_C in chunk.deltas)
    sum_C, squares_C = torch.zeros_like(first_C), torch.zeros_like(first_C)
    for d_C in others:
        d_C.sub_(first_C)
        sum_C += d_C
        squares_C.addcmul_(d_C, d_C)
    count = len(chunk.operands)
    return squares_C.mul_(count).addcmul_(sum_C, sum_C, value=-1).clamp_(min=0).sqrt_().div_(count).to(chunk.base.dtype)


def _lost(deltas: list[Tensor]) -> Tensor:
    """Where one of the differences is no number."""
    lost_C = ~deltas[0].isfinite()
    for d_C in deltas[1:]:
        lost_C |= ~d_C.isfinite()
    return lost_C


def _selected(chunk: Chunk, least: float) -> Iterator[Tensor]:
    """The differences' chunks with 0 where they deviate less than `least`."""
    if least == 0:
        yield from chunk.deltas
        return
    left_C = _deviation(chunk) < least
    for d_C in chunk.deltas:
        yield d_C.masked_fill_(left_C, 0.0)


@combine.register
def sce(method: expressions.Sce, chunk: Chunk, known: tuple[float, tuple[float, ...]]) -> Tensor:
    """base + mean, by the models' weights, of the selected differences that have the sign of their sum (arXiv 2408.07990, section 3.3)."""
    assert chunk.base is not None
    least, weights = known
    kept = list(_selected(chunk, least))
    return _disjoint_mean(kept, weights, shares=(1.0,) * len(weights)).masked_fill_(_lost(kept), math.nan).add_(chunk.base)
