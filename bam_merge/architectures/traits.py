"""What a model type implies, as its table says it: traits, keys under other names, lists of layers that turn or do not."""

from collections.abc import Callable, Mapping
from typing import Any

from bam_merge.architectures.nulls import meaningless
from bam_merge.architectures.tables import Architecture
from bam_merge.architectures.vocabulary import TRAITS
from bam_merge.text import printable
from bam_merge.validation_words import shown

BETA = "llama_4_scaling_beta"


Get = Callable[[str], Any]
"""The value of a key of config.json, or its default."""


def renamed(family: Architecture, config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """`config` with the keys that the family reads as another one under that one's name."""
    result = dict(config)
    for key, name in family.quirks.renamed.items():
        if key in result:
            value = result.pop(key)
            if value is None:
                problems.append(meaningless(family, key))
            if value is None or config.get(name, value) is None:  # a null under the other name is said there
                continue
            if name in config and config[name] != value:
                problems.append(
                    f"config.json: {key} = {shown(value)} and {name} = {shown(config[name])} are two spellings of one fact, and differ. "
                    "Make them equal, or remove the wrong one."
                )
            result[name] = value
    return result


def stated_traits(family: Architecture, get: Get, problems: list[str]) -> dict[str, Any]:
    """What the model type implies, where its table names a key of config.json with that key's value."""
    facts: dict[str, Any] = {}
    for trait, default in TRAITS.items():
        value = family.traits.get(trait, default)
        if not str(value).startswith("config:"):
            facts[trait] = value
            continue
        key, _, power = value.removeprefix("config:").partition("^")
        stated = get(key)
        if isinstance(default, bool):
            facts[trait] = bool(stated)
        elif power and stated is not None and not 1e-30 < stated < 1e30:
            problems.append(f"config.json: {key} must be above 0, and less than 1e30, found {shown(stated)}.")
            facts[trait] = None
        else:
            facts[trait] = float(stated) ** float(power) if power and stated is not None else stated
            factor = trait in ("embedding_scale", "residual_scale") or (trait == "logit_scale" and power)
            if factor and facts[trait] == 1:  # as if there were none
                facts[trait] = None
    return facts


def listed_as_turning(family: Architecture, get: Get, layers: int, problems: list[str]) -> list[int] | None:
    """The layers with rotary embedding, where the family has a list of them."""
    if family.quirks.turning != "listed":
        return None
    listed, interval = get("no_rope_layers"), get("no_rope_layer_interval")
    if listed is None:
        if interval < 1:
            problems.append(f"config.json: no_rope_layer_interval must be at least 1, found {shown(interval)}.")
        return [layer for layer in range(layers) if (layer + 1) % max(interval, 1)]
    if not isinstance(listed, list) or len(listed) < layers or not all(turns in (0, 1) for turns in listed):
        problems.append(
            f"config.json: no_rope_layers must have a 1 or a 0 for each of the {layers} layers, found {printable(repr(listed), 60)}."
        )
        return []
    return [layer for layer, turns in enumerate(listed[:layers]) if turns]


def query_growth(family: Architecture, rope: dict[str, Any], problems: list[str]) -> float | None:
    """By what queries grow with their position, taken out of `rope`; None where they do not."""
    if not family.quirks.query_growth or not rope:
        return None
    beta, original = rope.pop(BETA, None), rope.get("original_max_position_embeddings")
    if type(beta) not in (int, float):
        problems.append(f"config.json: rope_parameters.{BETA} must be a number, found {shown(beta)}.")
    elif not (isinstance(original, int | float) and original > 0):
        problems.append(f"config.json: rope_parameters.original_max_position_embeddings must be above 0, found {shown(original)}.")
    else:
        return float(beta)
    return None
