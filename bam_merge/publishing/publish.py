"""From a plan to a published folder: staging beside the target, everything synced, one atomic rename at the end.

While a merge runs, its files are in `.NAME.bam-merge/output` beside the target NAME; a journal there names the finished tensors,
so that a killed run can go on. The target appears complete or not at all.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from bam_merge._version import __version__
from bam_merge.calibrating.corpus import Calibration
from bam_merge.checkpoints.provenance import MANIFEST, MANIFEST_FORMAT, companion_digests, read_manifest
from bam_merge.checkpoints.reading import changed, check_unchanged
from bam_merge.errors import BamMergeError, CheckpointError, DurabilityUncertain, OutputError, SyncFailed, VerificationFailed
from bam_merge.expressions import Calibrated
from bam_merge.merging.execute import execute
from bam_merge.merging.tensor import Finished, Settings
from bam_merge.planning.make import make_plan
from bam_merge.planning.plan import Plan, Step
from bam_merge.publishing.companions import CompanionFile, companion_files, write_companions
from bam_merge.publishing.destination import target_path
from bam_merge.publishing.durable import sync_descriptor
from bam_merge.publishing.earlier import as_before
from bam_merge.publishing.fetching import fetched
from bam_merge.publishing.options import MergeOptions
from bam_merge.publishing.preflight import check_target
from bam_merge.publishing.replacing import Which, why_kept
from bam_merge.publishing.staging import Staging, free_names
from bam_merge.recipe.schema import Recipe
from bam_merge.text import printable

if TYPE_CHECKING:  # with torch
    from bam_merge.verifying.proof import Known


def merge(recipe: Recipe, output: str | os.PathLike[str] | None = None, options: MergeOptions | None = None) -> Path:
    """Plan and carry out `recipe`; returns the published folder. Raises BamMergeError, leaving the target untouched."""
    options = options or MergeOptions()
    return publish(make_plan(as_before(recipe, output, options.notify) if options.resume else recipe), output, options)


def publish(plan: Plan, output: str | os.PathLike[str] | None, options: MergeOptions) -> Path:
    """Carry out `plan` and publish the result at `output` (default: the recipe's). Raises BamMergeError.

    With `resume`, a target that is already what this plan gives is left as it is: the run was killed after it had published.
    """
    plan = fetched(plan, output, options)
    target = target_path(plan, output)
    if options.level is not None:  # a level or a device that there is not would be found after everything is written
        check_proof(options.level, options.device)
    if plan.calibration is not None:
        check_texts(plan.calibration, options.device)
    if options.resume and is_result(plan, target, options.allow_nonfinite):
        settle(target, options.notify)
        options.notify(
            f"{printable(str(target))} is already finished, from the same recipe, version and sources. bam-merge verify checks it."
        )
        return target
    check_target(plan, target, options)
    staging = Staging.open(target, options.notify)
    try:
        check_target(plan, target, options)  # again: the run that had the lock until now may have published
        try:
            _make(plan, staging, target, options)
        except OutputError as error:
            if staging.is_ours():
                raise
            raise deleted(staging) from error  # and that is why
        put_in_place(staging, target, options.force)
    except SyncFailed:
        staging.forget()
        raise
    finally:
        staging.close()
    return target


def _make(plan: Plan, staging: Staging, target: Path, options: MergeOptions) -> None:
    """Write everything into the staging folder, synced, and prove it."""
    done = staging.begin(plan, options.resume, options.allow_nonfinite, options.notify)
    companions = companion_files(plan)
    complete(plan, staging, target, options, _run(plan, staging, options, done), companions)


def complete(
    plan: Plan,
    staging: Staging,
    target: Path,
    options: MergeOptions,
    finished: dict[str, Finished],
    companions: set[CompanionFile],
    found: "Callable[[], Known] | None" = None,
) -> None:
    """Write what stands beside the tensors `finished`, routers from texts before it, all synced, and prove it, but for what other processes
    have `found`. `companions` are the files that were there at the beginning."""
    record: dict[str, Any] = {}
    if plan.calibration is not None:
        from bam_merge.publishing.calibrated import calibration_record, make_routers  # with torch, which copies do without

        made, routers = make_routers(plan, staging, options)
        finished, record = {**finished, **routers}, {"calibration": calibration_record(plan.calibration, made)}
    write_companions(plan, staging.output, finished, staging.files, **record)
    check_unchanged(plan.checkpoints)  # once more, after what the manifest read and the companions
    if changes := [changed(source, path) for source, path, _ in companions ^ companion_files(plan)]:
        raise CheckpointError(*dict.fromkeys(changes))
    sync_descriptor(staging.files, staging.output)
    if options.level is not None and staging.is_ours():  # verification looks where the name leads
        _prove(plan, staging, target, options, options.level, found)
    if not staging.is_ours():
        raise deleted(staging)


def deleted(staging: Staging) -> OutputError:
    return OutputError(f"{printable(str(staging.folder))} was deleted while the merge ran. Nothing was published; run again.")


def put_in_place(staging: Staging, target: Path, force: bool) -> None:
    """Give what is finished its final name, durably, in place of what `force` may replace; and clear up. Raises OutputError."""
    checked = _checked(target, force)
    staging.appear(target, replace_existing=checked is not None)
    _make_durable(staging, target)
    staging.remove(checked)


def _checked(target: Path, force: bool) -> Mapping[str, Which] | None:
    """The files of what --force is about to replace, which may be deleted then; None when it replaces nothing. Raises OutputError."""
    if not force or not os.path.lexists(target):
        return None
    why, found = why_kept(target)
    if why is not None:
        raise OutputError(
            f"{printable(str(target))} became what is not a checkpoint folder while the merge ran. Nothing was replaced: it {why}. "
            "Run again with --resume."
        )
    return found.saved


def _prove(plan: Plan, staging: Staging, target: Path, options: MergeOptions, level: str, found: "Callable[[], Known] | None") -> None:
    """Verify the staged result. If a check fails, keep it beside the target under a name that says so, and raise VerificationFailed."""
    from bam_merge.verifying.options import VerifyOptions
    from bam_merge.verifying.proof import NOTHING
    from bam_merge.verifying.verification import verify_rest

    options.notify("verifying" if level == "quick" else f"verifying, {level}")
    how = VerifyOptions(level, options.device, options.workers, options.on_verify, try_routers=True)
    report = verify_rest(NOTHING if found is None else found(), staging.output, plan, options=how)
    options.on_report(report)
    if not report.ok:
        refuse(staging, target, [f"{check.name}: {check.detail}" for check in report.failures])


def refuse(staging: Staging, target: Path, failures: list[str]) -> NoReturn:
    """Keep a result that failed its proof beside the target, under a name that says so, and raise VerificationFailed."""
    failed = next(path for path in map(target.with_name, free_names(target.name, ".failed")) if not os.path.lexists(path))
    staging.appear(failed, replace_existing=False)
    with suppress(SyncFailed):  # it is only for looking at
        sync_descriptor(staging.parent, target.parent)
    staging.remove()
    kept = f"the result is kept for inspection in {printable(str(failed))}"
    raise VerificationFailed(*failures, f"{printable(str(target))} was not published; {kept}.")


def check_proof(level: str, device: str) -> None:
    """Raises VerifyError. torch is imported only for a device that must be looked for."""
    from bam_merge.verifying.options import check_level

    check_level(level)
    if device != "cpu":
        from bam_merge.verifying.devices import open_device

        open_device(device)


def check_texts(found: Calibration, device: str) -> None:
    """Raises VerifyError for a device that there is not, CheckpointError for texts that are gone, as a recorded merge's may."""
    if found.absent:
        raise CheckpointError(*found.absent)
    if device != "cpu":
        from bam_merge.verifying.devices import open_device

        open_device(device)


def _make_durable(staging: Staging, target: Path) -> None:
    """Bring the new name to the disk, before what it replaced is deleted: a power cut must not leave the old one's remains there."""
    try:
        sync_descriptor(staging.parent, target.parent)
        sync_descriptor(staging.lock, staging.folder)
    except SyncFailed as error:
        kept = f" What it replaced is kept in {printable(str(staging.folder))}." if staging.output.exists() else ""
        raise DurabilityUncertain(
            f"{printable(str(target))} is published and complete, but may not survive a power cut: {error}{kept} "
            "Run again with --resume to try once more."
        ) from error


def is_result(plan: Plan, target: Path, allow_nonfinite: bool) -> bool:
    """Whether `target` is complete and was made by this version from the plan's recipe and its sources as they are now.

    As for a resumed tensor, a source is the same when its size, header and config.json are, and it did not change since; and its
    tokenizer and generation files, which no tensor depends on, must be those that were merged. Its manifest is of today's format.
    """
    try:
        document = read_manifest(target)
        made = os.stat(target / MANIFEST).st_mtime_ns
        complete = all(os.stat(target / shard.file).st_size == shard.nbytes for shard in plan.shards)
        for name, checkpoint in plan.checkpoints.items():
            known = document["sources"][name]
            files = {file: (record["bytes"], record["header"]) for file, record in known["files"].items()}
            found = {file: (header.identity.size, header.digest) for file, header in checkpoint.files.items() if file in files}
            changes = [] if checkpoint.afar is not None else [os.stat(checkpoint.path / file) for file in checkpoint.files]
            if checkpoint.afar is not None and any(
                record.get("etag", checkpoint.files[file].identity.etag) != checkpoint.files[file].identity.etag
                for file, record in known["files"].items()
            ):
                return False
            companions = companion_digests(checkpoint.path, plan.companions(name))
            if (known["config"], known["companions"], files) != (checkpoint.config_digest, companions, found):
                return False
            if any(max(status.st_ctime_ns, status.st_mtime_ns) >= made for status in changes):
                return False
    except (BamMergeError, OSError, KeyError, TypeError):
        return False
    texts = {} if plan.calibration is None else plan.calibration.document()
    if document.get("calibration", {}).get("texts", {}) != texts:
        return False
    finite = allow_nonfinite or not any(record.get("nonfinite") for record in document["tensors"].values())
    made_by = document["format"], document.get("version"), document["recipe"]
    return complete and finite and made_by == (MANIFEST_FORMAT, __version__, plan.recipe.resolved())


def settle(target: Path, notify: Callable[[str], None]) -> None:
    """What a run that was killed after its rename had yet to do."""
    staging = Staging.open(target, notify, parts=True)
    try:
        _make_durable(staging, target)
        staging.remove()
    finally:
        staging.close()


def _run(plan: Plan, staging: Staging, options: MergeOptions, done: dict[str, Finished]) -> dict[str, Finished]:
    def on_finished(step: Step, finished: Finished) -> None:
        staging.record(step.name, finished)

    options.progress(sum(step.nbytes for step in plan.steps if step.name in done and not isinstance(step.expr, Calibrated)))
    settings = Settings(options.workers, options.progress, on_finished, options.allow_nonfinite, staging.files)
    return {**done, **execute(plan, staging.output, settings, done)}
