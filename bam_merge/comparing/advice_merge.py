"""What a merge of branches would keep and lose, in words: whether attention experts are worth it, and what averaging does to drifts."""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from bam_merge.comparing.gram import Gram
from bam_merge.comparing.sides import Place
from bam_merge.comparing.standing import NOTHING, called, inner, is_matrix, moved_places, of_places, only_rounded, where
from bam_merge.text import fixed, in_percent, listed, span, times, whole_percent
from bam_merge.values.wide import ZERO, ratio

if TYPE_CHECKING:
    from bam_merge.comparing.drift import Drift

PART, LITTLE = 0.8, 0.2
"""Attention that drifted at least PART times as far as the FFN has as much to lose by averaging; below LITTLE times, little."""


SHARED = 0.9
"""An average that keeps this share of the drifts' norm needs no experts beside it."""


UNLIKE = 3.0
"""Drifts whose norms differ by more are not averaged as equals."""


SPREAD = 0.3
"""Cosines that lie further apart than this are not told by their mean."""


NEAR, SAME = 0.1, 0.8
"""Cosines of task vectors below which they are nearly orthogonal, and from which they are all but the same."""


# ---- attention or not ----------------------------------------------------------------------------------------------------------


def attention(found: "Drift") -> Iterator[str]:
    """Whether keeping attention experts keeps anything that BTX's average would lose; a sentence for all experts of which it is true."""

    def part(*kinds: str) -> list[Place]:
        return [place for place in found.grams if place[0].startswith(kinds) and is_matrix(found, place)]

    places = part("attn.", "linear."), part("ffn.")
    attn, ffn = (of_places(found, chosen) for chosen in places)
    if attn is None or ffn is None:
        return
    if any(place[2] is not None for chosen in places for place in chosen):
        yield "neither yet: these are mixtures. Both are made of dense models, such as one expert of each (PATH#EXPERT)."
        return
    groups: dict[Callable[..., str], list[int]] = {}
    for i in trained(found):
        groups.setdefault(_kind(found, attn, ffn, i), []).append(i)
    for sentence, experts in groups.items():
        who = f"{listed([called(found, i) for i in experts])}: " if len(groups) > 1 else ""
        yield who + sentence(found, attn, ffn, experts)


def trained(found: "Drift") -> list[int]:
    """The experts of which something moved by more than the rounding of their dtype."""
    return [i for i in range(len(found.names)) if found.overall.moved(i) and only_rounded(found, i) is None]


def _scaled(found: "Drift", attn: Gram, ffn: Gram, experts: Sequence[int]) -> str:
    return "all that moved is the seed's times a factor: nothing was learned that experts of attention or of the FFN could keep."


def _kind(found: "Drift", attn: Gram, ffn: Gram, i: int) -> Callable[..., str]:
    """What can be said of an expert's attention beside its FFN."""
    moved = moved_places(found, i, inner(found))
    if moved and set(moved) <= set(found.standings[i].multiples):
        return _scaled
    if not attn.moved(i):
        return _ffn_alone if ffn.moved(i) else _neither
    if not ffn.moved(i):
        return _attention_alone
    ratio = _ratio(attn, ffn, i)
    if ratio is None:
        return _unknown
    return _most if ratio > 1 / LITTLE else _as_much if ratio >= PART else _less if ratio >= LITTLE else _little


def _ratio(attn: Gram, ffn: Gram, i: int) -> float | None:
    one, other = attn.drift(i), ffn.drift(i)
    return None if one is None or not other else one / other


def _start(attn: Gram, ffn: Gram, experts: Sequence[int]) -> str:
    ratios = sorted(_ratio(attn, ffn, i) or 0.0 for i in experts)
    low, high = ratios[0], ratios[-1]
    far = times(sum(ratios) / len(ratios)) if high <= 1.1 * low else f"{times(low)} to {times(high)}"
    return f"attention drifted {far} times as far as the FFN, each relative to its weights (noise of one size: 1)"


def _average(found: "Drift", attn: Gram) -> tuple[bool, str]:
    """Whether the average keeps what attention learned, and what BTX's does with it."""
    n = len(found.names)
    if n == 1:
        return False, "BTX's average with the seed would halve it"
    norms = [attn.dd[i][i] for i in range(n)]
    alike = all((attn.cosine(i, j) or 0.0) >= SAME for i, j in combinations(range(n), 2))
    kept = attn.kept_by_averaging() or 0.0
    if alike and kept >= SHARED and max(norms) <= UNLIKE**2 * min(norms):
        keeps = f"attention went the same way in all, BTX's average keeps {whole_percent(kept)} of it"
        return True, f"{keeps}, and attention experts (BAM) buy little"
    return False, "BTX would average it away"


def _as_much(found: "Drift", attn: Gram, ffn: Gram, experts: Sequence[int]) -> str:
    shared, end = _average(found, attn)
    keep = "" if shared else "attention experts (BAM) keep as much of it as FFN experts do; "
    return f"{_start(attn, ffn, experts)}: {keep}{end}."


def _most(found: "Drift", attn: Gram, ffn: Gram, experts: Sequence[int]) -> str:
    shared, end = _average(found, attn)
    keep = "" if shared else "most of what was learned is there, attention experts (BAM) keep it, and FFN experts hardly differ; "
    return f"{_start(attn, ffn, experts)}: {keep}{end}."


def _less(found: "Drift", attn: Gram, ffn: Gram, experts: Sequence[int]) -> str:
    shared, end = _average(found, attn)
    return f"{_start(attn, ffn, experts)}: {end if shared else 'attention experts (BAM) keep less than FFN experts do, but not nothing'}."


def _little(found: "Drift", attn: Gram, ffn: Gram, experts: Sequence[int]) -> str:
    return f"{_start(attn, ffn, experts)}: it hardly specialised, and attention experts (BAM) buy little over BTX."


def _attention_alone(found: "Drift", attn: Gram, ffn: Gram, experts: Sequence[int]) -> str:
    shared, end = _average(found, attn)
    drifts = [drift for i in experts if (drift := attn.drift(i)) is not None]
    far = f" (by {span(drifts, in_percent)} of its weights' norm)" if drifts else ""
    keep = "" if shared else "attention experts (BAM) keep all that was learned; "
    return f"only attention drifted{far}, the FFN is the seed's: {keep}{end}, and FFN experts would be equal copies."


def _ffn_alone(found: "Drift", attn: Gram, ffn: Gram, experts: Sequence[int]) -> str:
    drifts = [drift for i in experts if (drift := ffn.drift(i)) is not None]
    far = f" (by {span(drifts, in_percent)} of its weights' norm)" if drifts else ""
    return f"only the FFN drifted{far}, attention is the seed's: attention experts (BAM) would be equal copies, and BTX loses nothing."


def _neither(found: "Drift", attn: Gram, ffn: Gram, experts: Sequence[int]) -> str:
    moved = {place for i in experts for place in moved_places(found, i, found.grams)}
    return (
        "neither attention nor the FFN left the seed, experts of either would be equal copies. "
        f"What moved, {where(found, moved)}, is averaged by both."
    )


def _unknown(found: "Drift", attn: Gram, ffn: Gram, experts: Sequence[int]) -> str:
    return "not known: the seed's attention or FFN is all zero, so that no drift is relative to it."


# ---- averages ------------------------------------------------------------------------------------------------------------------


def averaging(found: "Drift") -> Iterator[str]:
    """How alike the task vectors are, and what their average keeps of them."""
    n, experts = len(found.names), trained(found)
    if n < 2 or not experts:
        return
    chosen = inner(found)
    if len([i for i in experts if moved_places(found, i, chosen)]) < len(experts):
        chosen = list(found.grams)  # what moved in some is no matrix in a layer: all of it then
    places = [place for place in chosen if any(found.grams[place].moved(i) for i in experts)]
    gram = of_places(found, places)
    if gram is None:
        return
    if len(experts) == 1:
        yield f"{whole_percent(1 - 1 / n)} of {called(found, experts[0])}'s drift: the other{'s' * (n > 2)} stayed with the seed."
        return
    yield f"{_loss(found, gram, experts)} {_alike(found, gram, experts)}"


def _loss(found: "Drift", gram: Gram, experts: Sequence[int]) -> str:
    n = len(found.names)
    squares = {i: gram.dd[i][i] for i in experts}
    small, large = min(experts, key=squares.__getitem__), max(experts, key=squares.__getitem__)
    if squares[large] > UNLIKE**2 * squares[small]:
        mean, along = sum(map(sum, gram.dd), ZERO) / n**2, sum(gram.dd[small], ZERO) / n
        away = ratio(max(ZERO, mean - 2 * along + squares[small]), squares[small]) or 0.0
        one, other = (f"{called(found, i)} {in_percent(gram.drift(i) or 0.0)}" for i in (small, large))
        return (
            f"the drifts are of unlike size ({one}, {other}): the average is little but {called(found, large)}'s divided by "
            f"{n}, and lies {times(away)} times as far from {called(found, small)} as that went from the seed."
        )
    if (gram.kept_by_averaging() or 0.0) < NOTHING:
        return "all: the drifts cancel, and their average is the seed."
    lost, blind = (1 - share * len(experts) / n for share in (gram.kept_by_averaging() or 0.0, gram.kept_if_orthogonal() or 0.0))
    still = f", counting {n - len(experts)} that never moved" * (len(experts) < n)
    return f"{whole_percent(lost)} of a drift's norm (noise: {whole_percent(blind)}){still}."


def _alike(found: "Drift", gram: Gram, experts: Sequence[int]) -> str:
    cosines = {(i, j): cosine for i, j in combinations(experts, 2) if (cosine := gram.cosine(i, j)) is not None}
    low, high = min(cosines, key=cosines.__getitem__), max(cosines, key=cosines.__getitem__)
    mean = sum(cosines.values()) / len(cosines)
    noise = f"(noise: {gram.noise:.1g})"
    kinds = {_how(cosine, gram.noise) for cosine in cosines.values()}
    if len(kinds) > 1 and cosines[high] - cosines[low] > SPREAD:
        names = [listed([called(found, i) for i in pair]) for pair in (low, high)]
        ends = [f"{fixed(cosines[pair], 3)} of {name}" for pair, name in zip((low, high), names, strict=True)]
        return f"The drifts are not of one kind: cosine {', '.join(ends)} {noise}."
    return f"The drifts are {_how(mean, gram.noise)}: {'mean ' * (len(cosines) > 1)}cosine {fixed(mean, 3)} {noise}."


def _how(cosine: float, noise: float) -> str:
    if abs(cosine) < 4 * noise:
        return "no more alike than noise"
    if abs(cosine) < NEAR:
        return "nearly orthogonal"
    if cosine < 0:
        return "all but opposite" if cosine <= -SAME else "opposed"
    return "partly alike" if cosine < SAME else "all but the same"
