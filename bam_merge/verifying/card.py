"""Is README.md the card of this merge? It is made anew from the sources and the recipe, with what the manifest records of licenses."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from bam_merge._version import __version__
from bam_merge.checkpoints.folder import read_small_file
from bam_merge.checkpoints.provenance import refreshed
from bam_merge.errors import BamMergeError
from bam_merge.planning.card import TEMPLATES_APART, Beside, has_chat_template, model_card
from bam_merge.planning.plan import Plan
from bam_merge.recipe.schema import Recipe
from bam_merge.sources.licenses import License, source_licenses
from bam_merge.text import printable, some
from bam_merge.verifying.files import OnHub
from bam_merge.verifying.report import Check

CARD = "README.md"


def card_check(folder: Path, plan: Plan, manifest: Mapping[str, Any], recorded: Recipe, left: OnHub | None = None) -> Check:
    """README.md is the card of this merge, word for word, with the places of the sources as the manifest's recipe has them."""
    if left is not None and CARD in left.files:
        return Check("card", None, f"{CARD} is on the hub, and was not downloaded: not compared. Verify a copy of {left.model} to do so")
    beside = _beside(folder, manifest)
    expected = model_card(replace(plan, recipe=recorded), beside)
    try:
        found = read_small_file(folder / CARD)
    except BamMergeError as error:
        return Check("card", False, "; ".join(error.problems))
    if found == expected.encode():
        if other := _other_licenses(beside.licenses, source_licenses(plan.recipe)):
            return Check("card", None, f"{CARD} follows from the recipe; {other}")
        return Check("card", True, f"{CARD} follows from the sources and the recipe")
    lines = zip_longest(found.decode(errors="backslashreplace").split("\n"), expected.split("\n"), fillvalue=None)
    number, (mine, theirs) = next(((n, pair) for n, pair in enumerate(lines, 1) if pair[0] != pair[1]), (1, ("", "")))
    where = f"{CARD}, line {number}: found {_line(mine)}, the sources and the recipe give {_line(theirs)}"
    if (writer := beside.renewed or beside.version) != __version__:
        return Check("card", None, f"written by bam-merge {printable(writer)}, this is {__version__}, whose card differs ({where})")
    return Check("card", False, where)


def _beside(folder: Path, manifest: Mapping[str, Any]) -> Beside:
    """What the card says beside the plan, by the folder: its tokenizer files are compared with the sources' by a check of their own."""
    licenses = {name: License.of_entries(record) for name, record in manifest["sources"].items()}
    documents = {}
    for name in {*TEMPLATES_APART, "tokenizer_config.json"} & manifest["files"].keys():
        try:
            documents[name] = read_small_file(folder / name)
        except BamMergeError:
            continue
    renewed = refreshed(manifest)
    return Beside(
        {name: stated for name, stated in licenses.items() if stated is not None},
        has_chat_template(documents),
        str(manifest.get("version")),
        renewed.version if renewed is not None and CARD in renewed.files else None,
    )


def _other_licenses(recorded: Mapping[str, License], now: Mapping[str, License]) -> str:
    """Where a source states another license than the manifest says it stated, in words."""
    names = [name for name in {**recorded, **now} if recorded.get(name) != now.get(name)]
    said = [f"sources.{printable(name)} states {_stated(now, name)} now, {_stated(recorded, name)} by the manifest" for name in names]
    return some(said)


def _stated(licenses: Mapping[str, License], name: str) -> str:
    return str(licenses[name]) if name in licenses else "no license"


def _line(line: str | None) -> str:
    return "no such line" if line is None else printable(repr(line), 120)
