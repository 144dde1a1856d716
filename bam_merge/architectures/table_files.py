"""Where the tables lie: families/ has those of dense models, layouts/ those of mixtures, foreign/ those of mixtures that are only
looked at."""

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

FOLDERS = {"dense": "families", "mixture": "layouts", "foreign": "foreign"}
"""The folder of each kind of table."""


@cache
def _table_files() -> Mapping[str, tuple[str, Traversable]]:
    """Of each table, by its name in order: its kind, and its file."""
    folders = [(kind, files("bam_merge.architectures") / folder) for kind, folder in FOLDERS.items()]
    found = {
        item.name.removesuffix(".toml"): (kind, item)
        for kind, folder in folders
        for item in folder.iterdir()
        if item.name.endswith(".toml")
    }
    return dict(sorted(found.items()))


def table_names(*kinds: str) -> tuple[str, ...]:
    """The names of all tables, in order, or of those of `kinds`. No table is read for it."""
    return tuple(name for name, (kind, _) in _table_files().items() if kind in (kinds or FOLDERS))


def table_text(name: str) -> str:
    """The TOML document of the table called `name`. Raises KeyError when there is none."""
    return _table_files()[name][1].read_text(encoding="utf-8")


@cache
def left_out() -> Mapping[str, str]:
    """Model types of dense models that have no table, each with the reason."""
    found: dict[str, str] = tomllib.loads((files("bam_merge.architectures") / "_left_out.toml").read_text(encoding="utf-8"))
    return found
