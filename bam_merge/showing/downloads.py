"""How downloads look while they run: a line for each, and a bar where stderr is a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bam_merge.process import progress_console
from bam_merge.sources.watching import Watch, watched

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


@contextmanager
def downloads_shown(notify: Callable[[str], None]) -> Iterator[None]:
    """Show the downloads inside; nothing is imported or drawn before one begins."""
    bars: list[tuple[Progress, TaskID]] = []

    def begin(count: int) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        columns = (TextColumn("downloading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        console = progress_console()
        bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        bars.append((bar, bar.add_task("downloading", total=count)))
        bar.start()

    def advance(count: int) -> None:
        for bar, task in bars[-1:]:
            bar.advance(task, count)

    try:
        with watched(Watch(notify, begin, advance)):
            yield
    finally:
        for bar, _ in bars:
            bar.stop()
