"""A merge whose parts are tasks of a Ray cluster over a shared file system: each runs what --part runs, and finish follows.

Tasks return digests, never tensors. A task that dies with its node is run again on another one, where it goes on with what is on the disk;
so does a whole run after its driver died. Ray schedules; what was done stands in the journals of the parts, which tell the progress.
"""

import importlib
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bam_merge import errors
from bam_merge.errors import BamMergeError, OutputError
from bam_merge.own_folder import open_folder
from bam_merge.planning.make import make_plan
from bam_merge.planning.parts import Part, parts_of
from bam_merge.planning.plan import Plan
from bam_merge.publishing.destination import target_path
from bam_merge.publishing.fetching import fetched
from bam_merge.publishing.finishing import finish
from bam_merge.publishing.options import MergeOptions
from bam_merge.publishing.part_journals import difference, file_name, header_of, numbers, read_part
from bam_merge.publishing.parts import make_part
from bam_merge.publishing.preflight import check_target
from bam_merge.publishing.publish import check_proof, check_texts, is_result
from bam_merge.publishing.staging import PARTS, staging_folder
from bam_merge.recipe.load import load_recipe
from bam_merge.recipe.places import Known
from bam_merge.system import machine
from bam_merge.text import count, printable

RETRIES = 3
"""How often Ray runs a task again whose node or process died."""

PATIENCE = 90.0
"""Seconds that a task waits for a part that a process holds which may be dead: longer than such a one counts as alive."""

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
    _check_address(where.address)
    ray = _ray(where.address)
    plan = fetched(plan, output, options)
    target = target_path(plan, output)
    if options.level is not None:
        check_proof(options.level, options.device)
    if plan.calibration is not None:
        check_texts(plan.calibration, options.device)
    if not (os.path.lexists(target) and is_result(plan, target, options.allow_nonfinite)):
        check_target(plan, target, options)
        with _connected(ray, where.address):
            workers, slots = _room(ray, plan, where)
            of = where.parts or _begun(target) or min(len(plan.shards), PARTS_PER_TASK * slots)
            parts = parts_of(plan, of)
            options.notify(f"{count(of, 'part')} on Ray, {slots} at once, {count(workers, 'worker')} each")
            _run(ray, plan, target, parts, replace(options, workers=workers))
    return finish(plan, output, options)


# ---- a task ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """What a task is told: the recipe by its file, which is read on its host, what was found of models of the hub, where the result goes,
    which part, what the driver's plan is of, and how to run."""

    recipe: str
    known: Mapping[str, str]
    target: str
    number: int
    of: int
    header: Mapping[str, Any]
    settings: Mapping[str, Any]


def run_part(order: Order) -> dict[str, Any]:
    """Make a part, on whatever host: the digests of its tensors; or the kind of the error and its problems, for which nothing is tried
    again."""
    host, notes = machine()[0], list[str]()
    try:
        recipe = load_recipe(order.recipe)
        if order.known:
            recipe = recipe.knowing({text: Known(recorded, Path()) for text, recorded in order.known.items()})
        options = MergeOptions(**order.settings, notify=notes.append)
        plan = fetched(make_plan(recipe), order.target, options)
        if why := difference(order.header, header_of(plan, parts_of(plan, order.of)[order.number - 1])):
            raise OutputError(
                f"part {order.number}/{order.of}: host {printable(host, 100)} does not see what the driver sees, whose plan was made {why}."
            )
        made = make_part(plan, order.target, order.number, order.of, options, PATIENCE)
    except BamMergeError as error:
        return {"host": host, "notes": notes, "error": type(error).__name__, "problems": list(error.problems)}
    return {"host": host, "notes": notes, "digests": {} if made is None else made.digests}


def _orders(plan: Plan, target: Path, parts: tuple[Part, ...], options: MergeOptions) -> Iterator[Order]:
    known = {text: place.recorded for text, place in plan.recipe.known.items()}
    settings = {
        "force": options.force,
        "workers": options.workers,
        "allow_nonfinite": options.allow_nonfinite,
        "verify": False,
        "ranges": options.ranges,
    }
    for part in parts:
        header = header_of(plan, part)
        yield Order(os.path.abspath(plan.recipe.file), known, str(target), part.number, part.of, header, settings)


# ---- the driver --------------------------------------------------------------------------------------------------------------


def _run(ray: Any, plan: Plan, target: Path, parts: tuple[Part, ...], options: MergeOptions) -> None:
    """Have all parts made. Raises BamMergeError with what was wrong with any; the others are stopped then, and what they finished stays."""
    needs = {"num_cpus": options.workers, "memory": _memory(plan, options.workers), "max_retries": RETRIES}
    task = ray.remote(run_part).options(**needs)
    waiting = {task.remote(order): order for order in _orders(plan, target, parts, options)}
    progress = _Progress(plan, target, parts)
    failed: list[BamMergeError] = []
    try:
        while waiting and not failed:
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=LOOK_SECONDS)
            options.progress(progress.more())
            for reference in done:
                order = waiting.pop(reference)
                error = _outcome(ray, reference, order, options)
                failed += [] if error is None else [error]
    finally:
        for reference in waiting:
            with suppress(Exception):  # whatever Ray has to say of one that has ended
                ray.cancel(reference)
        if waiting:
            ray.wait(list(waiting), num_returns=len(waiting), timeout=10)
    options.progress(progress.more())
    if failed:
        raise type(failed[0])(*dict.fromkeys(problem for error in failed for problem in error.problems))


def _outcome(ray: Any, reference: Any, order: Order, options: MergeOptions) -> BamMergeError | None:
    """What came of a task, told; or its error."""
    part = f"part {order.number}/{order.of}"
    try:
        found = ray.get(reference)
    except ray.exceptions.RayError as error:
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return OutputError(f"{part}: Ray could not run it: {printable(said, 300)} What is finished is kept; run again to go on.")
    for note in found["notes"]:
        options.notify(f"{part}: {note}")
    if "error" in found:
        return getattr(errors, found["error"], OutputError)(*found["problems"])
    options.notify(f"{part} is made, on {printable(found['host'], 100)}")
    return None


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


def _begun(target: Path) -> int | None:
    """Of how many parts an earlier run is, which is gone on with; None where there is none, or no telling."""
    with suppress(OSError):
        parent = os.open(staging_folder(target), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            folder = open_folder(PARTS, parent)
            try:
                found = {of for _, of in numbers(folder, "journal")}
            finally:
                os.close(folder)
        finally:
            os.close(parent)
        return next(iter(found)) if len(found) == 1 else None
    return None


# ---- Ray ---------------------------------------------------------------------------------------------------------------------


def _ray(address: str | None) -> Any:
    """The library. Raises OutputError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # which else reports to its makers, over the network
    if address is None:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # a cluster for this run listens on 127.0.0.1 alone, as there
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise OutputError(
            f"--ray needs Ray, which could not be imported ({error}). pip install 'bam-merge[ray]', on every host of the cluster; or make "
            "the parts by --part."
        ) from None


def _check_address(address: str | None) -> None:
    """Raise OutputError where nothing answers at host:port: Ray would try for many minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not (colon and port.isdigit()):
        return  # "auto" and the like, which Ray knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OutputError(
            f"--ray: nothing answers at {printable(str(address), 200)}: {why}. ray start --head prints the address."
        ) from None


@contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    """In a cluster: that at `address`, or one of this machine that ends with this. Raises OutputError."""
    here = {"include_dashboard": False, "object_store_memory": 100 * 2**20} if address is None else {}  # digests are small
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="error", **here)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        where = "no cluster could be started here" if address is None else f"no cluster could be reached at {printable(address, 200)}"
        raise OutputError(f"--ray: {where}: {printable(said, 300)}") from None
    try:
        with _signals_kept(handlers):
            yield
    finally:
        ray.shutdown()


@contextmanager
def _signals_kept(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    """Signals end the run as they did before Ray came, which takes SIGTERM for itself, and makes a plain KeyboardInterrupt of whatever a
    handler raises while it waits."""
    caught: list[tuple[int, Any]] = []

    def noted(number: int, frame: Any) -> None:
        caught.append((number, frame))
        handlers[signal.Signals(number)](number, frame)

    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, noted if callable(handler) else handler)
    try:
        yield
    except KeyboardInterrupt:
        for last, frame in caught:
            handlers[signal.Signals(last)](last, frame)
        raise


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
