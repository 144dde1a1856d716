"""What the command lines need of their process: standard streams that may be full or closed, signals, running out of memory.

No other module prints, or looks at the standard streams.
"""

import os
import shutil
import signal
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any, NoReturn

import click

from bam_merge.errors import BamMergeError, DurabilityUncertain, ForeignRecipe, NotYet, OutputError, VerificationFailed
from bam_merge.text import printable

if TYPE_CHECKING:
    from rich.console import Console

PROBLEM_LENGTH = 4000
"""Characters of one message that are printed."""


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP, whose number it carries: the run ends as on Ctrl-C, orderly, with what is finished kept."""


_CAME: list[int] = []
"""The signals that have come: compiled code that runs then may make an error of its own of what they raise (pydantic_core does)."""


def stop_on_signals() -> None:
    """Raise Stopped in the main thread on SIGTERM and SIGHUP, except where they are ignored: nohup does, and means it."""
    _CAME.clear()

    def stop(number: int, frame: object) -> None:
        _CAME.append(number)
        raise Stopped(number)

    def interrupt(number: int, frame: object) -> None:
        _CAME.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, stop)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)


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


def print_piece(text: str) -> None:
    """A piece of a result that is shown as it is made. What would move a terminal's cursor is shown as an escape."""
    shown = "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else c.encode("unicode_escape").decode() for c in text)
    try:
        sys.stdout.write(shown)
        sys.stdout.flush()
    except BrokenPipeError:
        _silence(sys.stdout)
        raise SystemExit(0) from None  # whoever read it has seen enough
    except OSError as error:
        _silence(sys.stdout)
        raise OutputError(f"standard output: {error.strerror}.") from error


def lines_asked(prompt: str) -> Iterator[str]:
    """Lines of standard input, until its end; where that is a terminal, each is asked for."""
    if sys.stdin is None:
        return
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    terminal = sys.stdin.isatty()
    with suppress(ImportError):
        if terminal:
            import readline  # noqa: F401 - input() then takes the arrow keys
    while True:
        try:
            line = input(prompt) if terminal else sys.stdin.readline()
        except EOFError:
            print_piece("\n")
            return
        if not line and not terminal:
            return
        yield line.rstrip("\r\n")


def tell(text: str) -> None:
    """Messages, on stderr; nothing stops because they cannot be shown."""
    try:
        click.echo(text, file=sys.stderr)
    except OSError:
        _silence(sys.stderr)


def progress_console() -> "Console":
    """stderr, for a bar that is drawn again and again where it is a terminal."""
    from rich.console import Console

    return Console(stderr=True)


def result_width() -> int:
    """Columns of the terminal that results go to; 80 where they go to none."""
    return max(40, shutil.get_terminal_size().columns)


def results_in_colour() -> bool:
    """Whether stdout shows colour: a terminal that can, and that nobody has asked not to."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def results_in_unicode() -> bool:
    """Whether stdout takes every character."""
    return (sys.stdout.encoding or "ascii").lower().startswith("utf")


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


def one_blas_thread() -> None:
    """Keep numpy's BLAS to one thread: the workers are threads enough. numpy reads it when it is imported."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _end_by(number: int) -> NoReturn:
    """End as a signal asked for."""
    tell(f"bam-merge: {'interrupted' if number == signal.SIGINT else 'stopped'}.")
    sys.exit(128 + number)


def run_command(command: click.Command, prog_name: str | None = None, reads_only: bool = False) -> None:
    """Run a command line: prints errors, exits with the status of cli.py's docstring. `reads_only`: what it does writes nothing anyway."""
    complete_streams()
    escape_what_streams_lack()
    stop_on_signals()
    try:
        command.main(prog_name=prog_name, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except BamMergeError as error:
        if isinstance(error, ForeignRecipe) and error.instead is not None:
            print_result(error.instead)
        for problem in error.problems:
            fail(problem)
        failed = isinstance(error, VerificationFailed)
        if len(error.problems) > 1 and not failed:
            tell(f"{len(error.problems)} problems{'' if reads_only else '; nothing was written'}.")
        sys.exit(1 if failed else 3 if isinstance(error, DurabilityUncertain) else 4 if isinstance(error, NotYet) else 2)
    except (KeyboardInterrupt, click.Abort) as error:
        cause = error.__cause__ if isinstance(error, click.Abort) else error
        _end_by(cause.args[0] if isinstance(cause, Stopped) else signal.SIGINT)
    except OSError as error:
        fail(str(error))
        sys.exit(2)
    except Exception as error:
        if _CAME:
            _end_by(_CAME[0])
        if not lack_of_memory(error):
            raise
        fail(
            f"not enough memory ({str(error).splitlines()[0] if str(error) else 'an allocation failed'}). bam-merge plan says how much "
            "a merge takes; --workers 1 takes the least, and --resume goes on with what is finished."
        )
        sys.exit(2)
