"""The threads that carry out a plan: what each makes next, how they share the processors, how they end together."""

import itertools
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress

from bam_merge.planning.plan import Step, moves_bytes

SWITCH_SECONDS = 0.0002
"""How long a thread may keep the interpreter when another wants it."""


class Steps:
    """What is still to be made, the large tensors first, so that no worker is left with one at the end.

    One worker begins with the arithmetic and imports torch while the others copy. A file system lets one thread at a time write to
    a file, and those that wait burn their processor's time, so a copy is of the file that the fewest workers are at.
    """

    def __init__(self, steps: Iterable[Step]) -> None:
        self.lock = threading.Lock()
        self.computed: deque[Step] = deque()
        self.copied: dict[str, deque[Step]] = {}
        self.writers: Counter[str] = Counter()
        for step in sorted(steps, key=lambda step: -step.nbytes):
            (self.copied.setdefault(step.file, deque()) if moves_bytes(step) else self.computed).append(step)

    def take(self, last: Step | None, arithmetic_first: bool) -> Step | None:
        """The next step of a worker that has made `last`; None when there is none."""
        with self.lock:
            if last is not None:
                self.writers[last.file] -= 1
            files = [file for file, steps in self.copied.items() if steps]
            if self.computed and (arithmetic_first or not files):
                step = self.computed.popleft()
            elif files:
                step = self.copied[min(files, key=lambda file: (self.writers[file], -len(self.copied[file])))].popleft()
            else:
                return None
            self.writers[step.file] += 1
            return step


@contextmanager
def quick_switching() -> Iterator[None]:
    """Let a worker that comes back from the system go on soon: by default it waits 5 ms, ten copied pieces, while another imports torch."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def run_all(work: Callable[[], None], workers: int, stop: threading.Event) -> None:
    """Run `work` on every worker; the first failure stops the others and is raised.

    The wait for them is for a bare lock: Ctrl-C inside concurrent.futures.wait may leave its condition broken for the workers.
    """
    ended, left = threading.Lock(), itertools.count(max(1, workers) - 1, -1)
    ended.acquire()

    def one_less(future: Future[None]) -> None:
        last = next(left) == 0
        if last or future.exception() is not None:
            with suppress(RuntimeError):  # released already
                ended.release()

    with ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="bam-merge") as pool:
        futures: list[Future[None]] = [pool.submit(work) for _ in range(max(1, workers))]
        try:
            for future in futures:
                future.add_done_callback(one_less)
            ended.acquire()
        finally:
            stop.set()
    for future in futures:
        future.result()
