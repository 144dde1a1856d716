"""The pieces of a sentencepiece model (`tokenizer.model`), read without its library: a small, strict reader of the protobuf.

Messages and field numbers: ModelProto in sentencepiece's src/sentencepiece_model.proto. The wire format: a varint
(field * 8 + wire type) before every value; wire types 0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

VARINT, EIGHT, BYTES, FOUR = 0, 1, 2, 5


PIECES, TRAINER, NORMALIZER = 1, 2, 3


MODEL_FIELDS = {PIECES, TRAINER, NORMALIZER, 4, 5}  # and self test data, denormalizer


EXTENSIONS = 200
"""Field numbers from here on are open to extensions in every message of the file."""


NORMAL = 1


MODEL_TYPE = 3


UNIGRAM = 1


@dataclass(frozen=True, slots=True)
class SentencePieces:
    """`pieces` by id: text, score, type (1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte). `algorithm` is 1 for unigram,
    2 for BPE, 3 words, 4 characters; `normalizer` is its message as it stands.
    """

    pieces: tuple[tuple[str, float, int], ...]
    algorithm: int
    normalizer: bytes


def read_sentencepieces(data: bytes) -> SentencePieces:
    """Read a serialised ModelProto. Raises ValueError, in words, for anything else."""
    pieces: list[tuple[str, float, int]] = []
    algorithm, normalizer = UNIGRAM, b""
    for field, kind, value in _fields(data):
        if field not in MODEL_FIELDS and field < EXTENSIONS:
            raise ValueError(f"field {field} is none of a sentencepiece model")
        if field in MODEL_FIELDS and (kind != BYTES or not isinstance(value, bytes)):
            raise ValueError(f"field {field} is no message")
        if field == PIECES:
            pieces.append(_piece(value, len(pieces)))  # type: ignore[arg-type]  # bytes, as just checked
        elif field == TRAINER:
            found = [v for f, k, v in _fields(value) if (f, k) == (MODEL_TYPE, VARINT)]  # type: ignore[arg-type]
            algorithm = int(found[-1]) if found else algorithm
        elif field == NORMALIZER:
            normalizer = value  # type: ignore[assignment]
    if not pieces:
        raise ValueError("no pieces")
    return SentencePieces(tuple(pieces), algorithm, normalizer)


def _piece(data: bytes, position: int) -> tuple[str, float, int]:
    text, score, kind = None, 0.0, NORMAL
    for field, wire, value in _fields(data):
        if (field, wire) == (1, BYTES) and isinstance(value, bytes):
            try:
                text = value.decode()
            except UnicodeDecodeError:
                raise ValueError(f"piece {position} is not UTF-8 text") from None
        elif (field, wire) == (2, FOUR) and isinstance(value, bytes):
            score = struct.unpack("<f", value)[0]
        elif (field, wire) == (3, VARINT) and isinstance(value, int):
            kind = value
        elif field < EXTENSIONS:
            raise ValueError(f"piece {position} has the unknown field {field}")
    if text is None or score != score:
        raise ValueError(f"piece {position} has no {'text' if text is None else 'score that is a number'}")
    return text, score, kind


def _fields(data: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """(field, wire type, value) of a message; a value is an int for a varint, and the bytes otherwise."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        field, kind = key >> 3, key & 7
        if field == 0 or kind not in (VARINT, EIGHT, BYTES, FOUR):
            raise ValueError(f"byte {position} is no protobuf")
        if kind == VARINT:
            value, position = _varint(data, position)
            yield field, kind, value
            continue
        size = {EIGHT: 8, FOUR: 4}.get(kind, 0)
        if kind == BYTES:
            size, position = _varint(data, position)
        if position + size > len(data):
            raise ValueError(f"cut short at byte {len(data)}")
        yield field, kind, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number that begins at `position`, and where it ends."""
    value = shift = 0
    while position < len(data) and shift < 64:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
    raise ValueError(f"cut short at byte {len(data)}" if shift < 64 else f"byte {position} is no protobuf")
