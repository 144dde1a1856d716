"""What is shown of requests and downloads while they are made: by whoever shows it, for as long as it does."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class Watch:
    """`notify` gets a line worth saying; `begin` the bytes of a download that begins, `advance` those that came, from any thread."""

    notify: Callable[[str], None] = lambda text: None
    begin: Callable[[int], None] = lambda count: None
    advance: Callable[[int], None] = lambda count: None


WATCH: ContextVar[Watch] = ContextVar("WATCH", default=Watch())  # noqa: B039 - nothing in it is changed


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Show what requests and downloads inside do."""
    token = WATCH.set(watch)
    try:
        yield
    finally:
        WATCH.reset(token)
