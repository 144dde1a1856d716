"""The Ray library, and a cluster of it: that at an address, or one of this machine for this run, on 127.0.0.1 alone."""

import importlib
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from bam_merge.errors import OutputError
from bam_merge.text import printable


def ray_library(address: str | None) -> Any:
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


def check_address(address: str | None) -> None:
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
def connected(ray: Any, address: str | None) -> Iterator[None]:
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
