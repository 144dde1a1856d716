"""Where tables lie: each in the folder of its kind, under its own name, and none where nobody looks."""

from pathlib import Path

import pytest

import bam_merge
from bam_merge.architectures.table_files import FOLDERS, table_names, table_text
from bam_merge.architectures.tables import load_architecture

FOLDER = Path(bam_merge.__file__).parent / "architectures"


@pytest.mark.parametrize(("kind", "folder"), FOLDERS.items())
def test_each_table_lies_in_the_folder_of_its_kind(kind: str, folder: str) -> None:
    names = [path.stem for path in (FOLDER / folder).iterdir()]
    assert names and {(name, load_architecture(name).name, load_architecture(name).kind) for name in names} == {
        (name, name, kind) for name in names
    }


def test_every_table_is_found_once() -> None:
    """One that is put beside the folders, where nothing reads it, would be none."""
    lying = sorted(path.stem for path in FOLDER.rglob("*.toml") if path.parent.name != "wrapper_tables" and not path.name.startswith("_"))
    assert lying == list(table_names())


def test_a_name_that_no_table_has() -> None:
    with pytest.raises(KeyError):
        table_text("no_such_table")
