"""Positional reads: whatever part the system gives at a time, what was asked for or an error, with preadv and without."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bam_merge.checkpoints import positional
from bam_merge.checkpoints.folder import open_checkpoint
from bam_merge.checkpoints.header import encode_header, read_header
from bam_merge.checkpoints.pieces import Read, Slice, byte_runs
from bam_merge.checkpoints.positional import FileEnds, beginning, fill
from bam_merge.checkpoints.reading import blocks, digest_range, read_piece
from bam_merge.errors import BamMergeError, CheckpointError

DATA = bytes(range(100))


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "data").write_bytes(DATA)
    descriptor = os.open(tmp_path / "data", os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def by_preadv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pread")


def by_pread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv")


def by_short_preadv(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, views, offset: real(descriptor, [views[0][:3]], offset))


def by_short_pread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv")
    monkeypatch.setattr(positional, "THROUGH", 3)


def by_small_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call asks for more than the system takes at once."""
    real = os.preadv
    monkeypatch.setattr(positional, "MOST", 7)

    def refusing(descriptor: int, views: list[memoryview], offset: int) -> int:
        if len(views[0]) > 7:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", refusing)


WAYS = (by_preadv, by_pread, by_short_preadv, by_short_pread, by_small_calls)


@pytest.fixture(params=WAYS, ids=[way.__name__ for way in WAYS])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    request.param(monkeypatch)


@pytest.mark.parametrize(
    ("runs", "base", "expected"),
    [
        ([(0, 100)], 0, DATA),
        ([(3, 10), (1, 2), (50, 0), (90, 10)], 0, DATA[3:13] + DATA[1:3] + DATA[90:]),
        ([(3, 10), (1, 2)], 40, DATA[43:53] + DATA[41:43]),
        ([(5, 1)] * 20, 0, DATA[5:6] * 20),
        ([], 0, b""),
    ],
)
def test_runs_stand_one_after_the_other(way: None, file: int, runs: list[tuple[int, int]], base: int, expected: bytes) -> None:
    data = bytearray(len(expected))
    fill(file, iter(runs), memoryview(data), base)
    assert data == expected


@pytest.mark.parametrize("runs", [[(90, 11)], [(0, 10), (95, 6)], [(100, 1)], [(120, 1), (0, 1)]])
def test_a_file_that_ends_too_early_says_where(way: None, file: int, runs: list[tuple[int, int]]) -> None:
    with pytest.raises(FileEnds) as caught:
        fill(file, runs, memoryview(bytearray(sum(count for _, count in runs))))
    assert caught.value.at == max(100, runs[0][0])


def test_what_no_run_fills_is_not_passed_over(way: None, file: int) -> None:
    with pytest.raises(AssertionError):
        fill(file, [(0, 10)], memoryview(bytearray(11)))


@pytest.mark.parametrize("most", [0, 5, 100, 120])
def test_the_beginning_is_as_long_as_the_file(way: None, file: int, most: int) -> None:
    assert beginning(file, most) == DATA[:most]


def test_a_digest_is_of_all_the_bytes_or_an_error(way: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data"
    path.write_bytes(DATA)
    whole = digest_range(path, 10, 80)
    monkeypatch.setattr("bam_merge.checkpoints.reading.COPY_BUFFER", 32)
    assert digest_range(path, 10, 80) == whole != digest_range(path, 11, 80)
    with pytest.raises(BamMergeError, match=r"data: ends at byte 100, expected 101\."):
        digest_range(path, 10, 91)


def test_a_header_is_read_whole_or_refused(way: None, tmp_path: Path) -> None:
    header, ((offset, _),) = encode_header([("x" * 3000, "F32", (2,))])
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + bytes(8))
    (entry,) = read_header(str(path)).tensors
    assert (entry.name, entry.offset) == ("x" * 3000, offset)


def test_a_header_that_cannot_be_read_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = tmp_path / "x.safetensors"
    path.write_bytes(encode_header([("x", "F32", (2,))])[0] + bytes(8))
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: reading its header: Input/output error\."):
        read_header(str(path))


@pytest.mark.parametrize(("dtype", "scale"), [("F64", 8), ("BF16", 2), ("U8", 1), ("F4", 0.5)])
def test_the_bytes_of_a_piece(dtype: str, scale: float) -> None:
    """Two blocks of six rows of four elements; the piece is rows two to four of each."""
    read = Read("model", "x", dtype, (12, 4))
    assert list(byte_runs(read, 8, 24)) == [(8 * scale, 16 * scale)]
    assert list(byte_runs(Slice(read, 2, 2, 3, (6, 4)), 0, 24)) == [(8 * scale, 12 * scale), (32 * scale, 12 * scale)]
    assert list(byte_runs(Slice(read, 2, 2, 3, (6, 4)), 10, 14)) == [(18 * scale, 2 * scale), (32 * scale, 2 * scale)]


@pytest.mark.parametrize("size", [1, 7, 95, 200])
def test_blocks_are_the_whole_tensor(way: None, tmp_path: Path, size: int) -> None:
    header, _ = encode_header([("x", "U8", (95,)), ("none", "U8", (0,))])
    (tmp_path / "model.safetensors").write_bytes(header + DATA[5:])
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    view = memoryview(bytearray(size))
    assert b"".join(bytes(block) for block in blocks(checkpoint, checkpoint.tensors["x"], view)) == DATA[5:]
    assert list(blocks(checkpoint, checkpoint.tensors["none"], memoryview(b""))) == []
    data = bytearray(4)
    read_piece(checkpoint, Slice(Read("model", "x", "U8", (95,)), 5, 17, 2, (10,)), memoryview(data), 1, 5)
    assert bytes(data) == bytes([DATA[5:][index] for index in (18, 36, 37, 55)])
