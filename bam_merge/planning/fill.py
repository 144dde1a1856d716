"""Tensors that a layout stores and no source has: what its table fills them with, and what engines need of a model besides."""

from collections.abc import Iterator, Mapping
from typing import Any

from bam_merge import expressions
from bam_merge.architectures.locate import shape_of
from bam_merge.architectures.tables import Architecture, Limit, Row, at_layer, evaluate
from bam_merge.architectures.vocabulary import QUIET
from bam_merge.planning.assign import Made
from bam_merge.sources.dense import Site

CONSTANTS: dict[str, expressions.Initialiser] = {"zeros": expressions.Zeros(), "ones": expressions.Ones()}


def filling(row: Row, layer: int | None, sizes: Mapping[str, Any], made: Mapping[Site, Made], random_seed: int) -> expressions.Expr | None:
    """What `row` of a layout is filled with at `layer`; None where it has no filling, or the sources have its role. `sizes` are what the
    letters of its shape stand for."""
    if row.make is None or (row.roles[0], layer) in made:
        return None
    if row.make in CONSTANTS:
        like = next(item for (role, _), item in made.items() if role == "router.ffn")  # new as this is, and of one dtype with it
        facts = {**at_layer(sizes, layer), "num_experts": like.exprs[0].shape[0]}
        return expressions.Init(CONSTANTS[row.make], row.name(layer), random_seed, like.exprs[0].dtype, shape_of(row, facts))
    if (row.make, layer) not in made:  # of sources that the layout then refuses
        return None
    (once_more,) = made[row.make, layer].exprs
    return once_more


def engine_notes(layout: Architecture, values: Mapping[str, Any], made: Mapping[Site, Made]) -> Iterator[str]:
    """What a plan says of a layout's fillings that cost something, and of what engines will not do with the result."""
    for row in layout.rows:
        if row.make in (None, *CONSTANTS) or row.without is None or any((row.roles[0], layer) in made for layer in (None, 0)):
            continue
        yield (
            f"output.layout: {layout.name} has a {row.roles[0]} of its own, the sources use {row.make}: it is stored once more, as a copy "
            f"that training moves apart from it (without it {row.without}). Layout bam keeps one tensor for both."
        )
    yield from (f"output.layout: {layout.name}: {text}" for limit, text in _unmet(layout, values) if not limit.refuses)


def engine_faults(layout: Architecture, values: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """For each engine that runs `layout`, why it does not compute this model as transformers does; nothing where it does."""
    unmet = list(_unmet(layout, values))
    engines = [engine.name for engine in layout.engines if engine.runs]
    return {engine: tuple(text for limit, text in unmet if engine in limit.engines) for engine in engines}


def _unmet(layout: Architecture, values: Mapping[str, Any]) -> Iterator[tuple[Limit, str]]:
    """The limits that the model does not keep, in words."""
    for limit in layout.limits:
        if any(values[fact] != value for fact, value in limit.where.items()):
            continue
        if limit.equal and evaluate(limit.equal[0], values) != evaluate(limit.equal[1], values):
            sizes = " is not ".join(f"{size} = {evaluate(size, values)}" for size in limit.equal)
            yield limit, f"{sizes}: {limit.otherwise}."
        if limit.fact and (found := _fact(values, limit.fact)) not in limit.only:
            yield limit, f"{limit.fact} is {found}: {limit.otherwise}."


def _fact(values: Mapping[str, Any], name: str) -> Any:
    """A fact by its name, or the entry KEY of one that is a mapping, as FACT.KEY; "none" where there is none."""
    fact, _, key = name.partition(".")
    value = values.get(fact, QUIET.get(fact))
    found = value.get(key) if key else value
    return "none" if found is None else found
