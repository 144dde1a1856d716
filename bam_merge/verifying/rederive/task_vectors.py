"""The second way to the methods that merge differences from a base (task vectors)."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bam_merge import expressions
from bam_merge.checkpoints.pieces import numel
from bam_merge.values.streams import uniforms
from bam_merge.verifying.election import elect
from bam_merge.verifying.rederive.deriving import COMPUTING, COSINE_ERROR, Rows, blocks_of, derive, difference, survey_anew, weighed_sum
from bam_merge.verifying.rederive.thresholds import kth_largest
from bam_merge.verifying.rounding import Derived, Other, half_ulp, nearest
from bam_merge.verifying.rows import SourceTensors


@derive.register
def _task_arithmetic(method: expressions.TaskArithmetic, rows: Rows) -> Derived:
    return _added(rows.deltas, method.weights, method.scale, rows)


@derive.register
def _ties(method: expressions.Ties, rows: Rows) -> Derived:
    kept = [d.masked_fill(d.abs() < least, 0.0) for d, least in zip(rows.deltas, rows.known, strict=True)]
    return elect(method, kept, rows.start(), rows.computing.unit, rows.computing.least)


def _drawn(method: expressions.DareLinear | expressions.DareTies, rows: Rows) -> list[Tensor]:
    """The differences with 0 for what is dropped, which nothing is that is no number."""
    count = rows.start().numel()
    masks = (torch.from_numpy(uniforms(method.seed, s, rows.first, count) < method.density) for s in method.streams)
    return [d.masked_fill(d.isfinite() & ~mask.view(d.shape), 0.0) for d, mask in zip(rows.deltas, masks, strict=True)]


@derive.register
def _dare_ties(method: expressions.DareTies, rows: Rows) -> Derived:
    return elect(method, _drawn(method, rows), rows.start(), rows.computing.unit, rows.computing.least)


@derive.register
def _dare_linear(method: expressions.DareLinear, rows: Rows) -> Derived:
    return _added([d / method.density for d in _drawn(method, rows)], method.weights, method.scale, rows)


@derive.register
def _breadcrumbs(method: expressions.Breadcrumbs, rows: Rows) -> Derived:
    bounds = zip(rows.deltas, rows.known, strict=True)
    kept = [d.masked_fill(d.isfinite() & ((d.abs() < least) | (d.abs() > most)), 0.0) for d, (least, most) in bounds]
    return _added(kept, method.weights, method.scale, rows)


@derive.register
def _ram(method: expressions.Ram, rows: Rows) -> Derived:
    d_K = torch.stack(rows.deltas)
    active_K = d_K.abs() > method.epsilon
    count = active_K.sum(0)
    step = torch.nanmean(d_K.where(active_K, torch.nan), 0).where(count > 0, 0.0)
    lost = d_K.isnan().any(0)
    size = d_K.abs().where(active_K, 0.0).sum(0) / count.clamp(min=1)
    return Derived(rows.start() + step.masked_fill(lost, torch.nan), size * (len(d_K) + 2) * rows.computing.unit + 2 * rows.computing.least)


@derive.register
def _model_stock(method: expressions.ModelStock, rows: Rows) -> Derived:
    """As base + t mean(d): the kernel mixes base and mean."""
    (share, error), computing, start = rows.known, rows.computing, rows.start()
    count, x_K = len(rows.operands), rows.wide
    step = weighed_sum([1 / count] * count, x_K) - start
    size = weighed_sum([abs(share) / count] * count, [x.abs() for x in x_K]) + abs(1 - share) * start.abs()
    return Derived(start + share * step, size * (count + 4) * computing.unit + step.abs() * error + 2 * (count + 2) * computing.least)


@derive.register
def _della(method: expressions.Della, rows: Rows) -> Derived:
    kept = [_pruned(method, rows, index, delta) for index, delta in enumerate(rows.deltas)]
    plain = expressions.Ties(1.0, method.weights, method.scale)
    return elect(plain, kept, rows.start(), rows.computing.unit, rows.computing.least)


def _pruned(method: expressions.Della, rows: Rows, index: int, delta: Tensor) -> Tensor:
    """A difference after DELLA's dropping: what is kept, divided by its probability."""
    if method.density == 1:
        return delta
    size = torch.where(delta.isnan(), torch.inf, delta.abs())
    if rows.known is None:
        rank, columns = _mid_ranks(size), delta.shape[-1]
    else:
        (values, ranks), columns = rows.known[index]
        rank = ranks[torch.searchsorted(values, size.contiguous())]
    shift = 2 * rank / (columns - 1) - 1 if columns > 1 else torch.zeros_like(rank)
    p = method.density + method.epsilon * shift
    drawn = torch.from_numpy(uniforms(method.seed, method.streams[index], rows.first, delta.numel())).view(delta.shape)
    return torch.where(delta.isfinite() & (drawn >= p), 0.0, delta / p)


def _mid_ranks(x: Tensor) -> Tensor:
    """The rank of every element in its row (the last axis), from 0; of equal ones the mean of the ranks that they have together.

    It is the number of those that are smaller, and half of the others that are equal.
    """
    sorted_ = x.sort(dim=-1).values
    below = torch.searchsorted(sorted_, x.contiguous())
    return (below + torch.searchsorted(sorted_, x.contiguous(), right=True) - 1).double() / 2


@derive.register
def _sce(method: expressions.Sce, rows: Rows) -> Derived:
    """Where rounding decides whether an entry is selected, either is right."""
    least, weights, error = rows.known
    deltas, computing = rows.deltas, rows.computing
    deviation = _deviation(deltas)
    edge = least - float(half_ulp(torch.tensor([least], dtype=torch.float64), computing.dtype)) if math.isfinite(least) else math.inf
    selected = ~(nearest(deviation, computing.dtype) < least)
    plain = expressions.Ties(1.0, weights, 1.0)

    def outcome(kept: list[Tensor], start: Tensor) -> Derived:
        lost = ~torch.stack(kept).isfinite().all(0)
        result = elect(plain, kept, start, computing.unit + error, computing.least, shares=(1.0,) * len(weights))
        return replace(result, value=result.value.masked_fill(lost, torch.nan))

    result = outcome([d.where(selected, 0.0) for d in deltas], rows.start())
    doubtful = ((deviation - edge).abs() <= least * 2.0**-46).flatten().nonzero()[:, 0]
    if 0 < least < math.inf and len(doubtful):
        start = rows.start().flatten()[doubtful]
        kept = outcome([d.flatten()[doubtful] for d in deltas], start)
        assert kept.slack is not None
        result.others.append(Other(doubtful, kept.value, kept.slack))
        result.others.append(Other(doubtful, start, torch.zeros_like(start)))
    return result


def _deviation(deltas: list[Tensor]) -> Tensor:
    """The standard deviation over the models of each entry, from the differences between every two; 0 where all are equal."""
    count, total = len(deltas), torch.zeros_like(deltas[0])
    for index, one in enumerate(deltas):
        for other in deltas[:index]:
            total += (one - other) ** 2
    return total.sqrt() / count


def _added(deltas: list[Tensor], weights: Sequence[float], scale: float, rows: Rows) -> Derived:
    """base + scale * sum of weighted differences."""
    count, computing = len(deltas), rows.computing
    slack = weighed_sum([abs(scale * w) * (count + 5) * computing.unit for w in weights], [d.abs() for d in deltas])
    value = rows.start() + scale * weighed_sum(weights, deltas)
    return Derived(value, slack + 2 * (count + 1) * (1 + abs(scale)) * computing.least)


@survey_anew.register
def _thresholds(method: expressions.Ties, node: expressions.Merge, sources: SourceTensors) -> list[float]:
    """The magnitude from which each operand's differences are kept."""
    assert node.base is not None
    keep = max(1, math.floor(method.density * numel(node)))
    if keep >= numel(node):
        return [0.0] * len(node.operands)
    return [kth_largest(magnitudes(node, operand, node.base[1], sources), keep) for _, operand in node.operands]


@survey_anew.register
def _crumb_bounds(method: expressions.Breadcrumbs, node: expressions.Merge, sources: SourceTensors) -> list[tuple[float, float]]:
    """The least and the largest magnitude of each operand's differences that are kept."""
    assert node.base is not None
    size = numel(node)
    target = size if method.density >= 1 else max(1, math.floor(method.density * size))
    below = max(0, size - target - math.floor(method.gamma * size))
    if target == size:
        return [(0.0, math.inf)] * len(node.operands)
    found = []
    for _, operand in node.operands:
        blocks = magnitudes(node, operand, node.base[1], sources)
        found.append((kth_largest(blocks, size - below), kth_largest(blocks, size - below - target + 1)))
    return found


@survey_anew.register
def _stock_share(method: expressions.ModelStock, node: expressions.Merge, sources: SourceTensors) -> tuple[float, float]:
    """Model Stock's share, and how far another right way to the cosines may be from it."""
    count = len(node.operands)
    products = torch.zeros(count, count, dtype=torch.float64)
    for deltas in difference_blocks(node, sources):
        products += torch.stack([(one[None] * torch.stack(deltas)).sum(1) for one in deltas])
    lengths = products.diagonal().sqrt()
    cosines = (products / torch.outer(lengths, lengths)).nan_to_num(0.0).clamp(-1, 1).fill_diagonal_(0)
    mean = float(cosines.sum()) / (count * (count - 1)) if count > 1 else 1.0

    def at(cosine: float) -> float:
        bottom = 1 + (count - 1) * cosine
        return 0.0 if bottom < expressions.STOCK_LEAST else count * cosine / bottom

    error = COSINE_ERROR[COMPUTING[expressions.in_float64(node)].dtype]
    return at(mean), max(abs(at(mean + way) - at(mean)) for way in (-error, error))


@survey_anew.register
def _sorted_row(
    method: expressions.Della, node: expressions.Merge, sources: SourceTensors
) -> list[tuple[tuple[Tensor, Tensor], int]] | None:
    """Of a tensor that is a single row the magnitudes of each operand's differences, in order, and their ranks; and how many there are."""
    if method.density == 1 or len(node.shape) > 1:
        return None
    whole = [torch.cat(parts).abs() for parts in zip(*difference_blocks(node, sources), strict=True)]
    found = []
    for x in (torch.where(x.isnan(), torch.inf, x) for x in whole):
        values, order = x.sort()
        ranks = _mid_ranks(x)[order]  # of several equal ones any, as they have one rank
        found.append(((values, ranks), len(x)))
    return found


@survey_anew.register
def _selection(method: expressions.Sce, node: expressions.Merge, sources: SourceTensors) -> tuple[float, tuple[float, ...], float]:
    """The least deviation that is selected, as the merge rounds it; the models' weights; and a bound for the weights' relative error."""
    computing = COMPUTING[expressions.in_float64(node)]
    count, least = len(node.operands), 0.0

    def deviations() -> Iterator[Tensor]:
        for deltas in difference_blocks(node, sources):
            yield nearest(_deviation(deltas), computing.dtype).nan_to_num(torch.finfo(computing.torch).max)

    if method.density < 1:
        keep = math.floor(method.density * sum(int((block != 0).sum()) for block in deviations()))
        least = kth_largest(deviations, keep) if keep else math.inf
    squares = [0.0] * count
    for deltas in difference_blocks(node, sources):
        counted = ~(nearest(_deviation(deltas), computing.dtype) < least) & torch.stack(deltas).isfinite().all(0)
        squares = [total + float((d.where(counted, 0.0) ** 2).sum()) for total, d in zip(squares, deltas, strict=True)]
    total = sum(squares)
    weights = tuple(square / total for square in squares) if total > 0 else (1 / count,) * count
    return least, weights, COSINE_ERROR[computing.dtype]


def difference_blocks(node: expressions.Merge, sources: SourceTensors) -> Iterator[list[Tensor]]:
    """The operands' differences from the base, flat, rounded as they are computed, block by block."""
    assert node.base is not None
    computing = COMPUTING[expressions.in_float64(node)]
    for start, stop in blocks_of(node):
        base = sources.piece(node.base[1], start, stop)
        yield [difference(sources.piece(operand, start, stop), base, computing).flatten() for _, operand in node.operands]


def magnitudes(
    node: expressions.Merge, operand: expressions.Expr, base: expressions.Expr, sources: SourceTensors
) -> Callable[[], Iterator[Tensor]]:
    """Gives the magnitudes of operand - base, rounded as they are computed, block by block, as often as asked."""
    computing = COMPUTING[expressions.in_float64(node)]
    largest = torch.finfo(computing.torch).max  # stands for NaN and infinity, which --allow-nonfinite lets pass

    def blocks() -> Iterator[Tensor]:
        for start, stop in blocks_of(node):
            delta = difference(sources.piece(operand, start, stop), sources.piece(base, start, stop), computing)
            yield delta.abs().nan_to_num(largest, largest).flatten()

    return blocks
