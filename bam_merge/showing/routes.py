"""How the routing of a text looks in a terminal: each token in its expert's colour, or with its number; and what each layer does."""

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from bam_merge.routing.route import RoutedText, Routes
from bam_merge.showing.heatmap import FIGURE, LABEL, HeatmapRow, heatmap
from bam_merge.showing.terminal import Terminal, grid, heading, line, padded
from bam_merge.text import count, printable, ranges, whole_percent

STYLES = (
    "blue", "yellow", "green", "magenta", "cyan", "red", "bright_blue", "bright_yellow", "bright_green", "bright_magenta", "bright_cyan",
    "bright_red",
)  # fmt: skip
"""The colours of the experts; those that have none are dim."""


LISTED = 12
"""Experts that have a row in a table of shares: the busiest."""


def styles(found: Routes) -> dict[int, str]:
    """A colour for each expert, where there are enough; else for the busiest in these texts."""
    n = range(len(found.names))
    if len(n) <= len(STYLES):
        return dict(zip(n, STYLES, strict=False))
    return dict(zip(sorted(busiest(found, n)[: len(STYLES)]), STYLES, strict=True))


def busiest(found: Routes, experts: Sequence[int]) -> list[int]:
    """The experts, those first that most tokens have first."""
    taken = [0.0] * len(found.names)
    for text in found.texts:
        for choices in text.choices:
            for expert, share in enumerate(choices.first_shares):
                taken[expert] += share
    return sorted(experts, key=lambda expert: -taken[expert])


def routes_text(found: Routes, terminal: Terminal, each_layer: bool) -> str:
    """What `route` found, for a terminal; with `each_layer` the text once for every layer, else once for all of them together."""
    return terminal.text(*_parts(found, terminal, each_layer))


def _parts(found: Routes, terminal: Terminal, each_layer: bool) -> Iterator[RenderableType]:
    style = styles(found)
    key = Text.assemble(
        (printable(found.path), "bold"), f"  {printable(found.model_type)} mixture of {count(len(found.names), 'expert')}: "
    )
    named = list(style) if len(style) < len(found.names) else range(len(found.names))
    for place, expert in enumerate(named):
        key.append(", " if place else "").append(label(found, expert), style=style.get(expert, "dim"))
    if len(style) < len(found.names):
        key.append(f", and {len(found.names) - len(style)} without a colour", style="dim")
    yield key
    for text in found.texts:
        domain = f", for {printable(text.text.given.domain)}" if text.text.given.domain else ""
        yield heading(printable(text.name), count(len(text.text.ids), "token") + domain)
        for router in found.routers:
            yield from _router(found, text, router, style, terminal, each_layer)


def label(found: Routes, expert: int) -> str:
    """An expert's number and name, '1 code'; the number alone where it has no other name."""
    name = found.names[expert]
    return str(expert) if name == str(expert) else f"{expert} {printable(name, 40)}"


def _router(
    found: Routes, text: RoutedText, router: str, style: dict[int, str], terminal: Terminal, each_layer: bool
) -> Iterator[RenderableType]:
    soft = "the largest gate of all experts" if router in found.soft else "the largest gate"
    if each_layer:
        for choices in text.of(router):
            right = text.accuracy(choices)
            said = "" if right is None else f", {whole_percent(right)} to {printable(text.text.given.domain or '')}"
            yield heading(f"{router} router, layer {choices.layer}", f"entropy {choices.entropy:.2f}{said}")
            yield coloured(text.text.pieces, choices.experts_MK[:, 0].tolist(), style, terminal)
    else:
        yield heading(f"{router} router", f"each token as most of {layers_of(found)} choose: {soft}")
        yield coloured(text.text.pieces, text.voted(router), style, terminal)
    if len(found.layers) > 1 or not each_layer:
        yield from _shares(found, text, router, style, terminal)


def layers_of(found: Routes) -> str:
    """Which layers were looked at, in words."""
    if len(found.layers) == found.count:
        return count(found.count, "layer")
    return f"layer {found.layers[0]}" if len(found.layers) == 1 else f"layers {ranges(list(found.layers)).strip('{}')}"


def coloured(pieces: Sequence[str], experts: Sequence[int], style: dict[int, str], terminal: Terminal) -> RenderableType:
    """The text with each token in the colour of its expert; without colours, with the expert's number where another one takes a word."""
    shown = Text()
    before: int | None = None
    left, right = ("⟨", "⟩") if terminal.unicode else ("<", ">")
    for piece, expert in zip(pieces, experts, strict=True):
        if not piece:
            continue
        blank = piece[: len(piece) - len(piece.lstrip())]  # a mark stands at the word, not before its blank, nor at blanks alone
        shown.append(visible(blank))
        if len(blank) == len(piece):
            continue
        if not terminal.colour and expert != before:
            shown.append(f"{left}{expert}{right}")
        before = expert
        shown.append(visible(piece[len(blank) :]), style=style.get(expert, "dim"))
    return Padding(shown, (0, 0, 0, 2))


def visible(piece: str) -> str:
    """A piece of text for a terminal: line ends as they are, tabs as blanks, and what could steer the terminal escaped."""
    return "\n".join(printable(part.expandtabs(4), 10**6) for part in piece.replace("\r\n", "\n").split("\n"))


def _shares(found: Routes, text: RoutedText, router: str, style: dict[int, str], terminal: Terminal) -> Iterator[RenderableType]:
    """Which share of the tokens has each expert first, by layer."""
    rows = share_rows(found, text, router)
    width = max(8, terminal.width - LABEL - FIGURE - 8)
    together = -(-found.count // width)
    yield line(
        f"tokens that have each expert first, by layer, {'one' if together == 1 else f'the largest of {together}'} a column, and over all",
        "dim",
    )
    yield heatmap(rows, 1.0, terminal)
    right = [text.accuracy(choices) for choices in text.of(router)]
    known = [value for value in right if value is not None]
    table = grid("left", "left")
    entropy = sum(choices.entropy for choices in text.of(router)) / len(text.of(router))
    table.add_row("entropy", f"{entropy:.2f} nats on average")
    if known:
        chance = len(text.experts) / len(found.names)
        aside = f"{whole_percent(min(known))} to {whole_percent(max(known))} by layer; chance is {whole_percent(chance)}"
        mean = whole_percent(sum(known) / len(known))
        table.add_row("accuracy", f"{mean} of the tokens go to {printable(text.text.given.domain or '')} ({aside})")
    yield padded(table)


def share_rows(found: Routes, text: RoutedText, router: str) -> list[HeatmapRow]:
    """The shares of the busiest experts, by layer, and over all layers."""
    experts = range(len(text.of(router)[0].share))
    listed = sorted(busiest(found, experts)[:LISTED]) if len(experts) > LISTED else experts
    rows = []
    for expert in listed:
        shares = {choices.layer: choices.first_shares[expert] for choices in text.of(router)}
        values = [shares.get(layer) for layer in range(found.count)]
        rows.append(HeatmapRow(label(found, expert), values, sum(shares.values()) / len(shares)))
    return rows
