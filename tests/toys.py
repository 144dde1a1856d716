"""Families that exist for a test: a table of its own beside the package's, as if it stood there."""

from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import pytest

from bam_merge.architectures import table_files, tables


@pytest.fixture
def toy_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Adds the table that a TOML document describes, for the length of a test."""
    folder = tmp_path / "tables"
    folder.mkdir()
    for kind in table_files.FOLDERS.values():
        (folder / kind).mkdir()
        for item in (files("bam_merge.architectures") / kind).iterdir():
            (folder / kind / item.name).write_bytes(item.read_bytes())
    cached = [item for module in (table_files, tables) for item in vars(module).values() if hasattr(item, "cache_clear")]

    def forget() -> None:
        for item in cached:
            item.cache_clear()

    def add(text: str) -> None:
        name = text.partition('name = "')[2].partition('"')[0]
        kind = text.partition('kind = "')[2].partition('"')[0]
        (folder / table_files.FOLDERS[kind] / f"{name}.toml").write_text(text)
        monkeypatch.setattr(table_files, "files", lambda package: folder)
        forget()

    yield add
    forget()


def as_toy(family: str, name: str, *changes: tuple[str, str]) -> str:
    """The table of `family` under another name, with some of its text changed: every change must apply."""
    text = table_files.table_text(family)
    for old, new in ((f'name = "{family}"', f'name = "{name}"'), (f'model_types = ["{family}"]', f'model_types = ["{name}"]'), *changes):
        assert old in text, old
        text = text.replace(old, new)
    return text
