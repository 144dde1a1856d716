"""Layers of sources behind one another (output.layers; depth up-scaling, arXiv 2312.15166): every source as a model of the result's layers.

Each layer of the result is one of one source. So the sources are restated: of the result's depth, with its layers in the place of their
own; what else differs between them is refused as ever. What config.json says layer by layer follows the layers, or is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bam_merge import expressions
from bam_merge.architectures.config import MAX_LAYERS, describe
from bam_merge.architectures.spellings import conflicts
from bam_merge.recipe.rules import list_layers
from bam_merge.recipe.schema import Recipe
from bam_merge.sources.dense import DenseModel, Site
from bam_merge.text import ranges, some

WINDOWED, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"


LAYERED = ("num_hidden_layers", "layer_types", "sliding", "sliding_window", "use_sliding_window", "max_window_layers", "rope_layers")
"""Facts that say how many layers there are, or something of single ones."""


LISTS = ("layer_types", "no_rope_layers")
"""Keys of a config.json that say something of every layer, one after the other."""


SHORT = ("max_window_layers", "no_rope_layer_interval", "sliding_window_pattern", "full_attention_interval")
"""Keys that say in short what such a list can say."""


@dataclass
class Stack:
    """The sources as models of the result's layers, and what is wrong with the layers that the recipe asks for; then the sources are
    their own still, and what they say of layers is the first one's, since they need not agree in it."""

    models: list[DenseModel]
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Layer:
    """A layer of the result: the model that it is of, and its number there."""

    model: DenseModel
    number: int

    @property
    def window(self) -> int | None:
        """Its sliding window."""
        facts = self.model.facts
        return facts["sliding_window"] if facts["layer_types"][self.number] == WINDOWED else None

    @property
    def kind(self) -> str:
        """Its kind, of which a window that is none is no part."""
        return WINDOWED if self.window else LINEAR if self.model.facts["layer_types"][self.number] == LINEAR else FULL

    @property
    def turns(self) -> bool:
        """Whether it has a rotary embedding."""
        listed = self.model.facts["rope_layers"]
        return listed is None or self.number in listed


def stacked(recipe: Recipe, models: Sequence[DenseModel]) -> Stack:
    """Every source with the layers that output.layers names; the first of `models` gives the result's config.json."""
    same = {key: models[0].facts[key] for key in LAYERED if key in models[0].facts}
    found = Stack([replace(model, facts={**model.facts, **same}) for model in models])
    layers = list(_layers(recipe, models, found.problems))
    if found.problems or len({model.family.name for model in models}) > 1:  # which is said where sources are compared
        return found
    found.problems += _unlike(recipe, layers)
    first, wanted = models[0], _wanted(layers)
    config = None if found.problems else _config(first, wanted)
    if found.problems or config is None:
        found.problems += [] if config or found.problems else [_unsayable(recipe, first, wanted)]
        return found
    described = describe(first.family, config, [])
    layered = {key: described.get(key) for key in LAYERED if key in described}
    inside: dict[Site, expressions.Expr] = {
        (role, place): expr
        for place, layer in enumerate(layers)
        for (role, number), expr in layer.model.tensors.items()
        if number == layer.number
    }
    taken = {(layer.model.name, layer.number) for layer in layers}
    found.models = [
        replace(
            model,
            config=config if model is first else model.config,
            facts={**model.facts, **layered},
            tensors={**{site: expr for site, expr in model.tensors.items() if site[1] is None}, **inside},
            dropped={**model.dropped, **_left(model, taken)},
        )
        for model in models
    ]
    return found


def _layers(recipe: Recipe, models: Sequence[DenseModel], problems: list[str]) -> Iterator[_Layer]:
    by_name = {model.name: model for model in models}
    total = 0
    for index, item in enumerate(recipe.output.layers or ()):
        model = by_name[item.from_]
        try:
            numbers = list_layers(item.layers, model.facts["num_hidden_layers"])
        except ValueError as error:
            problems.append(f"{recipe.file}: output.layers[{index}].layers: of {item.from_}: {error}")
            continue
        total += len(numbers)
        yield from (_Layer(model, number) for number in numbers)
    if total > MAX_LAYERS:
        problems.append(f"{recipe.file}: output.layers: {total} layers, expected at most {MAX_LAYERS}.")


def _unlike(recipe: Recipe, layers: Sequence[_Layer]) -> Iterator[str]:
    """What layers of one model must have in common and config.json has one word for: the size of windows, and dtypes."""
    windows = {layer.window: layer.model.name for layer in layers if layer.window}
    if len(windows) > 1:
        text = "; ".join(f"{size} in layers of {name}" for size, name in windows.items())
        yield f"{recipe.file}: output.layers: config.json has one size of sliding windows for all layers, these have {text}."
    dtypes: dict[str, dict[str, str]] = {}
    for layer in {(layer.model.name, layer.number): layer for layer in layers}.values():
        for (role, number), expr in layer.model.tensors.items():
            if number == layer.number:
                dtypes.setdefault(role, {}).setdefault(expr.dtype, str(expr))
    mixed = next((found for found in dtypes.values() if len(found) > 1), None)
    if mixed and recipe.output.dtype == "source":
        text = "; ".join(f"{name} is {dtype}" for dtype, name in mixed.items())
        yield (
            f"{recipe.file}: output.dtype: source keeps what is stored, but the layers disagree: {text}. Set dtype: bfloat16 (or another)."
        )


def _wanted(layers: Sequence[_Layer]) -> dict[str, Any]:
    """What config.json must mean for these layers, in bam's words."""
    window = next((layer.window for layer in layers if layer.window), None)
    turning = [place for place, layer in enumerate(layers) if layer.turns]
    return {
        "num_hidden_layers": len(layers),
        "sliding_window": window,
        "layer_types": [layer.kind for layer in layers],
        "rope_layers": None if len(turning) == len(layers) else turning,
    }


def _config(model: DenseModel, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The model's config.json for other layers: the first way of saying it that means what is wanted; None where there is none."""
    plain = {key: value for key, value in model.config.items() if key not in LISTS} | {"num_hidden_layers": wanted["num_hidden_layers"]}
    known = {*model.family.function, *model.family.neutral}
    turning, before = wanted["rope_layers"], model.facts["num_hidden_layers"]
    if any(isinstance(model.config.get(key), list) and len(model.config[key]) == before for key in known - set(LISTS)):
        return None
    lists: dict[str, Any] = {"layer_types": wanted["layer_types"]} if "layer_types" in known else {}
    if "no_rope_layers" in known:
        every = range(wanted["num_hidden_layers"])
        lists["no_rope_layers"] = [1 if turning is None or layer in turning else 0 for layer in every]
    listed = {key: value for key, value in lists.items() if key in model.config}
    spoken = {key: value for key, value in plain.items() if key not in SHORT}
    for config in ({**plain, **listed}, {**plain, **lists}, {**spoken, **listed}, {**spoken, **lists}):
        problems: list[str] = []
        facts = describe(model.family, config, problems)
        if facts and not problems and not conflicts(model.family, config) and all(facts[key] == value for key, value in wanted.items()):
            return config
    return None


def _unsayable(recipe: Recipe, model: DenseModel, wanted: Mapping[str, Any]) -> str:
    kinds = ranges([place for place, kind in enumerate(wanted["layer_types"]) if kind == WINDOWED])
    return (
        f"{recipe.file}: output.layers: a config.json of {model.family.name} cannot say these layers (sliding windows in layers {kinds}, "
        "rotary embedding as in their sources): there it follows from a layer's number. Take them in whole periods of their pattern."
    )


def _left(model: DenseModel, taken: set[tuple[str, int]]) -> dict[str, str]:
    """The tensors of the layers that the result does not have, with the reason."""
    left = [expr for (_, number), expr in model.tensors.items() if number is not None and (model.name, number) not in taken]
    numbers = {number for _, number in model.tensors if number is not None and (model.name, number) not in taken}
    reason = f"output.layers has no layer {some(map(str, sorted(numbers)))} of {model.name}"
    return {read.tensor: reason for expr in left for read in expressions.reads(expr) if read.source == model.store_name}
