"""Heads that are stored although config.json ties them to the embeddings, and heads that could be tied.

transformers ties a stored head only where it equals the embeddings, and computes with it where it does not. So this is the one
question of a plan that headers cannot answer: the two tensors are compared byte for byte, a piece at a time.
"""

import struct
from collections.abc import Iterator
from dataclasses import replace

from bam_merge.architectures.tables import head_names
from bam_merge.checkpoints.dtypes import ARITHMETIC_DTYPES, DTYPE_BITS
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.header import TensorEntry
from bam_merge.checkpoints.reading import read_runs
from bam_merge.errors import CheckpointError
from bam_merge.sources.dense import DenseModel
from bam_merge.text import printable

PIECE = 2**20
"""Elements that are compared at a time: a multiple of eight, so that pieces of the smallest dtypes begin at a byte."""


def settle_heads(models: list[DenseModel]) -> tuple[list[DenseModel], list[str]]:
    """`models` with every head either its own or the embeddings, and what stands against that.

    A tied source may store a head that equals its embeddings: it is dropped. Beside tied sources, an untied one whose head equals its
    embeddings is tied as well. (One whose head differs is left, and disagrees with the others in tie_word_embeddings.)
    """
    tied = next((model.name for model in models if model.facts["tie_word_embeddings"]), None)
    settled, problems = [], []
    for model in models:
        try:
            found = _tied(model, tied) if tied is not None else model
        except CheckpointError as error:
            problems += [f"sources.{model.name}: {problem}" for problem in error.problems]
            found = model
        settled.append(found)
    return settled, problems


def _tied(model: DenseModel, other: str) -> DenseModel:
    """`model` without a head of its own, where that changes nothing. Raises CheckpointError where it claims so and it would."""
    tensors = model.checkpoint.tensors
    names = [name for name in head_names(model.family) if name in tensors]
    embeddings = next(name for row in model.family.rows if row.roles == ("embed",) for name in row.names if name in tensors)
    if model.facts["tie_word_embeddings"]:
        problems = [
            f"config.json has tie_word_embeddings=true, but the file holds {printable(name)}, which differs from {printable(embeddings)} "
            f"({where}). transformers computes with the stored head, other programs with the embeddings. Set tie_word_embeddings to "
            f"false in config.json, so that the stored head counts; or remove {printable(name)}, so that the embeddings count."
            for name in names
            if (where := difference(model.checkpoint, tensors[embeddings], tensors[name]))
        ]
        if problems:
            raise CheckpointError(*problems)
        why = "the head is tied to the embeddings, and this copy equals them"
        return replace(model, dropped={**model.dropped, **dict.fromkeys(names, why)})
    if any(difference(model.checkpoint, tensors[embeddings], tensors[name]) for name in names):
        return model
    why = f"the head equals the embeddings, and sources.{other} has it tied to them: so has the result"
    facts = {**model.facts, "tie_word_embeddings": True, "untied": False}
    kept = {site: expr for site, expr in model.tensors.items() if site[0] != "head"}
    return replace(model, facts=facts, tensors=kept, dropped={**model.dropped, **dict.fromkeys(names, why)})


# ---- bytes -----------------------------------------------------------------------------------------------------------------


def difference(checkpoint: Checkpoint, a: TensorEntry, b: TensorEntry) -> str:
    """Where two stored tensors differ first, in words; empty where they hold the same.

    Of one dtype, the bytes are compared, NaN and all; of two, the values, widened without rounding. Raises CheckpointError when a file
    cannot be read. Where headers alone were read, nothing is: headers_only.py says so, and a merge compares them.
    """
    if a.shape != b.shape:
        return f"{printable(str(list(b.shape)))} and {printable(str(list(a.shape)))}"
    if a.dtype != b.dtype and not {a.dtype, b.dtype} <= set(ARITHMETIC_DTYPES):
        return f"{b.dtype} and {a.dtype}"
    if checkpoint.remote is not None:
        return ""
    for start, piece_a, piece_b in _pieces(checkpoint, a, b):
        if piece_a != piece_b:
            byte = next(i for i, (x, y) in enumerate(zip(piece_a, piece_b, strict=True)) if x != y)
            return f"first in element {start + byte * min(PIECE, a.numel - start) // len(piece_a):,}"
    return ""


def _pieces(checkpoint: Checkpoint, a: TensorEntry, b: TensorEntry) -> Iterator[tuple[int, bytes, bytes]]:
    """(first element, bytes of a, bytes of b), in one dtype that holds both."""
    wide = a.dtype if a.dtype == b.dtype else "F64" if "F64" in (a.dtype, b.dtype) else "F32"
    for start in range(0, a.numel, PIECE):
        count = min(PIECE, a.numel - start)
        pieces = []
        for entry in (a, b):
            bits = DTYPE_BITS[entry.dtype]
            data = bytearray(count * bits // 8)
            read_runs(checkpoint, entry, [(start * bits // 8, len(data))], memoryview(data))
            pieces.append(_widened(data, entry.dtype, wide))
        yield start, pieces[0], pieces[1]


def _widened(data: bytearray, dtype: str, wide: str) -> bytes:
    """Little-endian floats of `dtype` as the equal ones of `wide`, without numpy: a bfloat16 is the upper half of a float32."""
    if dtype == "BF16" != wide:
        whole = bytearray(2 * len(data))
        whole[2::4], whole[3::4] = data[0::2], data[1::2]
        data, dtype = whole, "F32"
    if dtype == wide:
        return bytes(data)
    codes = {"F16": "e", "F32": "f", "F64": "d"}
    count = len(data) * 8 // DTYPE_BITS[dtype]
    return struct.pack(f"<{count}{codes[wide]}", *struct.unpack(f"<{count}{codes[dtype]}", data))
