"""Sizes that layers of one kind have otherwise than all: where a config.json has them, by kind or layer by layer."""

from collections.abc import Mapping
from typing import Any

from bam_merge.architectures.tables import Architecture
from bam_merge.architectures.traits import Get
from bam_merge.text import printable
from bam_merge.validation_words import shown

BY_LAYER = "per_layer_config"
"""The key under which newer files have such sizes, by the number of the layer; what older ones have is not read beside it."""


def sizes_by_kind(family: Architecture, get: Get, facts: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The sizes that layers of one kind have otherwise than all, by kind; and sizes that all have, where all layers are of that kind."""
    types, found = set(facts["layer_types"]), dict[str, dict[str, int]]()
    listed = _listed(family, get, facts, problems) if family.sizes else None
    for kind, keys in family.sizes.items():
        for size, text in keys.items():
            key, _, flag = text.partition(" if ")
            stated = get(key) if not flag or get(flag) else None
            if listed is not None:
                stated = listed.get(kind, {}).get(size)
            if stated is not None and not (type(stated) is int and 0 < stated < 2**31):
                problems.append(f"config.json: {key} must be a positive integer, found {shown(stated)}.")
            elif stated is not None and stated != facts[size] and kind in types:
                found.setdefault(kind, {})[size] = stated
        own = {**facts, **found.get(kind, {})}
        if own["num_attention_heads"] % own["num_key_value_heads"]:
            problems.append(
                f"config.json: of {kind} layers {own['num_attention_heads']} heads are not a multiple of {own['num_key_value_heads']} "
                "for keys and values."
            )
    only = found.pop(next(iter(types)), {}) if len(types) == 1 else {}
    return {**only, "sizes_by_kind": found or None}


def _listed(family: Architecture, get: Get, facts: Mapping[str, Any], problems: list[str]) -> dict[str, dict[str, Any]] | None:
    """The sizes of each kind, where a file has them layer by layer; None where it has not."""
    stated = get(BY_LAYER)
    if stated is None:
        return None
    layers, types = range(facts["num_hidden_layers"]), facts["layer_types"]
    names = {str(layer): layer for layer in layers}
    if not isinstance(stated, dict) or not all(name in names and isinstance(sizes, dict) for name, sizes in stated.items()):
        problems.append(
            f"config.json: {BY_LAYER} must have an object for some of the {len(layers)} layers, found {printable(repr(stated), 60)}."
        )
        return {}
    found: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(types):
        flags = {size: text.partition(" if ")[2] for size, text in family.sizes.get(kind, {}).items()}
        known = [size for size, flag in flags.items() if not flag or get(flag)]
        own = [stated.get(str(layer), {}) for layer in layers if types[layer] == kind]
        odd = next(
            (f"{key} = {shown(value)}" for sizes in own for key, value in sizes.items() if key not in known and facts.get(key) != value),
            None,
        )
        full = [{size: sizes.get(size, facts[size]) for size in known} for sizes in own]
        if odd or any(sizes != full[0] for sizes in full):
            what = odd or "other sizes in some of them than in others"
            problems.append(
                f"config.json: {BY_LAYER} gives {kind} layers {what}; {family.name} merges here where all layers of a kind have one, and "
                f"{' and '.join(known) or 'none'} may be its own."
            )
        found[kind] = full[0]
    return found


def of_own_keys(family: Architecture, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that name such sizes with what counts, wherever a file has it: of kinds of which there are layers."""
    by_kind = {kind: {**facts, **(facts["sizes_by_kind"] or {}).get(kind, {})} for kind in family.sizes if kind in facts["layer_types"]}
    return {text.partition(" if ")[0]: own[size] for kind, own in by_kind.items() for size, text in family.sizes[kind].items()}


def under_own_keys(family: Architecture, config: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with such sizes under the keys that name them, as all versions of transformers read them, and not layer by layer."""
    kept = {key: value for key, value in config.items() if key != BY_LAYER}
    return {**kept, **of_own_keys(family, facts)} if BY_LAYER in config and family.sizes else kept


def are_sizes_by_kind(value: object) -> bool:
    """Whether `value`, from a mixture's config.json, can be its sizes_by_kind."""
    return value is None or (
        isinstance(value, dict)
        and all(isinstance(sizes, dict) and all(type(size) is int for size in sizes.values()) for sizes in value.values())
    )
