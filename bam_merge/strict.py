"""Strict readers for JSON and YAML: nothing ambiguous is accepted and nothing is silently dropped.

Both refuse duplicate keys; JSON also refuses NaN and Infinity, YAML also aliases that explode and documents of absurd size.
"""

import json
import re
from collections.abc import Hashable
from typing import Any

import yaml

from bam_merge.errors import printable

YAML_MAX_BYTES = 1_000_000
YAML_MAX_DEPTH = 32
YAML_MAX_NODES = 100_000

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


def load_json(data: bytes) -> Any:
    """Parse UTF-8 JSON. Raises ValueError, in words, for anything a careful reader would object to."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start})") from None
    try:
        return json.loads(text, object_pairs_hook=_unique_object, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


class YamlError(ValueError):
    """A YAML document that we refuse, with the place."""

    def __init__(self, message: str, mark: yaml.Mark | None = None) -> None:
        super().__init__(message)
        self.line = mark.line + 1 if mark else None
        self.column = mark.column + 1 if mark else None


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader whose scalars are what a reader of a recipe expects: 1e-2 is a number, 1:30 a string."""


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


def load_yaml(text: str) -> tuple[Any, dict[Path, yaml.Mark]]:
    """Parse one YAML document. Returns the value and, for every path in it, where it stands in the text.

    Raises YamlError for bad syntax, duplicate or non-string keys, custom tags, alias bombs, and size or depth beyond reason.
    """
    if len(text.encode()) > YAML_MAX_BYTES:
        raise YamlError(f"larger than {YAML_MAX_BYTES:,} bytes, which no recipe is")
    marks: dict[Path, yaml.Mark] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        value = _construct(loader, node, (), marks) if node is not None else None
    except yaml.MarkedYAMLError as error:
        raise YamlError(error.problem or "not valid YAML", error.problem_mark) from None
    except yaml.YAMLError as error:  # of the reader, which knows no line: a control character, say
        raise YamlError(f"not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise YamlError("nested too deeply") from None
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
        return loader.construct_object(node)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):  # what PyYAML's constructors raise for "!!int x"
        kind = node.tag.rpartition(":")[2]
        raise YamlError(f"{printable(str(node.value), 60)!r} is no {kind}", node.start_mark) from None
