"""Are the bytes right? The folder against its manifest, and every tensor against its sources by the slow path of rederive/."""

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
import xxhash

from bam_merge import expressions
from bam_merge.checkpoints.dtypes import ARITHMETIC_DTYPES, DTYPE_BITS
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.header import TensorEntry
from bam_merge.checkpoints.pieces import Read
from bam_merge.checkpoints.provenance import REMEDY
from bam_merge.checkpoints.reading import digest_range, digest_tensor
from bam_merge.errors import BamMergeError
from bam_merge.model.loading import stored_model
from bam_merge.model.model import Model
from bam_merge.model.model_config import ModelConfig
from bam_merge.planning.plan import Plan, Step, moves_bytes
from bam_merge.text import printable, some
from bam_merge.values.torch_threads import one_torch_thread
from bam_merge.verifying.rederive import Written, overall, rederive, survey_all
from bam_merge.verifying.report import Check
from bam_merge.verifying.rounding import worst
from bam_merge.verifying.rows import COPIED_BYTES, RowReader, SourceTensors, row_blocks
from bam_merge.verifying.work import Work


def structure(checkpoint: Checkpoint, manifest: dict[str, Any]) -> Iterator[Check]:
    """Headers, index and config agree with the manifest, and the layout has every tensor it wants and none more."""
    yield _check("headers", _header_problems(checkpoint, manifest))
    yield _check("layout", _layout_problems(checkpoint, manifest))


def _check(name: str, problems: list[str]) -> Check:
    return Check(name, not problems, "; ".join(problems))


def _header_problems(checkpoint: Checkpoint, manifest: dict[str, Any]) -> list[str]:
    problems = []
    records = manifest["tensors"]
    missing, extra = sorted(records.keys() - checkpoint.tensors.keys()), sorted(checkpoint.tensors.keys() - records.keys())
    if missing:
        problems.append(f"{some(missing)} missing")
    if extra:
        problems.append(f"{some(extra)} not in the manifest")
    for name, entry in checkpoint.tensors.items():
        record = records.get(name)
        if record and (entry.dtype, list(entry.shape), entry.file) != (record["dtype"], record["shape"], record["file"]):
            problems.append(
                f"{printable(name)} is {entry.dtype} {list(entry.shape)} in {entry.file}, "
                f"the manifest says {printable(record['dtype'])} {printable(str(record['shape']))} in {printable(record['file'])}"
            )
    return problems


def _layout_problems(checkpoint: Checkpoint, manifest: dict[str, Any]) -> list[str]:
    """For layout bam: the tensors that a model of this config.json has, worked out by building one without memory."""
    if checkpoint.config.get("model_type") != "bam":
        try:
            stored_model(checkpoint, computes=False)
        except BamMergeError as error:
            return list(error.problems)
        return []
    try:
        with torch.device("meta"):
            model = Model(ModelConfig.from_dict(checkpoint.config))
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        return [f"config.json describes no model: {printable(str(error))}"]
    tied = model.config.tie_word_embeddings
    wanted = {n: tuple(p.shape) for n, p in model.state_dict().items() if not (tied and n == "lm_head.weight")}
    problems = []
    missing, extra = sorted(wanted.keys() - checkpoint.tensors.keys()), sorted(checkpoint.tensors.keys() - wanted.keys())
    if missing:
        problems.append(f"config.json wants {some(missing)} ({len(missing)} tensors), which are not there")
    if extra:
        problems.append(f"config.json has no place for {some(extra)} ({len(extra)} tensors)")
    shapes = [
        f"{printable(name)} is {list(checkpoint.tensors[name].shape)}, config.json wants {list(shape)}"
        for name, shape in wanted.items()
        if name in checkpoint.tensors and checkpoint.tensors[name].shape != shape
    ]
    return problems + shapes[:3]


# ---- tensors -----------------------------------------------------------------------------------------------------------------


def digests(
    checkpoint: Checkpoint,
    manifest: Mapping[str, Any],
    work: Work,
    workers: int,
    known: Mapping[str, str] | None = None,
    measured: dict[str, str | None] | None = None,
) -> Iterator[Check]:
    """Every tensor's bytes still have the digest that was taken when they were made. `known` are digests that another process has just
    read: where one is not as recorded, it is read here again. `measured` is given what was found."""
    wrong: dict[str, list[str]] = {}
    known, measured = known or {}, {} if measured is None else measured

    def digest(name: str) -> str | None:
        entry = checkpoint.tensors.get(name)
        if entry is not None and known.get(name) == manifest["tensors"][name]["digest"]:
            return known[name]
        return None if entry is None else digest_range(checkpoint.path / entry.file, entry.offset, entry.nbytes)

    advance = work.advancing("digests", sum(entry.nbytes for entry in checkpoint.tensors.values()))
    with ThreadPoolExecutor(workers) as pool:
        for (name, record), found in zip(manifest["tensors"].items(), pool.map(digest, manifest["tensors"]), strict=True):
            entry = checkpoint.tensors.get(name)
            advance(entry.nbytes if entry else 0)
            measured[name] = found
            if found == record["digest"]:
                continue
            wrong.setdefault(printable(entry.file if entry else record["file"]), []).append(name)
    changed = "; ".join(f"{some(names)} in {file}" for file, names in wrong.items())
    detail = f"{changed}: bytes changed since the merge: {REMEDY}" if wrong else f"{len(manifest['tensors'])} tensors"
    work.finish("digests")
    yield Check("digests", not wrong, detail)


KINDS = {"copies": "a source's bytes", "merges": "the float64 value within one rounding", "routers": "their generator's numbers"}


class Compared(NamedTuple):
    """What the comparison of a written tensor with its sources found: the largest error in roundings, its element, how many values are not
    finite; where that is to be kept, the digest of the bytes that were compared."""

    error: float
    where: int
    nonfinite: int
    digest: str = ""


def compared(
    checkpoint: Checkpoint,
    plan: Plan,
    workers: int,
    advance: Callable[[int], None],
    known: Mapping[str, Compared] | None = None,
    kept: bool = False,
) -> dict[str, Compared]:
    """Each tensor of `plan` that is in the folder, in its form, compared with its sources; but those that are `known`. `advance` hears of
    bytes. `kept`: with digests of what was compared."""
    entries, known = checkpoint.tensors, known or {}
    of_sources = (step for step in plan.steps if _kind(step) is not None)
    there = [step for step in of_sources if step.name in entries and _form(entries[step.name]) == _form(step)]
    there.sort(key=lambda step: -step.nbytes)  # the last ones are to be small, so that no worker waits long for another
    reader = RowReader()

    def compare(step: Step) -> Compared:
        if step.name in known:
            return known[step.name]
        entry = checkpoint.tensors[step.name]
        path, in_bytes = checkpoint.path / entry.file, math.prod(step.shape[1:]) * DTYPE_BITS[step.dtype] % 8 == 0
        found = _compare(path, step, SourceTensors(plan, reader), exact=_kind(step) == "copies", kept=kept and in_bytes)
        if kept and not in_bytes:  # rows share bytes, so theirs in order are not the tensor's
            return found._replace(digest=digest_range(path, entry.offset, entry.nbytes))
        return found

    with (  # each worker holds some blocks of ROWS_BYTES in float64
        one_torch_thread() as single_threaded,
        ThreadPoolExecutor(workers, initializer=single_threaded) as pool,
    ):
        found = {}
        for step, result in zip(there, pool.map(compare, there), strict=True):
            found[step.name] = result
            advance(step.nbytes)
    return found


def against_sources(
    checkpoint: Checkpoint,
    plan: Plan,
    manifest: Mapping[str, Any],
    work: Work,
    workers: int,
    proved: set[str] | None = None,
    known: Mapping[str, Compared] | None = None,
) -> Iterator[Check]:
    """Copies equal their source; merges are one rounding away from float64; routers re-derive; nothing is NaN or infinite
    but what --allow-nonfinite recorded. `proved` is given the names of the tensors of which that is so; what is `known`, of the bytes that
    are there, is not compared again."""
    nbytes = sum(step.nbytes for step in plan.steps if _kind(step) is not None)
    found = compared(checkpoint, plan, workers, work.advancing("sources", nbytes), known)
    yield from judged(checkpoint, plan, manifest, found, proved)


def judged(
    checkpoint: Checkpoint, plan: Plan, manifest: Mapping[str, Any], found: Mapping[str, Compared], proved: set[str] | None = None
) -> Iterator[Check]:
    """The checks that follow from what comparing `found`."""
    wrong: dict[str, list[str]] = {kind: [] for kind in KINDS}
    largest = dict.fromkeys(KINDS, 0.0)
    counts = dict.fromkeys(KINDS, 0)
    nonfinite: list[str] = []
    entries = checkpoint.tensors
    for step in plan.steps:
        kind = _kind(step)
        if kind is None:
            continue
        counts[kind] += 1
        if step.name not in found:
            stored = entries.get(step.name)
            wrong[kind].append(f"{step.name} ({'missing' if stored is None else f'{_form(stored)}, expected {_form(step)}'})")
            continue
        error, where, bad, _ = found[step.name]
        largest[kind] = max(largest[kind], error)
        if bad > manifest["tensors"].get(step.name, {}).get("nonfinite", 0):
            nonfinite.append(f"{step.name} ({bad} values)")
        if error > 1:
            why = "".join(
                f"; {read} changed since the merge"
                for read in dict.fromkeys(expressions.reads(step.expr))
                if _changed(read, plan, manifest)
            )
            wrong[kind].append(f"{step.name} (element {where} is {error:.3g} roundings off, expected {step.expression}{why})")
        elif proved is not None:
            proved.add(step.name)
    for kind, meaning in KINDS.items():
        detail = some(wrong[kind]) if wrong[kind] else f"{counts[kind]} tensors are {meaning}"
        yield Check(kind, not wrong[kind], detail, largest[kind], 0.0 if kind == "copies" else 1.0)
    yield Check("finite", not nonfinite, some(nonfinite) if nonfinite else "no NaN and no infinity")


def _form(of: Step | TensorEntry) -> str:
    return f"{of.dtype} {list(of.shape)}"


def _changed(read: Read, plan: Plan, manifest: Mapping[str, Any]) -> bool:
    """Whether a source's tensor has other bytes than those that were merged."""
    checkpoint = plan.checkpoints[read.source]
    entry = checkpoint.tensors[read.tensor]
    files = manifest["sources"].get(read.source, {}).get("files", {})
    known = files.get(entry.file, {}).get("tensors", {}).get(read.tensor)
    return known is not None and digest_tensor(checkpoint, entry) != known


def _kind(step: Step) -> str | None:
    """How a tensor is compared; None for routers from texts, which no row of a source gives (calibrated.py)."""
    if isinstance(step.expr, expressions.Calibrated):
        return None
    if isinstance(step.expr, expressions.Init):
        return "routers"
    return "copies" if moves_bytes(step) else "merges"


def _compare(path: Path, step: Step, sources: SourceTensors, exact: bool, kept: bool) -> Compared:
    """One written tensor."""
    largest, where, bad, before = 0.0, 0, 0, 0
    digest = xxhash.xxh3_128() if kept else None
    for part in _experts(step.expr):
        error, index, some = _compare_rows(path, step, part, before, sources, exact, digest)
        bad += some
        if error > largest:
            largest, where = error, before * math.prod(part.shape[1:]) + index
        before += part.shape[0] if part.shape else 1
    return Compared(largest, where, bad, digest.hexdigest() if digest is not None else "")


def _experts(expr: expressions.Expr) -> tuple[expressions.Expr, ...]:
    """Each expert's part of a tensor that holds all; another tensor as it is."""
    return expr.parts if isinstance(expr, expressions.Concat) and expr.stacked else (expr,)


def _compare_rows(
    path: Path, step: Step, expr: expressions.Expr, before: int, sources: SourceTensors, exact: bool, digest: "xxhash.xxh3_128 | None"
) -> tuple[float, int, int]:
    """(largest error in roundings, its element, how many values are not finite) of the rows that `expr` makes, which begin at row `before`.
    `digest` is given their bytes."""
    largest, where, bad = 0.0, 0, 0
    columns, size = math.prod(expr.shape[1:]), DTYPE_BITS[step.dtype] / 8
    known = survey_all(expr, sources)

    def rows(start: int, stop: int) -> torch.Tensor:
        return sources.reader.read(path, step.name, before + start, before + stop, step.dtype, expr.shape[1:])

    for start, stop in row_blocks(expr.shape, size, COPIED_BYTES if exact else None):
        written = rows(start, stop)
        if digest is not None:
            digest.update(_bytes(written).data)
        bad += _nonfinite(written)
        if exact:
            first = _first_difference(written, sources.piece(expr, start, stop))
            error, index = (0.0, 0) if first is None else (math.inf, first * 8 // DTYPE_BITS[step.dtype])
        else:
            error, index = worst(written, rederive(expr, sources, known, start, stop, step.dtype), step.dtype)
        if error > largest:
            largest, where = error, start * columns + index
    if isinstance(expr, expressions.Merge):
        whole = overall(expr.method, expr, sources, known.get(id(expr)), Written(rows, step.dtype))
        largest = max(largest, whole)
    return largest, where, bad


def _first_difference(a: torch.Tensor, b: torch.Tensor) -> int | None:
    """The first byte in which two tensors of one size differ. numpy compares eight at a time at twice the speed of torch."""
    ours, theirs = _bytes(a), _bytes(b)
    whole = len(ours) // 8 * 8
    if numpy.array_equal(ours[:whole].view("u8"), theirs[:whole].view("u8")) and numpy.array_equal(ours[whole:], theirs[whole:]):
        return None
    return int(numpy.flatnonzero(ours != theirs)[0])


def _bytes(rows: torch.Tensor) -> "numpy.ndarray[Any, numpy.dtype[numpy.uint8]]":
    found: numpy.ndarray[Any, numpy.dtype[numpy.uint8]] = rows.contiguous().flatten().view(torch.uint8).numpy()
    return found


def _nonfinite(values: torch.Tensor) -> int:
    """How many elements are NaN or infinite. The extremes tell whether any is, at a fraction of the time.

    By torch's values, on purpose: the merge counts bit patterns (values/nonfinite.py) and values before they are stored.
    """
    if not values.numel() or not (values.is_floating_point() or values.is_complex()):
        return 0
    if values.element_size() == 1:
        values = values.float()
    if not values.is_complex() and all(bool(torch.isfinite(end)) for end in torch.aminmax(values)):
        return 0
    return int((~torch.isfinite(values)).sum())


def not_computed(manifest: dict[str, Any], nonfinite: bool) -> str | None:
    """Why what the model computes cannot be checked, and what was checked in its place; None where it can be.

    `nonfinite`: NaN or infinity was found in the tensors, and the manifest says so.
    """
    tensors = manifest["tensors"]
    if nonfinite:
        return "not run: the merge was allowed to write NaN or infinity"
    names = [name for name, record in tensors.items() if record["dtype"] not in ARITHMETIC_DTYPES]
    if not names:
        return None
    dtypes = ", ".join(sorted({printable(tensors[name]["dtype"]) for name in names}))
    return (
        f"not run: {len(names)} tensors are {dtypes} ({some(names)}), which the reference model does not compute with. Bytes were "
        "compared, and shapes; not expert isolation, identity, logits, causality, cached decoding, batch and padding, nor perplexities"
    )
