"""Heads that are stored although config.json ties them to the embeddings, and heads that could be tied.

transformers ties a stored head only where it equals the embeddings, and computes with it where it does not. So this is the one
question of a plan that headers cannot answer: the two tensors are compared byte for byte, a piece at a time.
"""

import struct
from collections.abc import Iterator
from dataclasses import replace

from bam_merge.checkpoints.dtypes import ARITHMETIC_DTYPES, DTYPE_BITS
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.header import TensorEntry
from bam_merge.checkpoints.pieces import Read
from bam_merge.checkpoints.reading import read_runs
from bam_merge.errors import CheckpointError
from bam_merge.expressions import Expr
from bam_merge.sources.dense import DenseModel
from bam_merge.sources.settled import Settled
from bam_merge.text import printable

PIECE = 2**20
"""Elements that are compared at a time: a multiple of eight, so that pieces of the smallest dtypes begin at a byte."""


def settle_heads(models: list[DenseModel], accept: str | None = None) -> Settled:
    """`models` with every head either its own or the embeddings, and what stands against that.

    A tied source may store a head that equals its embeddings: it is dropped. Beside tied sources, an untied one whose head equals its
    embeddings is tied as well. Where the recipe accepts one, a head that differs counts ("stored") or is dropped ("tied"); a result that
    has a head of its own takes the embeddings of those that have none. (Else an untied one whose head differs is left, and disagrees with
    the others in tie_word_embeddings.)
    """
    heads = Settled(models)
    tied = next((model.name for model in models if model.facts["tie_word_embeddings"]), None)
    if tied is not None:
        settled = [_settled(model, accept, heads) for model in models]
        own = [model for model, differs in settled if differs]
        heads.models = [model for model, _ in settled]
        if own and accept == "stored":
            heads.models = [_with_embeddings_as_head(model, own[0], heads) for model in heads.models]
        elif not own or len(own) < len(models):
            heads.models = [model if differs else _tied(model, tied) for model, differs in settled]
    if accept is not None and not heads.warnings and not heads.problems:
        heads.notes.append(f"accept.head: {accept} need not be accepted: no head differs from embeddings that it is tied to.")
    return heads


def _settled(model: DenseModel, accept: str | None, heads: Settled) -> tuple[DenseModel, bool]:
    """`model` under what is accepted of its head, and whether that is then another matrix than the embeddings."""
    tensors, embeddings = model.checkpoint.tensors, _stored_name(model, "embed")
    try:
        if not model.facts["tie_word_embeddings"]:
            return model, bool(difference(model.checkpoint, tensors[embeddings], tensors[_stored_name(model, "head")]))
        places = {name: difference(model.checkpoint, tensors[embeddings], tensors[name]) for name in model.copies}
    except CheckpointError as error:
        heads.problems += [f"sources.{model.name}: {problem}" for problem in error.problems]
        return model, False
    name, where = next(((name, where) for name, where in places.items() if where), ("", ""))
    if not name:
        why = "the head is tied to the embeddings, and this copy equals them"
        return replace(model, dropped={**model.dropped, **dict.fromkeys(model.copies, why)}), False
    stored, embed = printable(name), printable(embeddings)
    differs = f"differs from {embed} ({where})"
    if accept == "tied":
        why = "it differs from the embeddings that config.json ties it to, and the recipe accepts head: tied"
        heads.warnings.append(
            f"{stored} of {model.name} {differs} and is dropped, since config.json ties it: the embeddings are the head, which is not what "
            "transformers computes with."
        )
        return replace(model, dropped={**model.dropped, name: why}), False
    if accept == "stored" and tensors[name].shape == tensors[embeddings].shape:
        heads.warnings.append(f"{stored} of {model.name} {differs} and counts, though config.json ties it: the result is untied.")
        entry = tensors[name]
        head = Read(model.name, name, entry.dtype, entry.shape)
        kept = {tensor: why for tensor, why in model.dropped.items() if tensor != name}
        return _untied(replace(model, dropped=kept, copies=()), head), True
    heads.problems.append(
        f"sources.{model.name}: config.json has tie_word_embeddings=true, but the file holds {stored}, which {differs}. transformers "
        "computes with the stored head, other programs with the embeddings. Set tie_word_embeddings to false in config.json, so that the "
        f"stored head counts; or remove {stored}, so that the embeddings count. Or say it in the recipe: accept: {{head: stored}}, or "
        "accept: {head: tied}."
    )
    return model, False


def _stored_name(model: DenseModel, role: str) -> str:
    leaf = model.tensors[role, None]
    assert isinstance(leaf, Read), f"{model.family.name}: the table cuts {role} from a fused tensor"
    return leaf.tensor


def _untied(model: DenseModel, head: Expr) -> DenseModel:
    """`model` with a head of its own, which the table's order puts last."""
    return replace(
        model, facts={**model.facts, "tie_word_embeddings": False, "untied": True}, tensors={**model.tensors, ("head", None): head}
    )


def _with_embeddings_as_head(model: DenseModel, own: DenseModel, heads: Settled) -> DenseModel:
    """A tied model beside one with a head of its own: what it computes with as its head is its embeddings."""
    if not model.facts["tie_word_embeddings"]:
        return model
    heads.warnings.append(
        f"{model.name} is tied and {own.name} has a head of its own, so the result is untied: the embeddings of {model.name} serve as its "
        "head."
    )
    return _untied(model, model.tensors["embed", None])


def _tied(model: DenseModel, other: str) -> DenseModel:
    """A model whose head equals its embeddings without it, beside one that is tied."""
    if model.facts["tie_word_embeddings"]:
        return model
    why = f"the head equals the embeddings, and sources.{other} has it tied to them: so has the result"
    facts = {**model.facts, "tie_word_embeddings": True, "untied": False}
    kept = {site: expr for site, expr in model.tensors.items() if site[0] != "head"}
    return replace(model, facts=facts, tensors=kept, dropped={**model.dropped, _stored_name(model, "head"): why})


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
