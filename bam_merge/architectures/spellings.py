"""Facts that a config.json can spell in two places: which place transformers takes, and where a file contradicts itself.

A file that spells a fact twice means one thing to transformers and may mean another to the next engine, or to who edited it: so two
values are refused, and two equal ones are fine. The tables are transformers' configuration classes (version 5) as data, and
tests/architectures/test_spellings.py holds every line of them against those classes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from bam_merge.architectures.tables import Architecture
from bam_merge.text import printable

WHOLE_HEADS = ("llama", "mistral", "qwen2", "qwen3", "cohere", "mixtral", "qwen2_moe", "qwen3_moe")
"""Model types whose attention turns every channel of a head, whatever share config.json asks for."""


PLAIN = (*WHOLE_HEADS, "phi3", "bam")


LOW_BASE = ("llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "phi3", "bam")


READ = (*PLAIN, "gpt_neox")
"""Every model type that is read here to be merged or run."""


STRETCHED = ("yarn", "longrope", "llama3")
"""Types of rotary scaling that start from an original context."""


@dataclass(frozen=True)
class Spelling:
    """One fact of some model types, under all keys that mean it.

    `read` are the keys that transformers takes, the first that is there before the next; `ignored` those that it passes over for these
    model types, though other types or other programs read them. "rope.KEY" is KEY inside rope_scaling or rope_parameters. `default` is
    the value where no key of `read` is there: a literal, "$KEY" for the value of another key, or None where there is none to compare
    with. `only` limits the fact to some types of rotary scaling.
    """

    fact: str
    model_types: tuple[str, ...]
    read: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    default: Any = None
    only: tuple[str, ...] | None = None


BASE, SHARE, CONTEXT = "the rotary base", "the share of a head that turns", "the context before the rotary scaling"


ORIGINAL = "original_max_position_embeddings"


SPELLINGS = (
    Spelling("the type of the rotary scaling", READ, ("rope.rope_type", "rope.type")),
    Spelling(BASE, LOW_BASE, ("rope.rope_theta", "rope_theta"), ("rotary_emb_base",), 10000.0),
    Spelling(BASE, ("cohere",), ("rope.rope_theta", "rope_theta"), ("rotary_emb_base",), 500000.0),
    Spelling(BASE, ("mixtral",), ("rope.rope_theta", "rope_theta"), ("rotary_emb_base",), 1000000.0),
    Spelling(BASE, ("gpt_neox",), ("rope.rope_theta", "rotary_emb_base"), ("rope_theta",), 10000.0),
    Spelling(SHARE, ("phi3", "bam"), ("rope.partial_rotary_factor", "partial_rotary_factor"), ("rotary_pct",), 1.0),
    Spelling(SHARE, ("gpt_neox",), ("rope.partial_rotary_factor", "rotary_pct"), ("partial_rotary_factor",), 0.25),
    Spelling(SHARE, WHOLE_HEADS, (), ("rope.partial_rotary_factor", "partial_rotary_factor", "rotary_pct"), 1.0),
    Spelling(CONTEXT, ("phi3",), (ORIGINAL,), (f"rope.{ORIGINAL}",), 4096, STRETCHED),
    Spelling(CONTEXT, (*WHOLE_HEADS, "bam", "gpt_neox"), (f"rope.{ORIGINAL}",), (ORIGINAL,), "$max_position_embeddings", STRETCHED),
    Spelling("the dtype", (*READ, "olmoe"), ("dtype", "torch_dtype")),
    Spelling("the activation", PLAIN, ("hidden_act",), ("hidden_activation", "activation_function"), "silu"),
    Spelling("the activation", ("gpt_neox",), ("hidden_act",), ("hidden_activation", "activation_function"), "gelu"),
    Spelling("the number of experts", ("mixtral",), ("num_experts", "num_local_experts"), ("n_routed_experts",)),
    Spelling("the number of experts", ("qwen3_moe", "olmoe"), ("num_local_experts", "num_experts"), ("n_routed_experts",)),
    Spelling("the number of experts", ("qwen2_moe",), ("num_experts",), ("num_local_experts", "n_routed_experts"), 60),
    Spelling("the hidden size", READ, ("hidden_size",), ("n_embd", "d_model")),
    Spelling("the number of layers", READ, ("num_hidden_layers",), ("n_layer", "num_layers")),
    Spelling("the number of heads", READ, ("num_attention_heads",), ("n_head", "num_heads")),
    Spelling("the number of key and value heads", ("gpt_neox",), (), ("num_key_value_heads",), "$num_attention_heads"),
    Spelling("the size of a head", ("gpt_neox",), (), ("head_dim",), "$hidden_size / num_attention_heads"),
)  # fmt: skip


SLIDING = {
    "qwen2": "by layer", "qwen3": "by layer", "qwen2_moe": "by layer", "mistral": "all", "phi3": "all", "mixtral": "all",
    "qwen3_moe": "all if used", "llama": "none", "cohere": "none", "gpt_neox": "none",
}  # fmt: skip
"""Which layers have sliding-window attention, in transformers.

by layer      those that layer_types names, or, where it is left out, max_window_layers implies; none unless use_sliding_window
all if used   every layer if use_sliding_window, else none; layer_types and max_window_layers are ignored
all           every layer if sliding_window is a number; the other three keys are ignored
none          none; all four keys are ignored
"""


SYNONYMS = {"swish": "silu", "su": "longrope"}


def conflicts(table: Architecture, config: Mapping[str, Any]) -> list[str]:
    """A message for every fact that `config` spells in two places with two values."""
    kind = table.name
    rope_key = next((key for key in ("rope_scaling", "rope_parameters") if isinstance(config.get(key), dict) and config[key]), None)
    rope = config[rope_key] if rope_key else {}
    problems = list(_two_ropes(kind, config)) if rope_key == "rope_scaling" else []
    for spelling in SPELLINGS:
        if kind in spelling.model_types and (spelling.only is None or _rope_type(rope) in spelling.only):
            problems += _conflict(spelling, kind, config, rope_key)
    window = config.get("sliding_window", table.defaults.get("sliding_window"))
    return problems + [f"config.json: {text}" for text in _sliding(kind, config, window)]


WINDOW_KEYS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")


def settled_keys(table: Architecture) -> frozenset[str]:
    """The keys that `conflicts` answers for: where it finds nothing, they say what is read anyway, or nothing to this model type."""
    lines = [spelling for spelling in SPELLINGS if table.name in spelling.model_types]
    return frozenset(WINDOW_KEYS).union(*((*spelling.read, *spelling.ignored) for spelling in lines))


def taken(spelling: Spelling, config: Mapping[str, Any], rope_key: str | None) -> tuple[str | None, Any]:
    """(key, value) that transformers takes; the key is None where the value is the default."""
    stated = ((key, _value(key, config, rope_key)) for key in spelling.read)
    first = next(((key, value) for key, value in stated if value is not None), None)
    return first or (None, _default(spelling.default, config))


def _conflict(spelling: Spelling, kind: str, config: Mapping[str, Any], rope_key: str | None) -> Iterator[str]:
    key, value = taken(spelling, config, rope_key)
    if value is None:
        return
    for other in (*spelling.read, *spelling.ignored):
        found = _value(other, config, rope_key)
        if other == key or found is None or _plain(found) == _plain(value):
            continue
        name, of = _name(other, rope_key), _name(key or (spelling.read or [""])[-1], rope_key)
        here = f"config.json: {name} = {_brief(found)}"
        if key:
            yield (
                f"{here} and {of} = {_brief(value)} are two spellings of {spelling.fact}, and differ; transformers takes {of} for {kind}. "
                "Make them equal, or remove the wrong one."
            )
        elif spelling.read:
            yield (
                f"{here} is another spelling of {spelling.fact}, which transformers takes from {of} for {kind}; that is left out, and "
                f"means {_brief(value)}. Write {of} = {_brief(found)} if that is right, and remove {name}."
            )
        else:
            yield (
                f"{here}, but {spelling.fact} is always {_brief(value)} in transformers' {kind}, which ignores the key. Remove {name}, "
                "unless the model was trained with it: then it is no such model."
            )


def _two_ropes(kind: str, config: Mapping[str, Any]) -> Iterator[str]:
    """Where both are there, transformers takes all of rope_scaling, and nothing of rope_parameters."""
    newer = config.get("rope_parameters")
    if not isinstance(newer, dict) or not newer:
        return
    first, second = (_effective(kind, config, key) for key in ("rope_scaling", "rope_parameters"))
    differing = [key for key in dict.fromkeys((*first, *second)) if _plain(first.get(key)) != _plain(second.get(key))]
    if differing:
        shown = "; ".join(f"{printable(key)} {_brief(first.get(key))} and {_brief(second.get(key))}" for key in differing)
        yield (
            f"config.json: rope_scaling and rope_parameters are two spellings of the rotary embedding, and differ: {shown}; transformers "
            "takes rope_scaling. Make them equal, or remove the wrong one."
        )


def _effective(kind: str, config: Mapping[str, Any], rope_key: str) -> dict[str, Any]:
    """The rotary embedding by one of the two dictionaries alone, with what it leaves to the keys beside it."""
    rope = config[rope_key]
    result = {key: value for key, value in rope.items() if key not in ("type", "rope_type") and value is not None}
    result["rope_type"] = _rope_type(rope)
    for spelling in SPELLINGS:
        name = {BASE: "rope_theta", SHARE: "partial_rotary_factor", CONTEXT: ORIGINAL}.get(spelling.fact)
        if name and kind in spelling.model_types and (spelling.only is None or result["rope_type"] in spelling.only):
            result[name] = taken(spelling, config, rope_key)[1]
    return result


def _sliding(kind: str, config: Mapping[str, Any], window: Any) -> Iterator[str]:
    """Contradictions among use_sliding_window, sliding_window (`window`, by default too), max_window_layers and layer_types."""
    how, layers, types = SLIDING.get(kind), config.get("num_hidden_layers"), config.get("layer_types")
    use, first = config.get("use_sliding_window"), config.get("max_window_layers")
    if how is None or not is_count(layers) or not (window is None or is_count(window)):
        return
    given = [t == "sliding_attention" for t in types] if isinstance(types, list) and len(types) == layers else None
    left_out = "" if "use_sliding_window" in config else " (left out)"
    if how in ("by layer", "all if used") and not use:
        if given and any(given):
            yield f"layer_types has sliding layers, but use_sliding_window is false{left_out}, so that {kind} has no window. Correct one."
        return
    if how == "none":
        if (window and use is not False and (given is None or any(given))) or (given and any(given)):
            key = "layer_types" if given and any(given) else "sliding_window"
            yield f"{key} asks for sliding-window attention, which {kind} has not in transformers: the key is ignored there. Remove it."
        return
    if how == "all" and use is False and window:
        yield (
            f"sliding_window = {_brief(window)}, but use_sliding_window is false, which transformers ignores for {kind}. "
            "Set sliding_window to null, or remove use_sliding_window."
        )
    if how == "by layer":
        implied = _implied(kind, layers, first) if type(first) is int and window else None
        if given is not None and implied is not None and given != implied:
            yield (
                f"layer_types says that layers {_layers(given)} slide, max_window_layers = {first} that layers {_layers(implied)} do; "
                f"transformers takes layer_types. Correct one, or remove max_window_layers."
            )
        if given and any(given) and not window:
            yield "layer_types has sliding layers, but sliding_window is no number. Correct one."
    elif window and given is not None and not all(given):
        yield (
            f"sliding_window = {_brief(window)} slides in every layer of {kind}, and layer_types says that layers {_layers(given)} slide; "
            "transformers ignores layer_types here. Correct one."
        )
    elif window and type(first) is int and first > 0:
        yield (
            f"sliding_window = {_brief(window)} slides in every layer of {kind}, max_window_layers = {first} leaves out the first {first}; "
            "transformers ignores max_window_layers here. Remove one."
        )
    elif how == "all" and not window and given and any(given):
        yield f"layer_types has sliding layers, but sliding_window is no number, so that {kind} has no window. Correct one."


def _implied(kind: str, layers: int, first: int) -> list[bool]:
    """The layers that slide by max_window_layers: from it on, but in qwen2_moe every other one before it."""
    return [layer % 2 == 0 and layer < first if kind == "qwen2_moe" else layer >= first for layer in range(layers)]


# ---- values and words ----------------------------------------------------------------------------------------------------


def _value(key: str, config: Mapping[str, Any], rope_key: str | None) -> Any:
    inside = key.removeprefix("rope.")
    if inside == key:
        return config.get(key)
    return config[rope_key].get(inside) if rope_key else None


def _default(default: Any, config: Mapping[str, Any]) -> Any:
    if not isinstance(default, str) or not default.startswith("$"):
        return default
    whole, _, parts = default[1:].partition(" / ")
    number, divisor = config.get(whole), config.get(parts) if parts else 1
    return number // divisor if is_count(number) and is_count(divisor) else None


def is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and value > 0


def _rope_type(rope: Mapping[str, Any]) -> Any:
    return _plain(rope.get("rope_type") or rope.get("type") or "default")


def _plain(value: Any) -> Any:
    """A value without the ways of writing it."""
    if not isinstance(value, str):
        return value
    return SYNONYMS.get(value, value.removeprefix("torch."))


def _name(key: str, rope_key: str | None) -> str:
    return key.replace("rope.", f"{rope_key or 'rope_parameters'}.")


def _brief(value: Any) -> str:
    return "nothing" if value is None else printable(repr(value), 60)


def _layers(sliding: list[bool]) -> str:
    return ", ".join(str(layer) for layer, slides in enumerate(sliding) if slides) or "none"
