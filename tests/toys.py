"""Families that exist for a test: a table of its own beside the package's, as if it stood there."""

from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import pytest

from bam_merge.architectures import tables


@pytest.fixture
def toy_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Adds the table that a TOML document describes, for the length of a test."""
    folder = tmp_path / "tables"
    folder.mkdir()
    for item in files("bam_merge.architectures").iterdir():
        if item.name.endswith(".toml"):
            (folder / item.name).write_bytes(item.read_bytes())
    cached = [item for item in vars(tables).values() if hasattr(item, "cache_clear")]

    def forget() -> None:
        for item in cached:
            item.cache_clear()

    def add(text: str) -> None:
        name = text.partition('name = "')[2].partition('"')[0]
        (folder / f"{name}.toml").write_text(text)
        monkeypatch.setattr(tables, "files", lambda package: folder)
        forget()

    yield add
    forget()


def as_toy(family: str, name: str, *changes: tuple[str, str]) -> str:
    """The table of `family` under another name, with some of its text changed: every change must apply."""
    text = (files("bam_merge.architectures") / f"{family}.toml").read_text(encoding="utf-8")
    for old, new in ((f'name = "{family}"', f'name = "{name}"'), (f'model_types = ["{family}"]', f'model_types = ["{name}"]'), *changes):
        assert old in text, old
        text = text.replace(old, new)
    return text
