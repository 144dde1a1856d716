"""Whether the sources can be merged: a table of all that they disagree in."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from bam_merge.architectures import rope_function
from bam_merge.architectures.config import NEUTRAL
from bam_merge.recipe.accepting import ACCEPTABLE
from bam_merge.sources.dense import DenseModel
from bam_merge.sources.harmless import find
from bam_merge.text import printable
from bam_merge.validation_words import shown

ABSENT = object()


SILENT = (
    "untied", "second_norm", "twin_norms", "sliding", "use_sliding_window", "max_position_embeddings", *NEUTRAL,
)  # fmt: skip
"""Facts that follow from another one, or are a limit or another choice that no forward pass depends on."""


ROTARY = {"rope_parameters": "rotary embedding", "sliding_rope_parameters": "rotary embedding of layers with a window"}
"""Facts that are compared as functions."""


ADVICE = {
    "vocab_size": "Embeddings are never cut; align the tokenizers first: tokenizer: {source: union} in the recipe does it, by token.",
    "tie_word_embeddings": "Tied and untied models cannot be mixed; untie the others first (save lm_head as a copy), or "
    "accept: {head: stored}.",
}


def disagreements(models: list[DenseModel]) -> list[str]:
    """Every way in which the sources compute different functions, compared with the first one."""
    first, *others = models
    problems: list[str] = []
    for model in others:
        if model.family.name != first.family.name:
            problems.append(
                f"sources.{model.name}: family {model.family.name}, sources.{first.name} is {first.family.name}. "
                "Experts must be branches of one architecture."
            )
            continue
        problems += _facts(model, first)
        problems += _unknown_keys(model, first)
    return problems


def _facts(model: DenseModel, first: DenseModel) -> Iterator[str]:
    keys = [key for key in dict.fromkeys((*model.facts, *first.facts)) if key not in SILENT]
    differ = [key for key in keys if key not in ROTARY and model.facts.get(key) != first.facts.get(key)]
    for key in keys:
        if key in ROTARY:
            yield from _rotary(key, model, first)
        elif key in differ and not _follows(key, differ, model, first):
            label, mine, theirs, more = contrast(key, model.facts.get(key), first.facts.get(key))
            advice = ADVICE.get(key) or f"Experts must share it{_or_accept(key, first)}."
            yield f"sources.{model.name}: {label} = {mine}, sources.{first.name} has {theirs} (config.json){more}. {advice}"


def _follows(key: str, differ: list[str], model: DenseModel, first: DenseModel) -> bool:
    """Whether the difference in `key` is but a consequence of another one in `differ`."""
    facts, others = model.facts, first.facts
    trait = str(model.family.traits.get(key, ""))
    if trait.startswith("config:") and trait != f"config:{key}":  # qk_norm of use_qk_norm, the output's bias of attention_bias
        return True
    if any(key in case.facts and set(case.where) & set(differ) for case in model.family.cases):
        return True
    unsaid = all(side.config.get(key) is None for side in (model, first)) and key not in model.family.defaults
    if key in ("rms_norm_eps", "layer_norm_eps") and model.family.quirks.norm_eps not in (None, key):
        return True
    match key:
        case "qk_norm_shape" | "qk_norm_bias" | "qk_norm_after_rotary":
            return "qk_norm" in differ
        case "sizes_by_kind":
            pairs = [pair for sizes in model.family.sizes.values() for pair in sizes.items()]
            return any(name in differ for size, text in pairs for name in (size, text.partition(" ")[0]))
        case "rope_layers":
            return "num_hidden_layers" in differ or "layer_types" in differ
        case "layer_types":
            no_window = facts["sliding_window"] is None or others["sliding_window"] is None
            return "num_hidden_layers" in differ or ("sliding_window" in differ and no_window)
        case "head_dim":
            return unsaid and bool({"hidden_size", "num_attention_heads"} & set(differ))
        case "num_key_value_heads":
            return unsaid and "num_attention_heads" in differ
    return False


def _or_accept(key: str, first: DenseModel) -> str:
    """The recipe's way out, for a fact that has one."""
    fact = next((fact for fact, what in ACCEPTABLE.items() if key in what.keys), None)
    return f", or the recipe accepts one for all: accept: {{facts: {{{fact}: {first.name}}}}}" if fact else ""


def fact_differences(keys: Iterable[str], model: DenseModel, first: DenseModel) -> Iterator[tuple[str, str, str]]:
    """(what differs, in `model`, in `first`), in words, of all that differs in these facts."""
    for key in keys:
        mine, theirs = model.facts.get(key), first.facts.get(key)
        if key in ROTARY:
            yield from ((label, here, there) for label, here, there, _ in _rotary_differences(key, model, first))
        elif mine != theirs:
            yield contrast(key, mine, theirs)[:3]


def _rotary(key: str, model: DenseModel, first: DenseModel) -> Iterator[str]:
    found = list(_rotary_differences(key, model, first))
    if found:
        parts = [f"{label} {here} here, {there} there{more}" for label, here, there, more in found]
        way_out = "" if any(label == "partial_rotary_factor" for label, *_ in found) else _or_accept("rope_parameters", first)
        said = "; ".join(parts)
        yield f"sources.{model.name}: {ROTARY[key]} differs from sources.{first.name}: {said}. Experts must share it{way_out}."


def _rotary_differences(key: str, model: DenseModel, first: DenseModel) -> Iterator[tuple[str, str, str, str]]:
    """(what differs, here, there, how much more) of what the two rotary embeddings compute."""
    if model.facts.get(key) is None and first.facts.get(key) is None:
        return
    mine, theirs = (
        rope_function.effective(side.facts.get(key) or side.facts["rope_parameters"], side.facts["max_position_embeddings"])
        for side in (model, first)
    )
    different = rope_function.differences(mine, theirs)
    if "rope_type" in different:  # what else differs belongs to the types
        different = [
            key for key in different if key not in rope_function.WORDS or key in ("rope_type", "rope_theta", "partial_rotary_factor")
        ]
    yield from (contrast(key, mine.get(key, ABSENT), theirs.get(key, ABSENT)) for key in different)


def _unknown_keys(model: DenseModel, first: DenseModel) -> Iterator[str]:
    """Keys that neither the family's table nor the list of harmless ones has at this value, where the sources differ in them."""
    for key in sorted({*model.unknown_keys, *first.unknown_keys}):
        mine, theirs = (side.config.get(key, ABSENT) for side in (model, first))
        if mine == theirs:
            continue
        label, here, there, more = contrast(key, mine, theirs)
        known = find(key)
        if known is not None and known.values is not None:
            why = f"it changes nothing only at {' or '.join(map(shown, known.values))}"
        else:
            why = f"{first.family.name}'s table does not know this key, so it may matter"
        has = "has none" if mine is ABSENT else f"has {label} = {here}"
        other = "has none" if theirs is ABSENT else f"has {label} = {there}" if mine is ABSENT else f"has {there}"
        if mine is ABSENT:
            has = f"has no {printable(key)}"
        way_out = f"Make them agree, or accept it: accept: {{config: [{printable(key)}]}}"
        yield f"sources.{model.name}: config.json {has}, sources.{first.name} {other}{more}; {why}. {way_out}."


def contrast(key: str, mine: Any, theirs: Any) -> tuple[str, str, str, str]:
    """(what differs, its value in both, how much more differs): of two long lists or mappings the first entry that does."""
    label = printable(str(key))
    if isinstance(mine, list) and isinstance(theirs, list):
        if len(mine) != len(theirs):
            return f"length of {label}", str(len(mine)), str(len(theirs)), ""
        places: list[Any] = [index for index, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1]]
        sides: list[Mapping[Any, Any]] = [dict(enumerate(mine)), dict(enumerate(theirs))]
        name = f"{label}[{places[0]}]" if places else label
    elif isinstance(mine, dict) and isinstance(theirs, dict):
        places = [word for word in dict.fromkeys((*mine, *theirs)) if mine.get(word, ABSENT) != theirs.get(word, ABSENT)]
        sides = [mine, theirs]
        name = f"{label}.{printable(str(places[0]))}" if places else label
    else:
        return label, _value(mine), _value(theirs), ""
    if not places:
        return label, _value(mine), _value(theirs), ""
    more = f", and {len(places) - 1} more of its entries differ" if len(places) > 1 else ""
    here, there = (_value(side.get(places[0], ABSENT)) for side in sides)
    return name, here, there, more


def _value(value: Any) -> str:
    return "none" if value is ABSENT else shown(value)
