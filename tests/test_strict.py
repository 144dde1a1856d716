"""The strict JSON and YAML readers."""

import pytest

from bam_merge.documents import YamlError, load_json, load_yaml


@pytest.mark.parametrize(("text", "message"), [
    (b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
    (b'{"a": {"b": 1, "b": 1}}', "the key 'b' stands twice"),
    (b'{"a": NaN}', "NaN is not a JSON number"),
    (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
    (b'{"a": 1} x', "not valid JSON: Extra data"),
    (b"\xff\xfe{}", "not UTF-8 text"),
    (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    (b"", "not valid JSON"),
    (b'{"a": 1e999}', "1e999 is beyond float64"),
    (b"[-1e400]", "-1e400 is beyond float64"),
    (b"9" * 5000, "a number of thousands of digits"),
    (b'"a\\udc00b"', r"the lone surrogate \\udc00 is no character"),
    (b'{"\\ud83d": 1}', r"the lone surrogate \\ud83d is no character"),
    (b"[" * 65 + b"]" * 65, "nested more than 64 deep"),
])  # fmt: skip
def test_json_refused(text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_json(text)


def test_json_accepted() -> None:
    assert load_json(b'{"a": [1, 2.5, null, "\\u00e9"]}') == {"a": [1, 2.5, None, "é"]}
    assert load_json(b'"\\ud83d\\ude00"') == "\U0001f600"
    assert load_json(b"[" * 64 + b"]" * 64)


@pytest.mark.parametrize(("text", "value"), [
    ("1e-2", 0.01), ("1E5", 1e5), (".5", 0.5), ("-3", -3), ("1.", 1.0), ("1:30", "1:30"), ("0-3", "0-3"), ("2024-01-01", "2024-01-01"),
    ("0o17", "0o17"), ("yes", True), ("no", False), ("~", None), ("", None), ("5GB", "5GB"), ('"1e-2"', "1e-2"), ("1_000", "1_000"),
    ("0x10", "0x10"), ("0b1", "0b1"), ("+5", 5), ("0", 0), ("-0", 0), ("0.5", 0.5), ("00:30", "00:30"), ("!!int 5", 5), ("!!float 5", 5.0),
    ('"010"', "010"),
])  # fmt: skip
def test_yaml_scalars(text: str, value: object) -> None:
    document, _ = load_yaml(f"x: {text}")
    assert document == {"x": value}
    assert type(document["x"]) is type(value)


@pytest.mark.parametrize(("text", "message", "place"), [
    ("a: 1\nb: 2\na: 3", "the key 'a' stands twice", (3, 1)),
    ("a: {b: 1, b: 2}", "the key 'b' stands twice", (1, 11)),
    ("no: x", "the key no is not a string; put it in quotes", (1, 1)),
    ("1: x", "the key 1 is not a string", (1, 1)),
    ("? [a]\n: x", "is not a string", (1, 3)),
    ("a: {<<: {b: 1}}", "the merge key << is not read here; write the entries out", (1, 5)),
    ("x: &x {b: 1}\n<<: *x", "the merge key << is not read here", (2, 1)),
    ("a: [1, 2", "expected ',' or ']'", (1, 9)),
    ("a: 1\n\tb: 2", "found character '\\\\t'", (2, 1)),
    ("a: !!python/object/apply:os.system [ls]\nb: !x y", "could not determine a constructor", (2, 4)),
    ("--- 1\n--- 2", "expected a single document|but found another document", (2, 1)),
    ("a: !!int x", "'x' is no int", (1, 4)),
    ("a: !!float x", "'x' is no float", (1, 4)),
    ("a: !!bool x", "'x' is no bool", (1, 4)),
    ("a: !!timestamp x", "'x' is no timestamp", (1, 4)),
    ("a: " + "9" * 5000, "is no int", (1, 4)),
    ("!!int x: 1", "'x' is no int", (1, 1)),
    ("a: !!binary aGk=", "the tag binary makes a value that no recipe has; remove it", (1, 4)),
    ("a: !!timestamp 2024-01-01", "the tag timestamp makes a value that no recipe has", (1, 4)),
    ("a: 010", "010 begins with a zero, which some readers of YAML take for base eight; write 10, or '010' if it is a name", (1, 4)),
    ("a: -012", "write -12, or '-012'", (1, 4)),
    ("a: +08", "write [+]8, or", (1, 4)),
    ("a: 00", "write 0, or '00'", (1, 4)),
    ("a: 01.5", "write 1.5, or '01.5'", (1, 4)),
    ("a: 010e2", "write 10e2, or '010e2'", (1, 4)),
    ("010: 1", "010 begins with a zero", (1, 1)),
    ("a: !!int 010", "write 10, or", (1, 4)),
    ("a: !!float 010", "write 10, or", (1, 4)),
    ("a: !!int 0x10", "'0x10' is no int: an int here is a plain decimal number", (1, 4)),
    ("a: !!int 0b1", "'0b1' is no int", (1, 4)),
    ("a: !!int 1:30", "'1:30' is no int", (1, 4)),
    ("a: !!int 1_000", "'1_000' is no int", (1, 4)),
    ("a: !!float 1:30", "'1:30' is no float: a float here is a plain decimal number", (1, 4)),
    ("a: !!float 1_0.5", "'1_0.5' is no float", (1, 4)),
    ("a: 18446744073709551616", "is beyond 64 bits, which is no int", (1, 4)),
    ("[" * 40 + "]" * 40, "nested more than 32 deep", None),
    ("# " + "x" * 1_000_001, "larger than 1,000,000 bytes", None),
    ("a: [" + "b," * 20_001 + "]", "more than 20,000 values", None),
    ('a: "\\uD800"', "half a surrogate pair", (1, 4)),
    ('a: "\\0"', "a NUL", (1, 4)),
    ('a: "\\UFFFFFFFF"', "does not exist", (1, 7)),
    ("a: !!int 0x" + "f" * 5000, "is no int", (1, 4)),
])  # fmt: skip
def test_yaml_refused(text: str, message: str, place: tuple[int, int] | None) -> None:
    with pytest.raises(YamlError, match=message) as caught:
        load_yaml(text)
    if place:
        assert (caught.value.line, caught.value.column) == place


def test_a_quoted_merge_key_is_a_name() -> None:
    assert load_yaml("a: {'<<': 1}")[0] == {"a": {"<<": 1}}


def test_python_tags_make_nothing() -> None:
    """A tag on a list or mapping is not obeyed: the value stays plain data."""
    assert load_yaml("a: !!python/object/apply:os.system [ls]")[0] == {"a": ["ls"]}


def test_alias_bomb_is_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 8)]
    with pytest.raises(YamlError, match="more than 20,000 values once its aliases are expanded"):
        load_yaml("\n".join(lines))


def test_recursive_alias_is_refused() -> None:
    with pytest.raises(YamlError, match="nested more than 32 deep"):
        load_yaml("a: &a [*a]")


def test_harmless_aliases_work_and_places_are_known() -> None:
    document, marks = load_yaml("a: &x {b: 1}\nc: *x")
    assert document == {"a": {"b": 1}, "c": {"b": 1}}
    assert (marks["c",].line, marks["c",].column) == (1, 0)
