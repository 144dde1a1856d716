"""A second, slow way to the same tensors: whole blocks of rows in float64, read with the safetensors library.

verify compares what a merge wrote with this. It shares no code with the way a merge is executed: another reader, another
arithmetic, another precision. Formulas are those of ops.py's records.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bam_merge import expressions
from bam_merge.checkpoints.dtypes import DTYPE_BITS
from bam_merge.checkpoints.pieces import Read, Shape, Slice, numel
from bam_merge.planning.plan import Plan
from bam_merge.values.streams import initialise, uniforms
from bam_merge.values.tensors import TORCH_DTYPES
from bam_merge.verifying.election import elect
from bam_merge.verifying.rounding import Derived, Other

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

    def read(self, path: Path, tensor: str, start: int, stop: int, dtype: str) -> Tensor:
        """Rows [start, stop) of a stored tensor, in its own dtype; of elements smaller than a byte, which the library does not know, and
        of truth values, which it may make 0 and 1, the bytes."""
        if DTYPE_BITS[dtype] < 8 or dtype == "BOOL":
            return _stored_bytes(path, tensor, start, stop, DTYPE_BITS[dtype])
        reader, count = self._open.pop(path) if path in self._open else (_opened(path), 0)
        rows: Tensor = reader.get_slice(tensor)[start:stop].clone()
        if count + rows.nbytes < MAPPED_BYTES:
            self._open[path] = (reader, count + rows.nbytes)
        return rows


def _stored_bytes(path: Path, tensor: str, start: int, stop: int, bits: int) -> Tensor:
    """The bytes in which rows [start, stop) of a tensor with elements of so many bits lie."""
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entry = json.loads(stream.read(length))[tensor]
        row = math.prod(entry["shape"][1:]) * bits
        first, last = start * row // 8, -(-stop * row // 8)
        stream.seek(8 + length + entry["data_offsets"][0] + first)
        return torch.frombuffer(bytearray(stream.read(last - first)), dtype=torch.uint8)


def _opened(path: Path) -> Any:
    """The library's reader of a file. It takes only names that are UTF-8, so another is named by a descriptor."""
    if os.fsencode(path) == str(path).encode(errors="replace"):
        return safe_open(path, "pt")
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return safe_open(f"/proc/self/fd/{descriptor}", "pt")
    finally:
        os.close(descriptor)


class SourceTensors:
    """Row blocks of a plan's source tensors."""

    def __init__(self, plan: Plan, reader: RowReader) -> None:
        self.plan, self.reader = plan, reader

    def rows(self, read: Read, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a stored tensor, in its own dtype."""
        checkpoint = self.plan.models[read.source].checkpoint
        return self.reader.read(checkpoint.path / checkpoint.tensors[read.tensor].file, read.tensor, start, stop, read.dtype)

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


def row_blocks(shape: Shape, itemsize: float) -> Iterator[tuple[int, int]]:
    """(start, stop) of blocks of rows of about ROWS_BYTES."""
    step = max(1, ROWS_BYTES // max(1, int(itemsize * math.prod(shape[1:]))))
    yield from ((start, min(shape[0], start + step)) for start in range(0, shape[0], step))


def rederive(expr: expressions.Expr, sources: SourceTensors, known: Mapping[int, Any], start: int, stop: int, dtype: str) -> Derived:
    """Rows [start, stop) of what `expr` means, in float64, with what rounding may make of them on the way to `dtype`."""
    if isinstance(expr, expressions.Init):
        wide = torch.float64 if expr.dtype == "F64" else torch.float32
        return Derived(initialise(expr.method, expr.shape, expr.seed, expr.name, wide)[start:stop].double())
    if isinstance(expr, expressions.Concat):
        return _joined([rederive(part, sources, known, a, b, dtype) for part, a, b in concat_runs(expr, start, stop)])
    if not isinstance(expr, expressions.Merge):
        return Derived(sources.piece(expr, start, stop).double())
    computing = COMPUTING[expressions.in_float64(expr)]
    operands = [sources.piece(operand, start, stop) for _, operand in expr.operands]
    base = sources.piece(expr.base[1], start, stop) if expr.base else None
    derived = _merge(expr, operands, base, known.get(id(expr)), start, computing)
    assert derived.slack is not None
    if dtype != "F32" or computing.dtype != "F32":  # the last operation rounds as well as the writer; in float64 ours does too
        derived.slack += derived.value.abs() * computing.unit
        for other in derived.others:
            other.slack += other.value.abs() * computing.unit
    return derived


@dataclass(frozen=True)
class Computing:
    """What a merge is computed in. `unit` bounds the relative error of one operation, ours in float64 included; `least` an underflow's."""

    dtype: str
    torch: torch.dtype
    unit: float
    least: float


COMPUTING = {
    False: Computing("F32", torch.float32, 2.0**-24 * (1 + 2.0**-20), 2.0**-149),
    True: Computing("F64", torch.float64, 2.0**-52 * (1 + 2.0**-20), 2.0**-1074),
}
"""By whether a source is float64."""


def _joined(parts: list[Derived]) -> Derived:
    """The parts one below the other."""
    slacks = [torch.zeros_like(part.value) if part.slack is None else part.slack for part in parts]
    exact = all(part.slack is None for part in parts)
    result = Derived(torch.cat([part.value for part in parts]), None if exact else torch.cat(slacks))
    place = 0
    for part in parts:
        result.others += [Other(other.index + place, other.value, other.slack) for other in part.others]
        place += part.value.numel()
    return result


def _merge(merge: expressions.Merge, operands: list[Tensor], base: Tensor | None, known: Any, start: int, computing: Computing) -> Derived:
    """The merged rows. `slack` is without the last operation: so many roundings, each relative to what it rounds at most."""
    method, count, unit = merge.method, len(operands), computing.unit
    if base is None:
        x_K = [x.double() for x in operands]
        if isinstance(method, expressions.Mean):
            return Derived(torch.stack(x_K).mean(0), _sum([1.0] * count, [x.abs() for x in x_K]) * ((count - 1) / count * unit))
        weights, errors = (method.weights, (0.0,) * count) if isinstance(method, expressions.Linear) else known
        sizes = [x.abs() for x in x_K]
        slack = _sum([abs(w) * (count + 1) * unit + error for w, error in zip(weights, errors, strict=True)], sizes)
        return Derived(_sum(weights, x_K), slack + 2 * count * computing.least)
    # every difference is one operation, whose rounding IEEE 754 fixes: what follows is defined on the rounded differences
    deltas = [_difference(x, base, computing) for x in operands]
    if isinstance(method, expressions.TaskArithmetic):
        slack = _sum([abs(method.scale * w) * (count + 4) * unit for w in method.weights], [d.abs() for d in deltas])
        value = base.double() + method.scale * _sum(method.weights, deltas)
        return Derived(value, slack + 2 * (count + 1) * (1 + abs(method.scale)) * computing.least)
    assert isinstance(method, expressions.Ties | expressions.DareTies)
    if isinstance(method, expressions.Ties):
        kept = [d.masked_fill(d.abs() < least, 0.0) for d, least in zip(deltas, known, strict=True)]
    else:
        first = start * math.prod(merge.shape[1:])
        masks = (torch.from_numpy(uniforms(method.seed, s, first, base.numel()) < method.density) for s in method.streams)
        kept = [d.where(mask.view(d.shape), 0.0) for d, mask in zip(deltas, masks, strict=True)]
    return elect(method, kept, base.double(), computing.unit, computing.least)


def _difference(x: Tensor, base: Tensor, computing: Computing) -> Tensor:
    """x - base as the computing dtype rounds it, in float64."""
    return (x.to(computing.torch) - base.to(computing.torch)).double()


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


ANGLE_ERROR = 2.0**-50
"""How much two correct ways to the cosine of an angle between tensors may differ."""


def _slerp_weights(t: float, node: expressions.Merge, sources: SourceTensors) -> tuple[list[float], list[float]]:
    """The two weights, and how much each may differ for the rounding of the angle: near opposite tensors that is a lot."""
    sums: list[list[float]] = []
    for start, stop in _blocks(node):
        a, b = (sources.piece(operand, start, stop).double().flatten() for _, operand in node.operands)
        sums.append([float((x * y).sum()) for x, y in ((a, b), (a, a), (b, b))])
    ab, aa, bb = map(math.fsum, zip(*sums, strict=True))
    cosine = ab / (math.sqrt(aa) * math.sqrt(bb)) if aa and bb else 1.0

    def at(cosine: float) -> tuple[float, float]:
        angle = math.acos(max(-1.0, min(1.0, cosine)))
        if math.sin(angle) < 1e-7:
            return 1 - t, t
        return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)

    weights = at(cosine)
    around = [at(cosine - ANGLE_ERROR), at(cosine + ANGLE_ERROR)]
    return list(weights), [max(abs(other[i] - weights[i]) for other in around) for i in (0, 1)]


def _differences(
    node: expressions.Merge, operand: expressions.Expr, base: expressions.Expr, sources: SourceTensors
) -> Callable[[], Iterator[Tensor]]:
    """Gives the magnitudes of operand - base, rounded as they are computed, block by block, as often as asked."""
    computing = COMPUTING[expressions.in_float64(node)]
    largest = torch.finfo(computing.torch).max  # stands for NaN and infinity, which --allow-nonfinite lets pass

    def blocks() -> Iterator[Tensor]:
        for start, stop in _blocks(node):
            delta = _difference(sources.piece(operand, start, stop), sources.piece(base, start, stop), computing)
            yield delta.abs().nan_to_num(largest, largest).flatten()

    return blocks


def kth_largest(blocks: Callable[[], Iterator[Tensor]], k: int) -> float:
    """The k-th largest of all elements of the blocks, none of them negative.

    Exact in bounded memory: the range that holds it is cut into equal bins again and again, until what is left in it can be sorted
    or is all the same.
    """
    low, high = 0.0, max(float(block.max()) for block in blocks())
    while low < high:

        def binned(block: Tensor, low: float = low, high: float = high) -> tuple[Tensor, Tensor]:
            inside = block[(block >= low) & (block <= high)]
            return inside, ((inside.double() - low) / (high - low) * SURVEY_BINS).long().clamp_(max=SURVEY_BINS - 1)  # rises with the value

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
