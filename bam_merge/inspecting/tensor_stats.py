"""What values stored tensors hold: streamed in chunks by worker threads, summed in float64, in bounded memory."""

import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from bam_merge.checkpoints.dtypes import DTYPE_BITS
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.header import TensorEntry
from bam_merge.checkpoints.reading import read_runs
from bam_merge.values.arrays import BITS, INTEGERS64, Array
from bam_merge.values.tensors import buffer
from bam_merge.values.threads import available_processors
from bam_merge.values.torch_threads import one_torch_thread
from bam_merge.values.wide import ABOVE, LARGEST, ZERO, Wide, figure

CHUNK = 2**20
"""Elements that a worker holds at a time."""


BINS = 16
"""Bins of the histogram, over the mean and four standard deviations on each side; what is further out is in the end bins."""


TAME = 1e-130, 1e145
"""A chunk whose largest magnitude lies between has moments that float64 holds."""


_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


COMPUTED = {name: getattr(torch, torch_name) for name, torch_name in _DTYPES.items() if hasattr(torch, torch_name)}
"""The dtypes whose values are looked at; the others (below a byte, complex) are counted and digested."""


@dataclass(frozen=True)
class TensorStats:
    """One stored tensor. Figures are over the finite elements; `std` is that of the population, `norm` the Euclidean one.

    `min` and `max` of 64-bit integers are integers, which float64 would round; `norm` is infinity where float64 does not hold it.
    `zeros` counts both signs, `negative_zeros` one. `zero_rows` is None for what is no matrix, `limit` (the largest magnitude over
    the dtype's largest) for what is no float. `histogram` has BINS counts between its two `edges`. Only `digest` (XXH3-128 of the
    bytes) is there for dtypes that are not computed.
    """

    digest: str
    count: int
    finite: int | None = None
    nan: int = 0
    inf: int = 0
    zeros: int = 0
    negative_zeros: int = 0
    zero_rows: int | None = None
    min: float | int | None = None
    max: float | int | None = None
    mean: float | None = None
    std: float | None = None
    norm: float | None = None
    limit: float | None = None
    constant: bool = False
    edges: tuple[float, float] | None = None
    histogram: tuple[int, ...] = ()

    def document(self) -> dict[str, Any]:
        """As `inspect --json` prints it."""
        beyond = {"norm": ABOVE} if self.norm == math.inf else {}
        document = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            **document,
            "norm": figure(self.norm),
            "out_of_range": beyond,
            "edges": list(self.edges) if self.edges else None,
            "histogram": list(self.histogram),
        }


def tensor_stats(checkpoint: Checkpoint, names: Iterable[str], workers: int | None = None) -> dict[str, TensorStats]:
    """The statistics of the named tensors. Raises CheckpointError when a file cannot be read or has changed."""
    ordered = sorted((checkpoint.tensors[name] for name in names), key=lambda entry: -entry.nbytes)
    with (
        one_torch_thread() as single_threaded,
        ThreadPoolExecutor(workers or min(8, available_processors()), initializer=single_threaded) as pool,
    ):
        found = list(pool.map(lambda entry: _stats(checkpoint, entry), ordered))
    return {entry.name: stats for entry, stats in zip(ordered, found, strict=True)}


def duplicates(stats: Mapping[str, TensorStats], checkpoint: Checkpoint) -> list[list[str]]:
    """Groups of tensors with the same dtype, shape and bytes, in the checkpoint's order."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, entry in checkpoint.tensors.items():
        if name in stats and entry.nbytes:
            groups.setdefault((stats[name].digest, entry.dtype, entry.shape), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


# ---- one tensor ------------------------------------------------------------------------------------------------------------


def _stats(checkpoint: Checkpoint, entry: TensorEntry) -> TensorStats:
    if entry.dtype not in COMPUTED:
        digest = xxhash.xxh3_128()
        for first in range(0, entry.nbytes, CHUNK):
            digest.update(_bytes(checkpoint, entry, first, min(entry.nbytes, first + CHUNK))[1])
        return TensorStats(digest.hexdigest(), entry.numel)
    moments = _Moments(entry)
    kept = None
    for start, stop in _spans(entry):
        values_C = moments.add(*_bytes(checkpoint, entry, start * moments.itemsize, stop * moments.itemsize), start)
        kept = values_C if stop - start == entry.numel else None
    edges = moments.edges()
    counts = [0] * BINS
    if edges:
        chunks = [kept] if kept is not None else (moments.widen(_read(checkpoint, entry, *span)) for span in _spans(entry))
        for chunk in chunks:
            for index, count in enumerate(_histogram(chunk, edges)):
                counts[index] += count
    return moments.result(edges, tuple(counts) if edges else ())


def _spans(entry: TensorEntry) -> Iterator[tuple[int, int]]:
    """Chunks of whole rows, or of parts of one row where rows are long."""
    row = entry.numel // entry.shape[0] if entry.numel and len(entry.shape) > 1 else entry.numel
    if row > CHUNK:
        for start in range(0, entry.numel, row):
            yield from ((first, min(start + row, first + CHUNK)) for first in range(start, start + row, CHUNK))
    elif row:
        size = CHUNK // row * row
        yield from ((start, min(entry.numel, start + size)) for start in range(0, entry.numel, size))


def _bytes(checkpoint: Checkpoint, entry: TensorEntry, first: int, last: int) -> tuple[Tensor, memoryview]:
    bytes_B, view = buffer(last - first)
    read_runs(checkpoint, entry, [(first, last - first)], view)
    return bytes_B, view


def _read(checkpoint: Checkpoint, entry: TensorEntry, start: int, stop: int) -> Tensor:
    size = DTYPE_BITS[entry.dtype] // 8
    return _bytes(checkpoint, entry, start * size, stop * size)[0]


class _Moments:
    """Running figures of one tensor; means and squared deviations of chunks are joined as in Chan, Golub and LeVeque (1983), eq. 2.1."""

    def __init__(self, entry: TensorEntry) -> None:
        self.entry, self.dtype = entry, COMPUTED[entry.dtype]
        self.itemsize = DTYPE_BITS[entry.dtype] // 8
        self.row = entry.numel // entry.shape[0] if entry.numel and len(entry.shape) > 1 else 0
        self.rows_in_use: set[int] = set()
        self.full_rows = 0
        self.digest = xxhash.xxh3_128()
        self.finite = self.nan = self.inf = self.zeros = self.negative_zeros = 0
        self.min: float | int = math.inf
        self.max: float | int = -math.inf
        self.mean = self.deviations = self.squares = ZERO

    def widen(self, bytes_B: Tensor) -> Tensor:
        """The elements in float64."""
        values = bytes_B.view(self.dtype)
        if self.dtype.itemsize == 1 and self.dtype.is_floating_point:
            values = values.to(torch.float32)
        return values.to(torch.float64)

    def add(self, bytes_B: Tensor, view: memoryview, start: int) -> Tensor:
        """Take in a chunk that begins at element `start`; gives it back in float64."""
        self.digest.update(view)
        values_C = self.widen(bytes_B)
        zero_C = values_C == 0
        zeros = int(zero_C.sum())
        self.zeros += zeros
        if zeros:
            self.negative_zeros += int((zero_C & torch.signbit(values_C)).sum())
        self._rows(zero_C, start)
        finite_C = values_C
        if not math.isfinite(float(values_C.sum())):
            self.nan += int(values_C.isnan().sum())
            self.inf += int(values_C.isinf().sum())
            finite_C = values_C[values_C.isfinite()]
        if finite_C.numel():
            low, high = (value.item() for value in torch.aminmax(finite_C))
            exact_C = None
            if self.entry.dtype in INTEGERS64:
                exact_C = np.frombuffer(view, BITS[self.entry.dtype])
                low, high = int(exact_C.min()), int(exact_C.max())
            self.min, self.max = min(self.min, low), max(self.max, high)
            largest = max(abs(low), abs(high))
            if exact_C is not None and largest > 2**53:
                self._join_wide(exact_C.astype(Wide))
            elif largest and not TAME[0] < largest < TAME[1]:
                self._join_wide(finite_C.numpy().astype(Wide))
            else:
                self._join(finite_C)
        return values_C

    def _join(self, values_C: Tensor) -> None:
        mean = float(values_C.mean())
        centred_C = values_C - mean
        self._add(values_C.numel(), Wide(mean), float(torch.dot(centred_C, centred_C)), float(torch.dot(values_C, values_C)))

    def _join_wide(self, values_C: Array) -> None:
        """The same where float64 has not the range, or not the digits."""
        apart_C = values_C - values_C[0]  # the mean of 64-bit integers may need more than 64 bits
        centred_C = apart_C - apart_C.mean()
        self._add(len(values_C), values_C[0] + apart_C.mean(), np.dot(centred_C, centred_C), np.dot(values_C, values_C))

    def _add(self, count: int, mean: Any, deviations: Any, squares: Any) -> None:
        total, step = self.finite + count, mean - self.mean
        self.deviations = self.deviations + deviations + step * step * self.finite * count / total
        self.squares = self.squares + squares
        self.mean = self.mean + step * count / total
        self.finite = total

    def _rows(self, zero_C: Tensor, start: int) -> None:
        if not self.row:
            return
        if zero_C.numel() % self.row == 0:
            self.full_rows += int((~zero_C.view(-1, self.row).all(1)).sum())
        elif not bool(zero_C.all()):
            self.rows_in_use.add(start // self.row)

    def edges(self) -> tuple[float, float] | None:
        """The histogram's range; None where there is nothing to spread."""
        if not self.finite or self.min == self.max:
            return None
        low, high = (max(-LARGEST, min(LARGEST, float(self.mean + sign * 4 * self.std))) for sign in (-1, 1))
        return low, high

    @property
    def std(self) -> Any:
        return np.sqrt(self.deviations / self.finite)

    def result(self, edges: tuple[float, float] | None, histogram: tuple[int, ...]) -> TensorStats:
        entry, some = self.entry, self.finite > 0
        largest = max(abs(self.min), abs(self.max)) if some else 0.0
        return TensorStats(
            digest=self.digest.hexdigest(),
            count=entry.numel,
            finite=self.finite,
            nan=self.nan,
            inf=self.inf,
            zeros=self.zeros,
            negative_zeros=self.negative_zeros,
            zero_rows=entry.shape[0] - self.full_rows - len(self.rows_in_use) if self.row else None,
            min=self.min if some else None,
            max=self.max if some else None,
            mean=float(self.mean) if some else None,
            std=float(self.std) if some else None,
            norm=float(np.sqrt(self.squares)) if some else None,
            limit=largest / torch.finfo(self.dtype).max if self.dtype.is_floating_point and some else None,
            constant=some and self.min == self.max and self.finite == entry.numel,
            edges=edges,
            histogram=histogram,
        )


def _histogram(values_C: Tensor, edges: tuple[float, float]) -> list[int]:
    finite_C = values_C[values_C.isfinite()]
    exponent = math.frexp(max(map(abs, edges)))[1]
    if not -900 < exponent < 1000:  # a bin's width, or its inverse, would be beyond float64: the same bins of numbers of about 1
        half, rest = math.ldexp(1, -exponent // 2), math.ldexp(1, -exponent - (-exponent // 2))
        finite_C, edges = finite_C * half * rest, (edges[0] * half * rest, edges[1] * half * rest)
    return [int(count) for count in torch.histc(finite_C.clamp(*edges), BINS, *edges)]
