"""`bam-merge diff --seed S E1 E2 ...`: how far branches of one model have drifted from it and from each other, in one pass."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from bam_merge import ops
from bam_merge.comparison import Finding, by_size, config_findings, tokenizer_findings
from bam_merge.errors import CheckpointError, printable, some
from bam_merge.gram import Gram, gram, total
from bam_merge.matching import Place, Side, check_comparable, in_common, open_side
from bam_merge.reading import Reading, readings
from bam_merge.values import COMPUTED
from bam_merge.words import count

FORMAT = 1
"""Version of the JSON document."""

SEED = "the seed", "it"
"""What the two sides of a finding are called."""


@dataclass(frozen=True)
class Drift:
    """What `diff --seed` found; `grams` by place, in the order of the seed's file. `left_out`: tensors not compared, with the reason."""

    seed: Side
    experts: tuple[Side, ...]
    names: tuple[str, ...]
    grams: Mapping[Place, Gram]
    left_out: Mapping[str, str]
    findings: tuple[Finding, ...] = ()
    readings: tuple[Reading, ...] = ()

    @cached_property
    def overall(self) -> Gram:
        return total(list(self.grams.values()))

    @property
    def equal(self) -> bool:
        """Whether every expert is the seed."""
        return all(count == self.overall.count for count in self.overall.equal_seed) and not any(f.counts for f in self.findings)

    def where(self, chosen: Callable[[Place], bool]) -> Gram | None:
        """The Gram matrix of the places chosen; None where there is none."""
        members = [gram for place, gram in self.grams.items() if chosen(place)]
        return total(members) if members else None

    def part(self, role: str | None = None, layer: int | None = None) -> Gram | None:
        """The Gram matrix of a role (or of all that a glob matches), of a layer, or of both."""

        def chosen(place: Place) -> bool:
            return (role is None or place[0] == role or fnmatchcase(place[0], role)) and (layer is None or place[1] == layer)

        return self.where(chosen)

    @property
    def roles(self) -> list[str]:
        return list(dict.fromkeys(place[0] for place in self.grams))

    @property
    def layers(self) -> list[int]:
        return sorted({place[1] for place in self.grams if place[1] is not None})

    def table(self, expert: int) -> tuple[list[str], list[str], list[list[float | None]]]:
        """Rows (layers, then what has no layer), columns (roles in layers), and the relative drift of one expert."""
        inside = list(dict.fromkeys(role for role, layer, _ in self.grams if layer is not None))
        values = [[_drift_at(self.part(role, layer), expert) for role in inside] for layer in self.layers]
        return [str(layer) for layer in self.layers], inside, values

    def alone(self, expert: int) -> list[tuple[str, float | None]]:
        """Relative drift of what has no layer: embeddings, head, final norm."""
        return [(role, _drift_at(gram, expert)) for (role, layer, _), gram in self.grams.items() if layer is None]

    def ranking(self) -> list[tuple[int, float]]:
        """The layers by mean relative drift over the experts, furthest first."""
        ranked = []
        for layer in self.layers:
            gram = self.part(layer=layer)
            assert gram is not None
            drifts = [gram.drift(i) or 0.0 for i in range(len(self.names))]
            ranked.append((layer, sum(drifts) / len(drifts)))
        return sorted(ranked, key=lambda item: -item[1])

    def document(self) -> dict[str, Any]:
        """`diff --seed --json`."""
        n = range(len(self.names))
        by_role = {role: self._figures(self.part(role)) for role in self.roles}
        return {
            "format": FORMAT, "seed": self.seed.label, "experts": dict(zip(self.names, (side.label for side in self.experts), strict=True)),
            "equal": self.equal, "stop": any(reading.stop for reading in self.readings),
            "readings": [reading.document() for reading in self.readings],
            "findings": [finding.document() for finding in self.findings],
            "overall": self._figures(self.overall), "by_role": by_role,
            "tensors": [
                {"role": role, "layer": layer, "name": self.seed.name((role, layer, expert)), "relative_drift": [gram.drift(i) for i in n]}
                for (role, layer, expert), gram in self.grams.items()
            ],
            "layers": [{"layer": layer, "relative_drift": value} for layer, value in self.ranking()],
            "left_out": dict(self.left_out),
        }  # fmt: skip

    def _figures(self, gram: Gram | None) -> dict[str, Any]:
        assert gram is not None
        n = range(len(self.names))
        return {
            "count": gram.count,
            "relative_drift": {name: gram.drift(i) for i, name in enumerate(self.names)},
            "seed_cosine": {name: gram.seed_cosine(i) for i, name in enumerate(self.names)},
            "equal_to_seed": {name: gram.equal_seed[i] / max(1, gram.count) for i, name in enumerate(self.names)},
            "cosine": [[gram.cosine(i, j) for j in n] for i in n],
            "cosine_of_noise": gram.noise,
            "equal": [[gram.equal[i][j] / max(1, gram.count) for j in n] for i in n],
            "equal_by_chance": gram.chance_equal,
            "kept_by_averaging": gram.kept_by_averaging(),
            "kept_if_orthogonal": gram.kept_if_orthogonal(),
        }


def _drift_at(gram: Gram | None, expert: int) -> float | None:
    return None if gram is None else gram.drift(expert)


def drift(seed: str | os.PathLike[str], experts: Sequence[str | os.PathLike[str]], workers: int | None = None) -> Drift:
    """Compare branches with their seed, each PATH or PATH#EXPERT. Raises CheckpointError when one cannot be read or has other shapes."""
    if not experts:
        raise CheckpointError("diff --seed: no experts. Give one or more folders after it.")
    sides = tuple(open_side(address) for address in (seed, *experts))
    check_comparable(sides)
    places, left_out, findings = _comparable(sides)
    grams = by_size(places, lambda place: gram(sides, place), lambda place: ops.numel(sides[0].leaves[place]), workers)
    found = Drift(sides[0], sides[1:], _names(sides[1:]), dict(zip(places, grams, strict=True)), left_out, tuple(findings))
    return replace(found, readings=tuple(readings(found)))


def _names(sides: Sequence[Side]) -> tuple[str, ...]:
    """The last part of each path, or the whole where two would be alike."""
    short = [os.path.basename(os.path.normpath(side.label)) for side in sides]
    return tuple(name if short.count(name) == 1 else side.label for name, side in zip(short, sides, strict=True))


def _comparable(sides: Sequence[Side]) -> tuple[list[Place], dict[str, str], list[Finding]]:
    """The places that all have with numbers in them, the tensors that are left out, and what else tells the folders apart. Raises where
    shapes disagree."""
    places, left_out, problems, findings = [], {}, [], []
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
        elif any(side.leaves[place].dtype not in COMPUTED for side in sides):
            left_out[sides[0].name(place)] = "a dtype that no arithmetic is done with"
        else:
            places.append(place)
    if problems:
        raise CheckpointError(f"{some(problems)}: not branches of one model. Compare two of them by bam-merge diff A B.")
    for side in sides[1:]:
        for finding in (*config_findings((sides[0], side), SEED), *tokenizer_findings((sides[0], side), SEED)):
            findings.append(replace(finding, text=f"{printable(side.label)}: {finding.text}"))
    return places, left_out, findings
