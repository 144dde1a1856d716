"""pydantic's findings in our words: what a value was expected to be, and how a found value looks in a message.

Neither pydantic's sentences nor the names of Python's types reach a user, who wrote YAML or JSON.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from bam_merge.text import bound, count, printable

Context = Mapping[str, Any]


def literals(expected: object) -> list[str]:
    """The values in pydantic's list of literals, "'a', 'b' or 'c'"."""
    return [word.strip(" '") for word in str(expected).replace(" or ", ", ").split(",")]


_EXPECTED: dict[str, str | Callable[[Context], str]] = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "int_parsing_size": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "string_unicode": "text of whole characters",
    "none_required": "null",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "dataclass_type": "a mapping",
    "dataclass_exact_type": "a mapping",
    "invalid_key": "text for a key",
    "finite_number": "a finite number",
    "greater_than": lambda context: f"more than {bound(context['gt'])}",
    "greater_than_equal": lambda context: f"at least {bound(context['ge'])}",
    "less_than": lambda context: f"less than {bound(context['lt'])}",
    "less_than_equal": lambda context: f"at most {bound(context['le'])}",
    "too_short": lambda context: f"at least {count(context['min_length'], 'entry', 'entries')}",
    "too_long": lambda context: f"at most {count(context['max_length'], 'entry', 'entries')}",
    "string_too_short": lambda context: f"at least {count(context['min_length'], 'character')}",
    "literal_error": lambda context: " or ".join(literals(context["expected"])),
    "enum": lambda context: " or ".join(literals(context["expected"])),
}
"""What is expected, by pydantic's type of error (https://docs.pydantic.dev/latest/errors/validation_errors/)."""


_PLAIN_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


_OTHER_NUMBER = re.compile(r"[-+]?(?:0[xX][0-9a-fA-F_]+|0[oO]?[0-7_]+|0[bB][01_]+|[0-9][0-9_,]*(?:\.[0-9_]*)?|[0-9]+(?::[0-5]?[0-9])+)")
"""A number in one of the spellings that YAML 1.1, YAML 1.2 or a person have, and we have not: 0x10, 0o17, 0b1, 1_000, 1:30."""


def is_worded(kind: str) -> bool:
    """Whether this type of error has words of its own here."""
    return kind in _EXPECTED


def expectation(error: Any) -> str:
    """What the value of one of pydantic's errors was expected to be: 'an integer', 'at most 1'."""
    words = _EXPECTED.get(error["type"], "another value")
    return words if isinstance(words, str) else words(error.get("ctx", {}))


def shown(value: object, limit: int = 60) -> str:
    """A value of a YAML or JSON document as its reader would write it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, dict | list | tuple):
        try:
            return printable(json.dumps(value, ensure_ascii=False, default=str), limit)
        except (ValueError, TypeError, RecursionError):
            return "a list" if isinstance(value, list | tuple) else "a mapping"
    try:
        return printable(repr(value), limit)
    except ValueError:  # Python prints no integer of thousands of digits
        return "a number of thousands of digits"


def bare(value: object) -> str:
    """A value as a word to look up: text without its quotes."""
    return value if isinstance(value, str) else shown(value)


def kind_of(value: object) -> str:
    """What a whole document is, in words."""
    kinds = {dict: "a mapping", list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false"}
    return "nothing" if value is None else kinds.get(type(value), "something else")


def hint(error: Any) -> str:
    """Where one is likely, the slip that led to this value, in brackets."""
    found, text_wanted = error["input"], error["type"] in ("string_type", "literal_error")
    if isinstance(found, bool) and text_wanted:
        return " (a bare yes, no, on or off is true or false in YAML: quote it)"
    if found is None and text_wanted:
        return " (an empty value or a bare ~ is null in YAML)"
    if isinstance(found, int | float) and error["type"] == "string_type":
        return " (in quotes it is text)"
    if isinstance(found, str) and error["type"] in ("int_type", "float_type"):
        if _PLAIN_NUMBER.fullmatch(found):
            return " (a number stands without quotes)"
        if _OTHER_NUMBER.fullmatch(found):
            return " (in plain decimal digits)"
    return ""
