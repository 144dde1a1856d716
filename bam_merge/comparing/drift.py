"""The records of `diff --seed`: how far branches are from their seed and from each other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from bam_merge.comparing.findings import Finding
from bam_merge.comparing.gram import Gram, total
from bam_merge.comparing.sides import Place, Side
from bam_merge.values.wide import LARGEST, figure

FORMAT = 1
"""Version of the JSON document."""


DECAYED = 0.25
"""How far from 1 the factor of a multiple may be for one that strong weight decay could explain; beyond it, no training does."""


@dataclass(frozen=True)
class Reading:
    """An answer of the report. `stop`: these models should not be merged as branches of this seed."""

    question: str
    text: str
    stop: bool = False

    def document(self) -> dict[str, Any]:
        return {"question": self.question, "answer": self.text, "stop": self.stop}


@dataclass(frozen=True)
class Standing:
    """One expert's places by how they stand to the seed's; `multiples` with the factor. Routers, which training makes anew,
    are never strangers."""

    foreign: tuple[Place, ...]
    zero: tuple[Place, ...]
    multiples: dict[Place, float]

    @property
    def far_multiples(self) -> dict[Place, float]:
        """Those that no training explains."""
        return {place: factor for place, factor in self.multiples.items() if abs(factor - 1) > DECAYED}


@dataclass(frozen=True)
class Drift:
    """What `diff --seed` found; `grams` by place, in the order of the seed's file. `left_out`: tensors not compared, with the reason;
    `standings`: how each expert's matrices stand to the seed's."""

    seed: Side
    experts: tuple[Side, ...]
    names: tuple[str, ...]
    grams: Mapping[Place, Gram]
    left_out: Mapping[str, str]
    findings: tuple[Finding, ...] = ()
    standings: tuple[Standing, ...] = ()
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
                {"role": role, "layer": layer, "name": self.seed.name((role, layer, expert)),
                 "relative_drift": [figure(gram.drift(i)) for i in n]}
                for (role, layer, expert), gram in self.grams.items()
            ],
            "layers": [{"layer": layer, "relative_drift": figure(value)} for layer, value in self.ranking()],
            "left_out": dict(self.left_out),
        }  # fmt: skip

    def _figures(self, gram: Gram | None) -> dict[str, Any]:
        assert gram is not None
        n = range(len(self.names))
        return {
            "count": gram.count,
            "relative_drift": {name: figure(gram.drift(i)) for i, name in enumerate(self.names)},
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
    found = None if gram is None else gram.drift(expert)
    return found if found is None else min(found, LARGEST)
