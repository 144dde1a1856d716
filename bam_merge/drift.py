"""`bam-merge diff --seed S E1 E2 ...`: how far branches of one model have drifted from it and from each other, in one pass.

Of every tensor, with D_i = E_i - S, the Gram matrix of the D_i is all that is needed: norms, cosines of task vectors, and the norm of
their mean. Sums are taken in float64 over chunks that float32 holds exactly, and any set of tensors is the sum of its members.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Any

import numpy as np

from bam_merge import ops
from bam_merge.comparison import by_size
from bam_merge.difference import BLOCK, CHUNK
from bam_merge.errors import CheckpointError, printable, some
from bam_merge.matching import Place, Side, check_comparable, in_common, open_side
from bam_merge.safetensors_header import DTYPE_BITS
from bam_merge.values import COMPUTED, Array, dot, is_float, widen

FORMAT = 1
"""Version of the JSON document."""

ANOTHER_ANCESTOR, PART = 0.5, 0.8
"""Thresholds of the reading. Weight matrices of two models trained apart are all but orthogonal (cosine with the seed near 0, relative
drift near sqrt 2), those of a branch stay close to it: below ANOTHER_ANCESTOR a model is no branch. Attention that drifted at least PART
times as far as the FFN has as much to lose by averaging."""


@dataclass(frozen=True)
class Gram:
    """Sums over the elements of one or more tensors. `dd` [N][N] of the experts' differences from the seed, `ss` of the seed, `se` [N]
    of the seed with each expert. `equal` [N][N] counts elements that two experts have in common, `equal_seed` [N] with the seed."""

    count: int
    ss: float
    se: tuple[float, ...]
    dd: tuple[tuple[float, ...], ...]
    equal: tuple[tuple[int, ...], ...]
    equal_seed: tuple[int, ...]

    def drift(self, i: int) -> float | None:
        """|E_i - S| / |S|."""
        return math.sqrt(self.dd[i][i] / self.ss) if self.ss else None

    def cosine(self, i: int, j: int) -> float | None:
        """Of the task vectors of two experts; None where one of them is zero."""
        norms = math.sqrt(self.dd[i][i] * self.dd[j][j])
        return max(-1.0, min(1.0, self.dd[i][j] / norms)) if norms else None

    def seed_cosine(self, i: int) -> float | None:
        """Of expert and seed as vectors."""
        norm = math.sqrt(self.ss * max(0.0, self.dd[i][i] + 2 * self.se[i] - self.ss))
        return max(-1.0, min(1.0, self.se[i] / norm)) if norm else None

    def kept_by_averaging(self) -> float | None:
        """|mean of the D_i| / mean of the |D_i|: 1 where all drifted alike, 0 where their drifts cancel."""
        n = len(self.dd)
        norms = sum(math.sqrt(self.dd[i][i]) for i in range(n)) / n
        return math.sqrt(max(0.0, math.fsum(map(math.fsum, self.dd)))) / n / norms if norms else None

    def kept_if_orthogonal(self) -> float | None:
        """The same for drifts of these norms in random directions; 1 / sqrt(N) where the norms are equal."""
        squares = [self.dd[i][i] for i in range(len(self.dd))]
        norms = sum(map(math.sqrt, squares))
        return math.sqrt(math.fsum(squares)) / norms if norms else None


def total(grams: Sequence[Gram]) -> Gram:
    """The Gram matrix of several tensors as one vector."""

    def add(rows: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
        return tuple(math.fsum(column) if isinstance(column[0], float) else sum(column) for column in zip(*rows, strict=True))

    n = range(len(grams[0].dd))
    return Gram(
        sum(g.count for g in grams), math.fsum(g.ss for g in grams), add([g.se for g in grams]),
        tuple(add([g.dd[i] for g in grams]) for i in n), tuple(add([g.equal[i] for g in grams]) for i in n),
        add([g.equal_seed for g in grams]),
    )  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """A sentence of the report. `stop`: these models should not be merged as branches of this seed."""

    text: str
    stop: bool = False


@dataclass(frozen=True)
class Drift:
    """What `diff --seed` found; `grams` by place, in the order of the seed's file. `left_out`: tensors not compared, with the reason."""

    seed: Side
    experts: tuple[Side, ...]
    names: tuple[str, ...]
    grams: Mapping[Place, Gram]
    left_out: Mapping[str, str]
    readings: tuple[Reading, ...] = field(default=())

    @property
    def overall(self) -> Gram:
        return total(list(self.grams.values()))

    @property
    def equal(self) -> bool:
        """Whether every expert is the seed."""
        return all(count == self.overall.count for count in self.overall.equal_seed)

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
            "readings": [reading.text for reading in self.readings],
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
            "cosine_of_noise": 1 / math.sqrt(max(1, gram.count)),
            "equal": [[gram.equal[i][j] / max(1, gram.count) for j in n] for i in n],
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
    places, left_out = _comparable(sides)
    grams = by_size(places, lambda place: gram(sides, place), lambda place: ops.numel(sides[0].leaves[place]), workers)
    found = Drift(sides[0], sides[1:], _names(sides[1:]), dict(zip(places, grams, strict=True)), left_out)
    return replace(found, readings=tuple(readings(found)))


def _names(sides: Sequence[Side]) -> tuple[str, ...]:
    """The last part of each path, or the whole where two would be alike."""
    short = [os.path.basename(os.path.normpath(side.label)) for side in sides]
    return tuple(name if short.count(name) == 1 else side.label for name, side in zip(short, sides, strict=True))


def _comparable(sides: Sequence[Side]) -> tuple[list[Place], dict[str, str]]:
    """The places that all have with numbers in them, and the tensors that are left out. Raises where shapes disagree."""
    places, left_out, problems = [], {}, []
    for side in sides:
        left_out.update({f"{side.label}: {name}": reason for name, reason in side.left_out.items()})
    common = in_common(sides)
    for side in sides:
        alone = side.leaves.keys() - set(common)
        left_out.update({f"{side.label}: {side.name(place)}": "not in all of the models" for place in side.leaves if place in alone})
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
    return places, left_out


def gram(sides: Sequence[Side], place: Place) -> Gram:
    """The sums of one tensor over the seed, which stands first, and the experts. Raises CheckpointError for NaN or infinity."""
    n, count = len(sides) - 1, ops.numel(sides[0].leaves[place])
    dtypes = [side.leaves[place].dtype for side in sides]
    sizes = [DTYPE_BITS[dtype] // 8 for dtype in dtypes]
    narrow = all(is_float(dtype) and dtype != "F64" for dtype in dtypes)
    models_MC = np.empty((n + 1, min(CHUNK, count)), np.float32 if narrow else np.float64)
    sums, equal = np.zeros((n + 1, n + 1)), np.zeros((n + 1, n + 1), np.int64)
    blocks = [bytearray(min(BLOCK, count) * size) for size in sizes]
    for start in range(0, count, BLOCK):
        stop = min(count, start + BLOCK)
        for side, block, size in zip(sides, blocks, sizes, strict=True):
            side.read(place, start, stop, memoryview(block)[: (stop - start) * size], size)
        for first in range(0, stop - start, CHUNK):
            last = min(stop - start, first + CHUNK)
            parts = [memoryview(block)[first * size : last * size] for block, size in zip(blocks, sizes, strict=True)]
            rows = [widen(part, dtype, row_C) for part, dtype, row_C in zip(parts, dtypes, models_MC, strict=True)]
            for i, j in combinations(range(n + 1), 2):
                equal[i, j] += int(np.count_nonzero(rows[i] == rows[j]))
            sums += _products(sides, place, rows)
    equal += equal.T + count * np.eye(n + 1, dtype=np.int64)
    # The seed stands first in the products: <S, S>, <S, D_i> and <D_i, D_j>.
    return Gram(
        count, float(sums[0, 0]), tuple(float(sums[0, 0] + sums[0, 1 + i]) for i in range(n)),
        tuple(tuple(map(float, row[1:])) for row in sums[1:]), tuple(tuple(map(int, row[1:])) for row in equal[1:]),
        tuple(map(int, equal[0, 1:])),
    )  # fmt: skip


def _products(sides: Sequence[Side], place: Place, rows: list[Array]) -> Array:
    """Inner products [M, M] of the seed and the differences from it, in float64. `rows` become the differences."""
    with np.errstate(over="ignore", invalid="ignore"):
        for row_C in rows[1:]:
            np.subtract(row_C, rows[0], out=row_C)
        found = _dots(rows)
        if not np.isfinite(found).all():
            for side, row_C in zip(sides, rows, strict=True):
                if not np.isfinite(row_C).all():
                    raise CheckpointError(
                        f"{printable(side.label)}: {printable(side.name(place))} holds NaN or infinity. "
                        "bam-merge inspect --stats counts them."
                    )
            found = _dots([row_C.astype(np.float64) for row_C in rows])
    return found


def _dots(rows: list[Array]) -> Array:
    dots = [[dot(one, other) if j >= i else 0.0 for j, other in enumerate(rows)] for i, one in enumerate(rows)]
    upper: Array = np.array(dots)
    return upper + np.triu(upper, 1).T


# ---- what it means ---------------------------------------------------------------------------------------------------------


def readings(found: Drift) -> list[Reading]:
    """The report in words: first what forbids a merge, then what a merge would keep and lose."""
    matrices = found.where(lambda place: place[1] is not None and not place[0].startswith("norm."))
    gram = matrices or found.overall
    said = [reading for i in range(len(found.names)) for reading in _of_one(found, gram, i)]
    for i, j in combinations(range(len(found.names)), 2):
        if found.overall.equal[i][j] == found.overall.count:
            said.append(Reading(f"{_shown(found, i)} and {_shown(found, j)} are the same model: every weight is equal."))
    apart = any(reading.stop for reading in said)
    if apart or not gram.ss:
        return said
    moved = [i for i in range(len(found.names)) if gram.dd[i][i] > 0]
    return said + ([*_of_attention(found, moved), *_of_averaging(found, gram, moved)] if moved else [])


def _shown(found: Drift, expert: int) -> str:
    return printable(found.names[expert], 60)


def _of_one(found: Drift, gram: Gram, i: int) -> list[Reading]:
    name, cosine, moved = _shown(found, i), gram.seed_cosine(i), gram.drift(i)
    if found.overall.equal_seed[i] == found.overall.count:
        return [Reading(f"{name} never left the seed: every weight is equal.")]
    if cosine is not None and moved is not None and cosine < ANOTHER_ANCESTOR:
        return [
            Reading(
                f"STOP: {name} is no branch of this seed. Its matrices have cosine {cosine:.2f} with the seed's and drifted by {moved:.2f} "
                "of their norm; unrelated models have 0 and about 1.41. Averaging them would destroy both.",
                stop=True,
            )
        ]
    return []


def _of_attention(found: Drift, moved: Sequence[int]) -> list[Reading]:
    """Whether keeping attention experts keeps anything that BTX's average would lose."""
    attention = found.part("attn.?")
    ffn = found.part("ffn.*")
    if attention is None or ffn is None:
        return []
    ratios = [(attention.drift(i) or 0.0) / (ffn.drift(i) or math.inf) for i in moved]
    ratio = sum(ratios) / len(ratios)
    start = f"Attention drifted {ratio:.2f} times as far as the FFN (relative to its weights)"
    if ratio >= PART:
        return [Reading(f"{start}: attention experts (BAM) keep as much of it as FFN experts do; BTX would average it away.")]
    if ratio >= PART / 4:
        return [Reading(f"{start}: attention experts (BAM) keep less than FFN experts do, but not nothing.")]
    return [Reading(f"{start}: it hardly specialised, and attention experts (BAM) buy little over BTX.")]


def _of_averaging(found: Drift, gram: Gram, moved: Sequence[int]) -> list[Reading]:
    """How alike the task vectors are, and what their average keeps."""
    if len(moved) < 2:
        return []
    cosines = [gram.cosine(i, j) or 0.0 for i, j in combinations(moved, 2)]
    noise = 1 / math.sqrt(gram.count)
    mean = sum(cosines) / len(cosines)
    kept, blind = gram.kept_by_averaging() or 0.0, gram.kept_if_orthogonal() or 0.0
    how = (
        "no more alike than noise"
        if abs(mean) < 4 * noise
        else "nearly orthogonal"
        if abs(mean) < 0.1
        else "partly alike"
        if mean < 0.8
        else "all but the same"
    )
    return [
        Reading(f"The experts' drifts are {how}: mean cosine {mean:.3f}, random directions have 0 ± {noise:.1g}."),
        Reading(f"Averaging keeps {kept:.0%} of a drift's norm; of drifts in random directions it would keep {blind:.0%}."),
    ]
