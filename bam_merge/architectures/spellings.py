"""Facts that a config.json can spell in two places: which place transformers takes, and where a file contradicts itself.

A file that spells a fact twice means one thing to transformers and may mean another to the next engine, or to who edited it: so two
values are refused, and two equal ones are fine. What transformers' configuration classes (version 5) do stands here, and where they are
unlike in the [quirks] of an architecture's table; tests/architectures/test_spellings.py holds every line of it against those classes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bam_merge.architectures.rotary_sets import FULL, SLIDING, set_of
from bam_merge.architectures.tables import Architecture, Quirks
from bam_merge.architectures.vocabulary import (
    ACTIVATION_KEYS,
    EXPERT_COUNTS,
    LOOSE_ACTIVATION,
    ROTARY_BASES,
    ROTARY_SHARES,
    SLIDING_BASES,
    WORKED_OUT,
)
from bam_merge.architectures.window_spellings import WINDOW_KEYS, brief, is_count, window_conflicts
from bam_merge.text import printable

STRETCHED = ("yarn", "longrope", "llama3")
"""Types of rotary scaling that start from an original context."""


@dataclass(frozen=True)
class Spelling:
    """One fact of a model type, under all keys that mean it.

    `read` are the keys that transformers takes, the first that is there before the next; `ignored` those that it passes over for this
    model type, though other types or other programs read them. "rope.KEY" is KEY inside rope_scaling or rope_parameters. `default` is
    the value where no key of `read` is there: a literal, "$KEY" for the value of another key, or None where there is none to compare
    with. `same` are values that this model type reads as another one, beside the `SYNONYMS` of
    all. `only` limits the fact to some types of rotary scaling. `kind` is the kind of layer whose rotary embedding it is of, where each
    has its own: "rope." is then what stands inside of that one.
    """

    fact: str
    read: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    default: Any = None
    only: tuple[str, ...] | None = None
    same: tuple[tuple[str, str], ...] = ()
    kind: str | None = None


BASE, SHARE, CONTEXT = "the rotary base", "the share of a head that turns", "the context before the rotary scaling"


ORIGINAL = "original_max_position_embeddings"


SIZE = "sliding_window_size"
"""A key of early files of some families, for what is sliding_window."""


OWN = {"intermediate_size": "the size of the FFN", "num_key_value_heads": "the number of key and value heads"}
"""Facts that some families have under a key of their own."""


SIZES = {
    "the hidden size": ("hidden_size", "n_embd", "d_model"),
    "the number of layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "the number of heads": ("num_attention_heads", "n_head", "num_heads"),
}
"""Facts that every model type takes from the first of these keys."""


def spellings_of(table: Architecture) -> tuple[Spelling, ...]:
    """The facts that a config.json of `table` can spell in two places; few where it is only looked at, none where nobody tried."""
    quirks, run = table.quirks, table.kind != "foreign"
    if not run and quirks == Quirks():
        return ()
    experts = (quirks.experts, _others(EXPERT_COUNTS, quirks.experts), quirks.experts_default)
    return (
        *((_lines_of_sets(table) if quirks.rotary_by_kind else _rotary_lines(table)) if run and not quirks.rope_sets else ()),
        Spelling("the dtype", ("dtype", "torch_dtype")),
        *([_activation(table)] if run else ()),
        *(_own_keys(table) if run else ()),
        *([Spelling("the number of experts", *experts)] if quirks.experts else ()),
        *(
            [Spelling("the sliding window", ("sliding_window",), (SIZE,), table.defaults["sliding_window"])]
            if SIZE in table.neutral
            else ()
        ),
        *(Spelling(fact, (key,), tuple(others)) for fact, (key, *others) in SIZES.items() if run),
        *(Spelling(WORKED_OUT[key], (), (key,), f"${source}") for key, source in quirks.worked_out.items()),
    )


def _activation(table: Architecture) -> Spelling:
    key = table.quirks.activation
    same = tuple(table.quirks.activations.items())
    others = tuple(other for other in ACTIVATION_KEYS if other not in (key, LOOSE_ACTIVATION, *table.neutral))
    return Spelling("the activation", (key,), others, table.defaults.get(key, "silu"), same=same)


def _own_keys(table: Architecture) -> Iterator[Spelling]:
    """Facts under another key than in most families, whose key transformers passes over; unless it means something else here."""
    for word, text in table.quirks.taken_from.items():
        own, _, otherwise = text.partition(" or ")
        if word in OWN and own != word and word not in table.neutral:
            yield Spelling(OWN[word], (own,), (word,), table.defaults.get(own, f"${otherwise}" if otherwise else None))


def _rotary_lines(table: Architecture) -> Iterator[Spelling]:
    bases = (*ROTARY_BASES, *SLIDING_BASES)
    base, share, inner = table.quirks.rotary_base, table.quirks.rotary_share, "rope.partial_rotary_factor"
    yield Spelling("the type of the rotary scaling", ("rope.rope_type", "rope.type"))
    yield Spelling(BASE, ("rope.rope_theta", base), _others(bases, (base,)), table.defaults.get("rope_theta", 10000.0))
    if share:
        yield Spelling(SHARE, (inner, share), _others(ROTARY_SHARES, (share,)), table.defaults.get("partial_rotary_factor", 1.0))
    else:
        yield Spelling(SHARE, (), (inner, *ROTARY_SHARES), 1.0)
    if table.quirks.context == "outer":
        yield Spelling(CONTEXT, (ORIGINAL,), (f"rope.{ORIGINAL}",), table.defaults.get(ORIGINAL, "$max_position_embeddings"), STRETCHED)
    else:
        yield Spelling(CONTEXT, (f"rope.{ORIGINAL}",), (ORIGINAL,), "$max_position_embeddings", STRETCHED)


def _lines_of_sets(table: Architecture) -> Iterator[Spelling]:
    """The same for each of two sets: what stands beside rope_parameters is of layers without a window, but for a base of the others'."""
    base, of_sliding = table.quirks.rotary_base, table.quirks.sliding_base
    for line in _rotary_lines(table):
        yield replace(line, kind=FULL, ignored=tuple(key for key in line.ignored if key != of_sliding))
    for line in _rotary_lines(table):
        if line.fact == BASE:
            read = ("rope.rope_theta", *([of_sliding] if of_sliding else ()))
            default = table.defaults.get(of_sliding or "rope_theta", line.default)
            yield replace(line, kind=SLIDING, read=read, ignored=() if of_sliding else (base,), default=default)
        else:
            yield replace(line, kind=SLIDING, ignored=tuple(key for key in line.ignored if key.startswith("rope.")))


def _others(known: tuple[str, ...], taken_from: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(key for key in known if key not in taken_from)


SYNONYMS = {"swish": "silu", "su": "longrope"}


def conflicts(table: Architecture, config: Mapping[str, Any]) -> list[str]:
    """A message for every fact that `config` spells in two places with two values."""
    kind = table.name
    rope_key = next((key for key in ("rope_scaling", "rope_parameters") if isinstance(config.get(key), dict) and config[key]), None)
    rope = config[rope_key] if rope_key else {}
    problems = list(_two_ropes(table, config)) if rope_key == "rope_scaling" and not table.quirks.rotary_by_kind else []
    for spelling in spellings_of(table):
        if spelling.kind is not None:
            problems += _conflict_in_set(spelling, kind, config)
        elif spelling.only is None or _rope_type(rope) in spelling.only:
            problems += _conflict(spelling, kind, config, rope_key)
    window = config.get("sliding_window", table.defaults.get("sliding_window"))
    return problems + [f"config.json: {text}" for text in window_conflicts(table, config, window)]


def settled_keys(table: Architecture) -> frozenset[str]:
    """The keys that `conflicts` answers for: where it finds nothing, they say what is read anyway, or nothing to this model type."""
    return frozenset(WINDOW_KEYS).union(*((*spelling.read, *spelling.ignored) for spelling in spellings_of(table)))


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
        if other == key or found is None or _read_as(spelling, found) == _read_as(spelling, value):
            continue
        name, of = _name(other, rope_key), _name(key or (spelling.read or [""])[-1], rope_key)
        here = f"config.json: {name} = {brief(found)}"
        if key:
            yield (
                f"{here} and {of} = {brief(value)} are two spellings of {spelling.fact}, and differ; transformers takes {of} for {kind}. "
                "Make them equal, or remove the wrong one."
            )
        elif spelling.read:
            yield (
                f"{here} is another spelling of {spelling.fact}, which transformers takes from {of} for {kind}; that is left out, and "
                f"means {brief(value)}. Write {of} = {brief(found)} if that is right, and remove {name}."
            )
        else:
            yield (
                f"{here}, but {spelling.fact} is always {brief(value)} in transformers' {kind}, which ignores the key. Remove {name}, "
                "unless the model was trained with it: then it is no such model."
            )


def _conflict_in_set(spelling: Spelling, kind: str, config: Mapping[str, Any]) -> Iterator[str]:
    """The same of the rotary embedding of one kind of layer."""
    assert spelling.kind is not None
    own, name = set_of(config, spelling.kind)
    if spelling.only is not None and _rope_type(own) not in spelling.only:
        return
    if spelling.kind == SLIDING and len(spelling.read) == 1 and spelling.fact == BASE and own.get("rope_theta") is not None:
        return  # rope_theta beside it is the other kind's
    yield from _conflict(spelling, kind, {**config, name: own}, name)


def _two_ropes(table: Architecture, config: Mapping[str, Any]) -> Iterator[str]:
    """Where both are there, transformers takes all of rope_scaling, and nothing of rope_parameters."""
    newer = config.get("rope_parameters")
    if not isinstance(newer, dict) or not newer:
        return
    first, second = (_effective(table, config, key) for key in ("rope_scaling", "rope_parameters"))
    differing = [key for key in dict.fromkeys((*first, *second)) if _plain(first.get(key)) != _plain(second.get(key))]
    if differing:
        shown = "; ".join(f"{printable(key)} {brief(first.get(key))} and {brief(second.get(key))}" for key in differing)
        yield (
            f"config.json: rope_scaling and rope_parameters are two spellings of the rotary embedding, and differ: {shown}; transformers "
            "takes rope_scaling. Make them equal, or remove the wrong one."
        )


def _effective(table: Architecture, config: Mapping[str, Any], rope_key: str) -> dict[str, Any]:
    """The rotary embedding by one of the two dictionaries alone, with what it leaves to the keys beside it."""
    rope = config[rope_key]
    result = {key: value for key, value in rope.items() if key not in ("type", "rope_type") and value is not None}
    result["rope_type"] = _rope_type(rope)
    for spelling in spellings_of(table):
        name = {BASE: "rope_theta", SHARE: "partial_rotary_factor", CONTEXT: ORIGINAL}.get(spelling.fact)
        if name and (spelling.only is None or result["rope_type"] in spelling.only):
            result[name] = taken(spelling, config, rope_key)[1]
    return result


# ---- values and words ----------------------------------------------------------------------------------------------------


def _value(key: str, config: Mapping[str, Any], rope_key: str | None) -> Any:
    inside = key.removeprefix("rope.")
    if inside == key:
        return config.get(key)
    return config[rope_key].get(inside) if rope_key else None


def _default(default: Any, config: Mapping[str, Any]) -> Any:
    if not isinstance(default, str) or not default.startswith("$"):
        return default
    factor, _, size = default[1:].rpartition(" * ")
    if factor:
        return int(factor) * config[size] if is_count(config.get(size)) else None
    whole, _, parts = default[1:].partition(" / ")
    number, divisor = config.get(whole), config.get(parts) if parts else 1
    return number // divisor if is_count(number) and is_count(divisor) else None


def _rope_type(rope: Mapping[str, Any]) -> Any:
    return _plain(rope.get("rope_type") or rope.get("type") or "default")


def _read_as(spelling: Spelling, value: Any) -> Any:
    """What the model type takes a value for."""
    return next((new for old, new in spelling.same if old == value), _plain(value))


def _plain(value: Any) -> Any:
    """A value without the ways of writing it."""
    if not isinstance(value, str):
        return value
    return SYNONYMS.get(value, value.removeprefix("torch."))


def _name(key: str, rope_key: str | None) -> str:
    return key.replace("rope.", f"{rope_key or 'rope_parameters'}.")
