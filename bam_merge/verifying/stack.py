"""Is every layer of a stack (output.layers) the source's layer that the recipe names? By verification's own reading of the recipe.

Three ways: every parameter is its source's, every block is built as its source's is, and in the layers that are asked the block computes
what the source's block computes, on the same hidden states.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bam_merge.checkpoints.pieces import stored
from bam_merge.model.loading import StoredModel
from bam_merge.model.model_config import ModelConfig
from bam_merge.model.streaming import streamed_block, streamed_embeddings
from bam_merge.planning.plan import Plan
from bam_merge.recipe.schema import Recipe
from bam_merge.verifying.levels import layers_asked
from bam_merge.verifying.measuring import Way, Worst, difference, of_layers, positions_of
from bam_merge.verifying.pairs import is_turned
from bam_merge.verifying.parameters import apart, is_proved
from bam_merge.verifying.report import Check
from bam_merge.verifying.wiring import unlike_blocks


class Origin(NamedTuple):
    """What a layer of the result is: a source, and the number of the layer there."""

    source: str
    layer: int


def origins(recipe: Recipe, depths: Mapping[str, int]) -> list[Origin]:
    """The origin of every layer, from what the recipe says and how many layers the sources have."""
    found = []
    for item in recipe.output.layers or ():
        for part in str(item.layers).replace(" ", "").split(","):
            numbers = re.fullmatch(r"(\d+)(-?)(\d*)", part)
            assert numbers is not None, "the plan refuses what is no range"
            first, dash, last = numbers.groups()
            end = int(last) if last else depths[item.from_] - 1 if dash else int(first)
            found += [Origin(item.from_, layer) for layer in range(int(first), end + 1)]
    return found


def as_stacked(dense: Mapping[str, StoredModel], recipe: Recipe) -> dict[str, StoredModel]:
    """The sources with configurations that say of layers what the stack's must say; for what does not depend on the layer."""
    if recipe.output.layers is None:
        return dict(dense)
    made = origins(recipe, {name: model.config.num_hidden_layers for name, model in dense.items()})
    slides = [_slides(dense[origin.source].config, origin.layer) for origin in made]
    turns = [place for place, origin in enumerate(made) if _turns(dense[origin.source].config, origin.layer)]
    window = next((dense[origin.source].config.sliding_window for origin, one in zip(made, slides, strict=True) if one), None)
    stack: dict[str, Any] = {
        "num_hidden_layers": len(made),
        "sliding_window": window,
        "layer_types": [
            "linear_attention" if dense[origin.source].config.is_linear(origin.layer) else "sliding_attention" if one else "full_attention"
            for origin, one in zip(made, slides, strict=True)
        ],
        "rope_layers": None if len(turns) == len(made) else turns,
    }
    return {name: replace(model, config=replace(model.config, **stack)) for name, model in dense.items()}


def _slides(config: ModelConfig, layer: int) -> bool:
    return config.sliding_window is not None and (config.layer_types is None or config.layer_types[layer] == "sliding_attention")


def _turns(config: ModelConfig, layer: int) -> bool:
    return config.rope_layers is None or layer in config.rope_layers


@torch.no_grad()
def same_layers(
    result: StoredModel, dense: Mapping[str, StoredModel], plan: Plan, proved: frozenset[str], ids_BT: Tensor, way: Way
) -> Iterator[Check]:
    """One check that every layer of the result is the layer that the recipe names."""
    made = origins(plan.recipe, {name: model.config.num_hidden_layers for name, model in dense.items()})
    worst = Worst("layers")
    if len(made) != result.config.num_hidden_layers:
        worst.add(float("inf"), f"the recipe asks for {len(made)} layers, the result has {result.config.num_hidden_layers}")
        yield worst.check("")
        return
    for place, origin in enumerate(made):
        for what, error in _unlike(result, place, dense[origin.source], origin, plan, proved):
            worst.value = max(worst.value, error)
            worst.places.append(f"layer {place} is not layer {origin.layer} of {origin.source}: {what}")
    asked = sorted(layers_asked(result.config, way.level))
    x_BTD = streamed_embeddings(result, ids_BT, way.computing)
    for place in asked:
        error, x_BTD = _computed_apart(result, place, dense[made[place].source], made[place].layer, x_BTD, worst.tolerance, way)
        worst.add(error, f"layer {place} computes something else than layer {made[place].layer} of {made[place].source}")
        way.ran(place)
    yield worst.check(f"all {len(made)} are the layers of their sources; their blocks compute the same{of_layers(asked, len(made))}")


def _unlike(
    result: StoredModel, place: int, dense: StoredModel, origin: Origin, plan: Plan, proved: frozenset[str]
) -> Iterator[tuple[str, float]]:
    """(what, by how much) of all that a layer and its origin differ in, without running them."""
    steps = {step.name: step for step in plan.steps}
    mine, theirs = f"model.layers.{place}.", f"model.layers.{origin.layer}."
    names = [name.removeprefix(mine) for name in result.leaves if name.startswith(mine)]
    for name in names:
        if theirs + name not in dense.leaves:
            yield f"{name} is not there", float("inf")
            continue
        leaf = result.leaves[mine + name]
        if is_turned(dense, theirs + name) or not is_proved(
            leaf, dense.leaves[theirs + name], steps.get(stored(leaf).tensor), origin.source, proved
        ):
            error = apart(result, mine + name, dense, theirs + name)
            if error:
                yield name, error
    for what in unlike_blocks(result, place, dense, origin.layer):
        yield what, float("inf")


def _computed_apart(
    result: StoredModel, place: int, dense: StoredModel, layer: int, x_BTD: Tensor, tolerance: float, way: Way
) -> tuple[float, Tensor]:
    """How far the block's output is from that of its origin on the same hidden states; and these after it."""
    for computing in way.precisions:
        taken = computing.taken(x_BTD)
        positions = positions_of(taken)
        got, expected = (streamed_block(model, at, computing)(taken, positions).hidden for model, at in ((result, place), (dense, layer)))
        error = difference(got - taken, expected - taken, expected)
        if error <= tolerance:
            break
    return error, got if way.level.thorough else x_BTD
