"""What values stored tensors hold: streamed in chunks by worker threads, summed in float64, in bounded memory."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from bam_merge.checkpoints.dtypes import DTYPE_BITS, DTYPES, MEASURED
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.header import TensorEntry
from bam_merge.checkpoints.pieces import Leaf, numel
from bam_merge.checkpoints.reading import read_piece, read_runs
from bam_merge.values.arrays import INTEGERS64, Array, is_float, widen
from bam_merge.values.threads import by_size, scratch
from bam_merge.values.wide import ABOVE, LARGEST, ZERO, Wide, figure

CHUNK = 2**18
"""Elements that a worker holds at a time: few enough to stay in a processor's cache, in float64."""


BINS = 16
"""Bins of the histogram, over the mean and four standard deviations on each side; what is further out is in the end bins."""


TAME = 1e-130, 1e145
"""A chunk whose largest magnitude lies between has moments that float64 holds."""


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
    entries = [checkpoint.tensors[name] for name in names]
    found = by_size(entries, lambda entry: _stats(checkpoint, entry), lambda entry: entry.nbytes, workers)
    return {entry.name: stats for entry, stats in zip(entries, found, strict=True)}


def duplicates(stats: Mapping[str, TensorStats], checkpoint: Checkpoint) -> list[list[str]]:
    """Groups of tensors with the same dtype, shape and bytes, in the checkpoint's order."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, entry in checkpoint.tensors.items():
        if name in stats and entry.nbytes:
            groups.setdefault((stats[name].digest, entry.dtype, entry.shape), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def part_digest(checkpoint: Checkpoint, leaf: Leaf) -> str:
    """The digest of a part of a stored tensor. Raises CheckpointError when the file cannot be read or has changed."""
    digest = xxhash.xxh3_128()
    for start in range(0, numel(leaf), CHUNK):
        stop = min(numel(leaf), start + CHUNK)
        (view,) = scratch([(stop - start) * DTYPE_BITS[leaf.dtype] // 8])
        read_piece(checkpoint, leaf, view, start, stop)
        digest.update(view)
    return digest.hexdigest()


# ---- one tensor ------------------------------------------------------------------------------------------------------------


def _stats(checkpoint: Checkpoint, entry: TensorEntry) -> TensorStats:
    if entry.dtype not in MEASURED:
        digest = xxhash.xxh3_128()
        for first in range(0, entry.nbytes, CHUNK):
            (view,) = scratch([min(CHUNK, entry.nbytes - first)])
            read_runs(checkpoint, entry, [(first, len(view))], view)
            digest.update(view)
        return TensorStats(digest.hexdigest(), entry.numel)
    moments, spans = _Moments(entry), list(_spans(entry))
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are counted
        for start, stop in spans:
            chunk = _Chunk(checkpoint, entry, start, stop)
            moments.add(chunk, start)
        edges = moments.edges()
        counts = np.zeros(BINS, np.int64)
        if edges:
            for span in spans:  # a tensor of one chunk is still there
                counts += _histogram(chunk if len(spans) == 1 else _Chunk(checkpoint, entry, *span), edges)
    return moments.result(edges, tuple(counts.tolist()) if edges else ())


def _spans(entry: TensorEntry) -> Iterator[tuple[int, int]]:
    """Chunks of whole rows, or of parts of one row where rows are long."""
    row = entry.numel // entry.shape[0] if entry.numel and len(entry.shape) > 1 else entry.numel
    if row > CHUNK:
        for start in range(0, entry.numel, row):
            yield from ((first, min(start + row, first + CHUNK)) for first in range(start, start + row, CHUNK))
    elif row:
        size = CHUNK // row * row
        yield from ((start, min(entry.numel, start + size)) for start in range(0, entry.numel, size))


class _Chunk:
    """Elements [start, stop) as stored and in float64, in memory that this thread's next chunk takes, and room for as many more."""

    def __init__(self, checkpoint: Checkpoint, entry: TensorEntry, start: int, stop: int) -> None:
        size, count = DTYPE_BITS[entry.dtype] // 8, stop - start
        self.data, wide, room = scratch([count * size, count * 8, count * 8])
        read_runs(checkpoint, entry, [(start * size, count * size)], self.data)
        self.values_C = widen(self.data, entry.dtype, np.frombuffer(wide, np.float64))
        self.room_C: Array = np.frombuffer(room, np.float64)


class _Moments:
    """Running figures of one tensor; means and squared deviations of chunks are joined as in Chan, Golub and LeVeque (1983), eq. 2.1."""

    def __init__(self, entry: TensorEntry) -> None:
        self.entry = entry
        self.row = entry.numel // entry.shape[0] if entry.numel and len(entry.shape) > 1 else 0
        self.rows_in_use: set[int] = set()
        self.full_rows = 0
        self.digest = xxhash.xxh3_128()
        self.finite = self.nan = self.inf = self.zeros = self.negative_zeros = 0
        self.min: float | int = math.inf
        self.max: float | int = -math.inf
        self.mean = self.deviations = self.squares = ZERO

    def add(self, chunk: _Chunk, start: int) -> None:
        """Take in a chunk that begins at element `start`."""
        self.digest.update(chunk.data)
        finite_C = values_C = chunk.values_C
        zero_C = values_C == 0
        zeros = int(np.count_nonzero(zero_C))
        self.zeros += zeros
        if zeros:
            self.negative_zeros += int(np.count_nonzero(zero_C & np.signbit(values_C)))
        self._rows(zero_C, start)
        if not math.isfinite(values_C.sum()):
            self.nan += int(np.count_nonzero(np.isnan(values_C)))
            self.inf += int(np.count_nonzero(np.isinf(values_C)))
            finite_C = values_C[np.isfinite(values_C)]
        if len(finite_C):
            exact_C = np.frombuffer(chunk.data, DTYPES[self.entry.dtype].numpy) if self.entry.dtype in INTEGERS64 else finite_C
            low, high = exact_C.min().item() + 0, exact_C.max().item() + 0  # + 0: no -0.0
            self.min, self.max = min(self.min, low), max(self.max, high)
            largest = max(abs(low), abs(high))
            if largest > 2**53 if exact_C is not finite_C else largest and not TAME[0] < largest < TAME[1]:
                self._join_wide(exact_C.astype(Wide))
            else:
                self._join(finite_C, chunk.room_C[: len(finite_C)])

    def _join(self, values_C: Array, centred_C: Array) -> None:
        mean = float(values_C.mean())
        np.subtract(values_C, mean, out=centred_C)
        self._add(len(values_C), Wide(mean), float(np.dot(centred_C, centred_C)), float(np.dot(values_C, values_C)))

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

    def _rows(self, zero_C: Array, start: int) -> None:
        if not self.row:
            return
        if len(zero_C) % self.row == 0:
            self.full_rows += int(np.count_nonzero(~zero_C.reshape(-1, self.row).all(1)))
        elif not zero_C.all():
            self.rows_in_use.add(start // self.row)

    def edges(self) -> tuple[float, float] | None:
        """The histogram's range; None where there is nothing to spread."""
        if not self.finite or self.min == self.max:
            return None
        low, high = (max(-LARGEST, min(LARGEST, float(self.mean + sign * 4 * self.std))) for sign in (-1, 1))
        return (low, high) if low < high else None

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
            limit=largest / DTYPES[entry.dtype].largest if is_float(entry.dtype) and some else None,
            constant=some and self.min == self.max and self.finite == entry.numel,
            edges=edges,
            histogram=histogram,
        )


def _histogram(chunk: _Chunk, edges: tuple[float, float]) -> Array:
    """How many finite elements are in each of BINS bins of equal width [BINS]."""
    finite_C, (low, high) = chunk.values_C, edges
    if not math.isfinite(finite_C.sum()):
        finite_C = finite_C[np.isfinite(finite_C)]
    exponent = math.frexp(max(map(abs, edges)))[1]
    if not -900 < exponent < 1000:  # a bin's width, or its inverse, would be beyond float64: the same bins of numbers of about 1
        half, rest = math.ldexp(1, -exponent // 2), math.ldexp(1, -exponent - (-exponent // 2))
        finite_C, low, high = finite_C * half * rest, low * half * rest, high * half * rest
    places_C = np.clip(finite_C, low, high, out=chunk.room_C[: len(finite_C)])
    places_C -= low
    places_C *= BINS
    places_C /= high - low
    counts: Array = np.bincount(places_C.astype(np.intp), minlength=BINS + 1)
    counts[BINS - 1] += counts[BINS]  # the upper edge
    return counts[:BINS]
