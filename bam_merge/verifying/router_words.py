"""What held-out text says of a mixture's routers, in words: what to conclude, and what to do."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from bam_merge.calibrating.texts import WINDOW
from bam_merge.comparing.drift import Reading
from bam_merge.model.loading import StoredModel
from bam_merge.text import count, in_percent, listed, printable, some, whole_percent
from bam_merge.verifying.heldout import Routed
from bam_merge.verifying.report import FORCED

APART, PARTLY = 0.5, 0.15
"""Of the way from chance to always right: above the first routers tell domains apart, below the second they do not."""


ALIKE = 0.6
"""Two domains resemble each other where each sends the other's expert this share, or more, of the tokens that its own gets."""


IDLE = 0.2
"""An expert is idle that has less than this share of an equal part of the choices."""


EQUAL = 1e-2
"""Relative difference of two rows of a router that tell no experts apart."""


LOST = 0.03
"""A perplexity is worth a word from this much on, relative to another one."""


BROKEN = 1.5
"""Times the average's perplexity: beyond it a mixture does not work."""


FEW = 255
"""Tokens of a text that routers are made of: with fewer much depends on the snippet (measured on SmolLM2)."""


def readings(
    routed: Routed,
    figures: Mapping[str, Any],
    perplexity: Sequence[Mapping[str, Any]],
    mixture: StoredModel,
    made_of: Mapping[str, int],
) -> list[Reading]:
    """What the figures mean, first what is wrong with the experts and the texts.

    `figures` are those of Routed.document, `made_of` the tokens of each source's text where routers are made of some.
    """
    rows = [row for row in perplexity if FORCED in row["perplexity"]]
    return [
        *(Reading("do the routers tell the domains apart?", text) for text in _apart(figures, made_of)),
        *(Reading("do domains resemble each other?", text) for text in _alike(routed, figures)),
        *(Reading("is an expert there twice?", text) for text in _twice(routed.names, mixture)),
        *(Reading("is an expert useless?", text) for text in _useless(routed, figures, rows)),
        *(Reading("what do routing and averaging cost?", text) for text in _costs(rows, mixture)),
        *(Reading("is there enough text?", text) for text in _short(routed, made_of)),
    ]


def _apart(figures: Mapping[str, Any], made_of: Mapping[str, int]) -> Iterator[str]:
    chance = figures["chance"]
    rows = figures["overall"]
    shown = listed([_right(row) for row in rows])
    least = min((row["accuracy"] - chance) / max(1e-9, 1 - chance) for row in rows)
    if least >= APART:
        yield f"yes: to their own expert go {shown}; chance is {whole_percent(chance)}."
    elif least >= PARTLY:
        yield f"partly: to their own expert go {shown}; chance is {whole_percent(chance)}."
    else:
        why = "So the domains resemble each other, or the texts that the routers are made of are not typical of them."
        why = why if made_of else "They were drawn at random; `router: {init: ridge, texts: ...}` makes them of texts."
        yield f"no: to their own expert go {shown}; chance is {whole_percent(chance)}. {why}"


def _right(row: Mapping[str, Any]) -> str:
    return f"{row['router']} {whole_percent(row['accuracy'])} of the tokens, {whole_percent(row['windows'])} of the windows"


def _alike(routed: Routed, figures: Mapping[str, Any]) -> Iterator[str]:
    """Pairs of domains whose tokens go to each other's experts."""
    if all(row["accuracy"] - figures["chance"] < PARTLY * (1 - figures["chance"]) for row in figures["overall"]):
        return  # then everything resembles everything
    for (i, one), (j, other) in combinations(enumerate(routed.texts), 2):
        if set(one.experts) & set(other.experts):
            continue
        for row in figures["overall"]:
            there, back = (_taken(row["of"][a], b.experts) for a, b in ((i, other), (j, one)))
            if there >= ALIKE * _taken(row["of"][i], one.experts) and back >= ALIKE * _taken(row["of"][j], other.experts):
                a, b = printable(str(one.domain)), printable(str(other.domain))
                yield (
                    f"{a} and {b} do, for the {row['router']} routers: {whole_percent(there)} of {a}'s tokens go to {b}'s expert, and "
                    f"{whole_percent(back)} of {b}'s to {a}'s. One expert for both would do as well, or texts that differ more."
                )


def _taken(row: Mapping[str, Any], experts: Sequence[int]) -> float:
    return float(sum(row["first"][expert] for expert in experts))


def _twice(names: Sequence[str], mixture: StoredModel) -> Iterator[str]:
    """Experts whose rows are equal in every router: no token can tell them apart."""
    same: set[tuple[int, int]] | None = None
    for name in (name for name in mixture.leaves if name.endswith(".router.weight")):
        here = set(_equal_rows(mixture.read(name, torch.float32)))
        same = here if same is None else same & here
        if not same:
            return
    for i, j in sorted(same or ()):
        yield (
            f"experts {i} ({printable(names[i])}) and {j} ({printable(names[j])}) have the same row in every router, so they always get "
            "the same gate: one of them could be left out, which saves its memory."
        )


def _equal_rows(router_ND: Tensor) -> Iterator[tuple[int, int]]:
    """The pairs of rows that differ by no more than rounding to bfloat16."""
    norms_N = router_ND.norm(dim=-1)
    for i, j in combinations(range(len(router_ND)), 2):
        if float((router_ND[i] - router_ND[j]).norm()) <= EQUAL * float(torch.maximum(norms_N[i], norms_N[j])):
            yield i, j


def _useless(routed: Routed, figures: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    equal = 1 / len(routed.names)
    own = {expert: index for index, text in enumerate(routed.texts) for expert in text.experts}
    for expert, name in enumerate(routed.names):
        idle = [row for row in figures["overall"] if row["load"][expert] < IDLE * equal]
        if idle and expert in own:
            said = [
                f"{row['router']} routers ({in_percent(row['load'][expert])} of all choices, "
                f"{in_percent(row['of'][own[expert]]['load'][expert])} on its own text)"
                for row in idle
            ]
            yield f"{printable(name)} is hardly chosen by the {listed(said)}."
    for row in rows:
        found = row["perplexity"]
        if "average" in found and found[FORCED] > found["average"] * (1 + LOST):
            yield (
                f"{printable(row['domain'])} is, for this text: with its expert forced the perplexity is {_ppl(found[FORCED])}, that of "
                f"the average of all models {_ppl(found['average'])}. Leave it out of `experts`, or give it texts that it is better at."
            )


def _costs(rows: Sequence[Mapping[str, Any]], mixture: StoredModel) -> Iterator[str]:
    """For each domain what is lost between its own model and the mixture: by averaging, then by routing."""
    bare = mixture.config.num_experts > 0 and not mixture.config.norm_topk_prob
    for row in rows:
        found, domain = row["perplexity"], printable(row["domain"])
        merged, forced = found["merged"], found[FORCED]
        text = f"{domain}: {_ppl(merged)}; with its expert forced {_ppl(forced)}, so routing {_costs_or_gains(merged, forced)}"
        if row["domain"] in found:
            text += f"; its own model {_ppl(found[row['domain']])}, so averaging the rest {_costs_or_gains(forced, found[row['domain']])}"
        if "average" in found:
            text += f"; the average of all {_ppl(found['average'])}"
        if found.get("average", merged) * BROKEN < merged:
            text += ". Worse than the average"
            if bare:
                text += ": gates that do not sum to one do this until the mixture is trained"
            elif forced > found["average"]:
                text += ", as its expert is"
        yield f"{text}."


def _costs_or_gains(value: float, than: float) -> str:
    share = 100 * (value / than - 1)
    return f"gains {-share:.1f}%" if share < -0.05 else f"costs {abs(share):.1f}%"


def _ppl(value: float) -> str:
    return f"{value:.2f}" if value < 1e5 else f"{value:.2e}"


def _short(routed: Routed, made_of: Mapping[str, int]) -> Iterator[str]:
    few = [f"{printable(name)} ({count(tokens, 'token')})" for name, tokens in made_of.items() if tokens < FEW]
    if few:
        what = f"no: routers are made of too little text of {some(few, 8)}, so that much depends on the snippet."
        yield f"{what} A thousand tokens give most of what there is to have."
    few = [f"{printable(str(text.domain))} ({count(text.tokens, 'token')})" for text in routed.texts if text.tokens < WINDOW]
    if few:
        yield f"no: these figures are of little text of {some(few, 8)}; {WINDOW} tokens or more tell something of a domain."
    seen = [printable(str(text.domain)) for text in routed.texts if text.seen]
    if seen:
        what = f"nothing is left of the texts of {some(seen, 8)} that the routers were not made of, so these figures flatter them."
        yield f"{what} bam-merge verify OUT --texts NAME=FILE tries others."
