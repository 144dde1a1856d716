"""Text for a terminal: rich tables and lines at a given width, with or without colour, in Unicode or plain ASCII."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

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
        console = Console(
            file=file,
            width=self.width,
            color_system="standard" if self.colour else None,
            force_terminal=self.colour,
            no_color=not self.colour,
            highlight=False,
            markup=False,
            emoji=False,
            legacy_windows=False,
        )
        for part in parts:
            console.print(part, overflow="fold")
        return "\n".join(row.rstrip() for row in file.getvalue().rstrip("\n").split("\n"))

    def sparkline(self, counts: Sequence[float]) -> str:
        """A bar per count, the highest for the largest; nothing at all is a blank."""
        bars, most = BARS[self.unicode], max(counts, default=0)
        return "".join(bars[min(len(bars) - 1, int(count / most * len(bars)))] if count else " " for count in counts) if most else ""

    def bar(self, share: float, width: int) -> str:
        """A horizontal bar of `share` of `width` characters."""
        return ("█" if self.unicode else "#") * round(share * width)


def heading(text: str, aside: str = "") -> Text:
    """A section's name after an empty line, with a remark beside it."""
    return Text.assemble("\n", (text, "bold"), (f"  {aside}" if aside else "", "dim"))


def line(text: str, style: str = "", indent: int = 2) -> Padding:
    """A line whose continuation is indented as it is."""
    return Padding(Text(text, style=style), (0, 0, 0, indent))


def padded(table: Table) -> Padding:
    """A table set in by two."""
    return Padding(table, (0, 0, 0, 2))


def grid(*justify: str, header: Sequence[str] | None = None) -> Table:
    """A table without rules; a column per word, "left" or "right"."""
    table = Table(box=None, show_header=header is not None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for index, side in enumerate(justify):
        right = side == "right"
        table.add_column(header[index] if header else "", justify="right" if right else "left", overflow="fold", no_wrap=right)
    return table
