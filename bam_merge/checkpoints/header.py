"""The safetensors header: reading it without trusting it, and writing it byte-reproducibly.

Format: 8 bytes little-endian header length, that many bytes of JSON, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors, "Format"). Only the header is ever read here.
"""

import json
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

import xxhash

from bam_merge.checkpoints.dtypes import DTYPE_BITS
from bam_merge.checkpoints.positional import FileEnds, beginning, fill
from bam_merge.documents import parse_json
from bam_merge.errors import CheckpointError
from bam_merge.text import printable

MAX_HEADER = 100_000_000


FIRST_BYTES = 2**14
"""Bytes that are asked for first of a file elsewhere: the whole header of most, which have some 25 tensors each."""


_LOOKALIKES = [
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself: run `git lfs pull`"),
    (b"<", "an HTML or XML page, probably a failed download: download it again"),
    (b"PK\x03\x04", "a zip archive (a PyTorch .bin?): convert it to safetensors"),
    (b"\x80", "a Python pickle, which is never loaded here: convert it to safetensors"),
    (b"GGUF", "a GGUF file: convert it to a Hugging Face folder"),
]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file. `offset` counts bytes from the start of the file, `nbytes` is its exact length."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells that a file is still the one that was planned with: size in bytes, mtime and ctime in ns.

    All three are the file system's own, so that they are the same on every host that has it mounted; a device number is the host's,
    and some clients make up their inodes. No program can set a file's ctime: it is the moment of the last change to content, times,
    mode, owner or names. So a file that was rewritten, or replaced by another one, is noticed though its size and mtime are the old
    ones; but not within one tick of the file system's clock (some ms) after the change that was planned with. A change of mode or of
    hard links alone is noticed too, and called a change: nobody can tell it from a rewriting.

    A file elsewhere has an `etag` instead: an etag, version or digest by which those who keep it tell its states apart.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    etag: str = ""

    @property
    def state(self) -> int | str:
        """What of it, beside the size, is the same wherever the file is seen from, and kept in records."""
        return self.etag or self.mtime_ns

    @classmethod
    def of(cls, status: os.stat_result) -> "FileIdentity":
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class Header:
    """A file's parsed header. `digest` is the XXH3-128 of its first bytes up to the data."""

    path: str
    identity: FileIdentity
    digest: str
    metadata: dict[str, str]
    tensors: tuple[TensorEntry, ...]


def reason(path: str | os.PathLike[str], error: OSError) -> str:
    """Why the system did not open `path`, in words."""
    if isinstance(error, FileNotFoundError) and os.path.islink(path):
        return f"a symlink to {printable(os.readlink(path))}, which does not exist"
    return error.strerror or str(error)


def open_regular(path: str) -> int:
    """Open `path` read-only, refusing what is not a regular file (a FIFO would hang). Raises CheckpointError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{printable(path)}: {reason(path, error)}.") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{printable(path)}: not a regular file.")
    return descriptor


def read_header(path: str, file: str | None = None) -> Header:
    """Read and check the header of the safetensors file at `path`; `file` is the name its tensors carry.

    Raises CheckpointError, naming the file and what is wrong, before allocating anything the file merely promises.
    """
    descriptor = open_regular(path)
    try:
        identity = FileIdentity.of(os.fstat(descriptor))
        start = beginning(descriptor, 32)
        raw = _header_bytes(descriptor, path, identity.size, start)
    except OSError as error:
        raise CheckpointError(f"{printable(path)}: reading its header: {error.strerror}.") from error
    finally:
        os.close(descriptor)
    return _header(path, file or os.path.basename(path), identity, start[:8], raw)


def header_of(path: str, file: str, size: int, read: Callable[[int, int], bytes], etag: str = "") -> Header:
    """The header of a file of `size` bytes of which `read(first, count)` gives some, and which `path` names in messages.

    Raises CheckpointError as read_header does.
    """
    start = read(0, min(size, FIRST_BYTES))
    length = _header_length(path, size, start)
    raw = start[8 : 8 + length]
    if len(raw) < length:
        raw += read(8 + len(raw), length - len(raw))
    return _header(path, file, FileIdentity(size, 0, 0, etag), start[:8], raw)


def _header(path: str, file: str, identity: FileIdentity, start: bytes, raw: bytes) -> Header:
    try:
        if not raw.startswith(b"{"):
            raise ValueError("the header does not begin with '{'")
        metadata, tensors = _parse(parse_json(raw), file, 8 + len(raw), identity.size)
    except ValueError as error:
        raise CheckpointError(f"{printable(path)}: {error}. The file is damaged: download or write it again.") from None
    return Header(path, identity, xxhash.xxh3_128_hexdigest(start + raw), metadata, tensors)


def _header_bytes(descriptor: int, path: str, size: int, start: bytes) -> bytes:
    length = _header_length(path, size, start)
    raw = bytearray(length)
    try:
        fill(descriptor, [(8, length)], memoryview(raw))
    except FileEnds:
        raise CheckpointError(f"{printable(path)}: the file ends inside its header. Is the download complete?") from None
    return bytes(raw)


def _header_length(path: str, size: int, start: bytes) -> int:
    """The bytes of the header that the file's first bytes promise. Raises CheckpointError where it can have no such header."""
    what, start = lookalike(start), start[:8]
    if what and not _plausible(start):
        raise CheckpointError(f"{printable(path)}: this is {what}.")
    if len(start) < 8:
        raise CheckpointError(f"{printable(path)}: {size} bytes, too short for a safetensors header. Is the download complete?")
    length = int.from_bytes(start, "little")
    if length < 2 or length > MAX_HEADER or 8 + length > size:
        raise CheckpointError(
            f"{printable(path)}: its first 8 bytes promise a header of {length:,} bytes; the file has {size:,} bytes and "
            f"a header at most {MAX_HEADER:,}. It is truncated, or not a safetensors file."
        )
    return length


def lookalike(start: bytes) -> str | None:
    """What a file that begins with `start` is instead of a checkpoint's, and what to do; None when it is nothing known."""
    return next((what for prefix, what in _LOOKALIKES if start.startswith(prefix)), None)


def _plausible(start: bytes) -> bool:
    """Whether `start` can be a header's length, though it may look like another format's first bytes."""
    return len(start) == 8 and 2 <= int.from_bytes(start, "little") <= MAX_HEADER


def _parse(document: object, file: str, data: int, size: int) -> tuple[dict[str, str], tuple[TensorEntry, ...]]:
    if not isinstance(document, dict):
        raise ValueError("the header is not a JSON object")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ does not map strings to strings")
    entries = [_entry(name, record, file, data) for name, record in document.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    position, previous = data, "the header"
    for entry in entries:
        if entry.offset != position:
            what = "a hole" if entry.offset > position else "an overlap"
            raise ValueError(
                f"{what} between {printable(previous)} and {printable(entry.name)}: bytes {position - data} and {entry.offset - data}"
            )
        position, previous = entry.offset + entry.nbytes, entry.name
    if position > size:
        first = next(entry.name for entry in entries if entry.offset + entry.nbytes > size)
        raise ValueError(f"the header promises {position:,} bytes, the file has {size:,}; {printable(first)} is the first tensor cut short")
    if position < size:
        raise ValueError(f"{size - position:,} bytes follow the last tensor, {printable(previous)}")
    return metadata, tuple(entries)


def _entry(name: str, record: object, file: str, data: int) -> TensorEntry:
    where = printable(name)
    if not isinstance(record, dict) or set(record) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the record of {where} does not have exactly dtype, shape and data_offsets")
    dtype, shape, span = record["dtype"], record["shape"], record["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"{where} has the unknown dtype {printable(str(dtype))}")
    if not _naturals(shape) or not _naturals(span) or len(span) != 2:
        raise ValueError(f"{where}: shape and data_offsets must be non-negative integers")
    bits = DTYPE_BITS[dtype]
    for size in shape:  # stopping early: the product of a million dimensions would take hours
        bits *= size
        if bits >= 2**64:
            raise ValueError(f"{where}: a shape of {len(shape)} dimensions that no file can hold")
    if bits % 8 or span[1] - span[0] != bits // 8:
        takes = f"{bits // 8:,} bytes" if bits % 8 == 0 else f"{bits} bits"
        raise ValueError(f"{where}: {dtype} {printable(str(shape))} takes {takes}, its data_offsets span {span[1] - span[0]:,}")
    return TensorEntry(name, dtype, tuple(shape), file, data + span[0], span[1] - span[0])


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def encode_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, list[tuple[int, int]]]:
    """The header of a file that holds `tensors` (name, dtype, shape) in this order, and each one's (offset, nbytes).

    Offsets count from the start of the file. One canonical spelling, space-padded to a multiple of 8 bytes, so that the
    same tensors give the same bytes.
    """
    document: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position, spans = 0, []
    for name, dtype, shape in tensors:
        nbytes = prod(shape) * DTYPE_BITS[dtype] // 8
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        spans.append((position, nbytes))
        position += nbytes
    raw = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    start = len(raw) + 8
    return len(raw).to_bytes(8, "little") + raw, [(start + offset, nbytes) for offset, nbytes in spans]
