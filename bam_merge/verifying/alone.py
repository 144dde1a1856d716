"""The part of a verification that needs the folder alone: is every byte as it was written, and does the manifest not contradict itself?

That the values are finite follows: a merge writes none that is not, or counts it in the manifest, and the counts are looked at.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bam_merge.architectures.opening import open_folder
from bam_merge.errors import BamMergeError
from bam_merge.values.threads import default_workers
from bam_merge.verifying.engines import engines
from bam_merge.verifying.files import file_checks
from bam_merge.verifying.record import contradictions, first_problems, nonfinite_problems
from bam_merge.verifying.report import Check
from bam_merge.verifying.stored import digests, structure
from bam_merge.verifying.work import Work


def folder_checks(
    folder: Path, manifest: Mapping[str, Any], tell: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[Check]:
    """Files, model code, headers, shapes, what engines need, digests of all tensors, the manifest: each as `verify` has it."""
    manifest = dict(manifest)
    try:
        checkpoint = open_folder(folder)
    except BamMergeError as error:  # nothing more can be read
        yield from file_checks(folder, manifest, None)
        yield Check("headers", False, "; ".join(error.problems))
        return
    yield from file_checks(folder, manifest, checkpoint)
    yield from structure(checkpoint, manifest)
    yield from engines(checkpoint)
    work = Work(tell)
    work.plan(checkpoint)
    yield from digests(checkpoint, manifest, work, default_workers())
    wrong = [*contradictions(checkpoint, manifest), *nonfinite_problems(checkpoint, manifest)[0]]
    yield Check("provenance", not wrong, first_problems(wrong))
