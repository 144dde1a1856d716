"""Requests over a network, made again a few times where that can help: the connection breaks, the other side is busy or down."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from bam_merge.errors import CheckpointError
from bam_merge.sources.watching import WATCH

WAITS = (0.5, 1.0, 2.0)
"""Seconds before a request is made again. After as many failures in a row, the last one is told."""


LONGEST_WAIT = 120
"""Seconds that a server may ask to wait; where it asks for more, the run ends with these words."""


Result = TypeVar("Result")


class Fleeting(CheckpointError):
    """There was no answer, or one that may be another later. `wait`: seconds that the other side asks to wait; `reached`: whether there was
    a connection at all."""

    def __init__(self, problem: str, wait: int | None = None, reached: bool = True) -> None:
        super().__init__(problem)
        self.wait, self.reached = wait, reached


def again(
    call: Callable[[], Result],
    waits: Sequence[float],
    asks: str,
    stop: threading.Event,
    got: Callable[[], int] = lambda: 0,
    offline: Callable[[], bool] = lambda: False,
) -> Result:
    """What `call` gives, tried again while it may help: as often as there is more in `got` than before. Raises CheckpointError.

    `asks` is who asks to wait, in words.
    """
    failures, had = 0, got()
    while True:
        try:
            return call()
        except Fleeting as error:
            failures, had = (0 if got() > had else failures + 1), max(had, got())
            if failures > (len(waits) if error.reached else 1) or offline() or (error.wait or 0) > LONGEST_WAIT or stop.is_set():
                raise
            if error.wait:
                WATCH.get().notify(f"{asks} asks to wait {error.wait} seconds.")
            stop.wait(error.wait or waits[max(failures, 1) - 1])


def wait_of(headers: Any) -> int | None:
    """Seconds that a server asks to wait, by its Retry-After: a number, or a date."""
    text = headers.get("retry-after", "").strip()
    if text.isdigit():
        return min(int(text), 10**6)
    if text:
        import time
        from contextlib import suppress
        from email.utils import parsedate_to_datetime

        with suppress(ValueError, TypeError):
            return max(1, round(parsedate_to_datetime(text).timestamp() - time.time()))
    return None
