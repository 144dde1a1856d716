"""What a model type implies, as its table says it: traits, keys under other names, lists of layers that turn or do not."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bam_merge.architectures.nulls import meaningless
from bam_merge.architectures.tables import Architecture
from bam_merge.architectures.vocabulary import LINEAR, LINEAR_SIZES, TRAITS
from bam_merge.text import printable
from bam_merge.validation_words import shown

BETA = "llama_4_scaling_beta"


PATTERN = "sliding_window_pattern"


INTERVAL = "full_attention_interval"
"""The key of hybrids for every how many layers one has full attention."""


LEGACY = {"attention": "full_attention"}
"""Kinds of layers as older files spell them."""


SOFTCAPS = ("attention_softcap", "logit_softcap", "attention_clip")
"""Traits that are sizes of caps."""


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


def under_common_keys(family: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the facts that the family has under keys of its own under those that most families have."""
    result = dict(config)
    for word, text in family.quirks.taken_from.items():
        key, _, otherwise = text.partition(" or ")
        value = config.get(key, family.defaults.get(key))
        if value is None and otherwise:
            factor, _, size = otherwise.rpartition(" * ")
            value = config.get(size)
            value = int(factor or 1) * value if type(value) is int else value
        result[word] = value
    return result


def without_idle_pattern(family: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without a pattern of 0 beside layer_types and no window, as the class of such patterns saves it."""
    idle = family.quirks.pattern_is_text and config.get(PATTERN) == 0 and isinstance(config.get("layer_types"), list)
    return {key: value for key, value in config.items() if key != PATTERN or not idle or config.get("sliding_window", 1) is not None}


def own_key(family: Architecture, word: str) -> str:
    """The key that `word` has in config.json."""
    return family.quirks.taken_from.get(word, word).partition(" ")[0]


def beyond(family: Architecture, config: Mapping[str, Any]) -> Iterator[str]:
    """A message for every key whose value makes the model one that nobody here computes."""
    for key, expected in family.quirks.only.items():
        possible = expected if isinstance(expected, list) else [expected]
        value = config.get(key, family.defaults.get(key))
        if value is None or (type(value), value) in [(type(one), one) for one in possible]:
            continue
        found = f"config.json: {key} = {shown(value)}{'' if key in config else ', which is meant where it is left out,'}"
        if key in family.quirks.reasons:
            yield f"{found} cannot be merged here: {family.quirks.reasons[key]}"
        else:
            words = " or ".join(map(shown, possible)) or "null"
            yield f"{found} is not known here, only {words}: what such a model computes would be a guess."
    known, types = family.quirks.kinds, config.get("layer_types")
    odd = [kind for kind in types if known and LEGACY.get(kind, kind) not in known] if isinstance(types, list) else []
    if odd:
        what = printable(repr(odd[0]), 60)
        yield f"config.json: layer_types names {what}; {family.name} merges here only where all its layers are {' or '.join(known)}."
    for key in family.quirks.needed:
        if config.get(key) is None:
            yield f"config.json: {key} is missing, and what {family.name} is without it is not known here. Add it."


def facts_of_cases(family: Architecture, get: Get, problems: list[str]) -> dict[str, Any]:
    """What several keys say together, by the family's cases."""
    facts: dict[str, Any] = {}
    for case in family.cases:
        if all(get(key) == value for key, value in case.where.items()):
            if case.refused:
                said = ", ".join(f"{key} = {shown(value)}" for key, value in case.where.items())
                problems.append(f"config.json: {said}: {case.refused}")
            facts.update({fact: get(value) if isinstance(value, str) else value for fact, value in case.facts.items()})
    return facts


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
        elif stated is not None and type(stated) not in (int, float):
            problems.append(f"config.json: {key} must be a number, found {shown(stated)}.")
            facts[trait] = None
        elif trait in SOFTCAPS and stated is not None and not 1e-30 < stated < 1e30:
            problems.append(f"config.json: {key} must be above 0, and less than 1e30, or null for no cap, found {shown(stated)}.")
            facts[trait] = None
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
    if family.quirks.turning == "if rope":
        return None if get("position_embedding_type") == "rope" else []
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


def linear_problems(family: Architecture, facts: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the sizes of layers with linear attention."""
    odd = [key for key in LINEAR_SIZES if key in family.function and not (type(facts[key]) is int and 0 < facts[key] < 2**31)]
    yield from (f"config.json: {key} must be a positive integer, found {shown(facts[key])}." for key in odd)
    if not odd and LINEAR_SIZES[0] in family.function and facts["linear_num_value_heads"] % facts["linear_num_key_heads"]:
        yield (
            f"config.json: linear_num_value_heads {facts['linear_num_value_heads']} is not a multiple of linear_num_key_heads "
            f"{facts['linear_num_key_heads']}."
        )


def kinds_of_hybrid(family: Architecture, get: Get, layers: int) -> list[str] | None:
    """The kinds of layers of a hybrid that does not list them: full attention in every so manieth, linear attention in the others."""
    every = get(family.quirks.linear) if family.quirks.linear else None
    if type(every) is not int or every < 1:
        return None
    return [LINEAR if (layer + 1) % every else "full_attention" for layer in range(layers)]


def interval_problems(family: Architecture, config: Mapping[str, Any]) -> Iterator[str]:
    """An interval of a hybrid that is no number of layers, or that its own list contradicts; transformers takes the list."""
    key, types = family.quirks.linear, config.get("layer_types")
    if key is None or key not in config:
        return
    every = config[key]
    if type(every) is not int or every < 1:
        yield f"config.json: {key} must be a positive integer, found {shown(every)}."
    elif isinstance(types, list) and types != kinds_of_hybrid(family, config.get, len(types)):
        yield (
            f"config.json: {key} = {every} says that one of every {every} layers has full attention, layer_types otherwise; transformers "
            f"takes layer_types. Correct one, or remove {key}."
        )


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
