"""Whether the sources can be merged: a table of all that they disagree in."""

from collections.abc import Mapping
from typing import Any

from bam_merge.architectures.config import NEUTRAL
from bam_merge.sources.dense import DenseModel
from bam_merge.text import printable

# ---- do the sources agree? -----------------------------------------------------------------------------------------------


def disagreements(models: list[DenseModel]) -> list[str]:
    """Every way in which the sources compute different functions, compared with the first one."""
    first, *others = models
    problems = []
    for model in others:
        if model.family.name != first.family.name:
            problems.append(
                f"sources.{model.name}: family {model.family.name}, sources.{first.name} is {first.family.name}. "
                "Experts must be branches of one architecture."
            )
            continue
        for key in dict.fromkeys((*model.facts, *first.facts)):
            mine, theirs = model.facts.get(key), first.facts.get(key)
            if mine != theirs and _matters(key, first.facts):
                problems.append(_disagreement(key, model.name, mine, first.name, theirs))
        for key in sorted({*model.unknown_keys, *first.unknown_keys}):
            mine, theirs = model.unknown_keys.get(key), first.unknown_keys.get(key)
            if mine != theirs:
                problems.append(
                    f"sources.{model.name}: config.json has {printable(key)} = {printable(repr(mine))}, sources.{first.name} has "
                    f"{printable(repr(theirs))}; {first.family.name}'s table does not know this key, so it may matter. Make them agree."
                )
    return problems


def _matters(key: str, facts: Mapping[str, Any]) -> bool:
    if key == "max_position_embeddings":  # a limit, unless the rotary scaling is worked out from it
        return facts["rope_parameters"]["rope_type"] in ("dynamic", "longrope")
    return key not in ("untied", "sliding", "use_sliding_window", *NEUTRAL)


def _disagreement(key: str, name: str, mine: Any, first: str, theirs: Any) -> str:
    if key == "rope_parameters":
        keys = [k for k in dict.fromkeys((*mine, *theirs)) if mine.get(k) != theirs.get(k)]
        values = ((key, *(printable(repr(side.get(key)), 60) for side in (mine, theirs))) for key in keys)
        shown = "; ".join(f"{printable(key)} {here} here, {there} there" for key, here, there in values)
        return f"sources.{name}: rotary embedding differs from sources.{first}: {shown}. Experts must share it."
    advice = {
        "vocab_size": "Embeddings are never cut; align the tokenizers first.",
        "tie_word_embeddings": "Tied and untied models cannot be mixed; untie the others first (save lm_head as a copy).",
    }.get(key, "Experts must share it.")
    return f"sources.{name}: {key} = {printable(repr(mine))}, sources.{first} has {printable(repr(theirs))} (config.json). {advice}"
