"""`bam-merge diff A B`: whether two models are the same, and where and how far they are not.

Tensors are matched by what they are (sides.py), compared by worker threads (tensor_difference.py), and everything else that tells two
folders apart is a finding: names, files, config.json, tokenizer. Nothing is left out silently.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from bam_merge.checkpoints.pieces import numel, stored
from bam_merge.comparing.findings import Finding, config_findings, moves, places, storage, tokenizer_findings
from bam_merge.comparing.recognise import named
from bam_merge.comparing.rotary import in_one_order
from bam_merge.comparing.sides import Place, Side, check_comparable, in_common, open_side
from bam_merge.comparing.tensor_difference import SHAPE, Difference, difference, relative_difference
from bam_merge.errors import CheckpointError
from bam_merge.text import printable
from bam_merge.values.threads import by_size
from bam_merge.values.wide import figure

FORMAT = 1
"""Version of the JSON document."""


@dataclass(frozen=True)
class Comparison:
    """What `diff` found. `compared` in the order of A's file; `ignored` are A's and B's tensors that were not asked for, with why."""

    a: Side
    b: Side
    compared: tuple[Difference, ...]
    findings: tuple[Finding, ...]
    ignored: Mapping[str, str]
    tol: float

    @property
    def changed(self) -> list[Difference]:
        """What differs, and by more than the tolerance, furthest first."""
        beyond = [d for d in self.compared if not d.same and not (d.verdict != SHAPE and within(d, self.tol))]
        return sorted(beyond, key=lambda d: -math.inf if d.relative_l2 is None or d.odd else -d.relative_l2)

    @property
    def equal(self) -> bool:
        return not self.changed and not any(finding.counts for finding in self.findings)

    def document(self) -> dict[str, Any]:
        """`diff --json`."""
        by_role, by_layer = (self.summary(key) for key in (lambda d: d.place[0].partition(" ")[0], lambda d: d.place[1]))
        return {
            "format": FORMAT, "a": self.a.label, "b": self.b.label, "equal": self.equal, "tol": self.tol,
            "only_in_a": self.names("only in A"), "only_in_b": self.names("only in B"),
            "verdicts": dict(Counter(d.verdict for d in self.compared)),
            "changed": [d.document() for d in self.changed],
            "findings": [finding.document() for finding in self.findings],
            "by_role": by_role, "by_layer": {"none" if key is None else str(key): value for key, value in by_layer.items()},
            "ignored": dict(self.ignored),
        }  # fmt: skip

    def names(self, kind: str) -> list[str]:
        return [name for finding in self.findings if finding.kind == kind for name in finding.names]

    def summary(self, key: Callable[[Difference], Any]) -> dict[Any, dict[str, Any]]:
        """By key: how many tensors, how many of them differ, and |b - a| / |a| over all their elements."""
        groups: dict[Any, list[Difference]] = {}
        for found in self.compared:
            groups.setdefault(key(found), []).append(found)
        return {
            name: {
                "tensors": len(members),
                "changed": sum(not d.same for d in members),
                "relative_l2": figure(relative_difference(members)),
            }
            for name, members in groups.items()
        }


def within(found: Difference, tol: float) -> bool:
    """Whether the drift is at most `tol`, if any is tolerated, and nothing that is no number appeared or went."""
    return tol > 0 and found.relative_l2 is not None and found.relative_l2 <= tol and not found.odd


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    tol: float = 0.0,
    only: Sequence[str] = (),
    ignore: Sequence[str] = (),
    workers: int | None = None,
    ranges: bool = False,
) -> Comparison:
    """Compare two models, each PATH or PATH#EXPERT. `only` and `ignore` are globs of tensor names or roles.

    `tol` is the relative L2 difference up to which a tensor counts as the same. Raises CheckpointError when a model cannot be read, or
    nothing in one corresponds to anything in the other. With `ranges`, models of the hub are read there, and not downloaded.
    """
    if not 0 <= tol < math.inf:
        raise CheckpointError(f"tol is {tol}, expected a number from 0 on: the relative difference up to which tensors count as the same.")
    first, second = in_one_order((open_side(a, ranges), open_side(b, ranges)))
    sides = first, second
    check_comparable(sides)
    wanted, ignored = _wanted(sides, only, ignore)
    compared = _compare(sides, [place for place in in_common(sides) if place in wanted], workers)
    findings = [
        *places(sides, wanted),
        *moves(sides, compared),
        *storage(sides, wanted),
        *config_findings(sides),
        *tokenizer_findings(sides),
    ]
    return Comparison(*sides, tuple(compared), tuple(findings), ignored, tol)


def _compare(sides: Sequence[Side], places: list[Place], workers: int | None) -> list[Difference]:
    """The differences, in the order of the places; the largest tensors are begun first."""
    a, b = sides
    return by_size(places, lambda place: named(a, b, difference(a, b, place)), lambda place: numel(a.leaves[place]), workers)


def _wanted(sides: Sequence[Side], only: Sequence[str], ignore: Sequence[str]) -> tuple[set[Place], dict[str, str]]:
    """The places to look at, and the tensors that are not looked at, with the reason."""
    wanted: set[Place] = set()
    unwanted: set[Place] = set()
    left: dict[str, str] = {}
    used: set[str] = set()
    for side in sides:
        left.update(side.left_out)
        for place in side.leaves:
            words = (stored(side.leaves[place]).tensor, place[0])
            matched = [[glob for glob in globs if any(fnmatchcase(word, glob) for word in words)] for globs in (ignore, only)]
            used.update(*matched)
            if matched[0]:
                unwanted.add(place)
                left[side.name(place)] = f"--ignore {matched[0][0]}"
            elif only and not matched[1]:
                left[side.name(place)] = f"not --only {' '.join(only)}"
            else:
                wanted.add(place)
    asked = [*(("--ignore", glob) for glob in ignore), *(("--only", glob) for glob in only)]
    problems = [f"{option} {printable(glob)}: no tensor and no role matches." for option, glob in asked if glob not in used]
    if problems:
        raise CheckpointError(*problems)
    return wanted - unwanted, left
