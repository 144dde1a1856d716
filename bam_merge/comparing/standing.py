"""How each matrix of a branch stands to the seed's: moved, a multiple of it, all zero, or a stranger's; and places in words."""

from collections.abc import Collection, Iterable

from bam_merge.checkpoints.dtypes import ARITHMETIC_DTYPES, DTYPES
from bam_merge.comparing.drift import DECAYED, Drift, Standing
from bam_merge.comparing.gram import Gram, total
from bam_merge.comparing.sides import Place
from bam_merge.text import folded, listed, printable, ranges, some

UNRELATED = 0.25
"""Cosine with the seed's below which a single matrix is a stranger's: unrelated ones of n elements have 1 / sqrt(n)."""


JUDGED = 64
"""Elements below which a matrix is not judged alone: an eighth is then the standard deviation of an unrelated cosine."""


NOTHING = 1e-3
"""Norm, relative to the seed's, below which a matrix is zero as far as its sums tell."""


ALONG, STRETCHED = 0.96, 0.02
"""A matrix is a multiple of the seed's where that explains ALONG of its squared drift, and by STRETCHED or more."""


MOSTLY = 0.8
"""What of its drift a matrix must be a multiple by where the factor is one that no weight decay explains (DECAYED)."""


ROUNDED = 0.4
"""Rounding moves weights by a fifth of the dtype's step (rms, relative, of uniform significands); twice that is no training yet."""


def called(found: Drift, expert: int) -> str:
    """An expert's name in a sentence."""
    return printable(found.names[expert], 60)


def is_matrix(found: Drift, place: Place) -> bool:
    """Whether a weight that inputs are multiplied with stands there: no norm, no bias. (What has no role is known by its shape.)"""
    role = place[0]
    return len(found.seed.leaves[place].shape) > 1 and not role.startswith("norm.") and not role.endswith((".bias", "_norm"))


def matrices(found: Drift) -> list[Place]:
    """All matrices; where there is none, all there is."""
    return [place for place in found.grams if is_matrix(found, place)] or list(found.grams)


def inner(found: Drift) -> list[Place]:
    """The matrices in layers; where there is none, all matrices."""
    all_of_them = matrices(found)
    return [place for place in all_of_them if place[1] is not None] or all_of_them


def standing(found: Drift, expert: int) -> Standing:
    """How the matrices of an expert stand to the seed's."""
    foreign: list[Place] = []
    zero: list[Place] = []
    multiples: dict[Place, float] = {}
    for place in matrices(found):
        gram = found.grams[place]
        left, stretch, cosine = gram.remaining(expert), gram.stretch(expert), gram.seed_cosine(expert)
        if left is None or stretch is None or not gram.moved(expert) or place[0].startswith("router."):
            continue
        factor, share = stretch
        if left < NOTHING:
            zero.append(place)
        elif share >= (MOSTLY if abs(factor - 1) > DECAYED else ALONG) and abs(factor - 1) >= STRETCHED and gram.count > 1:
            multiples[place] = factor
        elif cosine is not None and cosine < UNRELATED and gram.count >= JUDGED:
            foreign.append(place)
    return Standing(tuple(foreign), tuple(zero), multiples)


def only_rounded(found: Drift, expert: int) -> str | None:
    """The coarser dtype that an expert is stored in, where rounding to it explains all that its matrices drifted."""
    chosen = inner(found)
    pairs = {(found.seed.leaves[place].dtype, found.experts[expert].leaves[place].dtype) for place in chosen}
    floats = {pair for pair in pairs if set(pair) <= set(ARITHMETIC_DTYPES)}
    coarser = {there for here, there in floats if DTYPES[there].step > DTYPES[here].step}
    if len(pairs) != 1 or not coarser:
        return None
    (dtype,), gram = coarser, of_places(found, chosen)
    return dtype if gram is not None and 0 < (gram.drift(expert) or 0.0) <= ROUNDED * DTYPES[dtype].step else None


def moved_places(found: Drift, expert: int, among: Iterable[Place]) -> list[Place]:
    return [place for place in among if found.grams[place].moved(expert)]


def where(found: Drift, chosen: Collection[Place]) -> str:
    """Places in words: by role and layer where they are whole ones, or else by the first tensors' names."""
    there = set(chosen)
    if there == set(matrices(found)):
        return "all its matrices"
    cells: dict[str, set[int | None]] = {}
    together: dict[tuple[str, int | None], set[Place]] = {}  # of a mixture, all experts
    for place in found.grams:
        together.setdefault(place[:2], set()).add(place)
    for (role, layer), members in together.items():
        if members <= there:
            cells.setdefault(role, set()).add(layer)
    covered = sum(1 for place in there if place[1] in cells.get(place[0], ()))
    groups: dict[tuple[int | None, ...], list[str]] = {}
    for role, layers in cells.items():
        groups.setdefault(tuple(sorted(layers, key=lambda layer: -1 if layer is None else layer)), []).append(role)
    if covered < len(there) or len(groups) > 3 or any(role.startswith("? ") for role in cells):
        return some(folded(found.seed.name(place) for place in found.grams if place in there))
    inside = {place[0] for place in inner(found)}
    whole: list[str] = []
    parts: list[str] = []
    for numbered, roles in groups.items():
        numbers = [layer for layer in numbered if layer is not None]
        names = [printable(role, 40) for role in roles]
        if numbers == sorted({place[1] for place in found.grams if place[0] in roles and place[1] is not None}):
            whole += names
        else:
            which = f"layer{'s' * (len(numbers) > 1)} {ranges(numbers)}"
            parts.append(which if inside <= set(roles) else f"{listed(names)} of {which}")
    return listed([*whole, *parts])


def of_places(found: Drift, chosen: Collection[Place]) -> Gram | None:
    """The Gram matrix of some places as one vector; None where there is none."""
    members = [found.grams[place] for place in dict.fromkeys(chosen)]
    return total(members) if members else None
