"""What a drift means before a merge, in words: each answer beside what random noise of the same norm, or chance, would give."""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from bam_merge.comparing.drift import Reading
from bam_merge.comparing.gram import Gram
from bam_merge.text import printable, some

if TYPE_CHECKING:
    from bam_merge.comparing.drift import Drift

ANOTHER_ANCESTOR = 0.5
"""Weight matrices of two models trained apart are all but orthogonal (cosine with the seed near 0, relative drift near sqrt 2), those of
a branch stay close to it: below this cosine a model is no branch."""


PART = 0.8
"""Attention that drifted at least this many times as far as the FFN has as much to lose by averaging; below a quarter of it, little."""


def readings(found: "Drift") -> list[Reading]:
    """The report in words: first what forbids a merge, then what a merge would keep and lose."""
    matrices = found.where(lambda place: place[1] is not None and not place[0].startswith("norm."))
    gram = matrices or found.overall
    said = [*_ancestor(found, gram), *_left(found, gram), *_same(found)]
    moved = [i for i in range(len(found.names)) if gram.dd[i][i] > 0]
    if moved and gram.ss and not said[0].stop:
        said += [*_attention(found, moved), *_averaging(gram, moved)]
    return said


def _shown(found: "Drift", expert: int) -> str:
    return printable(found.names[expert], 60)


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _ancestor(found: "Drift", gram: Gram) -> Iterator[Reading]:
    question = "branches of this seed?"
    cosines = [gram.seed_cosine(i) for i in range(len(found.names))]
    strangers = [i for i, cosine in enumerate(cosines) if cosine is not None and cosine < ANOTHER_ANCESTOR]
    for i in strangers:
        yield Reading(
            question,
            f"STOP: {_shown(found, i)} is no branch of this seed. Its matrices have cosine {cosines[i]:.2f} with the seed's and drifted by "
            f"{gram.drift(i) or 0:.2f} of their norm; unrelated models have 0 and about 1.41. Averaging them would destroy both.",
            stop=True,
        )
    known = [cosine for cosine in cosines if cosine is not None]
    if not strangers:
        least = f"{'>0.9999' if min(known) > 0.9999 else f'{min(known):.4f} or more'}" if known else ""
        alike = min(share / max(1, found.overall.count) for share in found.overall.equal_seed)
        chance = found.overall.chance_equal or 0.0
        bits = (
            f", and {_percent(alike)} or more of its weights bit for bit (unrelated models: {_percent(chance)})"
            if alike > 2 * chance
            else ""
        )
        who = "each" if len(known) > 1 else "it"
        yield Reading(
            question, f"yes, {who} has cosine {least} with it (unrelated models: 0){bits}." if known else "not known: all is zero."
        )


def _left(found: "Drift", gram: Gram) -> Iterator[Reading]:
    question, n = "did each leave it?", range(len(found.names))
    stayed = [i for i in n if found.overall.equal_seed[i] == found.overall.count]
    far = ", ".join(f"{_shown(found, i)} by {_percent(gram.drift(i) or 0)}" for i in n if i not in stayed)
    if stayed:
        who = some(_shown(found, i) for i in stayed)
        yield Reading(question, f"no: {who} never left it, every weight is equal.{f' The others did: {far}.' if far else ''}")
    else:
        yield Reading(question, f"yes, {far} of the matrices' norm.")


def _same(found: "Drift") -> Iterator[Reading]:
    question, overall = "two the same model?", found.overall
    pairs = list(combinations(range(len(found.names)), 2))
    equal = [(i, j) for i, j in pairs if overall.equal[i][j] == overall.count]
    for i, j in equal:
        yield Reading(question, f"yes: {_shown(found, i)} and {_shown(found, j)}, every weight is equal.")
    if pairs and not equal:
        i, j = max(pairs, key=lambda pair: overall.equal[pair[0]][pair[1]])
        share = overall.equal[i][j] / max(1, overall.count)
        who = f"{_shown(found, i)} and {_shown(found, j)}"
        yield Reading(question, f"no: at most {_percent(share)} of the weights are bit-equal, those of {who}.")


def _matrices(found: "Drift", kind: str) -> Gram | None:
    """All of attention or of the FFN, without biases and norms."""
    return found.where(lambda place: place[0].startswith(kind) and not place[0].endswith((".bias", "_norm")))


def _attention(found: "Drift", moved: Sequence[int]) -> Iterator[Reading]:
    """Whether keeping attention experts keeps anything that BTX's average would lose."""
    attention, ffn = _matrices(found, "attn."), _matrices(found, "ffn.")
    if attention is None or ffn is None:
        return
    ratios = [(attention.drift(i) or 0.0) / (ffn.drift(i) or math.inf) for i in moved]
    ratio = sum(ratios) / len(ratios)
    start = f"attention drifted {ratio:.2f} times as far as the FFN, each relative to its weights (noise of one size: 1)"
    if ratio >= PART:
        end = "attention experts (BAM) keep as much of it as FFN experts do; BTX would average it away."
    elif ratio >= PART / 4:
        end = "attention experts (BAM) keep less than FFN experts do, but not nothing."
    else:
        end = "it hardly specialised, and attention experts (BAM) buy little over BTX."
    yield Reading("BAM or BTX?", f"{start}: {end}")


def _averaging(gram: Gram, moved: Sequence[int]) -> Iterator[Reading]:
    """How alike the task vectors are, and what their average keeps."""
    if len(moved) < 2:
        return
    cosines = [gram.cosine(i, j) or 0.0 for i, j in combinations(moved, 2)]
    mean = sum(cosines) / len(cosines)
    if abs(mean) < 4 * gram.noise:
        how = "no more alike than noise"
    elif abs(mean) < 0.1:
        how = "nearly orthogonal"
    else:
        how = "opposed" if mean < 0 else "partly alike" if mean < 0.8 else "all but the same"
    kept, blind = gram.kept_by_averaging() or 0.0, gram.kept_if_orthogonal() or 0.0
    yield Reading(
        "what averaging loses",
        f"{1 - kept:.0%} of a drift's norm (noise: {1 - blind:.0%}). The drifts are {how}: mean cosine {mean:.3f} "
        f"(noise: {gram.noise:.1g}).",
    )
