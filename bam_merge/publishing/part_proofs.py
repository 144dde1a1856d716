"""The proof that a part leaves beside its journal: what the comparison of its tensors with the sources found, for `finish` to go on from.

It is bound to the plan, the version, the sources' files as they were (by their ctime, too, which no program can set), and of each tensor to
the digest of the bytes that were compared. What is not as it says counts as not proved, and `finish` proves it: no proof ever stands for
other bytes, and the lack of one costs time alone.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

from bam_merge import expressions
from bam_merge.errors import VerificationFailed
from bam_merge.files import writing
from bam_merge.merging.tensor import Finished
from bam_merge.own_folder import open_file, read_file
from bam_merge.planning.parts import Part, parts_of
from bam_merge.planning.plan import Plan
from bam_merge.publishing.durable import sync_descriptor
from bam_merge.publishing.journal import begun, line
from bam_merge.publishing.options import MergeOptions
from bam_merge.publishing.part_journals import file_name, header_of
from bam_merge.publishing.part_staging import PartStaging
from bam_merge.publishing.staging import PARTS
from bam_merge.text import printable

if TYPE_CHECKING:  # with torch
    from bam_merge.verifying.proof import Known


def prove_part(plan: Plan, part: Part, mine: Plan, staging: PartStaging, options: MergeOptions, finished: Mapping[str, Finished]) -> None:
    """Compare the tensors of a part that is complete with the sources, and leave the proof; nothing where it is there.

    Raises VerificationFailed, after which the part counts as not made: the same command makes it anew.
    """
    from bam_merge.verifying.proof import prove

    there = read_proof(plan, part, staging.parts)
    if there is not None and {name: found.digest for name, found in there.compared.items()} == {n: f.digest for n, f in finished.items()}:
        return
    found, failures = prove(plan, mine, staging.output, options.workers, options.on_verify, _records(mine, finished))
    other = [name for name, item in finished.items() if name not in found.compared or found.compared[name].digest != item.digest]
    problems = [f"{check.name}: {check.detail}" for check in failures]
    if other and not problems:
        problems = [f"digests: {printable(other[0])}: bytes changed since they were written"]
    if problems:
        staging.forget()
        again = f"part {part} of {printable(str(staging.folder))} is not what its sources give, and counts as not made. Run again."
        raise VerificationFailed(*problems, again)
    assert staging.hold is not None
    staging.hold.check()
    _write(plan, part, found, staging)


def _records(mine: Plan, finished: Mapping[str, Finished]) -> dict[str, Any]:
    """What a manifest will record of a part's tensors, and of the sources that they are made of."""
    sources: dict[str, Any] = {name: {"files": {}} for name in mine.checkpoints}
    for step in mine.steps:
        for read in expressions.reads(step.expr) if step.name in finished else ():
            if (digest := finished[step.name].reads.get(str(read))) is not None:
                file = mine.checkpoints[read.source].tensors[read.tensor].file
                sources[read.source]["files"].setdefault(file, {"tensors": {}})["tensors"][read.tensor] = digest
    return {"tensors": {name: {"nonfinite": item.nonfinite} for name, item in finished.items()}, "sources": sources}


# ---- the file ------------------------------------------------------------------------------------------------------------------


def _header(plan: Plan, part: Part) -> dict[str, Any]:
    identities = {name: {file: list(astuple(it)) for file, it in found.identities.items()} for name, found in plan.checkpoints.items()}
    return {"proof": header_of(plan, part), "identities": identities}


def _write(plan: Plan, part: Part, found: "Known", staging: PartStaging) -> None:
    lines = [line(_header(plan, part))]
    lines += [line({"name": name, **one._asdict()}) for name, one in found.compared.items()]
    lines += [line({"source": source, "tensor": tensor, "digest": digest}) for (source, tensor), digest in found.sources.items()]
    name = file_name(part.number, part.of, "proof")
    path = staging.folder / PARTS / name
    with writing(path):
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=staging.parts)
        with os.fdopen(open_file(name, staging.parts, os.O_WRONLY | os.O_CREAT), "wb") as stream:
            stream.write(b"".join([*lines, line({"complete": len(lines) - 1})]))
            stream.flush()
            sync_descriptor(stream.fileno(), path)


def read_proof(plan: Plan, part: Part, folder: int) -> "Known | None":
    """What the proof of a part says; None where there is none, or it is torn, or of another plan, or of sources that changed since."""
    from bam_merge.verifying.proof import Known
    from bam_merge.verifying.stored import Compared

    try:
        data = read_file(file_name(part.number, part.of, "proof"), folder)
    except OSError:
        return None
    first, *rest = data.split(b"\n")[:-1] or [b""]
    records = [begun(text) for text in rest]
    if begun(first) != _header(plan, part) or not records or records[-1] != {"complete": len(records) - 1}:
        return None
    try:
        compared = {
            one["name"]: Compared(*(one[key] for key in Compared._fields)) for one in records[:-1] if "name" in one and _is_sound(one)
        }
        sources = {(one["source"], one["tensor"]): str(one["digest"]) for one in records[:-1] if "source" in one}
    except (KeyError, TypeError):
        return None
    return Known(compared, sources) if len(compared) + len(sources) == len(records) - 1 else None


def _is_sound(record: Mapping[str, Any]) -> bool:
    """Whether a record is one of a tensor that passed."""
    error = record["error"]
    return isinstance(error, int | float) and 0 <= error <= 1 and type(record["where"]) is int and type(record["nonfinite"]) is int


def proofs(plan: Plan, of: int, folder: int) -> Iterator["Known"]:
    """Those of the parts that left one which still holds."""
    return filter(None, (read_proof(plan, part, folder) for part in parts_of(plan, of)))
