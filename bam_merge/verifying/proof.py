"""What other processes have found of a result's bytes, part by part, and what a part finds of its own.

Each compares as one process does: rows of stored.py, worked out anew by rederive/. What it finds of a tensor is bound to the digest of the
very bytes that it compared, and holds for these alone: who takes it over sees by the digest whether they are still there.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bam_merge import expressions
from bam_merge.architectures.opening import open_folder
from bam_merge.checkpoints.dtypes import ARITHMETIC_DTYPES
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.header import read_header
from bam_merge.checkpoints.pieces import Read
from bam_merge.checkpoints.reading import check_unchanged, digest_tensor
from bam_merge.errors import BamMergeError
from bam_merge.expressions import Calibrated
from bam_merge.model.loading import stored_model
from bam_merge.model.streaming import computing_on
from bam_merge.planning.plan import Plan, moves_bytes
from bam_merge.verifying.computed import LayerErrors
from bam_merge.verifying.devices import open_device, torch_workers
from bam_merge.verifying.function import layers_of
from bam_merge.verifying.levels import LEVELS, layers_asked
from bam_merge.verifying.report import Check
from bam_merge.verifying.stored import Compared, compared, judged

SourceTensor = tuple[str, str]
"""A source, and one of its tensors."""


@dataclass(frozen=True)
class Known:
    """What other processes have found: of the result's tensors, by name, and the digests of sources' tensors that no copy has the bytes of.

    `layers` are what those of a mixture showed that were run beside their dense models, where they may be (function.layers_of).
    `fresh`: they have just read what they digested, after all was written, so that it need not be read again.
    """

    compared: Mapping[str, Compared] = field(default_factory=dict)
    sources: Mapping[SourceTensor, str] = field(default_factory=dict)
    layers: Mapping[int, LayerErrors] = field(default_factory=dict)
    fresh: bool = False

    @property
    def digests(self) -> dict[str, str]:
        """Of the result's tensors, where they need not be read again."""
        return {name: found.digest for name, found in self.compared.items()} if self.fresh else {}

    def of(self, measured: Mapping[str, str | None]) -> dict[str, Compared]:
        """What holds of the tensors whose digests are `measured`: of other bytes than were compared nothing is known."""
        return {name: found for name, found in self.compared.items() if found.digest == measured.get(name)}


NOTHING = Known()


def together(parts: Iterable[Known]) -> Known:
    """What several processes have found. It is fresh when all of it is."""
    compared: dict[str, Compared] = {}
    sources: dict[SourceTensor, str] = {}
    layers: dict[int, LayerErrors] = {}
    fresh = True
    for part in parts:
        compared |= part.compared
        sources |= part.sources
        layers |= part.layers
        fresh &= part.fresh
    return Known(compared, sources, layers, fresh and bool(compared))


def prove(
    whole: Plan, mine: Plan, folder: Path, workers: int, tell: Callable[[int, int], None], records: Mapping[str, Any]
) -> tuple[Known, list[Check]]:
    """Compare all tensors that the part `mine` of the plan `whole` has in `folder` with the sources, and say what failed of it.

    `records` has "tensors" and "sources" of a manifest, as far as they are known. Raises CheckpointError where a file cannot be read, or a
    source is not what was planned with.
    """
    files = {shard.file: read_header(str(folder / shard.file)) for shard in mine.shards}
    written = Checkpoint(folder, {}, "", files, {entry.name: entry for header in files.values() for entry in header.tensors})
    total, done = sum(step.nbytes for step in mine.steps), 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        tell(min(done, total), total)

    found = compared(written, mine, torch_workers(workers), advance, kept=True)
    sources = dict(_source_digests(whole, mine))
    check_unchanged(whole.checkpoints)
    tell(total, total)
    return Known(found, sources), [check for check in judged(written, mine, records, found) if check.ok is False]


def layers_alone(plan: Plan, folder: Path, level: str) -> tuple[int, ...]:
    """The layers of the mixture in `folder` that can be run beside their dense models one by one, on any host; none where hidden states go
    from one to the next, or nothing can be run."""
    beside = plan.layout.kind == "mixture" and plan.recipe.output.layers is None
    if LEVELS[level].thorough or not beside or any(step.dtype not in ARITHMETIC_DTYPES for step in plan.steps):
        return ()
    try:
        return tuple(sorted(layers_asked(stored_model(open_folder(folder)).config, LEVELS[level])))
    except BamMergeError:  # of which one process has more to say
        return ()


def run_layers(plan: Plan, folder: Path, layers: Collection[int], level: str, workers: int) -> Known:
    """Run `layers` of the mixture in `folder` beside those of its dense models. Raises BamMergeError."""
    with computing_on(open_device("cpu"), torch_workers(workers)) as computing:
        return Known(layers=layers_of(open_folder(folder), plan, LEVELS[level], computing, layers), fresh=True)


def _source_digests(whole: Plan, mine: Plan) -> Iterator[tuple[SourceTensor, str]]:
    """The digests of sources' tensors that fall to a part: its own are the first to be made of them, and none is a copy of them."""
    first: dict[SourceTensor, str] = {}
    for step in whole.steps:
        for read in () if isinstance(step.expr, Calibrated) else expressions.reads(step.expr):
            first.setdefault((read.source, read.tensor), step.file)
    copied = {(step.expr.source, step.expr.tensor) for step in whole.steps if isinstance(step.expr, Read) and moves_bytes(step)}
    files = {shard.file for shard in mine.shards}
    for (source, tensor), file in first.items():
        if file in files and (source, tensor) not in copied:
            checkpoint = whole.checkpoints[source]
            entry = checkpoint.tensors[tensor]
            yield (source, tensor), digest_tensor(checkpoint, entry)
