"""`bam-merge diff --seed S E1 E2 ...`: how far branches of one model have drifted from it and from each other, in one pass."""

import os
from collections.abc import Sequence
from dataclasses import replace

from bam_merge.checkpoints.dtypes import MEASURED
from bam_merge.checkpoints.pieces import numel
from bam_merge.comparing.advice import readings
from bam_merge.comparing.drift import Drift
from bam_merge.comparing.findings import Finding, config_findings, tokenizer_findings
from bam_merge.comparing.gram import gram
from bam_merge.comparing.rotary import in_one_order
from bam_merge.comparing.sides import Place, Side, check_comparable, in_common, open_side
from bam_merge.comparing.standing import standing
from bam_merge.comparing.tensor_difference import digest
from bam_merge.errors import CheckpointError
from bam_merge.text import count, printable, some
from bam_merge.values.threads import by_size

SEED = "the seed", "it"
"""What the two sides of a finding are called."""


def drift(
    seed: str | os.PathLike[str], experts: Sequence[str | os.PathLike[str]], workers: int | None = None, ranges: bool = False
) -> Drift:
    """Compare branches with their seed, each PATH or PATH#EXPERT. With `ranges`, models of the hub are read there, and not downloaded.

    Raises CheckpointError when one cannot be read or has other shapes.
    """
    if not experts:
        raise CheckpointError("diff --seed: no experts. Give one or more folders after it.")
    sides = in_one_order([open_side(address, ranges) for address in (seed, *experts)])
    check_comparable(sides)
    places, left_out, findings = _comparable(sides)
    grams = by_size(places, lambda place: gram(sides, place), lambda place: numel(sides[0].leaves[place]), workers)
    found = Drift(sides[0], sides[1:], _names(sides[1:]), dict(zip(places, grams, strict=True)), left_out, tuple(findings))
    found = replace(found, standings=tuple(standing(found, i) for i in range(len(found.names))))
    return replace(found, readings=tuple(readings(found)))


def _names(sides: Sequence[Side]) -> tuple[str, ...]:
    """The last part of each path, or the whole where two would be alike."""
    short = [os.path.basename(os.path.normpath(side.label)) for side in sides]
    return tuple(name if short.count(name) == 1 else side.label for name, side in zip(short, sides, strict=True))


def _comparable(sides: Sequence[Side]) -> tuple[list[Place], dict[str, str], list[Finding]]:
    """The places that all have with numbers in them, the tensors that are left out, and what else tells the folders apart. Raises where
    shapes disagree."""
    places, left_out, problems, findings = [], {}, [], []
    uncomputed: list[Place] = []
    for side in sides:
        left_out.update({f"{side.label}: {name}": reason for name, reason in side.left_out.items()})
    common = in_common(sides)
    for side in sides:
        alone = side.leaves.keys() - set(common)
        left_out.update({f"{side.label}: {side.name(place)}": "not in all of the models" for place in side.leaves if place in alone})
        if alone:
            names = tuple(side.name(place) for place in side.leaves if place in alone)
            text = f"{printable(side.label)}: {count(len(names), 'tensor')} not in all of the models, {some(names)}"
            findings.append(Finding("not in all", text, names, True))
    for place in common:
        shapes = [side.leaves[place].shape for side in sides]
        odd = next((side for side, shape in zip(sides, shapes, strict=True) if shape != shapes[0]), None)
        if odd is not None:
            problems.append(
                f"{printable(odd.label)}: {printable(odd.name(place))} is {list(odd.leaves[place].shape)}, the seed has {list(shapes[0])}"
            )
        elif any(side.leaves[place].dtype not in MEASURED for side in sides):
            left_out[sides[0].name(place)] = "a dtype that no arithmetic is done with"
            uncomputed.append(place)
        else:
            places.append(place)
    if not places and not problems:
        problems.append("no tensor that all of the models have holds numbers that arithmetic is done with")
    if problems:
        raise CheckpointError(f"{some(problems)}: not branches of one model. Compare two of them by bam-merge diff A B.")
    for side in sides[1:]:
        names = tuple(side.name(place) for place in uncomputed if not _same_bytes(sides[0], side, place))
        if names:
            text = (
                f"{printable(side.label)}: {count(len(names), 'tensor')} of a dtype that no arithmetic is done with differ, {some(names)}"
            )
            findings.append(Finding("bytes", text, names, True))
        for finding in (*config_findings((sides[0], side), SEED), *tokenizer_findings((sides[0], side), SEED)):
            findings.append(replace(finding, text=f"{printable(side.label)}: {finding.text}"))
    return places, left_out, findings


def _same_bytes(seed: Side, side: Side, place: Place) -> bool:
    return seed.leaves[place].dtype == side.leaves[place].dtype and digest(seed, place) == digest(side, place)
