"""One part of a merge, made by a process of its own, on whatever host: its files, in the staging folder that all parts share."""

import os
from dataclasses import dataclass
from pathlib import Path

from bam_merge.errors import OutputError, SyncFailed
from bam_merge.merging.execute import execute
from bam_merge.merging.tensor import Finished, Settings
from bam_merge.planning.parts import Part, parts_of, plan_of
from bam_merge.planning.plan import Plan, Step
from bam_merge.publishing.destination import preflight, target_path
from bam_merge.publishing.durable import sync_descriptor
from bam_merge.publishing.fetching import fetched
from bam_merge.publishing.options import MergeOptions
from bam_merge.publishing.part_staging import PartStaging
from bam_merge.publishing.preflight import part_space_problem
from bam_merge.publishing.publish import is_result
from bam_merge.text import printable
from bam_merge.verifying.options import check_level


@dataclass(frozen=True)
class PartResult:
    """What a process that made a part has to say: the digests of its tensors. `at_once`: it was there already, whole.
    `proved`: they were compared with the sources."""

    part: Part
    digests: dict[str, str]
    at_once: bool = False
    proved: bool = False


def make_part(
    plan: Plan, output: str | os.PathLike[str] | None, number: int, of: int, options: MergeOptions, patience: float = 0
) -> PartResult | None:
    """Make part `number` of `of` of `plan`, which `finish` makes a result of; go on with it where an earlier process began it.

    None where the result is published already. Unless `options.verify` says otherwise, the part leaves a proof of its tensors, which
    `finish` takes over. Raises BamMergeError: NotYet when another process makes this part, still after `patience` seconds;
    VerificationFailed when it is not what its sources give.
    """
    plan = fetched(plan, output, options)
    if options.level is not None:
        check_level(options.level)
    part = parts_of(plan, of)[number - 1]
    mine, target = plan_of(plan, part), target_path(plan, output)
    if _is_there(plan, target, options):
        return None
    _check(mine, target, options)
    staging = PartStaging.join(target, part, options.notify, patience)
    try:
        if _is_there(plan, target, options):  # again: it may have been finished until we had the lock
            return None
        _check(mine, target, options)
        return _make(plan, part, mine, staging, options)
    except SyncFailed:
        staging.forget()
        raise
    finally:
        staging.close()


def _make(plan: Plan, part: Part, mine: Plan, staging: PartStaging, options: MergeOptions) -> PartResult:
    done = staging.begin_part(plan, part, mine, options.allow_nonfinite)
    made = set(done)

    def on_finished(step: Step, finished: Finished) -> None:
        staging.record(step.name, finished)

    options.progress(sum(step.nbytes for step in mine.steps if step.name in done))
    settings = Settings(options.workers, options.progress, on_finished, options.allow_nonfinite, staging.files)
    finished = {**done, **execute(mine, staging.output, settings, done)}
    sync_descriptor(staging.files, staging.output)
    if not staging.is_ours():
        raise OutputError(f"{printable(str(staging.folder))} was deleted while part {part} was made. Run again.")
    staging.complete(len(finished))
    if options.level is not None:
        from bam_merge.publishing.part_proofs import prove_part  # with torch, which copies do without

        prove_part(plan, part, mine, staging, options, finished)
    digests = {name: item.digest for name, item in finished.items()}
    return PartResult(part, digests, made == finished.keys(), options.level is not None)


def _check(mine: Plan, target: Path, options: MergeOptions) -> None:
    problems = preflight(mine, target, options.force) or list(filter(None, [part_space_problem(mine, target)]))
    if problems:
        raise OutputError(*problems)


def _is_there(plan: Plan, target: Path, options: MergeOptions) -> bool:
    """Whether the whole is published already, of the same recipe, version and sources: the last to come has nothing to do."""
    if not os.path.lexists(target) or not is_result(plan, target, options.allow_nonfinite):
        return False
    options.notify(f"{printable(str(target))} is already finished, from the same recipe, version and sources.")
    return True
