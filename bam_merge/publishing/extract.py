"""`bam-merge extract OUT#experts.NAME FOLDER`: one expert of a mixture as the dense model that it was, or became.

Nothing is done here that a merge does not do: it is a merge of method `merge` whose one source is that expert, and which copies it.
"""

import os
import re
from pathlib import Path

from bam_merge.address import is_address
from bam_merge.errors import CheckpointError
from bam_merge.hub_id import hub_id
from bam_merge.paths import located
from bam_merge.publishing.options import MergeOptions
from bam_merge.publishing.publish import merge
from bam_merge.recipe.load import parse_recipe
from bam_merge.recipe.schema import Recipe
from bam_merge.sources.experts import split_expert
from bam_merge.text import printable

PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
"""An expert's name that a source can have without quotes."""


def extract(
    address: str | os.PathLike[str],
    output: str | os.PathLike[str],
    family: str | None = None,
    options: MergeOptions | None = None,
) -> Path:
    """Write the expert at `address` (OUT#experts.NAME, or its number) as a dense model into the new folder `output`; returns that.

    `family` is the dense family, where the mixture does not say of which it was made. Raises BamMergeError, leaving the target untouched.
    """
    return merge(extraction(address, output, family), options=options)


def extraction(address: str | os.PathLike[str], output: str | os.PathLike[str], family: str | None = None) -> Recipe:
    """The recipe of an extraction. Its paths are relative to the folder that the result will be in. Raises CheckpointError."""
    text = os.fsdecode(address)
    path, expert = split_expert(text)
    if expert is None:
        raise CheckpointError(f"{printable(text)}: no expert is named. Write FOLDER#experts.NAME, or its number for the name.")
    target = Path(os.path.abspath(located(output)))
    folder = located(path)
    is_local = not is_address(path) and (hub_id(path, CheckpointError) is None or os.path.lexists(folder))
    source = {"path": _written(folder, target.parent) if is_local else path, "expert": expert, **({"family": family} if family else {})}
    name = expert if PLAIN.fullmatch(expert) else "expert"
    document = {
        "method": "merge", "sources": {name: source}, "shared": {"make": "copy", "from": name},
        "output": {"path": _written(target, target.parent)},
    }  # fmt: skip
    return parse_recipe(document, target.parent, "extract")


def _written(path: Path, beside: Path) -> str:
    """The path as a recipe in the folder `beside` has it: from the root, or from there where a name above them is no text."""
    text = os.path.abspath(path)
    if text == text.encode(errors="replace").decode():
        return text
    way = os.path.relpath(text, beside)
    return way if os.path.realpath(beside / way) == os.path.realpath(text) else text  # links may lead elsewhere
