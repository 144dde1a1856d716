"""`bam-merge diff A B`: whether two models are the same, and where and how far they are not.

Tensors are matched by what they are (matching.py), compared by worker threads (difference.py), and everything else that tells two
folders apart is a finding: names, files, config.json, tokenizer. Nothing is left out silently.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from bam_merge import ops
from bam_merge.checkpoint import read_small_file
from bam_merge.difference import SHAPE, Difference, difference
from bam_merge.errors import CheckpointError, printable, some
from bam_merge.matching import Place, Side, check_comparable, in_common, open_side
from bam_merge.roles import stored
from bam_merge.source_files import available_processors

T = TypeVar("T")

FORMAT = 1
"""Version of the JSON document."""

INCIDENTAL = {"_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"}
"""Keys of config.json that change nothing that a model computes: shown, but two models that differ in them alone are the same."""


@dataclass(frozen=True)
class Finding:
    """Something that tells the folders apart. `counts`: models that differ in it are different. `names` are tensors, keys or files."""

    kind: str
    text: str
    names: tuple[str, ...]
    counts: bool


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
        return sorted(beyond, key=lambda d: -math.inf if d.relative_l2 is None else -d.relative_l2)

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
            "findings": [{"kind": f.kind, "text": f.text, "names": list(f.names), "counts": f.counts} for f in self.findings],
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
            name: {"tensors": len(members), "changed": sum(not d.same for d in members), "relative_l2": drift(members)}
            for name, members in groups.items()
        }


def within(found: Difference, tol: float) -> bool:
    """Whether the drift is at most `tol`, and nothing that is no number appeared or went."""
    return found.relative_l2 is not None and found.relative_l2 <= tol and found.nan[0] == found.nan[1] and found.inf[0] == found.inf[1]


def drift(members: Iterable[Difference]) -> float | None:
    """|b - a| / |a| of several tensors as one vector; None where a is zero."""
    pairs = [(d.squares, d.squared_difference) for d in members]
    squares, differences = (math.fsum(column) for column in zip(*pairs, strict=True)) if pairs else (0.0, 0.0)
    return math.sqrt(differences / squares) if squares else (None if differences else 0.0)


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    tol: float = 0.0,
    only: str | None = None,
    ignore: Sequence[str] = (),
    workers: int | None = None,
) -> Comparison:
    """Compare two models, each PATH or PATH#EXPERT. `only` and `ignore` are globs of tensor names or roles.

    `tol` is the relative L2 difference up to which a tensor counts as the same. Raises CheckpointError when a model cannot be read, or
    nothing in one corresponds to anything in the other.
    """
    sides = open_side(a), open_side(b)
    check_comparable(sides)
    wanted, ignored = _wanted(sides, only, ignore)
    compared = _compare(sides, [place for place in in_common(sides) if place in wanted], workers)
    findings = [*_places(sides, wanted), *_moves(compared), *_storage(sides, wanted), *_config(sides), *_tokenizer(sides)]
    return Comparison(*sides, tuple(compared), tuple(findings), ignored, tol)


def _compare(sides: Sequence[Side], places: list[Place], workers: int | None) -> list[Difference]:
    """The differences, in the order of the places; the largest tensors are begun first."""
    a, b = sides
    return by_size(places, lambda place: difference(a, b, place), lambda place: ops.numel(a.leaves[place]), workers)


def by_size(places: Sequence[Place], work: Callable[[Place], T], size: Callable[[Place], int], workers: int | None) -> list[T]:
    """What `work` makes of every place, in their order; threads begin with the largest."""
    largest_first = sorted(places, key=size, reverse=True)
    with ThreadPoolExecutor(workers or min(8, available_processors())) as pool:
        found = dict(zip(largest_first, pool.map(work, largest_first), strict=True))
    return [found[place] for place in places]


def _wanted(sides: Sequence[Side], only: str | None, ignore: Sequence[str]) -> tuple[set[Place], dict[str, str]]:
    """The places to look at, and the tensors that are not looked at, with the reason."""
    wanted: set[Place] = set()
    unwanted: set[Place] = set()
    left: dict[str, str] = {}
    used: set[str] = set()
    for side in sides:
        left.update(side.left_out)
        for place in side.leaves:
            words = (stored(side.leaves[place]).tensor, place[0])
            glob = next((glob for glob in ignore if any(fnmatchcase(word, glob) for word in words)), None)
            if glob is not None:
                used.add(glob)
                unwanted.add(place)
                left[side.name(place)] = f"--ignore {glob}"
            elif only is not None and not any(fnmatchcase(word, only) for word in words):
                left[side.name(place)] = f"not --only {only}"
            else:
                wanted.add(place)
    problems = [f"--ignore {printable(glob)}: no tensor and no role matches." for glob in ignore if glob not in used]
    if only is not None and not wanted:
        problems.append(f"--only {printable(only)}: no tensor and no role matches.")
    if problems:
        raise CheckpointError(*problems)
    return wanted - unwanted, left


# ---- findings --------------------------------------------------------------------------------------------------------------


def _places(sides: Sequence[Side], wanted: set[Place]) -> list[Finding]:
    """What only one side has; pairs of such with the same bytes were renamed."""
    missing = [[place for place in side.leaves if place in wanted and place not in other.leaves] for side, other in (sides, sides[::-1])]
    findings = []
    digests = [_digests(side, places) for side, places in zip(sides, missing, strict=True)]
    renamed = {key: (digests[0][key], digests[1][key]) for key in digests[0] if key in digests[1]}
    for place_a, place_b in renamed.values():
        pair = sides[0].name(place_a), sides[1].name(place_b)
        findings.append(Finding("renamed", f"{printable(pair[0])} is called {printable(pair[1])} in B", pair, True))
    for side, label, places, index in zip(sides, "AB", missing, (0, 1), strict=True):
        gone = {both[index] for both in renamed.values()}
        names = tuple(side.name(place) for place in places if place not in gone)
        if names:
            findings.append(Finding(f"only in {label}", f"{some(names)} only in {label}: {len(names)} tensor(s)", names, True))
    return findings


def _digests(side: Side, places: list[Place]) -> dict[tuple[Any, ...], Place]:
    """The places by dtype, shape and digest."""
    found = {}
    for place in places:
        leaf = side.leaves[place]
        found[leaf.dtype, leaf.shape, difference(side, side, place).digests[0]] = place
    return found


def _moves(compared: Sequence[Difference]) -> list[Finding]:
    """Tensors of A that stand elsewhere in B with the same bytes: swapped layers, permuted experts."""
    changed = [d for d in compared if not d.same and d.digests[0]]
    where: dict[tuple[Any, ...], Difference] = {(d.place[0], d.dtypes[1], d.shapes[1], d.digests[1]): d for d in changed}
    moves: dict[tuple[Any, ...], list[Difference]] = {}
    for found in changed:
        other = where.get((found.place[0], found.dtypes[0], found.shapes[0], found.digests[0]))
        if other is not None and other is not found:
            moves.setdefault((found.place[1:], other.place[1:]), []).append(found)
    findings = []
    for (a, b), members in moves.items():
        names = tuple(d.name_a for d in members)
        findings.append(Finding("moved", f"{_where(a)} of A is {_where(b)} of B: {len(members)} tensor(s), {some(names)}", names, True))
    return findings


def _where(place: tuple[int | None, int | None]) -> str:
    layer, expert = place
    return ", ".join([f"layer {layer}"] * (layer is not None) + [f"expert {expert}"] * (expert is not None)) or "a tensor"


def _storage(sides: Sequence[Side], wanted: set[Place]) -> list[Finding]:
    """How the same tensors are named, typed and spread over files. Tells nothing of what they hold."""
    a, b = sides
    both = [place for place in in_common(sides) if place in wanted]
    findings = []
    dtypes = Counter((a.leaves[place].dtype, b.leaves[place].dtype) for place in both)
    for (one, other), count in dtypes.items():
        if one != other:
            names = tuple(a.name(place) for place in both if (a.leaves[place].dtype, b.leaves[place].dtype) == (one, other))
            findings.append(Finding("dtype", f"{count} tensor(s) are {one} in A and {other} in B", names, False))
    named = tuple(a.name(place) for place in both if a.name(place) != b.name(place))
    if named:
        example = next(place for place in both if a.name(place) != b.name(place))
        text = f"{len(named)} tensor(s) have another name or are fused in one of the two, as "
        text += f"{printable(a.name(example))} and {printable(b.name(example))}"
        findings.append(Finding("names", text, named, False))
    files = [len(side.checkpoint.files) for side in sides]
    layout = [[(side.checkpoint.tensors[stored(leaf).tensor].file, stored(leaf).tensor) for leaf in side.leaves.values()] for side in sides]
    if not named and a.expert is None and b.expert is None and (files[0] != files[1] or layout[0] != layout[1]):
        same = sorted(name for _, name in layout[0]) == sorted(name for _, name in layout[1])
        order = "in another order or other files" if same else "in other files"
        findings.append(Finding("shards", f"tensors stand {order}: {files[0]} file(s) in A, {files[1]} in B", (), False))
    return findings


def _config(sides: Sequence[Side]) -> list[Finding]:
    """Keys of config.json that differ. Where the model types do, what the two configurations mean is compared instead."""
    a, b = (side.checkpoint.config for side in sides)
    if not all(side.checkpoint.config_digest for side in sides):
        return [Finding("config.json", "config.json is not there on both sides: not compared", (), False)] if a or b else []
    what = "config.json"
    if a.get("model_type") != b.get("model_type") or any(side.expert is not None for side in sides):
        left, right = ({k: v for k, v in side.anatomy.facts.items() if not _of_mixtures(k)} for side in sides)
        keys = left.keys() & right.keys()
        a, b, what = {k: left[k] for k in keys}, {k: right[k] for k in keys}, "what config.json says"
    findings = []
    for key in sorted({*a, *b}):
        if a.get(key) != b.get(key) or (key in a) != (key in b):
            shown = [printable(json.dumps(side[key], default=str), 100) if key in side else "absent" for side in (a, b)]
            text = f"{what}: {printable(key)} is {shown[0]} in A, {shown[1]} in B"
            findings.append(Finding("config.json", text, (key,), key not in INCIDENTAL))
    return findings


def _of_mixtures(key: str) -> bool:
    return "expert" in key or key.startswith(("router", "gate", "norm_topk", "attention_kv", "attention_routing", "shared_kv"))


def _tokenizer(sides: Sequence[Side]) -> list[Finding]:
    """Tokenizer and generation files that differ in content, or that one folder lacks."""
    checkpoints = [side.checkpoint for side in sides]
    there = [set(checkpoint.companions()) for checkpoint in checkpoints]
    findings = []
    for name in sorted(there[0] | there[1]):
        if name not in there[0] & there[1]:
            findings.append(Finding("tokenizer", f"{name} is only in {'A' if name in there[0] else 'B'}", (name,), False))
        elif len({read_small_file(checkpoint.path / name) for checkpoint in checkpoints}) > 1:
            findings.append(Finding("tokenizer", f"{name} differs", (name,), name != "generation_config.json"))
    return findings
