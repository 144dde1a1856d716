"""Inputs that are almost right: edits of a valid document's values, keys and text, and of its bytes."""

import copy
import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

RAW, TWICE = "\0raw:", "\0twice"
"""Marks in a document, for text that is no JSON value and for a key that is to stand twice; `text_of` puts them into effect."""


def nested(depth: int, of: str) -> str:
    return RAW + of[: len(of) // 2] * depth + "1" + of[len(of) // 2 :] * depth


WORDS = (
    "", "a", "x" * 300, "x" * 20_000, "\x1b[31m", "\x9b1m", "a\u202eb", "line\nbreak", "\x7f", "\0", "\u00e9\U0001f600", "__metadata__",
    "../../x", "/etc/passwd", "/dev/zero", "http://x/y", "C:\\x", "a/b", ".", "..", "model.safetensors", "config.json", "%s%n", "{0}",
    "llama", "phi3", "gpt_neox", "cohere", "qwen3", "bam", "mixtral", "seed", "code", "default", "linear", "dynamic", "yarn", "longrope",
    "llama3", "su", "full_attention", "sliding_attention", "F32", "BF16", "F4", "F6_E2M3", "C64", "BOOL", "true", "no", "1e-4", "0-1",
    "0-999999999", "5GB", "1e400GB", "attn.*", "*", "[", "head", "mean", "copy", "ties", "expert", "normal", "topk_then_softmax",
    "hidden_size", "auto_map", "weight_map", "shape", "model.layers.0.mlp.up_proj.weight", "model.layers.99.mlp.up_proj.weight",
    "model.layers.1000000.mlp.up_proj.weight", "model.layers.0.mlp.experts.7.up_proj.weight",
)  # fmt: skip
NUMBERS = (
    -1, 0, 1, 2, 3, 7, 64, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1.0, 1e-5, 1e308, 5e-324,
)  # fmt: skip
ODD = (
    None, True, False, [], {}, [1, 2], [0], [[]], ["a"], {"a": 1}, {"rope_type": "yarn"}, [2**62] * 200, [1] * 5000, float("nan"),
    RAW + "Infinity", RAW + "1e999", RAW + "9" * 5000, RAW + '"\\ud800"', RAW + '"\\ud83d\\ude00"', RAW, RAW + "01", RAW + "'a'",
    nested(70, "[]"), nested(30, '{"a":}'), nested(5000, "[]"), nested(5000, '{"a":}'),
)  # fmt: skip
values = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from(NUMBERS),
    st.sampled_from(ODD),
    st.integers(-2, 200),
    st.text(max_size=5),
    st.lists(st.integers(0, 9), max_size=3),
)


def text_of(document: Any) -> str:
    """JSON of the document, its marks put into effect."""
    text = json.dumps(document, ensure_ascii=False, separators=(", ", ": "))
    while (start := text.find(json.dumps(RAW)[1:-1])) >= 0:
        end = text.index('"', start) if '\\"' not in text[start:] else _closing(text, start)
        text = text[: start - 1] + json.loads(text[start - 1 : end + 1]).removeprefix(RAW) + text[end + 1 :]
    return text.replace(json.dumps(TWICE)[1:-1], "")


def _closing(text: str, start: int) -> int:
    """Where the string that `start` is in ends."""
    while text[start] != '"':
        start += 2 if text[start] == "\\" else 1
    return start


# ---- edits of a document -----------------------------------------------------------------------------------------------------


def containers(document: Any) -> list[Any]:
    """Every object and list of the document, the document itself first."""
    found, queue = [], [document]
    while queue:
        here = queue.pop()
        if isinstance(here, dict | list):
            found.append(here)
            queue += here.values() if isinstance(here, dict) else here
    return found


document_edits = st.tuples(
    st.sampled_from(("replace", "replace", "replace", "delete", "rename", "twice", "insert", "swap", "copy")),
    st.integers(0, 499),
    st.integers(0, 499),
    values,
)


def edit_document(document: Any, edit: tuple[str, int, int, Any]) -> None:
    """One edit, in place, of the item `b` of the container `a` (both modulo how many there are)."""
    kind, a, b, value = edit
    boxes = [box for box in containers(document) if box]
    if not boxes:
        return
    box = boxes[a % len(boxes)]
    keys = list(box) if isinstance(box, dict) else list(range(len(box)))
    key = keys[b % len(keys)]
    value = copy.deepcopy(value)  # further edits must not change the value that others are drawn from
    word = value if isinstance(value, str) and not value.startswith(RAW) else str(b)
    match kind:
        case "replace":
            box[key] = value
        case "delete":
            del box[key]
        case "swap":
            other = keys[a % len(keys)]
            box[key], box[other] = box[other], box[key]
        case "copy":
            box[key] = json.loads(json.dumps(boxes[b % len(boxes)]))
        case _ if isinstance(box, list):
            box.insert(b % (len(box) + 1), value)
        case "rename":
            box[word] = box.pop(key)
        case "twice":
            box[key + TWICE] = box[key]
        case "insert":
            box[word] = value


# ---- edits of bytes ------------------------------------------------------------------------------------------------------------

TOKENS = (
    b"", b"\0", b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xef\xbb\xbf", b'"', b"{", b"}", b"[", b"]", b",", b":", b"-", b"e9", b"\\", b"\\u0000",
    b"\\ud800", b"NaN", b"null", b" ", b"\n", b"\t", b"\r", b"# ", b"&a ", b"*a", b"!!int ", b"!!python/name:os.system ", b"!!binary ", b"<<: ",
    b"? ", b"- ", b"|", b">", b"'", b"%YAML 1.1\n", b"---\n", b"...\n", b"@", b"`", b'"\\UFFFFFFFF"', b"0x", b"\x1b", b"\xc2\x9b",
    b"version https://git-lfs", b"<html>", b"PK\x03\x04", b"\x80\x02", b"GGUF", b"[" * 200, b"{a: " * 60, b"9" * 5000,
)  # fmt: skip
byte_edits = st.tuples(
    st.sampled_from(("flip", "insert", "overwrite", "delete", "cut", "repeat")),
    st.integers(0, 10**6),
    st.one_of(st.sampled_from(TOKENS), st.binary(max_size=8)),
)


def edit_bytes(data: bytes, edit: tuple[str, int, bytes]) -> bytes:
    """One edit at byte `at` (modulo the length)."""
    kind, at, token = edit
    at %= len(data) + 1
    match kind:
        case "flip":
            return data[:at] + bytes([data[at] ^ 1 << len(token) % 8]) + data[at + 1 :] if at < len(data) else data
        case "insert":
            return data[:at] + token + data[at:]
        case "overwrite":
            return data[:at] + token + data[at + len(token) :]
        case "delete":
            return data[:at] + data[at + 1 + len(token) :]
        case "cut":
            return data[:at]
        case _:
            return data[:at] + data[max(0, at - 40) :]


# ---- whole inputs --------------------------------------------------------------------------------------------------------------


def inputs(good: Any, to_bytes: Callable[[Any], bytes]) -> st.SearchStrategy[bytes]:
    """A valid document with some edits, its bytes with some edits, or bytes that come from nowhere."""
    text = json.dumps(good)

    def edited(plan: tuple[list[Any], list[Any]]) -> bytes:
        document = json.loads(text)
        for edit in plan[0]:
            edit_document(document, edit)
        data = to_bytes(document)
        for edit in plan[1]:
            data = edit_bytes(data, edit)
        return data

    one_to_three = st.lists(document_edits, min_size=1, max_size=3)
    none: st.SearchStrategy[list[Any]] = st.just([])
    some = st.lists(byte_edits, min_size=1, max_size=3)
    plans = st.one_of(*[st.tuples(one_to_three, none)] * 3, st.tuples(none, some), st.tuples(one_to_three, some))
    return st.one_of(*[plans.map(edited)] * 9, st.binary(max_size=60))
