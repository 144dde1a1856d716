"""The licenses that sources state: in the front matter of README.md, or by a LICENSE file whose title is known.

What stands there is a stranger's text: an identifier, a plain name and an address of the web are taken from it, and nothing else.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bam_merge.checkpoints.folder import read_small_file
from bam_merge.documents import load_yaml
from bam_merge.errors import CheckpointError
from bam_merge.recipe.schema import Recipe

CARD = "README.md"


FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")


TITLES = {
    r"apache license,?\s+version 2\.0": "apache-2.0",
    r"mit license": "mit",
    r"bsd 3-clause license": "bsd-3-clause",
    r"gnu general public license\s+version 3": "gpl-3.0",
    r"llama 2 community license": "llama2",
    r"meta llama 3 community license": "llama3",
    r"llama 3\.1 community license": "llama3.1",
    r"llama 3\.2 community license": "llama3.2",
    r"llama 3\.3 community license": "llama3.3",
}
"""How the text of a license begins, and what the hub calls it."""


MOST = 2**20
"""Bytes of a file that is read for its license."""


@dataclass(frozen=True)
class License:
    """`id` as the hub writes it (apache-2.0, other, ...); with other, the `name` and the `link` that say which."""

    id: str
    name: str | None = None
    link: str | None = None

    def entries(self) -> dict[str, str]:
        """As front matter of a card."""
        found = {"license": self.id, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in found.items() if value is not None}

    def __str__(self) -> str:
        return f"{self.id} ({self.name})" if self.name else self.id

    @classmethod
    def of_entries(cls, entries: object) -> "License | None":
        """What front matter states; None where it states none, or what no license is called."""
        if not isinstance(entries, Mapping):
            return None
        name, link = entries.get("license_name"), entries.get("license_link")
        stated = entries.get("license")
        stated = stated[0] if isinstance(stated, list) and len(stated) == 1 else stated
        if not isinstance(stated, str) or not re.fullmatch(r"[a-z0-9][a-z0-9.+_-]{0,63}", stated.lower()):
            return None
        is_name = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,99}", name)
        is_link = isinstance(link, str) and re.fullmatch(r"https?://[A-Za-z0-9.-]+(?:/[A-Za-z0-9._/-]{0,300})?", link)
        return cls(stated.lower(), name if is_name else None, link if is_link else None)


def source_licenses(recipe: Recipe) -> dict[str, License]:
    """The license of every folder that tensors are read from, by its name in plans, where it states one."""
    found = {name: read_license(recipe.located(store.path)) for name, store in recipe.stores.items()}
    return {name: stated for name, stated in found.items() if stated is not None}


def read_license(folder: Path) -> License | None:
    """The license that a folder states; None for none, and where its card and its LICENSE file say different things."""
    stated, text = License.of_entries(_front_matter(_text(folder / CARD))), None
    for name in FILES:
        text = text or _known_text(_text(folder / name))
    if stated is None:
        return None if text is None else License(text)
    return stated if text in (None, stated.id) or stated.id == "other" else None


def _text(path: Path) -> str:
    """A small file's text; none where there is none that can be read."""
    try:
        return read_small_file(path, MOST).decode() if path.is_file() else ""
    except (CheckpointError, OSError, UnicodeDecodeError):
        return ""


def _known_text(text: str) -> str | None:
    """The license that begins as this text."""
    beginning = text[:400].lower()
    return next((name for title, name in TITLES.items() if re.search(title, beginning)), None)


def _front_matter(text: str) -> dict[str, object]:
    """The license's entries of a card's front matter, each read by itself: the rest may be of any form."""
    found = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", text.removeprefix("\ufeff"), re.DOTALL)
    entries: dict[str, object] = {}
    for entry in re.finditer(r"^(license(?:_name|_link)?):.*(?:\r?\n(?:[ \t]+|-[ \t]).*)*", found[1] if found else "", re.MULTILINE):
        try:
            value = load_yaml(entry[0])[0]
        except ValueError:
            continue
        if entry[1] in entries:  # twice: which one counts is nobody's to say
            return {}
        entries |= value if isinstance(value, dict) else {}
    return entries
