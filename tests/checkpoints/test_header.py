"""The safetensors header: literal bytes, agreement with the reference library, and everything that must be refused."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from bam_merge.checkpoints.header import encode_header, read_header
from bam_merge.errors import CheckpointError


def test_header_is_these_bytes() -> None:
    header, spans = encode_header([("b", "BF16", (2, 3)), ("a", "F32", ())])
    text = (
        b'{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},'
        b'"a":{"dtype":"F32","shape":[],"data_offsets":[12,16]}}'
    )
    padded = text + b" " * (-len(text) % 8)
    assert header == len(padded).to_bytes(8, "little") + padded
    assert spans == [(len(header), 12), (len(header) + 12, 4)]


def file_with(tmp_path: Path, document: object, data: bytes = b"", raw: bytes | None = None) -> Path:
    text = raw if raw is not None else json.dumps(document).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def record(dtype: str = "F32", shape: object = (1,), span: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


REFUSED = {
    "truncated data": ({"a": record(span=(0, 4))}, b"xyz", "the header promises .* a is the first tensor cut short"),
    "trailing bytes": ({"a": record()}, b"12345", "1 bytes follow the last tensor, a"),
    "hole": ({"a": record(), "b": record(span=(8, 12))}, b"x" * 12, "a hole between a and b: bytes 4 and 8"),
    "hole at start": ({"a": record(span=(4, 8))}, b"x" * 8, "a hole between the header and a"),
    "overlap": ({"a": record(), "b": record(span=(2, 6))}, b"x" * 6, "an overlap between a and b"),
    "alias": ({"a": record(), "b": record()}, b"x" * 4, "an overlap between a and b"),
    "negative dimension": ({"a": record(shape=(-1,))}, b"", "must be non-negative integers"),
    "float dimension": ({"a": record(shape=(1.0,))}, b"x" * 4, "must be non-negative integers"),
    "boolean dimension": ({"a": record(shape=(True,))}, b"x" * 4, "must be non-negative integers"),
    "huge product": ({"a": record(shape=(2**62,) * 200)}, b"", "no file can hold"),
    "a million huge dimensions": ({"a": record(shape=(2**62,) * 10**6)}, b"", "no file can hold"),
    "a million dimensions": ({"a": record(shape=(1,) * 10**6, span=(0, 8))}, b"x" * 8, r"characters\) takes 4 bytes"),
    "wrong span": ({"a": record(shape=(2,))}, b"x" * 4, r"F32 \[2\] takes 8 bytes, its data_offsets span 4"),
    "backward span": ({"a": record(span=(4, 0))}, b"x" * 4, "span -4"),
    "unknown dtype": ({"a": record(dtype="F33")}, b"", "unknown dtype F33"),
    "odd nibbles": ({"a": record(dtype="F4", shape=(3,), span=(0, 1))}, b"x", "takes 12 bits"),
    "extra key": ({"a": {**record(), "x": 1}}, b"x" * 4, "does not have exactly"),
    "missing key": ({"a": {"dtype": "F32"}}, b"", "does not have exactly"),
    "not a record": ({"a": 3}, b"", "does not have exactly"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__ does not map strings to strings"),
    "array": ([1], b"", "does not begin with"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    document, data, message = REFUSED[name]
    path = file_with(tmp_path, document, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("raw", "message"), [
    (b'{"a":1,"a":2}', "the key 'a' stands twice"),
    (b'{"a":1}\0\0', "not valid JSON"),
    (b' {"a":1}', "does not begin with"),
    (b'{"\xff":1}', "not UTF-8"),
    (b"{" + b'"a":{' * 50_000, "nested too deeply|not valid JSON"),
    (b'{"a":NaN}', "NaN is not"),
    (b'{"a\\ud800b":1}', r"the lone surrogate \\ud800 is no character"),
])  # fmt: skip
def test_header_text_refused(raw: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_header(str(file_with(tmp_path, None, raw=raw)))


@pytest.mark.parametrize(("data", "message"), [
    (b"", "too short"),
    (b"1234567", "too short"),
    (bytes(8), "promise a header of 0 bytes"),
    ((2**63).to_bytes(8, "little"), "promise a header of 9,223,372,036,854,775,808 bytes"),
    ((1000).to_bytes(8, "little") + b"{}", "promise a header of 1,000 bytes; the file has 10 bytes"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
    (b"<!DOCTYPE html><html>", "HTML"),
    (b"PK\x03\x04" + b"x" * 50, "zip archive"),
    (b"\x80\x02}q\x00." + b"x" * 20, "pickle, which is never loaded"),
    (b"GGUF" + b"\3\0\0\0" * 10, "GGUF"),
])  # fmt: skip
def test_not_a_header(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_header(str(path))


def test_fifo_and_folder_are_refused(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name in ("fifo", "folder"):
        with pytest.raises(CheckpointError, match="not a regular file"):
            read_header(str(tmp_path / name))


def test_legal_oddities(tmp_path: Path) -> None:
    """Misaligned offsets, scalars, empty tensors, files without tensors."""
    document = {"byte": record("U8", (1,), (0, 1)), "scalar": record("F32", (), (1, 5)), "empty": record("F32", (0, 7), (5, 5))}
    header = read_header(str(file_with(tmp_path, document, b"x" * 5)))
    assert {tensor.name: tensor.nbytes for tensor in header.tensors} == {"byte": 1, "scalar": 4, "empty": 0}
    assert read_header(str(file_with(tmp_path, {}))).tensors == ()


SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda n: n != "__metadata__"), SHAPES, max_size=5))
def test_reader_agrees_with_the_reference_writer(tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, tuple[int, ...]]) -> None:
    path = tmp_path_factory.mktemp("h") / "x.safetensors"
    path.write_bytes(save({name: torch.zeros(shape) for name, shape in shapes.items()}))
    assert {tensor.name: tensor.shape for tensor in read_header(str(path)).tensors} == shapes


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["F32", "BF16", "U8", "F64"]), SHAPES), max_size=5))
def test_reference_reader_accepts_our_header(tmp_path_factory: pytest.TempPathFactory, tensors: list[tuple[str, tuple[int, ...]]]) -> None:
    named = [(f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate(tensors)]
    header, spans = encode_header(named)
    path = tmp_path_factory.mktemp("h") / "x.safetensors"
    path.write_bytes(header + bytes(sum(nbytes for _, nbytes in spans)))
    with safe_open(path, "pt") as reader:
        assert {name: tuple(reader.get_slice(name).get_shape()) for name in reader.keys()} == {name: shape for name, _, shape in named}  # noqa: SIM118
    ours = read_header(str(path))
    assert [(t.name, t.dtype, t.shape, t.offset, t.nbytes) for t in ours.tensors] == [
        (*tensor, *span) for tensor, span in sorted(zip(named, spans, strict=True), key=lambda item: (item[1][0], item[1][1]))
    ]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_give_our_error_or_a_header_that_the_library_accepts_too(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, framed: bool
) -> None:
    path = tmp_path_factory.mktemp("h") / "x.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data if framed else data)
    try:
        read_header(str(path))
    except CheckpointError:
        return
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        pytest.fail(f"accepted what the library refuses: {error}")
