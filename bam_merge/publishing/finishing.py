"""From parts to a published folder: all are looked at, then routers from texts, what stands beside the tensors, the proof, the rename."""

import os
import shlex
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bam_merge.checkpoints.positional import beginning
from bam_merge.errors import Busy, NotYet, OutputError, SyncFailed
from bam_merge.expressions import Calibrated
from bam_merge.files import writing
from bam_merge.merging.tensor import Finished
from bam_merge.own_folder import open_file, open_folder
from bam_merge.planning.parts import Part, parts_of, plan_of
from bam_merge.planning.plan import Plan
from bam_merge.publishing.companions import companion_files
from bam_merge.publishing.destination import lack_of_space, preflight, target_path
from bam_merge.publishing.fetching import fetched
from bam_merge.publishing.holding import Hold, holder_of
from bam_merge.publishing.options import MergeOptions
from bam_merge.publishing.part_journals import FINISH_LOCK, PartJournal, difference, file_name, header_of, numbers, read_part
from bam_merge.publishing.part_staging import PartStaging
from bam_merge.publishing.publish import check_proof, check_texts, complete, is_result, put_in_place, settle
from bam_merge.publishing.staging import JOURNAL, OUTPUT, PARTS, staging_folder
from bam_merge.text import count, printable

if TYPE_CHECKING:  # with torch
    from bam_merge.verifying.proof import Known


def finish(plan: Plan, output: str | os.PathLike[str] | None, options: MergeOptions, found: "Callable[[], Known] | None" = None) -> Path:
    """Publish the result of `plan` that parts have made the tensors of. Returns the folder.

    What parts have proved of themselves is not proved again, as far as it holds of the bytes that are there; nor is what other processes
    have `found`, which are asked in their place when all is written.

    Raises NotYet for parts that are not there or being written, OutputError for parts of another plan, version or number, or whose host
    saw other source files; all that is wrong with them together. Nothing is published then, and the parts stay.
    """
    plan = fetched(plan, output, options)
    target = target_path(plan, output)
    if options.level is not None:
        check_proof(options.level, options.device)
    if plan.calibration is not None:
        check_texts(plan.calibration, options.device)
    if os.path.lexists(target) and is_result(plan, target, options.allow_nonfinite):
        with suppress(Busy):  # it is cleared up by who published it
            settle(target, options.notify)
        options.notify(f"{printable(str(target))} is already finished, from the same recipe, version and sources.")
        return target
    _check(plan, target, options)
    if not os.path.isdir(staging_folder(target) / PARTS):
        raise NotYet(
            f"no part of {printable(str(target))} was made: {printable(str(staging_folder(target)))} has none. "
            f"{part_command(plan, output, '1/N')} makes the first of N."
        )
    staging = PartStaging.open(target, options.notify, shared=True, parts=True)
    try:
        _hold(staging, target)
        _check(plan, target, options)
        of, finished = gathered(plan, staging, output, options)
        options.notify(f"{count(of, 'part')}: {count(len(finished), 'tensor')} are finished.")
        companions = companion_files(plan)
        complete(plan, staging, target, options, finished, companions, found or partial(_proved, plan, of, staging))
        put_in_place(staging, target, options.force)
    except SyncFailed:
        staging.forget()
        raise
    finally:
        staging.close()
    return target


def _proved(plan: Plan, of: int, staging: PartStaging) -> "Known":
    """What the parts have proved."""
    from bam_merge.publishing.part_proofs import proofs  # with torch, which copies do without
    from bam_merge.verifying.proof import together

    return together(proofs(plan, of, staging.parts))


def _check(plan: Plan, target: Path, options: MergeOptions) -> None:
    kept = plan.calibration.disk if plan.calibration is not None else 0
    problems = preflight(plan, target, options.force) or list(filter(None, [lack_of_space(kept, target, "finishing writes", 0)]))
    if problems:
        raise OutputError(*problems)


def _hold(staging: PartStaging, target: Path) -> None:
    """Take the right to finish: no other process does, and none begins a part until the end."""
    path = staging.folder / PARTS
    with writing(path):
        staging.parts = open_folder(PARTS, staging.lock)
        staging.hold = Hold.take(FINISH_LOCK, staging.parts, path / FINISH_LOCK, printable(str(target)))
    if JOURNAL in os.listdir(staging.lock):
        raise OutputError(f"{printable(str(staging.folder))} has an unfinished run of one process beside parts. Delete it, and run again.")


# ---- the parts ---------------------------------------------------------------------------------------------------------------


def gathered(
    plan: Plan, staging: PartStaging, output: str | os.PathLike[str] | None, options: MergeOptions
) -> tuple[int, dict[str, Finished]]:
    """How many parts there are, and what is known of every tensor, from the journals; the output folder is opened, and what no part made
    is deleted from it. Raises NotYet, or OutputError, with all that is wrong."""
    of = _number_of_parts(staging)
    problems: list[str] = []
    wrong = False
    finished: dict[str, Finished] = {}
    _open_output(staging)
    for part in parts_of(plan, of):
        try:
            finished |= _part(plan, part, staging, output, options)
        except NotYet as error:
            problems += error.problems
        except OutputError as error:
            problems += error.problems
            wrong = True
    if problems:
        raise (OutputError if wrong else NotYet)(*problems)
    staging.keep_only({shard.file for shard in plan.shards})
    return of, finished


def _open_output(staging: PartStaging) -> None:
    with writing(staging.output):
        try:
            staging.files = open_folder(OUTPUT, staging.lock)
        except FileNotFoundError:
            raise OutputError(f"{printable(str(staging.output))} is gone. Make all parts again.") from None


def _number_of_parts(staging: PartStaging) -> int:
    """The number of parts that the journals are of. Raises OutputError for several."""
    found = Counter(of for kind in ("journal", "lock") for _, of in numbers(staging.parts, kind))
    shown = printable(str(staging.folder))
    if not found:
        raise NotYet(f"no part was made in {shown}. Make all of them first, by --part.")
    if len(found) > 1:
        raise OutputError(f"{shown} has parts of {' and of '.join(map(str, sorted(found)))}. Delete that folder, and make all parts again.")
    return next(iter(found))


def _part(
    plan: Plan, part: Part, staging: PartStaging, output: str | os.PathLike[str] | None, options: MergeOptions
) -> dict[str, Finished]:
    """What the journal of a part says of its tensors. Raises NotYet or OutputError."""
    shown, again = printable(str(staging.folder)), part_command(plan, output, str(part))
    if holder := holder_of(file_name(part.number, part.of, "lock"), staging.parts):
        raise NotYet(f"part {part} in {shown} is being written by {holder}. Wait for it.")
    found = read_part(part.number, part.of, staging.parts)
    if found is None:
        raise NotYet(f"part {part} is missing in {shown}. It is made by: {again}")
    if why := difference(found.header, header_of(plan, part)):
        where = f" on {printable(found.host, 100)}" if found.host else ""
        raise OutputError(
            f"part {part} in {shown} was made{where} {why}. Run finish where, and as, all parts were run; or delete that folder, and make "
            "all parts again."
        )
    if found.host is None:
        raise NotYet(f"part {part} in {shown} is not complete. It goes on by: {again}")
    mine = plan_of(plan, part)
    wanted = {step.name for step in mine.steps if not isinstance(step.expr, Calibrated)}
    if found.finished.keys() != wanted:
        raise OutputError(f"part {part} in {shown} has other tensors than the plan. Make it again by: {again}")
    _check_files(mine, staging, again)
    _check_finite(found, options)
    return dict(found.finished)


def _check_files(mine: Plan, staging: PartStaging, again: str) -> None:
    """Raise OutputError for a file of a part that is not there, not of its size, or does not begin as planned. Each is opened anew."""
    sound = staging.sound({shard.file for shard in mine.shards})
    for shard in mine.shards:
        shown = printable(str(staging.output / shard.file))
        if shard.file not in sound:
            raise OutputError(f"{shown} is gone, or no file of ours with one name, though its part is complete. Make it again by: {again}")
        with writing(staging.output / shard.file):
            descriptor = open_file(shard.file, staging.files, os.O_RDONLY)
            try:
                size, header = os.fstat(descriptor).st_size, beginning(descriptor, len(shard.header))
            finally:
                os.close(descriptor)
        if size != shard.nbytes or header != shard.header:
            found = f"{size:,} bytes, expected {shard.nbytes:,}" if size != shard.nbytes else "another header than the plan's"
            raise OutputError(f"{shown}: {found}, though its part is complete. Make it again by: {again}")


def _check_finite(found: PartJournal, options: MergeOptions) -> None:
    bad = [name for name, item in found.finished.items() if item.nonfinite]
    if bad and not options.allow_nonfinite:
        raise OutputError(
            f"part {found} was made with --allow-nonfinite, and {count(len(bad), 'tensor')} of it, {printable(bad[0])} first, hold NaN or "
            "infinity. Finish with --allow-nonfinite too, and they are recorded."
        )


def part_command(plan: Plan, output: str | os.PathLike[str] | None, part: str) -> str:
    """The command that makes a part, as a shell takes it."""
    return printable(shlex.join(["bam-merge", plan.recipe.file, "--part", part, *_output(output)]), 1000)


def finish_command(plan: Plan, output: str | os.PathLike[str] | None) -> str:
    """The command that makes the result of all parts."""
    return printable(shlex.join(["bam-merge", "finish", plan.recipe.file, *_output(output)]), 1000)


def _output(output: str | os.PathLike[str] | None) -> list[str]:
    return [] if output is None else ["--output", os.fsdecode(output)]
