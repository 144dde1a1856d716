"""What a recipe accepts, applied to the sources: config keys that no longer count, facts that one source decides for all.

Each acceptance that is needed becomes a warning, which travels in plan, card and manifest; one that is not needed becomes a note.
"""

from dataclasses import replace

from bam_merge.architectures.config import describe
from bam_merge.recipe.accepting import ACCEPTABLE
from bam_merge.recipe.schema import Recipe
from bam_merge.sources.agreement import ABSENT, fact_differences
from bam_merge.sources.dense import DenseModel
from bam_merge.sources.harmless import is_harmless
from bam_merge.sources.settled import Settled
from bam_merge.text import listed, nearest, printable
from bam_merge.validation_words import shown


def apply_accepted(recipe: Recipe, models: list[DenseModel]) -> Settled:
    """`models`, the first of which the others are compared with, under what `recipe` accepts of their configurations."""
    found = Settled(models)
    accept = recipe.accept
    if accept is None or len(models) < len(recipe.sources):  # a source that cannot be opened is said, and the rest when it can
        return found
    for index, key in enumerate(accept.config or ()):
        _accept_key(recipe, found, key, f"{recipe.file}: accept.config[{index}]")
    for fact, source in (accept.facts or {}).items():
        _accept_fact(recipe, found, fact, source)
    return found


def _accept_key(recipe: Recipe, found: Settled, key: str, where: str) -> None:
    models, name = found.models, printable(key)
    values = {model.name: model.config.get(key, ABSENT) for model in models}
    if all(value is ABSENT for value in values.values()):
        known = {key for model in models for key in model.config}
        found.problems.append(f"{where}: no source's config.json has {name}{nearest(key, known) or '. Correct or remove it.'}")
        return
    if not any(key in model.unknown_keys for model in models):
        harmless = all(value is ABSENT or is_harmless(key, value) for value in values.values())
        why = "it changes nothing at these values" if harmless else f"{models[0].family.name}'s table knows it, and it is compared"
        found.notes.append(f"accept.config: {name} need not be accepted: {why}.")
        return
    if all(value == values[models[0].name] for value in values.values()):
        found.notes.append(f"accept.config: {name} need not be accepted: no source differs in it.")
        return
    said = ", ".join(f"{source} has {'none' if value is ABSENT else shown(value)}" for source, value in values.items())
    found.warnings.append(
        f"config key {name} differs: {said}. No table knows it, nothing of it is in the result, and what it changes is not checked."
    )
    kept = ({k: v for k, v in model.unknown_keys.items() if k != key} for model in models)
    found.models = [replace(model, unknown_keys=unknown) for model, unknown in zip(models, kept, strict=True)]


def _accept_fact(recipe: Recipe, found: Settled, fact: str, source: str) -> None:
    where = f"{recipe.file}: accept.facts.{fact}"
    models = [model for model in found.models if model.family.name == found.models[0].family.name]
    decides = next((model for model in found.models if model.name == source), None)
    if decides is None or decides not in models:
        return  # that families differ is said, and is another problem
    others = {model.name: _differs(fact, model, decides) for model in models if model is not decides}
    others = {name: texts for name, texts in others.items() if texts}
    if not others:
        has = fact in decides.facts
        why = "no source differs in it" if has else f"{decides.family.name} has no such fact"
        found.notes.append(f"accept.facts: {fact} need not be accepted: {why}.")
        return
    if fact == "rope_parameters":
        shares = {model.name: model.facts[fact].get("partial_rotary_factor") for model in models}
        if len(set(shares.values())) > 1:
            said = ", ".join(f"{name} {share}" for name, share in shares.items())
            found.problems.append(
                f"{where}: the share of a head that turns differs ({said}), which is how heads are built, and is never accepted."
            )
            return
    said = "; ".join(f"{name}: {', '.join(texts)}" for name, texts in others.items())
    found.warnings.append(
        f"{fact} of {source} counts for all sources ({said}): {listed(list(others))} will not compute what "
        f"{'it was' if len(others) == 1 else 'they were'} trained to."
    )
    found.models = [_with_fact(fact, model, decides) if model.name in others else model for model in found.models]


def _differs(fact: str, model: DenseModel, decides: DenseModel) -> list[str]:
    """In words, how `model` differs from `decides` in a fact and in what goes with it."""
    together = {"sliding_window": ("sliding_window", "layer_types"), "rope_parameters": ("rope_parameters", "sliding_rope_parameters")}
    keys = together.get(fact, (fact,))
    return [f"{label} {mine}, not {theirs}" for label, mine, theirs in fact_differences(keys, model, decides)]


def _with_fact(fact: str, model: DenseModel, decides: DenseModel) -> DenseModel:
    """`model` with the fact as `decides` has it, written as there; its other facts as they are."""
    keys = ACCEPTABLE[fact].keys
    config = {key: value for key, value in model.config.items() if key not in keys}
    config |= {key: value for key, value in decides.config.items() if key in keys}
    facts = describe(model.family, config, [])
    ties = {key: model.facts[key] for key in ("tie_word_embeddings", "untied")}
    return replace(model, config=config, facts={**facts, **ties})
