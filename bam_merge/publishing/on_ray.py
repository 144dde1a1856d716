"""A merge whose parts are tasks of a Ray cluster over a shared file system: each runs what --part runs, and finish follows, with other
tasks that prove what it has written.

Tasks return digests and what was measured, never tensors. A task that dies with its node is run again on another one, where it goes on with
what is on the disk; so does a whole run after its driver died. Ray schedules; what was done stands in the journals of the parts, which tell
the progress.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bam_merge import errors
from bam_merge.errors import BamMergeError, OutputError
from bam_merge.own_folder import open_folder
from bam_merge.planning.parts import Part, parts_of
from bam_merge.planning.plan import Plan
from bam_merge.publishing.destination import target_path
from bam_merge.publishing.fetching import fetched
from bam_merge.publishing.finishing import finish
from bam_merge.publishing.options import MergeOptions
from bam_merge.publishing.part_journals import PartJournal, check_together, file_name, header_of, headers, numbers, read_part
from bam_merge.publishing.preflight import check_target
from bam_merge.publishing.publish import check_proof, check_texts, is_result
from bam_merge.publishing.ray_cluster import check_address, connected, ray_library
from bam_merge.publishing.ray_tasks import Order, orders, prove, run_part
from bam_merge.publishing.staging import OUTPUT, PARTS, staging_folder
from bam_merge.text import count, printable

if TYPE_CHECKING:  # with torch
    from bam_merge.verifying import proof

RETRIES = 3
"""How often Ray runs a task again whose node or process died."""

LOOK_SECONDS = 0.5
"""How often the journals are looked at."""

TASK_WORKERS = 2
"""Threads, and processors, of a task, unless more are asked for: parts keep the others busy."""

PARTS_PER_TASK = 2
"""Parts for each task that can run at once: what a lost node costs is half of what it does."""


@dataclass(frozen=True)
class OnRay:
    """Where the tasks run: the address of a cluster, as ray.init takes it, or None for one of this machine, for this run. `parts` and
    `workers`, threads of each, are chosen by the cluster where they are None."""

    address: str | None = None
    parts: int | None = None
    workers: int | None = None


def merge_on_ray(plan: Plan, output: str | os.PathLike[str] | None, options: MergeOptions, where: OnRay) -> Path:
    """Make the parts of `plan` as tasks of Ray, then finish. Returns the published folder.

    Parts that an earlier run made are taken over. Raises BamMergeError: OutputError where Ray is not there, or ends, among it.
    """
    check_address(where.address)
    ray = ray_library(where.address)
    plan = fetched(plan, output, options)
    target = target_path(plan, output)
    if options.level is not None:
        check_proof(options.level, options.device)
    if plan.calibration is not None:
        check_texts(plan.calibration, options.device)
    if not (os.path.lexists(target) and is_result(plan, target, options.allow_nonfinite)):
        check_target(plan, target, options)
        with connected(ray, where.address):
            workers, slots = _room(ray, plan, where)
            begun = _begun(target)
            ofs = {journal.of for journal in begun}
            of = where.parts or (ofs.pop() if len(ofs) == 1 else min(len(plan.shards), PARTS_PER_TASK * slots))
            parts = parts_of(plan, of)
            for journal in begun:  # else it would depend on which task begins first whether it refuses or makes its part anew
                part = parts[min(journal.number, of) - 1]
                check_together(journal, header_of(plan, part), part, staging_folder(target))
            options.notify(f"{count(of, 'part')} on Ray, {slots} at once, {count(workers, 'worker')} each")
            mine = replace(options, workers=workers, on_verify=_NeverLess(options.on_verify))
            _run(ray, plan, target, parts, mine)
            return finish(plan, output, replace(options, on_verify=mine.on_verify), partial(_proved, ray, plan, target, parts, mine))
    return finish(plan, output, options)


# ---- the driver --------------------------------------------------------------------------------------------------------------


def _run(ray: Any, plan: Plan, target: Path, parts: tuple[Part, ...], options: MergeOptions) -> None:
    """Have all parts made. Raises BamMergeError with what was wrong with any; the others are stopped then, and what they finished stays."""
    progress = _Progress(plan, target, parts)
    needs = _needs(plan, options)
    for order, reference in _ended(ray, run_part, orders(plan, target, parts, options), needs, lambda: options.progress(progress.more())):
        found = _outcome(ray, reference, order, options)
        if isinstance(found, BamMergeError):
            raise found
        options.notify(f"{order} is made, on {printable(found['host'], 100)}")
    options.progress(progress.more())


def _needs(plan: Plan, options: MergeOptions) -> dict[str, Any]:
    """The resources of a task, and how often it is run again."""
    return {"num_cpus": options.workers, "memory": _memory(plan, options.workers), "max_retries": RETRIES}


def _ended(
    ray: Any, body: Callable[[Order], dict[str, Any]], orders: Iterable[Order], needs: Mapping[str, Any], look: Callable[[], None]
) -> Iterator[tuple[Order, Any]]:
    """(order, what Ray knows of it) of all tasks, as they end; meanwhile `look` is called.

    Whoever stops asking leaves the cluster, and with its driver Ray ends the tasks that are left. Asking for that before, by ray.cancel,
    makes Ray 2.60 abort the driver now and then, where a task ends meanwhile.
    """
    task = ray.remote(body).options(**needs)
    waiting = {task.remote(order): order for order in orders}
    while waiting:
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=LOOK_SECONDS)
        look()
        for reference in done:
            yield waiting.pop(reference), reference


def _outcome(ray: Any, reference: Any, order: Order, options: MergeOptions) -> dict[str, Any] | BamMergeError:
    """What came of a task, whose notes are told; or its error."""
    try:
        found: dict[str, Any] = ray.get(reference)
    except ray.exceptions.RayError as error:
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return OutputError(f"{order}: Ray could not run it: {printable(said, 300)} What is finished is kept; run again to go on.")
    for note in found["notes"]:
        options.notify(f"{order}: {note}")
    if "error" in found:
        kind = getattr(errors, found["error"], OutputError)
        refused: BamMergeError = kind(*found["problems"])
        return refused
    return found


# ---- the proof ---------------------------------------------------------------------------------------------------------------


def _proved(ray: Any, plan: Plan, target: Path, parts: tuple[Part, ...], options: MergeOptions) -> "proof.Known":
    """What tasks find of the written result: each part compared with its sources, and the layers run that can be by themselves. What a task
    could not do is left to the driver, and why is told."""
    from bam_merge.verifying import proof
    from bam_merge.verifying.work import of_bytes

    assert options.level is not None
    asked = list(orders(plan, target, parts, options, options.level))
    sizes = {order: part.nbytes for order, part in zip(map(str, asked), parts, strict=True)}
    alone = proof.layers_alone(plan, staging_folder(target) / OUTPUT, options.level) if options.device == "cpu" else ()
    asked += [replace(asked[0], layers=(layer,)) for layer in alone]
    found, done = list[proof.Known](), 0
    for order, reference in _ended(ray, prove, asked, _needs(plan, options), lambda: None):
        outcome = _outcome(ray, reference, order, options)
        if isinstance(outcome, BamMergeError):
            options.notify(f"{order}: verified here, since its task was not: {' '.join(outcome.problems)}")
            continue
        found.append(outcome["found"])
        done += sizes.get(str(order), 0)
        options.on_verify(*of_bytes(done, sum(sizes.values())))
    return proof.together(found)


@dataclass
class _NeverLess:
    """Tells `tell` of work done and of all the work; where another one begins to count, not of less than was done before."""

    tell: Callable[[int, int], None]
    share: float = 0.0

    def __call__(self, done: int, total: int) -> None:
        self.share = max(self.share, done / max(1, total))
        self.tell(max(done, int(self.share * total)), total)


# ---- how far it has come -----------------------------------------------------------------------------------------------------


@dataclass
class _Progress:
    """How many bytes are written, by the journals of the parts."""

    plan: Plan
    target: Path
    parts: tuple[Part, ...]
    sizes: dict[int, int] = field(default_factory=dict)
    bytes_of: dict[int, int] = field(default_factory=dict)
    told: int = 0

    @cached_property
    def names(self) -> dict[str, int]:
        return {step.name: step.nbytes for step in self.plan.steps}

    def more(self) -> int:
        """Bytes that have come since it was asked last; fewer than none when a part began anew."""
        with suppress(OSError):
            folder = os.open(staging_folder(self.target) / PARTS, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                for number, of in numbers(folder, "journal"):
                    self._look(number, of, folder)
            finally:
                os.close(folder)
        done = sum(self.bytes_of.values())
        self.told, more = done, done - self.told
        return more

    def _look(self, number: int, of: int, folder: int) -> None:
        size = os.stat(file_name(number, of, "journal"), dir_fd=folder).st_size
        if of == len(self.parts) and self.sizes.get(number) != size:
            found = read_part(number, of, folder)
            self.sizes[number] = size
            self.bytes_of[number] = sum(self.names.get(name, 0) for name in found.finished) if found is not None else 0


def _begun(target: Path) -> list[PartJournal]:
    """What earlier runs' parts are of, which is gone on with; nothing where there is none, or no telling."""
    with suppress(OSError):
        parent = os.open(staging_folder(target), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            folder = open_folder(PARTS, parent)
            try:
                return list(headers(folder))
            finally:
                os.close(folder)
        finally:
            os.close(parent)
    return []


# ---- what a cluster has room for ----------------------------------------------------------------------------------------------


def _room(ray: Any, plan: Plan, where: OnRay) -> tuple[int, int]:
    """Threads of a task, and how many tasks can run at once. Raises OutputError where no node has what one needs."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = int(max((node.get("CPU", 0) for node in nodes), default=0))
    if most < (where.workers or 1):
        raise OutputError(
            f"--ray: the largest node of the cluster has {count(most, 'processor')}, and a part is to have {where.workers or 1}. Use a "
            "smaller --workers, or start nodes that have more."
        )
    workers = where.workers or min(TASK_WORKERS, most)
    memory = _memory(plan, workers)
    slots = sum(min(int(node.get("CPU", 0) // workers), int(node.get("memory", 0) // memory)) for node in nodes)
    if not slots:
        raise OutputError(
            f"--ray: no node of the cluster has {count(workers, 'processor')} and {memory / 1e9:.2f} GB of memory, which a part takes. Use "
            "a smaller --workers, or start nodes that have more."
        )
    return workers, slots


def _memory(plan: Plan, workers: int) -> int:
    """Bytes that a task takes: those of the merge, without a pass over texts, which the driver makes."""
    return replace(plan, calibration=None).peak_memory(workers)
