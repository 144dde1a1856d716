"""Heads that are stored although config.json ties them to the embeddings, and heads that could be tied.

transformers ties a stored head only where it equals the embeddings, and computes with it where it does not. So this is the one
question of a plan that headers cannot answer: the two tensors are compared byte for byte, a piece at a time.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from bam_merge.checkpoints.dtypes import ARITHMETIC_DTYPES, DTYPE_BITS
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.header import TensorEntry
from bam_merge.checkpoints.pieces import Read, whole
from bam_merge.checkpoints.reading import read_runs
from bam_merge.errors import CheckpointError
from bam_merge.expressions import Expr
from bam_merge.sources.dense import DenseModel
from bam_merge.text import printable

PIECE = 2**20
"""Elements that are compared at a time: a multiple of eight, so that pieces of the smallest dtypes begin at a byte."""


@dataclass
class Heads:
    """The sources with every head settled, and what is to be said of it."""

    models: list[DenseModel]
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def settle_copies(model: DenseModel, accept: str | None = None) -> tuple[DenseModel, list[str]]:
    """A tied model without the heads that it stores all the same, and what stands against that.

    A head that equals the embeddings is dropped. Where the recipe accepts one, a head that differs counts ("stored"), so that the model is
    untied, or is dropped ("tied"): that is a warning of the model's.
    """
    if not model.copies:
        return model, []
    tensors, embeddings = model.checkpoint.tensors, whole(model.tensors["embed", None]).tensor  # type: ignore[arg-type]
    plain = isinstance(model.tensors["embed", None], Read)
    try:
        places = {name: _where(model, tensors[embeddings], tensors[name], plain) for name in model.copies}
    except CheckpointError as error:
        return model, [f"sources.{model.name}: {problem}" for problem in error.problems]
    name, where = next(((name, where) for name, where in places.items() if where), ("", ""))
    if not name:
        why = "the head is tied to the embeddings, and this copy equals them"
        return replace(model, dropped={**model.dropped, **dict.fromkeys(model.copies, why)}), []
    stored, embed = printable(name), printable(embeddings)
    differs = f"differs from {embed} ({where})"
    if accept == "tied":
        why = "it differs from the embeddings that config.json ties it to, and the recipe accepts head: tied"
        warning = (
            f"{stored} of {model.name} {differs} and is dropped, since config.json ties it: the embeddings are the head, which is not what "
            "transformers computes with."
        )
        return replace(model, dropped={**model.dropped, name: why}, warnings=(*model.warnings, warning)), []
    entry = tensors[name]
    if accept == "stored" and entry.shape == tensors[embeddings].shape and where != QUANTISED:
        warning = f"{stored} of {model.name} {differs} and counts, though config.json ties it: the result is untied."
        kept = {tensor: why for tensor, why in model.dropped.items() if tensor != name}
        untied = replace(model, dropped=kept, copies=(), warnings=(*model.warnings, warning))
        return _untied(untied, Read(model.name, name, entry.dtype, entry.shape)), []
    return model, [
        f"sources.{model.name}: config.json has tie_word_embeddings=true, but the file holds {stored}, which {differs}. transformers "
        "computes with the stored head, other programs with the embeddings. Set tie_word_embeddings to false in config.json, so that the "
        f"stored head counts; or remove {stored}, so that the embeddings count. Or say it in the recipe: accept: {{head: stored}}, or "
        "accept: {head: tied}."
    ]


QUANTISED = "stored as 8-bit floats: not compared"


def _where(model: DenseModel, embeddings: TensorEntry, head: TensorEntry, plain: bool) -> str:
    """Where a stored head differs from the embeddings; 8-bit floats, which have scales beside them, are not compared."""
    return difference(model.checkpoint, embeddings, head) if plain and not head.dtype.startswith("F8_E") else QUANTISED


def settle_heads(models: list[DenseModel], accept: str | None = None) -> Heads:
    """`models`, whose copies are settled, with every head either its own or the embeddings, and what stands against that.

    Beside tied sources, an untied one whose head equals its embeddings is tied as well. Where the recipe accepts heads of their own
    ("stored"), tied ones take their embeddings for one. (Else an untied one whose head differs is left, and disagrees with the others in
    tie_word_embeddings.)
    """
    heads = Heads(models, warnings=list(dict.fromkeys(warning for model in models for warning in model.warnings)))
    tied = next((model.name for model in models if model.facts["tie_word_embeddings"]), None)
    if tied is not None:
        own = {model.name: model for model in models if _has_own_head(model, heads)}
        if own and accept == "stored":
            heads.models = [_with_embeddings_as_head(model, next(iter(own)), heads) for model in models]
        else:
            heads.models = [model if model.name in own else _tied(model, tied) for model in models]
    if accept is not None and not heads.warnings and not heads.problems:
        heads.notes.append(f"accept.head: {accept} need not be accepted: no head differs from embeddings that it is tied to.")
    return heads


def _has_own_head(model: DenseModel, heads: Heads) -> bool:
    """Whether the head is another matrix than the embeddings. Of one that an adapter changed, or that is computed, it is taken to be."""
    if model.facts["tie_word_embeddings"]:
        return False
    embed, head = model.tensors["embed", None], model.tensors["head", None]
    if not all(isinstance(end, Read) and end.source == model.store_name for end in (embed, head)):
        return embed != head
    tensors = model.checkpoint.tensors
    try:
        return bool(difference(model.checkpoint, *(tensors[whole(end).tensor] for end in (embed, head))))  # type: ignore[arg-type]
    except CheckpointError as error:
        heads.problems += [f"sources.{model.name}: {problem}" for problem in error.problems]
        return False


def _untied(model: DenseModel, head: Expr) -> DenseModel:
    """`model` with a head of its own, which the table's order puts last."""
    return replace(
        model, facts={**model.facts, "tie_word_embeddings": False, "untied": True}, tensors={**model.tensors, ("head", None): head}
    )


def _with_embeddings_as_head(model: DenseModel, own: str, heads: Heads) -> DenseModel:
    """A tied model beside one with a head of its own: what it computes with as its head is its embeddings."""
    if not model.facts["tie_word_embeddings"]:
        return model
    heads.warnings.append(
        f"{model.name} is tied and {own} has a head of its own, so the result is untied: the embeddings of {model.name} serve as its head."
    )
    return _untied(model, model.tensors["embed", None])


def _tied(model: DenseModel, other: str) -> DenseModel:
    """A model whose head equals its embeddings without it, beside one that is tied."""
    if model.facts["tie_word_embeddings"]:
        return model
    why = f"the head equals the embeddings, and sources.{other} has it tied to them: so has the result"
    facts = {**model.facts, "tie_word_embeddings": True, "untied": False}
    kept = {site: expr for site, expr in model.tensors.items() if site[0] != "head"}
    head = model.tensors["head", None]
    dropped = {head.tensor: why} if isinstance(head, Read) else {}
    return replace(model, facts=facts, tensors=kept, dropped={**model.dropped, **dropped})


# ---- bytes -----------------------------------------------------------------------------------------------------------------


def difference(checkpoint: Checkpoint, a: TensorEntry, b: TensorEntry) -> str:
    """Where two stored tensors differ first, in words; empty where they hold the same.

    Of one dtype, the bytes are compared, NaN and all; of two, the values, widened without rounding. Raises CheckpointError when a file
    cannot be read.
    """
    if a.shape != b.shape:
        return f"{printable(str(list(b.shape)))} and {printable(str(list(a.shape)))}"
    if a.dtype != b.dtype and not {a.dtype, b.dtype} <= set(ARITHMETIC_DTYPES):
        return f"{b.dtype} and {a.dtype}"
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
