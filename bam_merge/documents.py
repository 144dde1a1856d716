"""Strict readers for JSON and YAML: nothing ambiguous is accepted and nothing is silently dropped.

Both refuse duplicate keys, lone surrogates and absurd depth; JSON also refuses NaN and numbers beyond float64, YAML also aliases
that explode and documents of absurd size.
"""

import json
import math
import re
from collections.abc import Hashable
from typing import Any

import yaml

from bam_merge.text import printable

YAML_MAX_BYTES = 1_000_000


YAML_MAX_DEPTH = 32


YAML_MAX_NODES = 20_000


JSON_MAX_DEPTH = 64


Path = tuple[str | int, ...]
"""Where a value stands in a document: keys and list positions from the root."""


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {printable(key)!r} stands twice")
            seen.add(key)
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{printable(text, 40)} is beyond float64")
    return value


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def load_json(data: bytes) -> Any:
    """Parse UTF-8 JSON. Raises ValueError, in words, for anything a careful reader would object to."""
    document = parse_json(data)
    level = [document]
    for _ in range(JSON_MAX_DEPTH):
        inside = (value.values() if isinstance(value, dict) else value for value in level if isinstance(value, dict | list))
        level = [item for items in inside for item in items]
        if not level:
            return document
    raise ValueError(f"nested more than {JSON_MAX_DEPTH} deep")


def parse_json(data: bytes) -> Any:
    """As load_json, of any depth that Python can hold: for documents whose every value is then looked at."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start})") from None
    try:
        document = json.loads(text, object_pairs_hook=_unique_object, parse_constant=_no_constant, parse_float=_finite)
        if _SURROGATE.search(data):  # half of a pair is no character: it can be neither printed nor written
            json.dumps(document, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"the lone surrogate \\u{ord(error.object[error.start]):04x} is no character") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        raise ValueError("a number of thousands of digits" if "int_max_str_digits" in str(error) else str(error)) from None
    return document


class YamlError(ValueError):
    """A YAML document that we refuse, with the place."""

    def __init__(self, message: str, mark: yaml.Mark | None = None) -> None:
        super().__init__(message)
        self.line = mark.line + 1 if mark else None
        self.column = mark.column + 1 if mark else None


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader whose scalars are what a reader of a recipe expects: 1e-2 is a number, 1:30 a string.

    It stops at absurd depth and size while it reads, for it is slow.
    """

    depth = nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        self.nodes += 1
        if self.depth > YAML_MAX_DEPTH + 1 or self.nodes > YAML_MAX_NODES:
            what = f"nested more than {YAML_MAX_DEPTH} deep" if self.nodes <= YAML_MAX_NODES else f"more than {YAML_MAX_NODES:,} values"
            raise YamlError(f"{what}, as no recipe is", self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_RESOLVERS = {
    "bool": (r"^(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$", "yYnNtTfFoO"),
    "float": (r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|nan)$", "-+0123456789."),
    "int": (r"^[-+]?[0-9]+$", "-+0123456789"),
    "null": (r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
}


_Loader.yaml_implicit_resolvers = {}


for _name in ("bool", "int", "float", "null"):
    _pattern, _first = _RESOLVERS[_name]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), list(_first))


_LEADING_ZERO = re.compile(r"^[-+]?0[0-9]")


_EXPLICIT = {kind: re.compile(_RESOLVERS[kind][0]) for kind in ("int", "float")}
"""What numbers look like here. PyYAML's own constructors are never asked: to them 010 is 8 and 1:30 is 90."""


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    """The decimal number that `node` is. Raises YamlError for one that YAML 1.1 and 1.2 read differently."""
    kind, text = node.tag.rpartition(":")[2], str(node.value)
    pattern = _EXPLICIT[kind]
    if not pattern.match(text):
        article = "an int" if kind == "int" else "a float"
        raise YamlError(f"{printable(text, 60)!r} is no {kind}: {article} here is a plain decimal number", node.start_mark)
    if _LEADING_ZERO.match(text):
        shown, plain = printable(text, 60), printable(re.sub(r"^([-+]?)0+(?=[0-9])", r"\1", text), 60)
        raise YamlError(
            f"{shown} begins with a zero, which some readers of YAML take for base eight; write {plain}, or '{shown}' if it is a name",
            node.start_mark,
        )
    return int(text) if kind == "int" else float(text.replace(".inf", "inf").replace(".nan", "nan"))


for _name in _EXPLICIT:
    _Loader.add_constructor(f"tag:yaml.org,2002:{_name}", _number)


def load_yaml(text: str) -> tuple[Any, dict[Path, yaml.Mark]]:
    """Parse one YAML document. Returns the value and, for every path in it, where it stands in the text.

    Raises YamlError for bad syntax, duplicate or non-string keys, custom tags, alias bombs, and size or depth beyond reason.
    """
    if len(text.encode()) > YAML_MAX_BYTES:
        raise YamlError(f"larger than {YAML_MAX_BYTES:,} bytes, which no recipe is")
    marks: dict[Path, yaml.Mark] = {}
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        value = _construct(loader, node, (), marks) if node is not None else None
    except YamlError:
        raise
    except yaml.MarkedYAMLError as error:
        raise YamlError(printable(error.problem or "not valid YAML"), error.problem_mark) from None
    except yaml.YAMLError as error:  # of the reader, which knows no line: a control character, say
        raise YamlError(f"not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise YamlError("nested too deeply") from None
    except (ValueError, OverflowError):  # PyYAML's scanner, of "\\UFFFFFFFF" and of version numbers of thousands of digits
        raise YamlError("a character or number that does not exist", loader.get_mark() if loader else None) from None
    return value, marks


def _construct(loader: _Loader, node: yaml.Node, path: Path, marks: dict[Path, yaml.Mark]) -> Any:
    """Build plain data from a composed node, walking aliases as often as they stand, so that bombs are counted."""
    if len(path) > YAML_MAX_DEPTH:
        raise YamlError(f"nested more than {YAML_MAX_DEPTH} deep", node.start_mark)
    if len(marks) >= YAML_MAX_NODES:
        raise YamlError(f"more than {YAML_MAX_NODES:,} values once its aliases are expanded", node.start_mark)
    marks[path] = node.start_mark
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key: Hashable = _scalar(loader, key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if key == "<<" and isinstance(key_node, yaml.ScalarNode) and key_node.style is None:
                raise YamlError("the merge key << is not read here; write the entries out", key_node.start_mark)
            if not isinstance(key, str):
                word = printable(str(getattr(key_node, "value", "")))
                raise YamlError(f"the key {word} is not a string; put it in quotes", key_node.start_mark)
            if key in result:
                raise YamlError(f"the key {printable(key)!r} stands twice", key_node.start_mark)
            result[key] = _construct(loader, value_node, (*path, key), marks)
            marks[(*path, key)] = key_node.start_mark
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, child, (*path, index), marks) for index, child in enumerate(node.value)]
    return _scalar(loader, node)


def _scalar(loader: _Loader, node: yaml.Node) -> Any:
    try:
        value = loader.construct_object(node)
        if isinstance(value, int) and value.bit_length() > 64:
            raise YamlError(f"{printable(str(node.value), 60)} is beyond 64 bits, which is no int", node.start_mark)
    except YamlError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):  # what PyYAML's constructors raise for "!!int x"
        kind = node.tag.rpartition(":")[2]
        raise YamlError(f"{printable(str(node.value), 60)!r} is no {kind}", node.start_mark) from None
    if value is not None and not isinstance(value, str | int | float):  # of !!binary and !!timestamp
        raise YamlError(
            f"the tag {printable(node.tag.rpartition(':')[2], 60)} makes a value that no recipe has; remove it", node.start_mark
        )
    if isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
        raise YamlError("a NUL or half a surrogate pair, which no name and no path has", node.start_mark)
    return value
