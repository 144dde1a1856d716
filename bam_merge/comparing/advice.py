"""What a drift means before a merge, in words: each answer beside what random noise of the same norm, or chance, would give."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bam_merge.comparing.advice_merge import attention, averaging
from bam_merge.comparing.drift import Reading, Standing
from bam_merge.comparing.gram import Gram
from bam_merge.comparing.sides import Place
from bam_merge.comparing.standing import called, inner, matrices, moved_places, of_places, only_rounded, where
from bam_merge.text import cosine_text, drift_percent, fixed, listed, multiple, share_percent, span

if TYPE_CHECKING:
    from bam_merge.comparing.drift import Drift

ANOTHER_ANCESTOR = 0.5
"""Weight matrices of two models trained apart are all but orthogonal (cosine with the seed near 0, relative drift near sqrt 2), those of
a branch stay close to it: below this cosine a model, a role or a layer is no branch's."""


AFAR = 0.9
"""Below this cosine a branch is one, but not a close one."""


def readings(found: "Drift") -> list[Reading]:
    """The report in words: first what forbids a merge, then what a merge would keep and lose."""
    said = [*_ancestor(found), *_left(found), *_same(found)]
    if not said[0].stop:
        said += [Reading("BAM or BTX?", text) for text in attention(found)]
        said += [Reading("what averaging loses", text) for text in averaging(found)]
    return said


# ---- is it a branch? -----------------------------------------------------------------------------------------------------------


def _ancestor(found: "Drift") -> Iterator[Reading]:
    question, n = "branches of this seed?", range(len(found.names))
    stops = [text for i in n for text in _objections(found, i)]
    if stops:
        yield from (Reading(question, f"STOP: {text}", stop=True) for text in stops)
    else:
        yield Reading(question, _branches(found))


def _objections(found: "Drift", i: int) -> Iterator[str]:
    """Why an expert is no branch of this seed."""
    name, state, gram = called(found, i), found.standings[i], _inner(found)
    cosine = gram.seed_cosine(i)
    judged = {place for place in inner(found) if not place[0].startswith("router.")} - set(state.multiples)
    in_part = state.zero or state.far_multiples or (state.foreign and not judged <= set(state.foreign))
    if cosine is not None and cosine < ANOTHER_ANCESTOR and not in_part:
        yield (
            f"{name} is no branch of this seed. Its matrices have cosine {fixed(cosine, 2)} with the seed's and drifted by "
            f"{fixed(gram.drift(i), 2)} of their norm; unrelated models have 0 and about 1.41. Averaging them would destroy both."
        )
        return
    strange = state.foreign or _parts(found, i, state)
    if strange:
        part, rest = of_places(found, strange), of_places(found, [p for p in matrices(found) if p not in set(strange)])
        others = rest.seed_cosine(i) if rest else None
        beside = f", {cosine_text(others, estimate=True)} in its other matrices" if others is not None else ""
        yield (
            f"{name} is no branch of this seed in {where(found, strange)}: the cosine with the seed's is "
            f"{fixed(part.seed_cosine(i) if part else 0, 2)} there{beside}; unrelated matrices have 0. Averaging them would destroy "
            "both."
        )
    if state.zero:
        yield f"{name} is all zero in {where(found, state.zero)}, where the seed is not. Was it saved whole?"
    if state.far_multiples:
        yield (
            f"{name} is {span(state.far_multiples.values(), multiple)} times the seed in {where(found, state.far_multiples)}: scaled, not "
            "trained. Find out what scaled it, and undo that before a merge."
        )


def _parts(found: "Drift", i: int, state: Standing) -> tuple[Place, ...]:
    """The matrices of roles and layers that are no branch's as a whole."""
    known = {*state.zero, *state.multiples}
    judged = [place for place in matrices(found) if not place[0].startswith("router.") and place not in known]
    parts = [[p for p in judged if p[0] == role] for role in dict.fromkeys(p[0] for p in judged)]
    parts += [[p for p in judged if p[1] == layer] for layer in found.layers]
    odd: set[Place] = set()
    for part in parts:
        gram = of_places(found, part)
        cosine = gram.seed_cosine(i) if gram and gram.moved(i) and len(part) > 1 else None
        if cosine is not None and cosine < ANOTHER_ANCESTOR:
            odd.update(part)
    return tuple(place for place in judged if place in odd)


def _inner(found: "Drift") -> Gram:
    gram = of_places(found, inner(found))
    assert gram is not None
    return gram


def _branches(found: "Drift") -> str:
    """That all are branches, and how close."""
    n, overall, gram = range(len(found.names)), found.overall, _inner(found)
    who = "each" if len(n) > 1 else "it"
    if all(equal == overall.count for equal in overall.equal_seed):
        return "yes: every weight that all have is the seed's." if _partly(found) else f"yes: {who} is the seed itself."
    cosines = [gram.seed_cosine(i) for i in n]
    known = [cosine for cosine in cosines if cosine is not None]
    if not known:
        return "not known: the seed's matrices are all zero."
    least = min(known)
    text = "yes, " if least >= AFAR else "yes, but from afar: "
    same = all(equal == gram.count for equal in gram.equal_seed)
    near, most = cosine_text(least, estimate=True), cosine_text(max(known), estimate=True)
    near += " or more" * (near != most)
    text += f"{who} has the matrices of the seed's layers" if same else f"{who} has cosine {near} with it (unrelated models: 0)"
    shares, chance = sorted(equal / max(1, overall.count) for equal in overall.equal_seed), overall.chance_equal or 0.0
    if shares[0] > 2 * chance:
        or_more = " or more" * (share_percent(shares[0]) != share_percent(shares[-1]))
        text += f", and {share_percent(shares[0])}{or_more} of its weights bit for bit (unrelated models: {share_percent(chance)})"
    return f"{text}."


# ---- did it move? --------------------------------------------------------------------------------------------------------------


def _left(found: "Drift") -> Iterator[Reading]:
    question, n = "did each leave it?", range(len(found.names))
    stayed = [i for i in n if found.overall.equal_seed[i] == found.overall.count]
    gone = [i for i in n if i not in stayed]
    gram, chosen = _inner(found), inner(found)
    trained = [i for i in gone if gram.moved(i)]
    parts = []
    if trained:
        far = ", ".join(f"{called(found, i)} by {drift_percent(gram.drift(i))}" for i in trained)
        parts.append(f"{far} of the matrices' norm{_remarks(found, trained, chosen)}")
    parts += [f"{called(found, i)} {_elsewhere(found, i)}" for i in gone if not gram.moved(i)]
    far = "; ".join(parts)
    if not stayed:
        hardly = all(only_rounded(found, i) for i in gone)
        yield Reading(question, f"{'hardly' if hardly else 'yes'}, {far}.")
        return
    others = f" The other{'s' * (len(gone) > 1)} did: {far}." if gone else ""
    yield Reading(question, f"no: {listed([called(found, i) for i in stayed])} never left it, {_every(found)} is equal.{others}")


def _remarks(found: "Drift", trained: list[int], chosen: list[Place]) -> str:
    """What is special in how some of them moved, told once for all of which it is true."""
    said: dict[str, list[int]] = {}
    for i in trained:
        for remark in _special(found, i, chosen):
            said.setdefault(remark, []).append(i)
    text = ""
    for remark, experts in said.items():
        who = "each " if len(experts) > 1 else ""
        text += f", {who}{remark}" if experts == trained else f"; {listed([called(found, i) for i in experts])} {remark}"
    return text


def _special(found: "Drift", i: int, chosen: list[Place]) -> list[str]:
    """Which matrices moved if not all, and by what if not by training."""
    moved = moved_places(found, i, chosen)
    remarks = [f"in {where(found, moved)} alone"] * (len(moved) < len(chosen))
    rounded = only_rounded(found, i)
    scaled = {place: factor for place, factor in found.standings[i].multiples.items() if place in set(chosen)}
    if scaled:
        which = "" if len(scaled) == len(moved) else f" in {where(found, scaled)}"
        remarks.append(f"being {span(scaled.values(), multiple)} times the seed{which}")
    remarks += [f"no further than rounding to {rounded} takes it"] * (rounded is not None)
    return remarks


def _elsewhere(found: "Drift", i: int) -> str:
    """What moved in an expert whose matrices did not."""
    moved = moved_places(found, i, found.grams)
    gram = of_places(found, moved)
    if gram is None:
        return "in the signs of zeros alone"
    return f"in {where(found, moved)} alone, by {drift_percent(gram.drift(i))} of what stands there"


def _partly(found: "Drift") -> bool:
    """Whether there is more to the models than the weights that were compared."""
    return any(finding.counts for finding in found.findings)


def _every(found: "Drift") -> str:
    return f"every weight{' that all have' * _partly(found)}"


def _same(found: "Drift") -> Iterator[Reading]:
    question, overall, n = "two the same model?", found.overall, range(len(found.names))
    if len(n) < 2:
        return
    groups = [[j for j in n if overall.equal[i][j] == overall.count] for i in n]
    twins = [group for i, group in enumerate(groups) if len(group) > 1 and group[0] == i]
    for group in twins:
        yield Reading(question, f"yes: {listed([called(found, i) for i in group])}, {_every(found)} is equal.")
    if twins:
        return
    i, j = max(((i, j) for i in n for j in n if i < j), key=lambda pair: overall.equal[pair[0]][pair[1]])
    share = overall.equal[i][j] / max(1, overall.count)
    if not share:
        text = "no: no weight of one is bit-equal to another's."
    elif len(n) == 2:
        text = f"no: {share_percent(share)} of the weights are bit-equal."
    else:
        text = f"no: at most {share_percent(share)} of the weights are bit-equal, those of {called(found, i)} and {called(found, j)}."
    yield Reading(question, text)
