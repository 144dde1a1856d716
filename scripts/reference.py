"""The reference pages of docs/reference/, made of what the code says: click's commands, the recipe's JSON Schema, the architecture tables
and the docstrings of the public names. `python scripts/reference.py` writes them; a test fails when one is not what this makes.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

import bam_merge
from bam_merge.architectures.tables import Architecture, Row, architectures, dense_families, mixture_layouts
from bam_merge.architectures.vocabulary import ROLES, SYMBOLS, UNSAID
from bam_merge.architectures.wrappers import text_models, wrappers
from bam_merge.cli import cli
from bam_merge.recipe import makes
from bam_merge.recipe.rules import makes_of
from bam_merge.recipe.schema import schema

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "reference"
MAKES = {re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower(): item for name, item in vars(makes).items() if isinstance(item, type)}
FROM_TEXTS = {item.record.name: item for item in makes_of(makes.FromTexts)}
MADE = "<!-- Made by scripts/reference.py: change the code, then run it again. -->"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    lines = [list(header)]
    lines += [["---"] * len(lines[0]), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines)


def code(text: object) -> str:
    return f"`{text}`"


# ---- the command line ------------------------------------------------------------------------------------------------------


def command_line() -> str:
    """Every command with its arguments and options."""
    parts = [
        MADE,
        "# Command line",
        (cli.help or "").partition("\b")[0].strip(),
        "`bam-merge RECIPE.yaml` is short for `bam-merge merge RECIPE.yaml`.",
    ]
    for name, command in _commands(cli):
        context = click.Context(command, info_name=f"bam-merge {name}")
        parts += [f"## bam-merge {name}", inspect.cleandoc(command.help or ""), f"    {command.get_usage(context).removeprefix('Usage: ')}"]
        options = [record for item in command.params if (record := item.get_help_record(context))]
        if options:
            parts.append(table(("option", "meaning"), ((code(flags), text) for flags, text in options)))
    status = inspect.cleandoc(sys.modules["bam_merge.cli"].__doc__ or "").partition("Exit status: ")[2].replace("\n", " ")
    parts += ["## Exit status", table(("status", "meaning"), _statuses(status))]
    return "\n\n".join(parts) + "\n"


def _commands(group: click.Group, before: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command by its words, behind a group those that are in it."""
    for name, command in sorted(group.commands.items()):
        yield f"{before}{name}", command
        if isinstance(command, click.Group):
            yield from _commands(command, f"{before}{name} ")


def _statuses(text: str) -> Iterator[tuple[str, str]]:
    """The sentence in the module's docstring as rows: '0 all well, 1 the answer is no (...), ...'."""
    depth, start = 0, 0
    for at, letter in enumerate(text + ","):
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0 and (at + 2 >= len(text) or text[at + 2].isdigit()):
            number, _, meaning = text[start:at].strip().rstrip(".").partition(" ")
            if number == "128":
                number, meaning = "128 + N", meaning.removeprefix("+ N ")
            yield number, meaning
            start = at + 1


# ---- the recipe --------------------------------------------------------------------------------------------------------------


def recipe() -> str:
    """Every key of a recipe, its values and its default; then every make."""
    document = schema()
    names = document["$defs"]
    parts = [MADE, "# Recipe", "Unknown keys, duplicate keys and wrong types are errors, with line, column and the nearest valid name."]
    parts += ["`bam-merge schema` prints the same as a JSON Schema, for editors. [What a table cannot say](../explanation/recipe.md)."]
    parts += ["## Keys", _keys(document, names)]
    parts += ["## Sources", "A source is text, its path; or one of these:"]
    for item in (names["Folder"], names["Adapted"]):
        shown = ", ".join(f"{key}: ..." for key in item["properties"])
        parts += [f"### {{{shown}}}", item["description"], _properties(list(item["properties"]), item, names)]
    parts += ["## Routers", "How a router starts: one for both under `router`, or one each under `router.attention` and `router.ffn`."]
    starts = [item for item in names.values() if "init" in item.get("properties", {})]
    for item in sorted(starts, key=lambda item: str(item["properties"]["init"]["const"])):
        start = item["properties"]["init"]["const"]
        parts += [f"### init: {start}", *_described_make(start, item, names)]
    rules = [item for item in names.values() if "make" in item.get("properties", {}) and "roles" in item["properties"]]
    parts += ["## Rules", "A rule is a make with the tensors that it is for.", _properties(("roles", "layers"), rules[0], names)]
    parts += ["## Makes", "How one tensor is made: in `rules`; and, but for `expert` and those of routers, under `shared`."]
    for item in sorted(rules, key=lambda item: str(item["properties"]["make"]["const"])):
        make = item["properties"]["make"]["const"]
        parts += [f"### {make}", *_described_make(make, item, names)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _described_make(name: str, item: Mapping[str, Any], names: Mapping[str, Any]) -> Iterator[str]:
    """What a make, or a router's start of the same name, does, and its keys."""
    make = FROM_TEXTS[name] if "texts" in item["properties"] else MAKES[name]
    yield inspect.cleandoc(make.__doc__ or make.record.__doc__ or "")
    keys = [key for key in item["properties"] if key not in ("make", "init", "roles", "layers")]
    yield _properties(keys, item, names) if keys else "No further keys."


def _keys(document: Mapping[str, Any], names: Mapping[str, Any]) -> str:
    rows = []
    for key, value in document["properties"].items():
        references = [str(item.get("$ref", "")).rpartition("/")[2] for item in (value, *value.get("anyOf", ()))]
        section = next((names[name] for name in references if name in names and not names[name].get("oneOf")), None)
        if section and section.get("properties") and key != "router":
            rows += [(f"{key}.{inner}", item, section) for inner, item in section["properties"].items()]
        else:
            rows.append((key, value, document))
    return _rows(rows, names)


def _properties(keys: Iterable[str], parent: Mapping[str, Any], names: Mapping[str, Any]) -> str:
    return _rows([(key, parent["properties"][key], parent) for key in keys], names)


def _rows(rows: Iterable[tuple[str, Mapping[str, Any], Mapping[str, Any]]], names: Mapping[str, Any]) -> str:
    def default(key: str, value: Mapping[str, Any], parent: Mapping[str, Any]) -> str:
        if key.rpartition(".")[2] in parent.get("required", ()):
            return "needed"
        return code(value["default"]) if value.get("default") not in (None, (), [], {}) else ""

    cells = ((code(key), _type(value, names), default(key, value, parent), value.get("description", "")) for key, value, parent in rows)
    return table(("key", "values", "default", "meaning"), cells)


def _resolved(value: Mapping[str, Any], names: Mapping[str, Any]) -> Mapping[str, Any]:
    return names[value["$ref"].rpartition("/")[2]] if "$ref" in value else value


def _type(value: Mapping[str, Any], names: Mapping[str, Any]) -> str:
    """What a value may be, in words."""
    value = _resolved(value, names)
    if "const" in value:
        return code(value["const"])
    if "enum" in value:
        return ", ".join(map(code, value["enum"]))
    options = value.get("anyOf") or value.get("oneOf")
    if options and all("make" in _resolved(item, names).get("properties", {}) for item in options):
        return "a rule" if "roles" in _resolved(options[0], names)["properties"] else "a make"
    if options:
        words = list(dict.fromkeys(_type(item, names) for item in options if item.get("type") != "null"))
        return f"{words[0]}, or a list of such" if words[1:] == [f"list of {words[0]}"] else " or ".join(words)
    if "init" in value.get("properties", {}):
        return f"`init: {value['properties']['init'].get('const', value['properties']['init'].get('default'))}`"
    kind = value.get("type", "anything")
    if kind == "array":
        of = _type(value.get("items") or value["prefixItems"][0], names)
        return "list of rules" if of == "a rule" else f"list of {of}"
    if kind == "object":
        inside = value.get("additionalProperties")
        if isinstance(inside, dict):
            return f"name: {_type(inside, names)}"
        return f"`{{{', '.join(f'{key}: ...' for key in value['properties'])}}}`"
    limits = [(">= {}", "minimum"), ("> {}", "exclusiveMinimum"), ("<= {}", "maximum"), ("< {}", "exclusiveMaximum")]
    bounds = ", ".join(text.format(value[key]) for text, key in limits if abs(value.get(key, 2**63)) < 2**63)
    words = {"integer": "integer", "number": "number", "string": "text", "boolean": "`true`, `false`"}
    return words.get(kind, str(kind)) + (f" {bounds}" if bounds else "")


# ---- roles, families, layouts ------------------------------------------------------------------------------------------------


def roles() -> str:
    """Which role stands under which name in every family and layout."""
    parts = [
        MADE,
        "# Roles",
        "A role says what a tensor does, in one vocabulary for all families. Rules name roles, or globs such as `attn.*`;",
    ]
    parts[-1] += " a weight's role covers its bias."
    for role in ROLES:
        if role.endswith(".bias"):
            continue
        rows = [(item.name, row) for item in architectures() for row in item.rows if role in row.roles]
        parts += [f"## {role}", table(("in", "tensor", "shape"), ((name, code(row.names[0]), _shape(row)) for name, row in rows))]
    return "\n\n".join(parts) + "\n"


def _shape(row: Row) -> str:
    shape = f"[{', '.join(row.shape)}]" if row.shape else ""
    return shape + (f" with {' and '.join(role for role in row.roles)} in one tensor" if len(row.roles) > 1 else "")


def families() -> str:
    """The dense families and the layouts, from their tables."""
    letters = ", ".join(f"{letter} = {name}" for letter, name in SYMBOLS.items())
    parts = [MADE, "# Families and layouts", f"Shapes in letters: {letters}.", "## Dense families"]
    parts += [_overview()]
    for item in dense_families():
        parts += [f"### {item.name}", _facts(item), _tensors(item)]
    parts += ["## Layouts", "What a mixture may be written as. A merge that a layout cannot express is refused in the plan, in words."]
    parts += [_layouts_overview()]
    for item in mixture_layouts():
        accepts = [
            (code(key), ", ".join(map(code, value)) if isinstance(value, list) else code(value)) for key, value in item.accepts.items()
        ]
        parts += [
            f"### {item.name}",
            _facts(item),
            *_served(item),
            *([table(("needs", "to be"), accepts)] if accepts else []),
            _tensors(item),
        ]
    parts += ["## Mixtures that are only looked at", "`inspect` and `diff` read them; nothing writes them."]
    parts += [f"### {item.name}\n\n{_facts(item)}" for item in architectures() if item.kind == "foreign"]
    parts += ["## Wrappers", "Models of images or sound whose text model merges as a family of its own, where that is known.", _wrappers()]
    inside = ((code(text.model_type), text.family) for text in text_models().values() if text.model_type != text.family)
    parts += ["The text model inside may be of any dense family, by its own model_type, or one of these:"]
    parts += [table(("model_type in text_config", "merges as"), inside)]
    return "\n\n".join(parts) + "\n"


def _wrappers() -> str:
    rows = (
        (
            ", ".join(map(code, item.model_types)),
            f"refused: {item.refused}" if item.refused else " or ".join(code(s.trunk) for s in item.spellings),
            ", ".join(item.beside),
        )
        for item in wrappers()
    )
    return table(("model_type", "the text model's names begin with", "not read"), rows)


GATES = {"softmax_then_topk": ("softmax", False), "topk_then_softmax": ("softmax", True), "topk_then_sigmoid": ("sigmoid", True)}
"""The gates of an FFN's router, as a recipe names them: what they are made of, and whether they are renormalised."""


def gates_of(layout: Architecture, engine: str | None = None) -> list[str]:
    """The gates that a layout can say, and with `engine` those of them that this engine computes."""
    limits = [limit.only for limit in layout.limits if limit.fact == "norm_topk_prob" and engine in limit.engines]
    sums = _possible(layout, "norm_topk_prob", [False, True])
    made_of = _possible(layout, "scoring_func", ["softmax", "sigmoid"] if not layout.accepts else ["softmax"])
    return [
        gate
        for gate, (of, renormalised) in GATES.items()
        if of in made_of and renormalised in sums and all(renormalised in only for only in limits)
    ]


def _possible(layout: Architecture, fact: str, every: list[object]) -> list[object]:
    stated = layout.accepts.get(fact, every)
    return stated if isinstance(stated, list) else [stated]


def _served(layout: Architecture) -> Iterator[str]:
    """What runs a layout, with which gates, as it was tried, and what an engine computes otherwise."""
    every = "every family that fits, with logits within 1e-5 of the reference model's: in this project's tests"
    own = ", by the model code in the folder (`trust_remote_code=True`)" if not layout.accepts else ""
    rows = [(f"transformers{own}", ", ".join(map(code, gates_of(layout))), every, "")]
    for engine in layout.engines:
        gates = ", ".join(map(code, gates_of(layout, engine.name))) if engine.runs else "none"
        tried = f"{', '.join(engine.tried) or 'not tried'}: {engine.how}"
        rows.append((f"{engine.name} ({engine.version})", gates, tried, "; ".join(_otherwise(layout, engine.name))))
    yield table(("runs in", "FFN gates", "tried with", "not as config.json says, where"), rows)


def _otherwise(layout: Architecture, engine: str) -> Iterator[str]:
    """Where an engine does not compute what config.json says, but for the gates: by size, and by fact, outside of what all limits allow."""
    limits = [limit for limit in layout.limits if engine in limit.engines]
    yield from (" is not ".join(map(code, limit.equal)) for limit in limits if limit.equal)
    for fact in dict.fromkeys(limit.fact for limit in limits if limit.fact not in (None, "norm_topk_prob")):
        only = [limit.only for limit in limits if limit.fact == fact]
        fine = [value for value in only[0] if all(value in values for values in only)]
        yield f"{code(fact)} is not {' or '.join(code(str(value).lower()) for value in fine)}"


def _tried(family: Architecture, layouts: Iterable[Architecture]) -> str:
    """In which engines beside transformers merges of `family` were run."""
    found = [
        f"{code(layout.name)} in {' and '.join(names)}"
        for layout in layouts
        if (names := [engine.name for engine in layout.engines if engine.runs and family.name in engine.tried])
    ]
    return ", ".join(found) or "not tried"


def _layouts_overview() -> str:
    """Every layout: which families it takes, its gates, its shared expert, and the engines in which merges were run."""
    rows = []
    for item in mixture_layouts():
        taken = [family.name for family in dense_families() if not ruled_out(family, item)]
        roles = {role: row for row in item.rows for role in row.roles}
        up = roles.get("ffn.shared.up")
        shared = "" if up is None else "weighted by a router" if "ffn.shared.router" in roles else "added" if up.make else "averaged with"
        shared += (
            ", zeros unless a recipe names a source" if up is not None and up.make else ", where a recipe names a source" if up else ""
        )
        engines = [f"{engine.name} ({engine.version})" for engine in item.engines if engine.runs and engine.tried]
        takes = "all" if len(taken) == len(dense_families()) else ", ".join(taken)
        rows.append(
            (
                f"[{item.name}](#{item.name})",
                takes,
                ", ".join(map(code, gates_of(item))),
                shared,
                ", ".join(engines) or ("none" if any(engine.tried for engine in item.engines) else "not tried"),
            )
        )
    return table(("layout", "takes", "FFN gates", "shared expert", "tried beside transformers, and runs"), rows)


def _overview() -> str:
    """Every family: what is unlike Llama, from its table's traits and quirks, and the layouts that nothing of it rules out."""
    rows = []
    for item in dense_families():
        stated = {**dict.fromkeys(PLAIN, False), **item.traits}
        traits = [f"{key} {str(value).lower()}" for key, value in stated.items() if value != PLAIN.get(key) and not key.endswith("bias")]
        quirks = [
            f"{key} {str(getattr(item.quirks, key)).lower()}"
            for key in ("windows", "turning", "query_growth", "rotary_by_kind")
            if getattr(item.quirks, key) not in ("none", "all", False)
        ]
        quirks += ["linear attention in some layers"] if item.quirks.linear else []
        own = [layout for layout in mixture_layouts() if not ruled_out(item, layout)]
        layouts = ", ".join(code(layout.name) for layout in own)
        rows.append((f"[{item.name}](#{item.name})", ", ".join(map(code, (*traits, *quirks))), layouts, _tried(item, own)))
    said = (
        "What a source may be. The layouts are those that no fixed trait rules out; a config.json can rule out more, and the plan says so. "
        "transformers runs all of them: [layouts](#layouts) says what else does, with which gates, and how that was tried."
    )
    return f"{said}\n\n{table(('family', 'unlike Llama in', 'layouts', 'tried beside transformers'), rows)}"


PLAIN = {"norm_type": "rms_norm", "gated_ffn": True}


def ruled_out(family: Architecture, layout: Architecture) -> bool:
    """Whether a trait that all models of `family` have is one that `layout` has no word for."""
    if not layout.accepts:
        return False
    has = {
        **UNSAID,
        **{trait: value for trait, value in family.traits.items() if trait != "rope_interleaved"},  # rows are put in either order
        "rope_layers": {"listed": [0], "where windows are": "where windows are"}.get(family.quirks.turning),
        "query_growth": family.quirks.query_growth or None,
        "sizes_by_kind": family.sizes or None,
    }
    wanted = {**UNSAID, "gated_ffn": True, **layout.accepts, "rope_interleaved": [True, False]}
    one_key = "$attention_bias" in layout.config.values() and "attention_out_bias" not in (*layout.accepts, *layout.implies)
    if one_key and not str(has["attention_bias"]).startswith("config:"):  # for the biases of q, k, v and o
        wanted["attention_out_bias"] = has["attention_bias"]
    for key, value in has.items():
        options = wanted[key] if isinstance(wanted[key], list) else [wanted[key]]
        by_kind = key == "sliding_rope_parameters" and "$rope_parameters_by_kind" in layout.config.values()
        by_kind = by_kind or (key == "sizes_by_kind" and layout.sizes == family.sizes)
        written = by_kind or key in (*layout.implies, *layout.traits) or f"${key}" in layout.config.values()
        if (
            not written
            and not str(value).startswith("config:")
            and ("none" if value is None else value) not in (*options, *(["none"] if None in options else []))
        ):
            return True
    return False


def _facts(item: Architecture) -> str:
    types = ", ".join(map(code, item.model_types))
    keys = f" Config keys that change what it computes: {', '.join(map(code, item.function))}." if item.function else ""
    return f"model_type {types}; {code(item.class_name)} in transformers.{keys}"


def _tensors(item: Architecture) -> str:
    rows = ((", ".join(row.roles), code(row.names[0]), _shape(row).partition(" with")[0], _only_where(row)) for row in item.rows)
    return table(("role", "tensor", "shape", "only where"), rows)


def _only_where(row: Row) -> str:
    return ", ".join(word for word in (row.when, f"{' or '.join(row.kinds)} layers" if row.kinds else None) if word)


# ---- Python ------------------------------------------------------------------------------------------------------------------


def python() -> str:
    """The public names with their signatures and docstrings."""
    parts = [MADE, "# Python", "`import bam_merge` costs nothing: a name's module is imported when the name is first used."]
    names = [name for name in bam_merge.__all__ if name != "__version__"]
    groups: list[tuple[str, Callable[[Any], bool]]] = [
        ("Functions", inspect.isfunction),
        ("Records", lambda value: inspect.isclass(value) and not issubclass(value, BaseException)),
        ("Errors", lambda value: inspect.isclass(value) and issubclass(value, BaseException)),
    ]
    for title, belongs in groups:
        parts.append(f"## {title}")
        for name in names:
            value = getattr(bam_merge, name)
            if belongs(value):
                parts += [f"### {name}", *_described(name, value)]
    return "\n\n".join(parts) + "\n"


def _described(name: str, value: Any) -> Iterator[str]:
    if inspect.isfunction(value):
        yield "\n".join(f"    {line}" for line in _signature(name, value).splitlines())
    elif issubclass(value, BaseException) and value.__bases__[0] is not Exception:
        yield f"A {code(value.__bases__[0].__name__)}."
    yield inspect.cleandoc(value.__doc__ or "")
    if inspect.isclass(value) and not issubclass(value, BaseException):
        rows = list(_members(value))
        if rows:
            yield table(("attribute", "type or meaning"), rows)


def _signature(name: str, value: Any) -> str:
    text = f"{name}{inspect.signature(value)}".replace("'", "")
    return text if len(text) < 100 else text.replace("(", "(\n    ", 1).replace(", ", ",\n    ").replace(") ->", ",\n) ->")


def _members(value: type) -> Iterator[tuple[str, str]]:
    """Fields with their types, then properties and methods with the first sentence of their docstrings."""
    fields = getattr(value, "model_fields", {})  # of a recipe: its page says what each may be
    yield from ((code(key), f"[the recipe's](recipe.md) `{item.alias or key}`") for key, item in fields.items())
    for key, kind in getattr(value, "__annotations__", {}).items():
        if not key.startswith("_") and key not in fields:
            yield code(key), code(kind if isinstance(kind, str) else inspect.formatannotation(kind))
    for key, item in vars(value).items():
        text = inspect.cleandoc(getattr(item, "__doc__", None) or "").partition(". ")[0].partition("\n\n")[0].rstrip(".")
        if not key.startswith("_") and (isinstance(item, property) or inspect.isfunction(item)):
            yield code(key if isinstance(item, property) else f"{key}()"), text.replace("\n", " ")


PAGES: dict[str, Callable[[], str]] = {
    "command-line.md": command_line, "recipe.md": recipe, "roles.md": roles, "families.md": families, "python.md": python,
}  # fmt: skip


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
