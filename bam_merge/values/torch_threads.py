"""torch's own threads, kept to one a worker; torch itself is imported only by the worker that needs it."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def one_torch_thread() -> Iterator[Callable[[], None]]:
    """The workers are the parallelism: each calls what this yields, which sets torch to one thread. Afterwards the caller gets back what
    torch had, or would have had, which OMP_NUM_THREADS and the processors decide when it is imported."""
    before: list[int] = []
    lock = threading.Lock()

    def single() -> None:
        with lock:
            import torch

            if not before:
                before.append(torch.get_num_threads())
            torch.set_num_threads(1)

    try:
        yield single
    finally:
        if before:
            sys.modules["torch"].set_num_threads(before[0])
