"""`route --html FILE`: a text with every token in the colour of the expert that takes it, router by router and layer by layer.

One page in the style of diff's, that needs nothing but itself. Without scripts it shows what most of the layers choose; with them a layer
can be chosen, and the pointer shows gates.
"""

import json
from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from string import digits as ten
from typing import Any

from bam_merge.model.routes import Choices
from bam_merge.routing.route import RoutedText, Routes
from bam_merge.showing.page import filled, heatmap_picture, write_html
from bam_merge.showing.routes import busiest, label, share_rows, visible
from bam_merge.text import count, printable, whole_percent

HUES = (264, 75, 145, 330, 205, 25, 110, 290, 180, 50, 235, 0)
"""Of the experts' colours: as many as a reader can tell apart."""


DIGITS = ten + ascii_uppercase + ascii_lowercase + "-_"


def write_routes(found: Routes, path: Path, force: bool = False) -> None:
    """Write the page, whole or not at all. Raises OutputError."""
    write_html(routes_page(found), path, force)


def routes_page(found: Routes) -> str:
    """The page as HTML."""
    return filled("route", f"Routing of {printable(found.path, 200)}", _parts(found))


def places(found: Routes) -> dict[int, int]:
    """The colour of each expert that has one: of all where there are enough, else of the busiest."""
    n = range(len(found.names))
    coloured = n if len(n) <= len(HUES) else sorted(busiest(found, n)[: len(HUES)])
    return {expert: place for place, expert in enumerate(coloured)}


def _parts(found: Routes) -> Iterator[str]:
    place = places(found)
    template = (resources.files("bam_merge.showing") / "routes.html").read_text(encoding="utf-8")
    yield template.replace("@COLOURS@", _colours())
    names = [label(found, expert) for expert in range(len(found.names))]
    yield _json({"place": place, "names": names}, "experts")
    yield f"<h1>Routing of {escape(printable(found.path, 200))}</h1>"
    yield f"<p>{escape(printable(found.model_type))} mixture of {count(len(names), 'expert')}.</p>"
    key = "".join(f'<span class="e{colour}">{escape(names[expert])}</span>' for expert, colour in place.items())
    rest = f'<span class="ex">{len(names) - len(place)} others</span>' if len(place) < len(names) else ""
    yield f'<p class="key">{key}{rest}</p>'
    for text in found.texts:
        yield from _text(found, text, place)


def _colours() -> str:
    light = [f".e{place} {{ background: oklch(88% .09 {hue}); }}" for place, hue in enumerate(HUES)]
    dark = [f".e{place} {{ background: oklch(38% .10 {hue}); }}" for place, hue in enumerate(HUES)]
    return "\n".join([*light, ".ex { background: var(--zero); }", f"@media (prefers-color-scheme: dark) {{ {' '.join(dark)} }}"])


def _text(found: Routes, text: RoutedText, place: dict[int, int]) -> Iterator[str]:
    domain = text.text.given.domain
    aside = count(len(text.text.ids), "token") + (f", for {printable(domain)}" if domain else "")
    yield f"<h2>{escape(printable(text.name))} <small>{escape(aside)}</small></h2>"
    votes = {router: text.voted(router) for router in found.routers}
    digits = 1 if len(found.names) <= 64 else 2
    routers = {router: _routers(found, text.of(router), digits) for router in found.routers}
    options = "".join(f'<option value="{router}">{router} router</option>' for router in found.routers)
    first = votes[found.routers[0]]
    spans = "".join(
        f'<span class="e{place.get(expert, "x")}">{escape(visible(piece))}</span>'
        for piece, expert in zip(text.text.pieces, first, strict=True)
    )
    yield (
        f'<div class="text">{_json({"digits": digits, "routers": routers, "votes": votes})}'
        f'<div class="pick" hidden><select name="router" aria-label="router">{options}</select>'
        '<label><input type="range" name="layer" min="0" max="1" value="0" aria-label="layer"> <span class="said"></span></label></div>'
        f'<div class="routed">{spans}</div></div>'
    )
    for router in found.routers:
        rows = share_rows(found, text, router)
        yield f"<h2>{router} router <small>share of the tokens that have each expert first, by layer and over all</small></h2>"
        yield heatmap_picture(f"{router} router", rows, 1.0)
        right = [(choices.layer, text.accuracy(choices)) for choices in text.of(router)]
        known = [value for _, value in right if value is not None]
        if known:
            mean, chance = whole_percent(sum(known) / len(known)), whole_percent(len(text.experts) / len(found.names))
            yield f"<p>{mean} of the tokens go to {escape(printable(domain or ''))}, {whole_percent(min(known))} to "
            yield f"{whole_percent(max(known))} by layer; chance is {chance}.</p>"


def _routers(found: Routes, choices: Sequence[Choices], digits: int) -> dict[str, Any]:
    kept = choices[0].experts_MK.shape[1]
    return {"layers": list(found.layers), "kept": kept, "of": [_layer(one, digits) for one in choices]}


def _layer(choices: Choices, digits: int) -> str:
    """What one router did, in digits of 64: for each token its experts, the first one first, `digits` for each, and its gate in one."""
    found = zip(choices.experts_MK.tolist(), choices.gates_MK.tolist(), strict=True)
    return "".join(
        f"{_in_digits(expert, digits)}{DIGITS[round(63 * min(1.0, max(0.0, gate)))]}"
        for experts, gates in found for expert, gate in zip(experts, gates, strict=True)
    )  # fmt: skip


def _in_digits(number: int, digits: int) -> str:
    return "".join(DIGITS[number // 64**place % 64] for place in reversed(range(digits)))


def _json(document: Any, name: str = "") -> str:
    """Data for the page's scripts: nothing in it ends the element."""
    text = json.dumps(document, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json"{f" id={name}" if name else ""}>{text}</script>'
