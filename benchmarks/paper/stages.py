"""Stages of a long experiment: each has a folder that is named by all it was made from, and is made once.

A stage is a kind (a function of work.py), its own parameters (JSON) and the stages whose folders it reads. Its digest is taken of these
and of nothing else: neither the source text of the scripts nor what other stages the experiment has. So a run that was stopped goes on
where it was, and a change of one number makes anew what depends on it and keeps the rest.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

RECORD = "stage.json"


@dataclass(frozen=True, eq=False)
class Stage:
    """`name` is for people and is no part of the digest. `inputs` by the names that the kind's function knows them by."""

    name: str
    kind: str
    parameters: dict[str, Any]
    inputs: dict[str, "Stage"]

    @cached_property
    def digest(self) -> str:
        made_from = [self.kind, self.parameters, {name: stage.digest for name, stage in self.inputs.items()}]
        return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]

    def folder(self, work: Path) -> Path:
        return work / f"{self.kind}-{self.digest}"

    def done(self, work: Path) -> bool:
        return self.folder(work).exists()

    def read(self, work: Path, file: str) -> Any:
        """The contents of one of the stage's JSON files."""
        return json.loads((self.folder(work) / file).read_text())


def make(stage: Stage, work: Path) -> float:
    """Make the stage's folder, absent or whole; returns the seconds it took. Runs in a process of the pool."""
    from work import KINDS  # imports torch and transformers, which only the processes that work need

    started = time.monotonic()
    target = stage.folder(work)
    partial = target.with_name(f".{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    KINDS[stage.kind](partial, stage.parameters, {name: one.folder(work) for name, one in stage.inputs.items()})
    seconds = time.monotonic() - started
    record = {"name": stage.name, "kind": stage.kind, "parameters": stage.parameters, "seconds": round(seconds, 1)}
    record["inputs"] = {name: one.folder(work).name for name, one in stage.inputs.items()}
    (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    partial.rename(target)
    return seconds


def prepare(threads: int) -> None:
    """What a process of the pool does first. At these sizes two processes of one thread do more than one of two."""
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import torch

    torch.set_num_threads(threads)


def make_all(stages: Sequence[Stage], work: Path, workers: int, threads: int) -> None:
    """Make what is not made yet, in the given order as far as inputs allow, in `workers` processes at a time.

    A stage that fails ends the run with its error after those under way; all that was finished is kept.
    """
    work.mkdir(parents=True, exist_ok=True)
    waiting = [stage for stage in stages if not stage.done(work)]
    total, begun = len(waiting), time.monotonic()
    print(f"{len(stages)} stages, {total} to make; {workers} at a time", flush=True)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = multiprocessing.get_context("spawn")
    running: dict[Future[float], Stage] = {}
    with ProcessPoolExecutor(workers, context, initializer=prepare, initargs=(threads,)) as pool:
        while waiting or running:
            for stage in [one for one in waiting if all(given.done(work) for given in one.inputs.values())]:
                if len(running) < workers:
                    waiting.remove(stage)
                    running[pool.submit(make, stage, work)] = stage
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                stage = running.pop(future)
                seconds = future.result()
                made = total - len(waiting) - len(running)
                print(f"{time.monotonic() - begun:7.0f} s  {made}/{total}  {stage.name}: {seconds:.0f} s", flush=True)
