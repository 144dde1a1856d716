"""What an unfinished run was of, where the recipe alone does not say it: the commits of models of the hub, whose branches move."""

import os
from collections.abc import Callable
from pathlib import Path

from bam_merge.errors import BamMergeError
from bam_merge.hub_id import hub_id
from bam_merge.publishing.destination import target_of
from bam_merge.publishing.journal import begun
from bam_merge.publishing.staging import JOURNAL, PARTS, staging_folder
from bam_merge.recipe.places import Known
from bam_merge.recipe.schema import Recipe
from bam_merge.text import printable

MOST_HEADER = 10**6
"""Bytes of the first line of a journal."""


def as_before(recipe: Recipe, output: str | os.PathLike[str] | None, notify: Callable[[str], None]) -> Recipe:
    """The recipe as the unfinished run of it took it, so that it can go on though a branch on the hub has moved."""
    known: dict[str, Known] = {}
    staging = staging_folder(target_of(recipe, output))
    journals = [staging / JOURNAL, *sorted((staging / PARTS).glob(f"*.{JOURNAL}"))[:1]]  # all parts are of the same commits
    for text, recorded in (pair for journal in journals for pair in _commits(journal).items()):
        if text in {store.path for store in recipe.stores.values()} and _is_commit_of(text, recorded):
            known[text] = Known(recorded, Path())
            notify(f"{printable(text)} is taken as the unfinished run took it: {recorded}.")
    return recipe.knowing(known) if known else recipe


def _commits(journal: Path) -> dict[str, str]:
    """The models of the hub that a journal begins with, by what stands for them in its recipe; none where there is no such journal."""
    try:
        with open(journal, "rb") as stream:
            header = begun(stream.readline(MOST_HEADER))
    except OSError:
        return {}
    hub = header.get("hub") if isinstance(header, dict) else None
    pairs = hub.items() if isinstance(hub, dict) else ()
    return {text: recorded for text, recorded in pairs if isinstance(recorded, str)}


def _is_commit_of(text: str, recorded: str) -> bool:
    """Whether `recorded` is a commit of the model that `text` leaves open the commit of."""
    try:
        wanted, taken = hub_id(text), hub_id(recorded)
    except BamMergeError:
        return False
    return wanted is not None and taken is not None and wanted.repo == taken.repo and not wanted.commit and taken.commit is not None
