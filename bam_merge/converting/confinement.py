"""What a process gives up before it reads a file that may be hostile: the network, other programs, files to write, memory, time.

torch's weights_only loader runs no code of a file. This is for the day on which it has a fault, and for files that only take memory and
time, which need no fault.
"""

import os
import sys
import threading

from bam_merge.system import address_space, cut_network, lower_limit

FORBIDDEN = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "pty.", "os.remove",
    "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link", "os.symlink", "os.truncate", "os.kill", "shutil.", "os.putenv",
    "signal.", "syslog.", "urllib.", "http.", "ftplib.", "smtplib.", "telnetlib.", "webbrowser.", "sqlite3.", "winreg.", "tempfile.",
)  # fmt: skip
"""How the names of Python's audit events begin that are refused: everything that reaches out of the process."""


WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Refused(RuntimeError):
    """What is read tried to do more than to be read."""


def without_network() -> None:
    """Leave the network, where the system lets this process. Before threads are started."""
    cut_network()


def end_with(descriptor: int) -> None:
    """End the process when the other end of that pipe is closed: whoever waits for the result is gone."""

    def wait() -> None:
        while os.read(descriptor, 4096):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def confine(memory: int, seconds: int) -> None:
    """From here on: so many bytes more than the process has now, so many seconds of processor time, nothing but reading."""
    lower_limit("CORE", 0)
    lower_limit("CPU", seconds + round(sum(os.times()[:2])), 5)  # SIGXCPU first, which says why
    if has := address_space():
        lower_limit("AS", has + memory)
    sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    if event.startswith(FORBIDDEN):
        raise Refused(f"it tried {event}")
    if event == "open" and len(arguments) > 2 and isinstance(arguments[2], int) and arguments[2] & WRITING:
        raise Refused(f"it tried to write {arguments[0]!r}")
