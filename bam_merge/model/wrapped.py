"""Text models under other names or inside a wrapper, as the reference model reads them: by code of its own.

Plans find a prefix by trying the spellings that they know (architectures/naming.py). Here it is worked out from the names alone: for every
tensor that a model must have, what stands before its name in each stored one that ends with it; the prefix is what all of them have in
common. So a plan that took the wrong one of two prefixes, or the wrong key of a configuration, is not confirmed by what proves it. (What a
wrapper is, and what it has beside its text model, stands in the tables that both read, and that tests hold against transformers.)
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from bam_merge.architectures.wrappers import TextModel, Wrapper, text_models, wrappers
from bam_merge.errors import CheckpointError
from bam_merge.text import printable, some

ANYWHERE = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
"""Names of modules that wrap another one and are no part of any model."""


NEVER_INSIDE = ("model_type", "architectures", "tie_word_embeddings")


# ---- the configuration -------------------------------------------------------------------------------------------------------------


def wrapper_of(config: Mapping[str, Any]) -> Wrapper | None:
    for wrapper in wrappers():
        if config.get("model_type") in wrapper.model_types:
            return wrapper
    return None


def text_config(config: Mapping[str, Any], has_head: bool) -> dict[str, Any]:
    """The configuration of the text model in a wrapper, as one of its own family would have it. Raises CheckpointError.

    `has_head`: a head is stored. Where config.json does not say whether it is tied, or says both, that tells.
    """
    wrapper = wrapper_of(config)
    assert wrapper is not None
    if wrapper.refused:
        raise CheckpointError(f"config.json: model_type {wrapper.name!r}: {wrapper.refused}, which is not known here.")
    places = [config[key] for key in wrapper.config if isinstance(config.get(key), dict)]
    if not places and not wrapper.flat:
        raise CheckpointError(
            f"config.json: a {wrapper.name} model without {' or '.join(wrapper.config)}, which is its text model's configuration."
        )
    inner = dict(places[0]) if places else {key: value for key, value in config.items() if key not in wrapper.flat}
    kind = inner.get("model_type", wrapper.text) if places else wrapper.text
    text = text_models().get(str(kind))
    if text is None:
        found = printable(repr(kind), 60)
        raise CheckpointError(
            f"config.json: model_type {wrapper.name!r} wraps a text model of model_type {found}, which is not known here."
        )
    result = {key: value for key, value in inner.items() if key not in NEVER_INSIDE}
    for key in ("vocab_size", "dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id"):
        if key not in result and key in config:
            result[key] = config[key]
    rope_key = next((key for key in ("rope_scaling", "rope_parameters") if isinstance(result.get(key), dict)), None)
    if rope_key is not None and text.mrope:
        result[rope_key] = dict(_ordinary(result[rope_key]))
    for key, value in _implied(text, result, rope_key):
        result.setdefault(key, value)
    result["model_type"] = text.family
    result["tie_word_embeddings"] = _is_tied(wrapper, config, inner if places else {}, has_head)
    return result


def _ordinary(rope: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """mrope at positions that are one number three times: each part of a head turns by that number, as without it."""
    for key, value in rope.items():
        if key in ("type", "rope_type") and value == "mrope":
            yield key, "default"
        elif not key.startswith("mrope_"):
            yield key, value


def _implied(text: TextModel, stated: Mapping[str, Any], rope_key: str | None) -> Iterator[tuple[str, Any]]:
    for key, value in text.defaults.items():
        if key != "rope_theta" or rope_key is None or "rope_theta" not in stated[rope_key]:
            yield key, value


def _is_tied(wrapper: Wrapper, config: Mapping[str, Any], inner: Mapping[str, Any], has_head: bool) -> bool:
    said = [side["tie_word_embeddings"] for side in (config, inner) if type(side.get("tie_word_embeddings")) is bool]
    if said and all(said):
        return True
    if said and not any(said):
        return False
    return not has_head and (bool(said) or wrapper.tied)


# ---- the names ---------------------------------------------------------------------------------------------------------------------


def own_names(
    stored: Collection[str], wanted: Iterable[tuple[str, ...]], heads: Collection[str], wrapper: Wrapper | None
) -> dict[str, str]:
    """The stored name of each tensor by the family's own name, of all that are stored but what `wrapper` has beside its text model.

    `wanted` are the names of each tensor that the model must have, the head's (`heads`) apart. Raises CheckpointError where no prefix, or
    more than one, is before all of them.
    """
    wanted = list(wanted)
    if wrapper is None and all(any(name in stored for name in names) for names in wanted):
        tops = _heads({name: name for name in stored}, heads, _first_word(wanted[0][0])[0])
        return {name: name for name in stored if name not in tops.values()} | tops
    short = {".".join(word for word in name.split(".") if word not in ANYWHERE): name for name in stored}
    if len(short) < len(stored):
        raise CheckpointError("two tensors have one name, but for the words that a wrapping program puts into it.")
    prefixes: set[tuple[str, str]] | None = None
    ends = _by_ending(short)
    for names in wanted:
        here = {(before, word) for name in names for word, rest in [_first_word(name)] for before in ends.get(rest, ())}
        prefixes = here if prefixes is None else prefixes & here
    if not prefixes:
        return {name: name for name in stored}  # what is missing is said by its name
    if len({before for before, _ in prefixes}) > 1:
        found = some(sorted(before or "(none)" for before, _ in prefixes))
        raise CheckpointError(f"the names of {len(stored):,} tensors have more than one prefix that would do: {found}.")
    ((before, word),) = prefixes
    result = _heads(short, heads, before)
    taken = set(result.values())
    for name, full in short.items():
        if full not in taken and not _is_beside(name, before, wrapper):
            result[word + name[len(before) :] if name.startswith(before) else f"?{name}"] = full  # no table has a name that begins so
    return result


def _first_word(name: str) -> tuple[str, str]:
    word, dot, rest = name.partition(".")
    return word + dot, rest


def _by_ending(names: Iterable[str]) -> dict[str, set[str]]:
    """What stands before every ending of the names, of whole words."""
    found: dict[str, set[str]] = {}
    for name in names:
        at = 0
        while True:
            found.setdefault(name[at:], set()).add(name[:at])
            at = name.find(".", at) + 1
            if not at:
                break
    return found


def _heads(short: Mapping[str, str], heads: Collection[str], before: str) -> dict[str, str]:
    """A head stands beside the trunk, at some step of the way there."""
    steps = [before[: at + 1] for at in range(len(before)) if before[at] == "."]
    return {head: short[step + head] for head in heads for step in ("", *steps) if step + head in short}


def _is_beside(name: str, before: str, wrapper: Wrapper | None) -> bool:
    """Whether a tensor is of a wrapper's towers, after some of the words that stand before the trunk."""
    steps = ["", *(before[: at + 1] for at in range(len(before)) if before[at] == ".")]
    return wrapper is not None and any(wrapper.what(name.removeprefix(step)) is not None for step in steps if name.startswith(step))
