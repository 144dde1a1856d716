"""Rotary embeddings of which layers with and without a sliding window have one each: where a config.json has the two sets.

transformers keeps them nested, `rope_parameters: {full_attention: {...}, sliding_attention: {...}}`. Older files have one key each for the
two bases, and a rope_scaling, which is that of the layers without a window alone.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from bam_merge.architectures.tables import Architecture
from bam_merge.text import printable, some
from bam_merge.validation_words import shown

FULL, SLIDING = "full_attention", "sliding_attention"
SETS = (FULL, SLIDING)


def set_of(config: Mapping[str, Any], kind: str) -> tuple[dict[str, Any], str]:
    """What `config` says inside of the rotary embedding of one kind of layer, and the key that it stands under.

    rope_scaling is added to what rope_parameters has for layers without a window, as transformers adds it.
    """
    scaling = _object(config, "rope_scaling") if kind == FULL else {}
    own = _object(_object(config, "rope_parameters"), kind)
    return {**own, **scaling}, "rope_scaling" if scaling and not own else f"rope_parameters.{kind}"


def _object(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def with_one_set(family: Architecture, config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """`config` as that of a family with one set for all layers: the one that layers of this kind have."""
    quirks, own = family.quirks, set_of(config, kind)[0]
    if quirks.rope_sets and not _object(config, "rope_parameters"):
        own = dict(quirks.rope_sets[kind])
    result = {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_parameters")}
    if "truncate" in own and own["truncate"] is None:
        own["truncate"] = False  # transformers asks whether it is true, and null is not
    if kind == SLIDING:
        result.pop(quirks.rotary_base, None)
        beside = quirks.sliding_base
        base = config.get(beside, family.defaults.get(beside)) if beside else family.defaults.get("rope_theta")
        if base is not None:
            result[quirks.rotary_base] = base
    return result | {"rope_parameters": own}


def set_problems(family: Architecture, config: Mapping[str, Any]) -> list[str]:
    """What keeps the two sets from being told apart."""
    if family.quirks.rope_sets and (problems := list(_incomplete(family, config))):
        return problems
    problems = []
    scaling, nested = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    for key, value in (("rope_scaling", scaling), ("rope_parameters", nested)):
        if not isinstance(value, dict):
            return [f"config.json: {key} must be an object, found {printable(repr(value), 60)}."]
    inside = [key for key in scaling if isinstance(scaling[key], dict)]
    if inside:
        problems.append(f"config.json: {some(inside)} in rope_scaling must be a number, text or a list of numbers.")
    odd = [key for key in nested if key not in SETS]
    if odd:
        problems.append(
            f"config.json: rope_parameters has {some(odd)}; {family.name} has one set for {FULL} and one for {SLIDING}, and transformers "
            "ignores what stands beside them. Move it into the set that it belongs to, or remove it."
        )
    elif nested and scaling and not isinstance(nested.get(FULL), dict):
        problems.append(
            f"config.json: rope_scaling belongs to {FULL}, which rope_parameters has no set for: transformers does not load such a model. "
            f"Move it to rope_parameters.{FULL}."
        )
    named = scaling.get("rope_type", "default")
    if not nested and scaling.get("type", named) != named:
        problems.append(
            f"config.json: rope_scaling.type = {shown(scaling['type'])}: of {family.name} transformers reads rope_scaling.rope_type alone, "
            f"which is {shown(named)}. Write rope_type in the place of type."
        )
    for kind in SETS:
        if nested.get(kind) is not None and not isinstance(nested[kind], dict):
            problems.append(f"config.json: rope_parameters.{kind} must be an object, found {printable(repr(nested[kind]), 60)}.")
    own = _object(nested, FULL)
    for key, value in scaling.items():
        there = own.get(key, own.get({"type": "rope_type", "rope_type": "type"}.get(key, key)))
        if there is not None and there != value:
            problems.append(
                f"config.json: rope_scaling.{printable(key)} = {shown(value)} and rope_parameters.{FULL} has {shown(there)}: two spellings "
                "of one fact that differ; transformers takes rope_scaling's. Make them equal, or remove the wrong one."
            )
    return problems


def _incomplete(family: Architecture, config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the sets of a class that reads no key beside rope_parameters, and fills in nothing of what is left out there."""
    for key in ("rope_scaling", *BESIDE):
        if config.get(key) is not None:
            yield f"config.json: {key}, which transformers ignores for {family.name}. Write it into rope_parameters, or remove it."
    nested = config.get("rope_parameters")
    if nested is None or not isinstance(nested, dict):
        return
    for kind in SETS:
        own = nested.get(kind)
        lacking = [key for key in ("rope_type", "rope_theta") if not isinstance(own, dict) or own.get(key) is None]
        if lacking:
            yield (
                f"config.json: rope_parameters.{kind} lacks {some(lacking)}, which {family.name} is not loaded without. Add what it was "
                "trained with."
            )

        share = own.get("partial_rotary_factor") if isinstance(own, dict) else None
        if share not in (None, 1.0) and own is not None and own.get("rope_type") != "proportional":
            yield (
                f"config.json: rope_parameters.{kind}.partial_rotary_factor = {shown(share)}, which transformers reads of rope_type "
                f"proportional alone for {family.name}. Remove it, or write that type."
            )


BESIDE = ("rope_theta", "rope_local_base_freq", "partial_rotary_factor")
"""Keys beside rope_parameters that most classes read."""


def settled(sets: list[dict[str, Any]], slides: list[bool]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(that of all layers but those with a window, the latter's) of one set or two; None where it is the same, or no layer has a window."""
    full, sliding = sets[0], sets[-1]
    if slides and all(slides):
        return sliding, None
    return full, sliding if any(slides) and sliding != full else None
