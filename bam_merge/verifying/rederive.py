"""A second, slow way to the same tensors: whole blocks of rows in float64, read with the safetensors library.

verify compares what a merge wrote with this. It shares no code with the way a merge is executed: another reader, another
arithmetic, another precision. Formulas are those of ops.py's records.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bam_merge import expressions
from bam_merge.checkpoints.dtypes import MANTISSA_BITS, SMALLEST_EXPONENT
from bam_merge.checkpoints.pieces import Read, Shape, Slice, numel
from bam_merge.planning.plan import Plan
from bam_merge.values.streams import initialise, uniforms
from bam_merge.values.tensors import TORCH_DTYPES

ROWS_BYTES = 2**20
"""Bytes of one source tensor, as stored, that are compared at a time."""


MAPPED_BYTES = 2**23
"""Bytes that are read of a file before it is opened anew."""


SURVEY_BINS, SURVEY_SORTED = 2**12, 2**20
"""Bins of a histogram, and the most elements that are sorted, where a whole tensor is searched for a threshold."""


class RowReader:
    """Rows of tensors in safetensors files, by the safetensors library; for one thread.

    The library maps files, and the pages that were read of an open map count as this process's memory: so a file is closed after
    MAPPED_BYTES.
    """

    def __init__(self) -> None:
        self._open: dict[Path, tuple[Any, int]] = {}

    def read(self, path: Path, tensor: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a stored tensor, in its own dtype."""
        reader, count = self._open.pop(path, None) or (safe_open(path, "pt"), 0)
        rows: Tensor = reader.get_slice(tensor)[start:stop].clone()
        if count + rows.nbytes < MAPPED_BYTES:
            self._open[path] = (reader, count + rows.nbytes)
        return rows


class SourceTensors:
    """Row blocks of a plan's source tensors."""

    def __init__(self, plan: Plan, reader: RowReader) -> None:
        self.plan, self.reader = plan, reader

    def rows(self, read: Read, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a stored tensor, in its own dtype."""
        checkpoint = self.plan.models[read.source].checkpoint
        return self.reader.read(checkpoint.path / checkpoint.tensors[read.tensor].file, read.tensor, start, stop)

    def piece(self, expr: expressions.Expr, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of what only moves bytes: a stored tensor, a slice of one, several of them fused."""
        if isinstance(expr, Read):
            return self.rows(expr, start, stop)
        if isinstance(expr, Slice):
            block = expr.of.shape[0] // expr.groups
            runs = _runs([expr.rows], start, stop)
            pieces = [self.rows(expr.of, g * block + expr.start + a, g * block + expr.start + b) for g, _, a, b in runs]
        else:
            assert isinstance(expr, expressions.Concat)
            pieces = [self.piece(part, a, b) for part, a, b in concat_runs(expr, start, stop)]
        return torch.cat(pieces)


def _runs(rows: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Where rows [start, stop) of a fused tensor come from, whose blocks hold `rows[i]` rows of part i: (block, part, first, last)."""
    block = sum(rows)
    while start < stop:
        group, offset = divmod(start, block)
        part = 0
        while offset >= rows[part]:
            offset, part = offset - rows[part], part + 1
        count = min(rows[part] - offset, stop - start)
        yield group, part, offset, offset + count
        start += count


def concat_runs(expr: expressions.Concat, start: int, stop: int) -> Iterator[tuple[expressions.Expr, int, int]]:
    """(part, first row, last row) of the pieces that make up rows [start, stop) of `expr`, in order."""
    rows = [part.shape[0] // expr.groups for part in expr.parts]
    for group, part, first, last in _runs(rows, start, stop):
        yield expr.parts[part], group * rows[part] + first, group * rows[part] + last


def row_blocks(shape: Shape, itemsize: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of blocks of rows of about ROWS_BYTES."""
    step = max(1, ROWS_BYTES // max(1, itemsize * math.prod(shape[1:])))
    yield from ((start, min(shape[0], start + step)) for start in range(0, shape[0], step))


def rederive(
    expr: expressions.Expr, sources: SourceTensors, known: Mapping[int, Any], start: int, stop: int
) -> tuple[Tensor, Tensor | None]:
    """Rows [start, stop) of what `expr` means, in float64, and a bound for the error of doing the same in float32 (None: exact)."""
    if isinstance(expr, expressions.Init):
        return initialise(expr.method, expr.shape, expr.seed, expr.name)[start:stop].double(), None
    if isinstance(expr, expressions.Concat):
        derived = [rederive(part, sources, known, a, b) for part, a, b in concat_runs(expr, start, stop)]
        slacks = [torch.zeros_like(value) if slack is None else slack for value, slack in derived]
        return torch.cat([value for value, _ in derived]), torch.cat(slacks)
    if not isinstance(expr, expressions.Merge):
        return sources.piece(expr, start, stop).double(), None
    x_K = [sources.piece(operand, start, stop).double() for _, operand in expr.operands]
    base = sources.piece(expr.base[1], start, stop).double() if expr.base else None
    value, unsure = _merge(expr, x_K, base, known.get(id(expr)), start)
    magnitude = torch.stack([x.abs() for x in (*x_K, *([base] if base is not None else []))]).sum(0)
    gain = 1.0 + _gain(expr.method)
    unit = 2.0**-53 if expr.dtype == "F64" else 2.0**-24
    slack = magnitude * unit * (len(x_K) + 3) * gain
    return value, slack if unsure is None else slack.masked_fill(unsure, float("inf"))


def _gain(method: expressions.Method) -> float:
    """How much a method can enlarge the rounding errors of its operands."""
    match method:
        case expressions.Linear(weights):
            return sum(map(abs, weights))
        case expressions.TaskArithmetic(weights, scale):
            return abs(scale) * sum(map(abs, weights)) * 2
        case expressions.Ties(_, weights, scale):
            return 2 * abs(scale) * len(weights)
        case expressions.DareTies(density=density, weights=weights, scale=scale):
            return 2 * abs(scale) * len(weights) / density
        case _:
            return 2.0


def _merge(merge: expressions.Merge, x_K: list[Tensor], base: Tensor | None, known: Any, start: int) -> tuple[Tensor, Tensor | None]:
    """The merged rows, and where an elected sign hangs on the last digits of float32, so that either outcome is right."""
    method = merge.method
    if isinstance(method, expressions.Mean):
        return torch.stack(x_K).mean(0), None
    if isinstance(method, expressions.Linear):
        return _sum(method.weights, x_K), None
    if isinstance(method, expressions.Slerp):
        return _sum(known, x_K), None
    assert base is not None
    deltas = [x - base for x in x_K]
    if isinstance(method, expressions.TaskArithmetic):
        return base + method.scale * _sum(method.weights, deltas), None
    if isinstance(method, expressions.Ties):
        # the trim is defined on the float32 differences: whether an entry reaches the threshold must not depend on more digits
        deltas = [d * (d.float().abs() >= least) for d, least in zip(deltas, known, strict=True)]
    else:
        first = start * math.prod(merge.shape[1:])
        kept = (torch.from_numpy(uniforms(method.seed, s, first, base.numel()) < method.density) for s in method.streams)
        deltas = [d * keep.view(d.shape) / method.density for d, keep in zip(deltas, kept, strict=True)]
    stacked_K = torch.stack([w * d for w, d in zip(method.weights, deltas, strict=True)])
    weights_K = torch.tensor(method.weights, dtype=torch.float64).view(-1, *[1] * base.dim())
    total = stacked_K.sum(0)
    agree_K = (stacked_K.sign() == total.sign()) & (stacked_K != 0)
    mass = (agree_K * weights_K).sum(0)
    merged = torch.where(mass != 0, (stacked_K * agree_K).sum(0) / mass.where(mass != 0, 1.0), 0.0)
    unsure = (total.abs() <= stacked_K.abs().sum(0) * len(x_K) * 2.0**-23) & stacked_K.any(0)
    return base + method.scale * merged, unsure


def _sum(weights: Sequence[float], x_K: Sequence[Tensor]) -> Tensor:
    return (torch.stack(list(x_K)) * torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * x_K[0].dim())).sum(0)


def survey_all(expr: expressions.Expr, sources: SourceTensors) -> dict[int, Any]:
    """What slerp and TIES must know of whole tensors, by the identity of the Merge, from blocks of rows: an angle, thresholds."""
    known: dict[int, Any] = {}
    for node in expressions.parts(expr):
        if not isinstance(node, expressions.Merge) or not isinstance(node.method, expressions.Slerp | expressions.Ties):
            continue
        if isinstance(node.method, expressions.Slerp):
            known[id(node)] = _slerp_weights(node.method.t, node, sources)
        else:
            assert node.base is not None
            keep = max(1, math.floor(node.method.density * numel(node)))
            known[id(node)] = [
                0.0 if keep >= numel(node) else kth_largest(_differences(node, operand, node.base[1], sources), keep)
                for _, operand in node.operands
            ]
    return known


def _blocks(node: expressions.Merge) -> Iterator[tuple[int, int]]:
    return row_blocks(node.shape, TORCH_DTYPES[node.dtype].itemsize)


def _slerp_weights(t: float, node: expressions.Merge, sources: SourceTensors) -> tuple[float, float]:
    sums = torch.zeros(3, dtype=torch.float64)
    for start, stop in _blocks(node):
        a, b = (sources.piece(operand, start, stop).double().flatten() for _, operand in node.operands)
        sums += torch.stack([a @ b, a @ a, b @ b])
    ab, aa, bb = sums.tolist()
    angle = math.acos(max(-1.0, min(1.0, ab / math.sqrt(aa * bb)))) if aa and bb else 0.0
    if math.sin(angle) < 1e-7:
        return 1 - t, t
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _differences(
    node: expressions.Merge, operand: expressions.Expr, base: expressions.Expr, sources: SourceTensors
) -> Callable[[], Iterator[Tensor]]:
    """Gives the float32 magnitudes of operand - base, block by block, as often as asked."""
    largest = torch.finfo(torch.float32).max  # stands for NaN and infinity, which --allow-nonfinite lets pass

    def blocks() -> Iterator[Tensor]:
        for start, stop in _blocks(node):
            delta = sources.piece(operand, start, stop).double() - sources.piece(base, start, stop).double()
            yield delta.float().abs().nan_to_num(largest, largest).flatten()

    return blocks


def kth_largest(blocks: Callable[[], Iterator[Tensor]], k: int) -> float:
    """The k-th largest of all elements of the blocks, none of them negative.

    Exact in bounded memory: the range that holds it is cut into equal bins again and again, until what is left in it can be sorted
    or is all the same.
    """
    low, high = 0.0, max(float(block.max()) for block in blocks())
    while low < high:
        scale = SURVEY_BINS / (high - low)

        def binned(block: Tensor, low: float = low, high: float = high, scale: float = scale) -> tuple[Tensor, Tensor]:
            inside = block[(block >= low) & (block <= high)]
            return inside, ((inside.double() - low) * scale).long().clamp_(max=SURVEY_BINS - 1)  # rises with the value

        counts = torch.stack([torch.bincount(binned(block)[1], minlength=SURVEY_BINS) for block in blocks()]).sum(0)
        above = counts.flip(0).cumsum(0).flip(0)  # elements of this bin or a higher one
        chosen = int((above >= k).nonzero()[-1])
        k -= int(above[chosen] - counts[chosen])
        kept = (inside[bins == chosen] for inside, bins in map(binned, blocks()))
        if counts[chosen] <= SURVEY_SORTED:
            return float(torch.cat(list(kept)).sort(descending=True).values[k - 1])
        ends = [(float(values.min()), float(values.max())) for values in kept if len(values)]
        low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    return low


def half_ulp(value: Tensor, dtype: str) -> Tensor:
    """Half the distance between neighbouring numbers of `dtype` at `value` [float64]: the error of one correct rounding."""
    exponent = torch.frexp(value).exponent - 1
    result: Tensor = torch.exp2(exponent.clamp(min=SMALLEST_EXPONENT[dtype]).double() - MANTISSA_BITS[dtype] - 1)
    return result


def worst(written: Tensor, value: Tensor, slack: Tensor | None, dtype: str) -> tuple[float, int]:
    """The largest error of `written` against the float64 `value`, in units of what one rounding of `dtype` may cause, and where.

    At most 1 is right; a number rounded twice, or through a narrower type, is above it somewhere.
    """
    error = (written.double() - value).abs()
    allowed = half_ulp(value, dtype) + (0.0 if slack is None else slack)
    same = (written.double() == value) | (written.isnan() & value.isnan())  # infinities, and NaN that --allow-nonfinite let pass
    ratio = torch.where(same, 0.0, torch.where(torch.isfinite(error), error / allowed, float("inf"))).flatten()
    index = int(ratio.argmax())
    return float(ratio[index]), index
