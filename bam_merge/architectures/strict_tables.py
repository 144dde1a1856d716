"""Architecture tables are read strictly: a key or value that no table can have is an error with its place and the nearest valid name.

Whoever adds a family writes a table and no Python, so a misspelt key must not be a key that is ignored.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from bam_merge.architectures.vocabulary import (
    ACTIVATION_KEYS,
    CONTEXTS,
    DERIVED,
    EXPERT_COUNTS,
    KINDS_OF_LAYERS,
    LAYER_SIZES,
    LINEAR,
    ROLES,
    ROTARY_BASES,
    ROTARY_SHARES,
    SHARED_ROLES,
    SLIDING_BASES,
    SYMBOLS,
    TRAIT_WORDS,
    TRAITS,
    TURNING,
    WINDOWS,
    WORKED_OUT,
)
from bam_merge.text import nearest

Kinds = Mapping[str, type | tuple[type, ...]]

TABLE: Kinds = {
    "name": str, "kind": str, "model_types": list, "class": str, "function": list, "defaults": dict, "neutral": list, "traits": dict,
    "quirks": dict, "cases": list, "sizes": dict, "accepts": dict, "implies": dict, "config": dict, "limits": list,
    "engines": list, "told_by": str, "drawn_routers": str, "tensors": dict, "nulls": list,
}  # fmt: skip
TENSORS: Kinds = {"rows": list, "others": list, "dropped": list}
ROW: Kinds = {
    "role": str, "roles": list, "name": (str, list), "shape": list, "groups": str, "parts": list, "axis": str, "when": str, "make": str,
    "without": str, "pieces": str, "kinds": list, "parameter": str,
}  # fmt: skip
QUIRKS: Kinds = {
    "rotary_base": str, "rotary_share": str, "rope_types": dict, "context": str, "windows": str, "worked_out": dict, "experts": list,
    "experts_default": int, "pattern_is_read": bool, "pattern_is_text": bool, "turning": str, "alpha": bool, "query_growth": bool,
    "rope_needed": bool, "rotary_by_kind": bool, "rope_sets": dict, "sliding_base": str, "needed": list, "kinds": list, "taken_from": dict,
    "linear": str, "mrope": bool,
    "norm_eps": str, "activation": str, "renamed": dict, "activations": dict, "only": dict, "reasons": dict,
}  # fmt: skip
"""What tables.Quirks documents, key by key."""
QUIRK_WORDS: Mapping[str, Iterable[str]] = {
    "rotary_base": ROTARY_BASES, "sliding_base": SLIDING_BASES, "rotary_share": ROTARY_SHARES, "context": CONTEXTS, "windows": WINDOWS,
    "worked_out": WORKED_OUT, "activation": ACTIVATION_KEYS,
    "turning": TURNING, "experts": EXPERT_COUNTS,
}  # fmt: skip
"""The words that a key of [quirks] can hold."""
CASE: Kinds = {"where": dict, "facts": dict, "refused": str}
LIMIT: Kinds = {"otherwise": str, "engines": list, "equal": list, "fact": str, "only": list, "where": dict, "refuses": bool}
ENGINE: Kinds = {
    "name": str,
    "version": str,
    "tried": list,
    "how": str,
    "runs": bool,
    "architecture": str,
    "paired": bool,
    "divided_logits": bool,
}
KINDS = ("dense", "mixture", "foreign")
WRAPPER: Kinds = {
    "name": str, "model_types": list, "class": str, "config": list, "flat": list, "text": str, "tied": bool, "spellings": list,
    "beside": dict, "refused": str, "written": dict,
}  # fmt: skip
"""What wrappers.Wrapper documents, key by key."""
SPELLING: Kinds = {"trunk": str, "rest": str}
WRITTEN: Kinds = {"of": str, "kept": dict, "keys": list, "parts": dict}


class TableError(ValueError):
    """An architecture table is wrong: all its problems, one a line."""


def check_table(table: Mapping[str, Any], file: str) -> None:
    """Raise TableError when `table`, read from `file`, is not an architecture: unknown or missing keys, types, roles, letters of shapes."""
    problems = [f"{file}: {problem}" for problem in _problems(table)]
    if problems:
        raise TableError("\n".join(problems))


def check_wrapper(table: Mapping[str, Any], file: str) -> None:
    """Raise TableError when `table`, read from `file`, is no wrapper: unknown or missing keys, types, words that end as no name does."""
    problems = [f"{file}: {problem}" for problem in _wrapper_problems(table)]
    if problems:
        raise TableError("\n".join(problems))


def _wrapper_problems(table: Mapping[str, Any]) -> Iterator[str]:
    wrong = list(_keys("", table, WRAPPER, needed=("name", "model_types", "class", "config", "tied", "spellings", "beside")))
    yield from wrong
    for index, record in enumerate(() if wrong else table["spellings"]):
        place = f"spellings[{index}]"
        odd = list(_keys(place, record, SPELLING, needed=("trunk", "rest")))
        yield from odd
        for key, words in () if odd else record.items():
            if words and not words.endswith("."):
                yield f"{place}.{key}: {words!r} must end with a dot: it stands before a name."
    if not wrong and "written" in table:
        yield from _keys("written", table["written"], WRITTEN, needed=WRITTEN)
    for what, starts in () if wrong else table["beside"].items():
        if not isinstance(starts, list) or not all(isinstance(start, str) and start and not start.endswith(".") for start in starts):
            yield f"beside.{what}: found {starts!r}, expected a list of first words of names, without a dot at their end."


def _problems(table: Mapping[str, Any]) -> Iterator[str]:
    wrong = list(_keys("", table, TABLE, needed=("name", "kind", "model_types", "class", "tensors")))
    yield from wrong
    if wrong:
        return
    if table["kind"] not in KINDS:
        yield f"kind is {table['kind']!r}, expected one of {', '.join(KINDS)}{nearest(table['kind'], KINDS)}."
    for trait, value in table.get("traits", {}).items():
        if trait not in TRAITS:
            yield f"traits.{trait}: no such trait{_known(trait, TRAITS)}"
        elif trait in TRAIT_WORDS and not str(value).startswith("config:"):
            if value not in TRAIT_WORDS[trait]:
                yield f"traits.{trait}: {value!r} is not possible{_known(str(value), TRAIT_WORDS[trait])}"
        elif isinstance(value, str) and not re.fullmatch(r"config:\w+(\^-?\d+(\.\d+)?)?", value):
            yield f"traits.{trait}: found {value!r}, expected a value, config:KEY, or config:KEY^POWER."
    yield from _quirks(table.get("quirks", {}))
    for index, case in enumerate(table.get("cases", ())):
        yield from _case(f"cases[{index}]", case)
    yield from _sizes_by_kind(table.get("sizes", {}))
    if "sliding_window" in (*table.get("function", ()), *table.get("config", ())) and "windows" not in table.get("quirks", {}):
        yield f"quirks.windows is missing: the table names sliding_window, and windows are one of {', '.join(WINDOWS)}."
    wrong = list(_keys("tensors", table["tensors"], TENSORS, needed=("rows",)))
    yield from wrong
    if wrong:
        return
    for key in ("rows", "others"):
        for index, row in enumerate(table["tensors"].get(key, ())):
            yield from _row(f"tensors.{key}[{index}]", row, own_roles=table["kind"] != "foreign")
    yield from _engines(table)


def _sizes_by_kind(kinds: Mapping[str, Any]) -> Iterator[str]:
    for kind, sizes in kinds.items():
        if kind not in KINDS_OF_LAYERS:
            yield f"sizes.{kind}: no such kind of layer{_known(kind, KINDS_OF_LAYERS)}"
        yield from _keys(f"sizes.{kind}", sizes, dict.fromkeys(LAYER_SIZES, str))


def _engines(table: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with what a layout says of engines, and where they compute something else."""
    for index, limit in enumerate(table.get("limits", ())):
        yield from _keys(f"limits[{index}]", limit, LIMIT, needed=("otherwise", "engines"))
        yield from _sizes(f"limits[{index}].equal", limit.get("equal", ()))
        for name in limit.get("engines", ()):
            engines = [engine.get("name") for engine in table.get("engines", ())]
            if name not in engines:
                yield f"limits[{index}].engines: {name!r} is none of [[engines]]{_known(str(name), map(str, engines))}"
    for index, engine in enumerate(table.get("engines", ())):
        yield from _keys(f"engines[{index}]", engine, ENGINE, needed=("name", "version", "tried", "how"))


def _quirks(quirks: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the section that says what a family's configuration class does and most do not."""
    wrong = list(_keys("quirks", quirks, QUIRKS))
    yield from wrong
    for key, words in () if wrong else QUIRK_WORDS.items():
        for word in [quirks[key]] if isinstance(quirks.get(key), str) else quirks.get(key, ()):
            if word not in words:
                yield f"quirks.{key}: {word!r} is not possible{_known(str(word), words)}"
    for key, text in () if wrong else quirks.get("taken_from", {}).items():
        if not re.fullmatch(r"\w+( or (\d+ \* )?\w+)?", text):
            yield f"quirks.taken_from.{key}: found {text!r}, expected KEY, KEY or SIZE, or KEY or 4 * SIZE."
    for key in () if wrong else quirks.get("reasons", {}):
        if key not in quirks.get("only", {}):
            yield f"quirks.reasons.{key}: quirks.only says nothing of it{_known(key, quirks.get('only', {}))}"
    for key, source in () if wrong else quirks.get("worked_out", {}).items():
        for word in str(source).split(" / "):
            if word not in SYMBOLS.values():
                yield f"quirks.worked_out.{key}: {word!r} is no size{_known(word, SYMBOLS.values())}"


def _case(place: str, case: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with one of the cases in which several keys say something together."""
    wrong = list(_keys(place, case, CASE, needed=("where",)))
    yield from wrong
    if not wrong and ("facts" in case) == ("refused" in case):
        yield f"{place}: needs facts (what holds then) or refused (why there is no such model here), and not both."
    for fact in () if wrong else case.get("facts", {}):
        if fact not in (*SYMBOLS.values(), *TRAITS):
            yield f"{place}.facts: {fact!r} is neither a size nor a trait{_known(fact, (*SYMBOLS.values(), *TRAITS))}"


def _keys(place: str, record: object, known: Kinds, needed: Iterable[str] = ()) -> Iterator[str]:
    """Keys that are unknown, missing, or hold something of another type."""
    if not isinstance(record, Mapping):
        yield f"{place}: found {record!r}, expected a table."
        return
    at = f"{place}." if place else ""
    for key, value in record.items():
        if key not in known:
            yield f"{at}{key}: unknown key{_known(key, known)}"
        elif not isinstance(value, known[key]):
            kinds = known[key]
            words = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
            yield f"{at}{key}: found {value!r}, expected {words}."
    yield from (f"{at}{key} is missing." for key in needed if key not in record)


def _known(word: str, known: Iterable[str]) -> str:
    """The nearest valid name, or all of them."""
    names = list(known)
    return nearest(word, names) or f". Known: {', '.join(names)}."


def _row(place: str, row: Mapping[str, Any], own_roles: bool) -> Iterator[str]:
    """What is wrong with one row. A mixture that is only looked at may have roles that no recipe names (`own_roles` false)."""
    wrong = list(_keys(place, row, ROW, needed=("name",)))
    yield from wrong
    if wrong:
        return
    if ("role" in row) == ("roles" in row):
        yield f"{place}: needs role (one) or roles (several in one tensor), and not both."
    roles = row.get("roles", [row.get("role")])
    for role in roles if own_roles else ():
        if role not in (*ROLES, *SHARED_ROLES) and "make" not in row:  # what a layout fills in by itself may have a name of its own
            yield f"{place}: {role!r} is no role{nearest(str(role), ROLES)}"
    for fact in (part.removeprefix("not ") for part in row.get("when", "untied").split(" and ")):
        if fact not in (*TRAITS, *DERIVED):
            yield f"{place}.when: {fact!r} is no trait{_known(fact, (*TRAITS, *DERIVED))}"
    if len(roles) != len(row.get("parts", roles)) or (len(roles) > 1 and own_roles and "parts" not in row):
        yield f"{place}: {len(roles)} roles need as many parts, found {len(row.get('parts', ()))}."
    if "axis" in row and row.get("groups", "1") != "1":
        yield f"{place}.groups: of a tensor with axis = {row['axis']!r} each expert's rows are one block."
    if row.get("axis", "expert") != "expert":
        yield f"{place}.axis: {row['axis']!r} is not possible{_known(row['axis'], ('expert',))}"
    yield from _sizes(f"{place}.shape", (*row.get("shape", ()), *row.get("parts", ()), row.get("groups", "1"), row.get("pieces", "1")))
    yield from _kinds(place, row.get("kinds", ()))
    yield from _marks(place, row)


def _marks(place: str, row: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the marks in a row's names."""
    for name in [row["name"]] if isinstance(row["name"], str) else row["name"]:
        for mark in re.findall(r"\{(\w*)\}", name):
            if mark not in ("layer", "expert", "head"):
                yield f"{place}.name: {{{mark}}} is neither {{layer}} nor {{expert}}{nearest(mark, ('layer', 'expert'))}"
        if "{expert}" in name and "axis" in row:
            yield f"{place}.name: {{expert}} is of one expert's tensor, axis = {row['axis']!r} of one that holds all. Keep one."
        if ("{head}" in name) != ("pieces" in row):
            yield f"{place}: pieces says how many tensors a name with {{head}} stands for, and belongs to one."


def _kinds(place: str, kinds: Iterable[str]) -> Iterator[str]:
    known = (*KINDS_OF_LAYERS, LINEAR)
    yield from (f"{place}.kinds: {kind!r} is no kind of layer{_known(str(kind), known)}" for kind in kinds if kind not in known)


def _sizes(place: str, sizes: Iterable[str]) -> Iterator[str]:
    """Symbolic sizes are sums of products of letters, integers and quotients of them."""
    for size in sizes:
        for factor in re.split(r"[+*/]", size):
            if not factor.isdigit() and factor not in SYMBOLS:
                yield f"{place}: {size!r}: {factor!r} is neither an integer nor one of {', '.join(SYMBOLS)}."
