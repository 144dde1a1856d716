"""Text for a terminal: rich tables and lines at a given width, with or without colour, in Unicode or plain ASCII."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO

from rich.console import Console, RenderableType

BARS = {True: "▁▂▃▄▅▆▇█", False: "_.-:=+*#"}


@dataclass(frozen=True)
class Terminal:
    """What the reader's terminal can show."""

    width: int = 80
    colour: bool = False
    unicode: bool = True

    def text(self, *parts: RenderableType) -> str:
        """The parts one below the other, as text without trailing blanks."""
        file = StringIO()
        system = "standard" if self.colour else None
        console = Console(
            file=file, width=self.width, color_system=system, force_terminal=self.colour, no_color=not self.colour,
            highlight=False, markup=False, emoji=False, legacy_windows=False,
        )  # fmt: skip
        for part in parts:
            console.print(part, overflow="fold")
        return "\n".join(line.rstrip() for line in file.getvalue().rstrip("\n").split("\n"))

    def sparkline(self, counts: Sequence[float]) -> str:
        """A bar per count, the highest for the largest; nothing at all is a blank."""
        bars, most = BARS[self.unicode], max(counts, default=0)
        return "".join(bars[min(len(bars) - 1, int(count / most * len(bars)))] if count else " " for count in counts) if most else ""

    def bar(self, share: float, width: int) -> str:
        """A horizontal bar of `share` of `width` characters."""
        return ("█" if self.unicode else "#") * round(share * width)
