"""The documentation is what the code says: pages that are made are fresh, commands and options are described, names exist."""

import sys
from pathlib import Path

import click
import pytest

import bam_merge
from bam_merge.cli import cli

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import reference  # noqa: E402


@pytest.mark.parametrize("page", reference.PAGES)
def test_reference_pages_are_fresh(page: str) -> None:
    assert (reference.FOLDER / page).read_text(encoding="utf-8") == reference.PAGES[page](), "run python scripts/reference.py"


def test_no_other_reference_pages() -> None:
    made = {path.name for path in reference.FOLDER.glob("*.md") if reference.MADE in path.read_text(encoding="utf-8")}
    assert made == set(reference.PAGES)


@pytest.mark.parametrize("command", cli.commands)
def test_commands_and_options_are_described(command: str) -> None:
    text = reference.PAGES["command-line.md"]()
    assert f"## bam-merge {command}\n" in text and (cli.commands[command].help or "").strip()
    for option in cli.commands[command].params:
        if isinstance(option, click.Option):
            assert (option.help or "").endswith((".", ")")), option.opts
            assert option.opts[-1] in text


def test_every_public_name_is_documented() -> None:
    text = reference.PAGES["python.md"]()
    assert {name for name in bam_merge.__all__ if f"\n### {name}\n" in text} == set(bam_merge.__all__) - {"__version__"}
