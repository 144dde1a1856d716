"""From a plan to a published folder: staging beside the target, everything synced, one atomic rename at the end.

While a merge runs, its files are in `.NAME.bam-merge/output` beside the target NAME; a journal there names the finished tensors,
so that a killed run can go on. The target appears complete or not at all.
"""

import ctypes
import errno
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from bam_merge import __version__, ops
from bam_merge.card import model_card
from bam_merge.checkpoint import INDEX, read_small_file
from bam_merge.errors import BamMergeError, OutputError, printable
from bam_merge.execute import Finished, Settings, digest_range, execute
from bam_merge.plan import Plan, Step, make_plan
from bam_merge.recipe import Recipe

MANIFEST = "bam_merge.json"
MANIFEST_FORMAT = 1


def default_workers() -> int:
    """As many workers as this process may use processors, at most 8: more only compete for the disk."""
    return max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


@dataclass
class MergeOptions:
    """How to run a merge. `notify` gets one line for each thing worth saying, `progress` the bytes just written."""

    force: bool = False
    resume: bool = False
    workers: int = field(default_factory=default_workers)
    allow_nonfinite: bool = False
    notify: Callable[[str], None] = lambda text: None
    progress: Callable[[int], None] = lambda count: None


def merge(recipe: Recipe, output: str | os.PathLike[str] | None = None, options: MergeOptions | None = None) -> Path:
    """Plan and carry out `recipe`; returns the published folder. Raises BamMergeError, leaving the target untouched."""
    return publish(make_plan(recipe), output, options or MergeOptions())


def publish(plan: Plan, output: str | os.PathLike[str] | None, options: MergeOptions) -> Path:
    """Carry out `plan` and publish the result at `output` (default: the recipe's). Raises BamMergeError."""
    target = target_path(plan, output)
    problems = preflight(plan, target, force=options.force)
    if problems:
        raise OutputError(*problems)
    staging = _Staging.open(target)
    try:
        done = staging.begin(plan, options)
        short = space_problem(plan, target, reserved=staging.allocated())
        if short:
            raise OutputError(short)
        finished = _run(plan, staging, options, done)
        _write_companions(plan, staging.output, finished)
        _sync_folder(staging.output)
        _appear(staging.output, target, replace_existing=options.force)
        staging.remove()
    finally:
        staging.close()
    _sync_folder(target.parent)
    return target


def target_path(plan: Plan, output: str | os.PathLike[str] | None) -> Path:
    """Where the result goes: `output` relative to the working directory, or the recipe's path relative to the recipe."""
    return Path(os.path.abspath(output if output is not None else plan.recipe.folder / plan.recipe.output.path))


# ---- before anything is written ------------------------------------------------------------------------------------------


def preflight(plan: Plan, target: Path, force: bool) -> list[str]:
    """Why `target` cannot be written, found before a byte is: it exists, it overlaps a source, no permission."""
    shown = printable(str(target))
    problems = []
    here = _identity(target)
    above = {_identity(parent) for parent in target.parents} - {None}
    for name, model in plan.models.items():
        source = model.checkpoint.path.resolve()
        if here is not None and here in {_identity(source), *map(_identity, source.parents)}:
            problems.append(f"output.path: {shown} is, or holds, sources.{name} ({printable(str(source))}). Choose another folder.")
        elif _identity(source) in above:
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


def space_problem(plan: Plan, target: Path, reserved: int = 0) -> str | None:
    """A message when the file system lacks room for the output, of which `reserved` bytes are there already."""
    parent = _existing_parent(target)
    needed, free = plan.bytes_written + 20_000_000 - reserved, shutil.disk_usage(parent).free
    if needed <= free:
        return None
    return (
        f"{printable(str(parent))}: {free / 1e9:.2f} GB free, the merge writes {plan.bytes_written / 1e9:.2f} GB. "
        "Free some space, or choose another --output."
    )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _existing_parent(target: Path) -> Path:
    return next((parent for parent in target.parents if os.path.lexists(parent)), Path("/"))


def _replaceable(target: Path) -> bool:
    """Whether --force may delete `target`: a folder that is empty or holds a checkpoint."""
    if target.is_symlink() or not target.is_dir():
        return False
    names = os.listdir(target)
    return not names or "config.json" in names


# ---- the staging folder ----------------------------------------------------------------------------------------------------


@dataclass
class _Staging:
    """`.NAME.bam-merge` beside the target, locked by this process for as long as `lock` is open."""

    folder: Path
    lock: int
    journal: Any = None

    @property
    def output(self) -> Path:
        return self.folder / "output"

    @classmethod
    def open(cls, target: Path) -> "_Staging":
        """Make and lock the staging folder of `target`. Raises OutputError when another run has it."""
        folder = target.parent / f".{target.name}.bam-merge"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            while True:
                folder.mkdir(exist_ok=True)
                lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(lock)
                    raise OutputError(f"{printable(str(target))} is being written by another run{_holder(folder)}. Wait for it.") from None
                if _identity(folder) == (os.fstat(lock).st_dev, os.fstat(lock).st_ino):
                    break
                os.close(lock)  # that run finished and removed the folder between our two calls
            (folder / "pid").write_text(f"{os.getpid()}\n")
        except OSError as error:
            raise OutputError(f"{printable(str(error.filename or folder))}: {error.strerror}.") from error
        return cls(folder, lock)

    def begin(self, plan: Plan, options: MergeOptions) -> dict[str, Finished]:
        """Start the journal. Returns the tensors that an earlier run of the same plan finished, when resuming."""
        path = self.folder / "journal"
        header = {"fingerprint": plan.fingerprint, "version": __version__}
        done: dict[str, Finished] = {}
        if options.resume:
            done = self._trusted(plan, _read_journal(path, header, options.notify), options.notify)
        elif self.output.exists():
            options.notify("an unfinished run is discarded; --resume would have continued it.")
        if not done and self.output.exists():
            shutil.rmtree(self.output)
        self.output.mkdir(exist_ok=True)
        self.journal = open(path, "wb", buffering=0)
        self._append(header)
        for name, finished in done.items():
            self.record(name, finished)
        return done

    def _trusted(self, plan: Plan, journal: dict[str, Finished], notify: Callable[[str], None]) -> dict[str, Finished]:
        """The journal's tensors whose bytes are really there."""
        trusted = {}
        for step in plan.steps:
            finished = journal.get(step.name)
            try:
                if finished and digest_range(self.output / step.file, step.offset, step.nbytes) == finished.digest:
                    trusted[step.name] = finished
            except BamMergeError:
                continue
        if journal:
            notify(f"resuming: {len(trusted)} of {len(plan.steps)} tensors are finished.")
        return trusted

    def record(self, name: str, finished: Finished) -> None:
        self._append({"name": name, "digest": finished.digest, "reads": finished.reads, "nonfinite": finished.nonfinite})

    def _append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record).encode()
        self.journal.write(b"%08x %s\n" % (zlib.crc32(line), line))

    def allocated(self) -> int:
        return sum(os.stat(file).st_blocks * 512 for file in self.output.glob("*"))

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        if self.journal is not None:
            self.journal.close()
        os.close(self.lock)


def _holder(folder: Path) -> str:
    try:
        return f" (process {int((folder / 'pid').read_text())})"
    except (OSError, ValueError):
        return ""


def _read_journal(path: Path, header: dict[str, Any], notify: Callable[[str], None]) -> dict[str, Finished]:
    """The finished tensors of an earlier run; nothing when it was of another plan. A torn end is ignored."""
    records: list[dict[str, Any]] = []
    if not path.exists():
        notify("nothing to resume: starting from the beginning.")
        return {}
    for line in path.read_bytes().split(b"\n"):
        checksum, _, body = line.partition(b" ")
        if checksum != b"%08x" % zlib.crc32(body) or not body:
            break
        records.append(json.loads(body))
    if not records or records[0] != header:
        notify("the unfinished run was of another recipe, version or set of sources: starting from the beginning.")
        return {}
    return {record["name"]: Finished(record["digest"], record["reads"], record["nonfinite"]) for record in records[1:]}


def _run(plan: Plan, staging: _Staging, options: MergeOptions, done: dict[str, Finished]) -> dict[str, Finished]:
    def on_finished(step: Step, finished: Finished) -> None:
        staging.record(step.name, finished)

    options.progress(sum(step.nbytes for step in plan.steps if step.name in done))
    settings = Settings(options.workers, options.progress, on_finished, options.allow_nonfinite)
    return {**done, **execute(plan, staging.output, settings, done)}


# ---- the files beside the tensors ------------------------------------------------------------------------------------------


def _write_companions(plan: Plan, folder: Path, finished: dict[str, Finished]) -> None:
    """config.json, index, tokenizer files, model card and, last, the manifest."""
    seed = plan.models[plan.recipe.seed_name].checkpoint
    documents = {"config.json": _json(plan.config)}
    if len(plan.shards) > 1:
        weight_map = {step.name: step.file for step in sorted(plan.steps, key=lambda step: step.name)}
        total = sum(step.nbytes for step in plan.steps)
        documents[INDEX] = _json({"metadata": {"total_parameters": plan.parameters, "total_size": total}, "weight_map": weight_map})
    for name in seed.companions():
        documents[name] = read_small_file(seed.path / name)
    documents["README.md"] = model_card(plan).encode()
    digests = {name: xxhash.xxh3_128_hexdigest(data) for name, data in documents.items()}
    documents[MANIFEST] = _json(_manifest(plan, finished, digests))
    for name, data in documents.items():
        _write_file(folder / name, data)


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _manifest(plan: Plan, finished: dict[str, Finished], files: dict[str, str]) -> dict[str, Any]:
    """What was made from what, with digests (XXH3-128). Same inputs, recipe and version: same bytes."""
    tensors = {}
    for step in plan.steps:
        record = {
            "expression": step.expression, "file": step.file, "dtype": step.dtype, "shape": list(step.shape),
            "digest": finished[step.name].digest,
        }  # fmt: skip
        if finished[step.name].nonfinite:
            record["nonfinite"] = finished[step.name].nonfinite
        tensors[step.name] = record
    return {
        "format": MANIFEST_FORMAT,
        "tool": "bam-merge",
        "version": __version__,
        "recipe": plan.recipe.resolved(),
        "sources": _source_records(plan, finished),
        "parameters": {"total": plan.parameters, "active": plan.active_parameters},
        "files": dict(sorted(files.items())),
        "tensors": tensors,
        "unused": {name: dict(sorted(reasons.items())) for name, reasons in plan.unused.items() if reasons},
    }


def _source_records(plan: Plan, finished: dict[str, Finished]) -> dict[str, Any]:
    """For each source its path and, for each file read, its size, a digest of the header and one of every tensor read.

    A file's `digest` is the XXH3-128 of the header's digest and the digests of the tensors read, in file order.
    """
    known: dict[str, str] = {}
    for name, result in finished.items():
        for read, digest in result.reads.items():
            if known.setdefault(read, digest) != digest:
                raise OutputError(f"{read} changed while it was being merged (seen again for {name}). Run again when nothing writes to it.")
    used: dict[str, dict[str, ops.Read]] = {name: {} for name in plan.models}
    for step in plan.steps:
        for read in ops.reads(step.expr):
            used[read.source][read.tensor] = read
    records = {}
    for source, model in plan.models.items():
        files = {}
        for file, header in model.checkpoint.files.items():
            entries = [entry for entry in header.tensors if entry.name in used[source]]
            digests = {}
            for entry in entries:
                key = str(used[source][entry.name])
                digests[entry.name] = known.get(key) or digest_range(model.checkpoint.path / file, entry.offset, entry.nbytes)
            if entries:
                whole = xxhash.xxh3_128_hexdigest("".join([header.digest, *digests.values()]).encode())
                files[file] = {"bytes": header.identity.size, "header": header.digest, "digest": whole, "tensors": digests}
        records[source] = {
            "path": plan.recipe.relative(plan.recipe.sources[source]),
            "config": model.checkpoint.config_digest,
            "files": files,
        }
    return records


def _write_file(path: Path, data: bytes) -> None:
    try:
        with open(path, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise OutputError(f"{printable(str(path))}: {error.strerror}. Run again with --resume once that is mended.") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OutputError(f"{printable(str(folder))}: {error.strerror} while making it durable.") from error
    finally:
        os.close(descriptor)


# ---- the atomic appearance ---------------------------------------------------------------------------------------------------

_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2


def _appear(staged: Path, target: Path, replace_existing: bool) -> None:
    """Give the finished folder its final name in one step. An existing target is exchanged, and so lands in the staging folder."""
    exchange = replace_existing and os.path.lexists(target)
    try:
        _rename(staged, target, _EXCHANGE if exchange else _NOREPLACE)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise OutputError(
                f"{printable(str(target))} appeared while the merge ran. Nothing was replaced; use --force --resume."
            ) from None
        raise OutputError(f"{printable(str(target))}: {error.strerror} when renaming the finished folder {staged} to it.") from error


def _rename(old: Path, new: Path, flags: int) -> None:
    """renameat2(2), which os.rename lacks: plain rename silently replaces an empty folder, and cannot exchange two."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code))
    # A kernel or file system without it: two steps, with the target absent in between when it is replaced.
    if flags == _EXCHANGE:
        aside = old.with_name("replaced")
        os.rename(new, aside)
    elif os.path.lexists(new):
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
    os.rename(old, new)
