"""What the command line needs of its process: standard streams that may be full or closed, signals, running out of memory."""

import os
import signal
import sys
from io import TextIOWrapper
from typing import Any

import click

from bam_merge.errors import OutputError
from bam_merge.text import printable

PROBLEM_LENGTH = 4000
"""Characters of one message that are printed."""


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP, whose number it carries: the run ends as on Ctrl-C, orderly, with what is finished kept."""


def stop_on_signals() -> None:
    """Raise Stopped in the main thread on SIGTERM and SIGHUP, except where they are ignored: nohup does, and means it."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, stop)


def print_result(text: str) -> None:
    """Results, on stdout. A reader that has seen enough (`head`, say) changes nothing; a disk that is full is an error."""
    try:
        click.echo(text, file=sys.stdout, color=True)
        sys.stdout.flush()
    except BrokenPipeError:
        _silence(sys.stdout)
    except OSError as error:
        _silence(sys.stdout)
        raise OutputError(f"standard output: {error.strerror}.") from error


def tell(text: str) -> None:
    """Messages, on stderr; nothing stops because they cannot be shown."""
    try:
        click.echo(text, file=sys.stderr)
    except OSError:
        _silence(sys.stderr)


def _silence(stream: Any) -> None:
    """Let what is still to be written to the stream go nowhere: at exit Python would try again, and change the exit status."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def complete_streams() -> None:
    """Take the place of closed standard streams, which the files to come would have, and with them what a library prints."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 - until the end
    if sys.stdout is None:
        fail("standard output is closed; redirect it to /dev/null when it is not wanted.")
        sys.exit(2)


def escape_what_streams_lack() -> None:
    """Print a character that a stream's encoding lacks as its escape: a result that is there must not fail for the sake of its name."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def fail(text: str) -> None:
    """An error's message, whatever names are in it."""
    tell(f"{click.style('error:', fg='red', bold=True)} {printable(text, PROBLEM_LENGTH)}")


def lack_of_memory(error: BaseException) -> bool:
    """Whether that is what an error of Python, the dynamic linker or torch means."""
    said = ("can't start new thread", "allocate memory", "failed to map segment", "not enough memory")
    return isinstance(error, MemoryError) or (isinstance(error, ImportError | RuntimeError) and any(text in str(error) for text in said))
