"""From a plan to a published folder: staging beside the target, everything synced, one atomic rename at the end.

While a merge runs, its files are in `.NAME.bam-merge/output` beside the target NAME; a journal there names the finished tensors,
so that a killed run can go on. The target appears complete or not at all.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import resources
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from bam_merge import __version__
from bam_merge.card import model_card
from bam_merge.checkpoint import INDEX
from bam_merge.errors import (
    BamMergeError,
    CheckpointError,
    DurabilityUncertain,
    OutputError,
    SyncFailed,
    VerificationFailed,
    printable,
    writing,
)
from bam_merge.execute import Finished, Settings, execute
from bam_merge.manifest import manifest
from bam_merge.plan import Plan, Step, make_plan
from bam_merge.provenance import MANIFEST, read_manifest, sealed
from bam_merge.recipe import Recipe
from bam_merge.safetensors_header import FileIdentity
from bam_merge.source_files import available_processors, changed, check_unchanged
from bam_merge.staging import Staging, appear, identity, staged_bytes, sync_folder
from bam_merge.tokenizer_check import companion

if TYPE_CHECKING:
    from bam_merge.report import Report

SMALL_FILES = 20_000_000
"""Bytes set aside for the files beside the tensors: tokenizer, manifest, index."""


def default_workers() -> int:
    """As many workers as this process may use processors, at most 8: more only compete for the disk."""
    return min(8, available_processors())


@dataclass
class MergeOptions:
    """How to run a merge. `verify` proves the result before it appears; `on_report` is given what that found. `notify` gets one line for
    each thing worth saying, `progress` the bytes just written, from any worker.
    """

    force: bool = False
    resume: bool = False
    workers: int = field(default_factory=default_workers)
    allow_nonfinite: bool = False
    verify: bool = True
    notify: Callable[[str], None] = lambda text: None
    progress: Callable[[int], None] = lambda count: None
    on_report: "Callable[[Report], None]" = lambda report: None


def merge(recipe: Recipe, output: str | os.PathLike[str] | None = None, options: MergeOptions | None = None) -> Path:
    """Plan and carry out `recipe`; returns the published folder. Raises BamMergeError, leaving the target untouched."""
    return publish(make_plan(recipe), output, options or MergeOptions())


def publish(plan: Plan, output: str | os.PathLike[str] | None, options: MergeOptions) -> Path:
    """Carry out `plan` and publish the result at `output` (default: the recipe's). Raises BamMergeError.

    With `resume`, a target that is already what this plan gives is left as it is: the run was killed after it had published.
    """
    target = target_path(plan, output)
    if options.resume and _is_result(plan, target, options.allow_nonfinite):
        _settle(target)
        options.notify(
            f"{printable(str(target))} is already finished, from the same recipe, version and sources. bam-merge verify checks it."
        )
        return target
    _check(plan, target, options)
    staging = Staging.open(target)
    try:
        _check(plan, target, options)  # again: the run that had the lock until now may have published
        done = staging.begin(plan, options.resume, options.allow_nonfinite, options.notify)
        companions = _companions(plan)
        finished = _run(plan, staging, options, done)
        _write_companions(plan, staging.output, finished)
        check_unchanged(plan)  # once more, after what the manifest read and the companions
        if changes := [changed(plan.recipe.seed_name, path) for path, _ in companions ^ _companions(plan)]:
            raise CheckpointError(*dict.fromkeys(changes))
        sync_folder(staging.output)
        if options.verify:
            _prove(plan, staging, target, options)
        if not staging.is_ours():
            raise OutputError(f"{printable(str(staging.folder))} was deleted while the merge ran. Nothing was published; run again.")
        if options.force and os.path.lexists(target) and not _replaceable(target):
            raise OutputError(f"{printable(str(target))} became what is not a checkpoint folder while the merge ran. Nothing was replaced.")
        appear(staging.output, target, replace_existing=options.force, notify=options.notify)
        _make_durable(staging, target)
        staging.remove()
    except SyncFailed:
        staging.forget()
        raise
    finally:
        staging.close()
    return target


def _prove(plan: Plan, staging: Staging, target: Path, options: MergeOptions) -> None:
    """Verify the staged result. If a check fails, keep it beside the target under a name that says so, and raise VerificationFailed."""
    from bam_merge.verification import verify

    options.notify("verifying")
    report = verify(staging.output, plan)
    options.on_report(report)
    if not report.ok:
        failed = _free_name(target.with_name(f"{target.name}.failed"))
        appear(staging.output, failed, replace_existing=False)
        with suppress(SyncFailed):  # it is only for looking at
            sync_folder(target.parent)
        staging.remove()
        names = [f"{check.name}: {check.detail}" for check in report.failures]
        kept = f"the result is kept for inspection in {printable(str(failed))}"
        raise VerificationFailed(*names, f"{printable(str(target))} was not published; {kept}.")


def _free_name(path: Path) -> Path:
    """`path`, or the first of NAME-2, NAME-3, ... that is not taken. What stands there may be somebody's."""
    if not os.path.lexists(path):
        return path
    return next(other for n in count(2) if not os.path.lexists(other := path.with_name(f"{path.name}-{n}")))


def _make_durable(staging: Staging, target: Path) -> None:
    """Bring the new name to the disk, before what it replaced is deleted: a power cut must not leave the old one's remains there."""
    try:
        sync_folder(target.parent)
        sync_folder(staging.folder)
    except SyncFailed as error:
        kept = f" What it replaced is kept in {printable(str(staging.folder))}." if staging.output.exists() else ""
        raise DurabilityUncertain(
            f"{printable(str(target))} is published and complete, but may not survive a power cut: {error}{kept} "
            "Run again with --resume to try once more."
        ) from error


def _is_result(plan: Plan, target: Path, allow_nonfinite: bool) -> bool:
    """Whether `target` is complete and was made by this version from the plan's recipe and its sources as they are now.

    As for a resumed tensor, a source is the same when its size, header and config.json are, and it did not change since.
    """
    try:
        document = read_manifest(target)
        made = os.stat(target / MANIFEST).st_mtime_ns
        complete = all(os.stat(target / shard.file).st_size == shard.nbytes for shard in plan.shards)
        for name, model in plan.models.items():
            known, checkpoint = document["sources"][name], model.checkpoint
            files = {file: (record["bytes"], record["header"]) for file, record in known["files"].items()}
            found = {file: (header.identity.size, header.digest) for file, header in checkpoint.files.items() if file in files}
            changes = [os.stat(checkpoint.path / file) for file in checkpoint.files]
            if known["config"] != checkpoint.config_digest or files != found:
                return False
            if any(max(status.st_ctime_ns, status.st_mtime_ns) >= made for status in changes):
                return False
    except (BamMergeError, OSError, KeyError, TypeError):
        return False
    finite = allow_nonfinite or not any(record.get("nonfinite") for record in document["tensors"].values())
    return complete and finite and (document.get("version"), document["recipe"]) == (__version__, plan.recipe.resolved())


def _settle(target: Path) -> None:
    """What a run that was killed after its rename had yet to do."""
    staging = Staging.open(target)
    try:
        _make_durable(staging, target)
        staging.remove()
    finally:
        staging.close()


def target_path(plan: Plan, output: str | os.PathLike[str] | None) -> Path:
    """Where the result goes: `output` relative to the working directory, or the recipe's path relative to the recipe."""
    return Path(os.path.abspath(output if output is not None else plan.recipe.folder / plan.recipe.output.path))


# ---- before anything is written ------------------------------------------------------------------------------------------


def _check(plan: Plan, target: Path, options: MergeOptions) -> None:
    """Raise OutputError when `target` cannot be written."""
    problems = preflight(plan, target, force=options.force) or list(filter(None, [space_problem(plan, target)]))
    if problems:
        raise OutputError(*problems)


def preflight(plan: Plan, target: Path, force: bool) -> list[str]:
    """Why `target` cannot be written, found before a byte is: it exists, it overlaps a source, no permission."""
    shown = printable(str(target))
    problems = []
    here = identity(target)
    above = {identity(parent) for parent in target.parents} - {None}
    for name, model in plan.models.items():
        source = model.checkpoint.path.resolve()
        if here is not None and here in {identity(source), *map(identity, source.parents)}:
            problems.append(f"output.path: {shown} is, or holds, sources.{name} ({printable(str(source))}). Choose another folder.")
        elif identity(source) in above:
            problems.append(f"output.path: {shown} is inside sources.{name} ({printable(str(source))}). Choose another folder.")
    if problems:
        return problems
    if os.path.lexists(target):
        if not force:
            problems.append(f"{shown} already exists. Choose another --output, or replace it as a whole with --force.")
        elif not _replaceable(target):
            problems.append(f"{shown} exists and is not a checkpoint folder, so --force will not delete it. Remove it yourself.")
    parent = _existing_parent(target)
    if not parent.is_dir():
        problems.append(f"{printable(str(parent))} is not a folder, so {shown} cannot be made in it.")
    elif not os.access(parent, os.W_OK | os.X_OK):
        problems.append(f"no permission to write in {printable(str(parent))}. Choose another --output.")
    return problems


def space_problem(plan: Plan, target: Path) -> str | None:
    """A message when the file system lacks room for the output; what an unfinished run holds counts as room."""
    parent = _existing_parent(target)
    needed, free = plan.bytes_written + SMALL_FILES, shutil.disk_usage(parent).free + staged_bytes(target)
    if needed <= free:
        return None
    return (
        f"{printable(str(parent))}: {free / 1e9:.2f} GB free, the merge writes {plan.bytes_written / 1e9:.2f} GB. "
        "Free some space, or choose another --output."
    )


def _existing_parent(target: Path) -> Path:
    return next((parent for parent in target.parents if os.path.lexists(parent)), Path("/"))


def _replaceable(target: Path) -> bool:
    """Whether --force may delete `target`: a folder that is empty or holds a checkpoint."""
    if target.is_symlink() or not target.is_dir():
        return False
    names = os.listdir(target)
    return not names or "config.json" in names


def _run(plan: Plan, staging: Staging, options: MergeOptions, done: dict[str, Finished]) -> dict[str, Finished]:
    def on_finished(step: Step, finished: Finished) -> None:
        staging.record(step.name, finished)

    options.progress(sum(step.nbytes for step in plan.steps if step.name in done))
    settings = Settings(options.workers, options.progress, on_finished, options.allow_nonfinite)
    return {**done, **execute(plan, staging.output, settings, done)}


# ---- the files beside the tensors ------------------------------------------------------------------------------------------


def _companions(plan: Plan) -> set[tuple[Path, FileIdentity]]:
    """The files that are copied from the seed, as they are now."""
    seed = plan.models[plan.recipe.seed_name].checkpoint
    return {(seed.path / name, FileIdentity.of(os.stat(seed.path / name))) for name in seed.companions()}


def _write_companions(plan: Plan, folder: Path, finished: dict[str, Finished]) -> None:
    """config.json, index, tokenizer files, model code, model card and, last, the manifest."""
    seed = plan.models[plan.recipe.seed_name].checkpoint
    documents = {"config.json": _json(plan.config)}
    if len(plan.shards) > 1:
        weight_map = {step.name: step.file for step in sorted(plan.steps, key=lambda step: step.name)}
        total = sum(step.nbytes for step in plan.steps)
        documents[INDEX] = _json({"metadata": {"total_parameters": plan.parameters, "total_size": total}, "weight_map": weight_map})
    for name in seed.companions():
        documents[name] = companion(seed.path / name)
    documents.update(model_code(plan.config))
    documents["README.md"] = model_card(plan).encode()
    digests = {name: xxhash.xxh3_128_hexdigest(data) for name, data in documents.items()}
    documents[MANIFEST] = sealed(manifest(plan, finished, digests))
    for name, data in documents.items():
        _write_file(folder / name, data)


def model_code(config: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of `bam_merge.exported` that the config's auto_map names, as they are; none for a public layout."""
    modules = {reference.partition(".")[0] for reference in config.get("auto_map", {}).values()}
    return {f"{name}.py": (resources.files("bam_merge.exported") / f"{name}.py").read_bytes() for name in sorted(modules)}


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _write_file(path: Path, data: bytes) -> None:
    with writing(path), open(path, "wb") as stream:
        stream.write(data)
        stream.flush()
        with writing(path, SyncFailed):
            os.fsync(stream.fileno())
