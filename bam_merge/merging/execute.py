"""Carries out a plan: streams every tensor to its planned place with bounded memory, by any number of workers.

Every output's file and offset are fixed by the plan, so workers need no order and the bytes are the same for any number of
them. Plain copies and arithmetic run on chunks. torch is imported by the first worker that computes, while
others already copy.
"""

import itertools
import os
import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from bam_merge.checkpoints.reading import SourceFiles, check_unchanged
from bam_merge.errors import SyncFailed
from bam_merge.expressions import Calibrated
from bam_merge.files import writing
from bam_merge.merging.outputs import prepare, written_behind
from bam_merge.merging.tensor import Finished, Settings, TensorWriter
from bam_merge.merging.workers import Steps, quick_switching, run_all
from bam_merge.planning.plan import Plan, Step, moves_bytes
from bam_merge.system import sync
from bam_merge.values.torch_threads import one_torch_thread


def execute(plan: Plan, folder: Path, settings: Settings, done: Iterable[str] = ()) -> dict[str, Finished]:
    """Write the tensors of `plan`, except those named in `done`, into the shard files in `folder`; create what is missing.

    Returns what is known of each tensor written. Raises CheckpointError when a source fails or changes, OutputError when the
    output cannot be written, NonFiniteError when a merge gives NaN or infinity. Files are synced before it returns.
    """
    finished: dict[str, Finished] = {}
    skip = set(done)
    steps = Steps(step for step in plan.steps if step.name not in skip and not isinstance(step.expr, Calibrated))  # made after all others
    workers, stop, lock = itertools.count(), threading.Event(), threading.Lock()
    outputs = {shard.file: prepare(folder / shard.file, shard.header, shard.nbytes, settings.folder) for shard in plan.shards}

    def work(single_threaded: Callable[[], None]) -> None:
        step: Step | None = None
        arithmetic_first = next(workers) == 0
        with SourceFiles(plan.checkpoints) as sources:
            while not stop.is_set() and (step := steps.take(step, arithmetic_first)) is not None:
                if not moves_bytes(step):
                    single_threaded()
                result = TensorWriter(plan, step, sources, outputs[step.file], folder / step.file, settings, stop).run()
                if result is not None:
                    with lock:
                        finished[step.name] = result
                        settings.on_finished(step, result)

    try:
        with (
            one_torch_thread() as single_threaded,
            quick_switching(),
            written_behind({folder / file: fd for file, fd in outputs.items()}, stop),
        ):
            run_all(partial(work, single_threaded), settings.workers, stop)
        check_unchanged(plan.checkpoints)
        for file, descriptor in outputs.items():
            with writing(folder / file, SyncFailed):
                sync(descriptor)
    finally:
        for descriptor in outputs.values():
            os.close(descriptor)
    return finished
