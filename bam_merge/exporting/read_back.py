"""A GGUF file held against the folder that it was made from: every tensor's values, by the names that the format gives to roles, by our own
code from the folder's bytes; then metadata and vocabulary."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bam_merge.architectures.locate import Cell, cells, locate, parts_of
from bam_merge.architectures.tables import Architecture, Engine
from bam_merge.checkpoints.dtypes import DTYPE_BITS
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.pieces import Leaf, Read, numel
from bam_merge.checkpoints.reading import read_piece
from bam_merge.errors import OutputError
from bam_merge.exporting.metadata import metadata_problems
from bam_merge.exporting.vocabulary import vocabulary_problems
from bam_merge.text import printable, some
from bam_merge.values.arrays import Array, bfloat16_bits, widen

STEMS = {
    "embed": "token_embd", "norm.final": "output_norm", "head": "output",
    "norm.attn": "attn_norm", "norm.ffn": "ffn_norm", "norm.attn.post": "post_attention_norm", "norm.ffn.post": "post_ffw_norm",
    "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.o": "attn_output", "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "router.ffn": "ffn_gate_inp", "ffn.gate": "ffn_gate_exps", "ffn.up": "ffn_up_exps", "ffn.down": "ffn_down_exps",
    "ffn.shared.gate": "ffn_gate_shexp", "ffn.shared.up": "ffn_up_shexp", "ffn.shared.down": "ffn_down_shexp",
    "ffn.shared.router": "ffn_gate_inp_shexp",
}  # fmt: skip
"""What GGUF calls the tensors of a mixture, by their roles (llama.cpp: gguf-py/gguf/constants.py)."""


ROTARY_FACTORS = "rope_freqs.weight"
"""What the frequencies of llama3's rotary embedding are divided by: made of config.json, stored by no folder."""


def compare(file: Path, checkpoint: Checkpoint, layout: Architecture, facts: Mapping[str, Any], dtype: str) -> tuple[int, int]:
    """How many tensors and keys of metadata were compared. Raises OutputError with all that differs."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except (ValueError, OSError, IndexError) as error:
        raise OutputError(f"the converter's file cannot be read: {printable(str(error))}.") from error
    (engine,) = [engine for engine in layout.engines if engine.name == "llama.cpp"]
    stored = {tensor.name: tensor for tensor in reader.tensors}
    problems = list(_tensor_problems(stored, checkpoint, layout, engine, facts, dtype))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    keys, wrong = metadata_problems(fields, engine, facts)
    problems += [*wrong, *vocabulary_problems(fields, checkpoint, facts["vocab_size"])]
    if problems:
        raise OutputError(*(f"what the converter wrote is not what {printable(str(checkpoint.path))} has: {text}" for text in problems))
    return len(stored), keys


def _tensor_problems(
    stored: Mapping[str, Any], checkpoint: Checkpoint, layout: Architecture, engine: Engine, facts: Mapping[str, Any], dtype: str
) -> Iterator[str]:
    """What differs, tensor by tensor. One matrix is held at a time."""
    met: set[str] = set()
    for name, expert, role, leaf in _expected(checkpoint, layout, facts):
        if name is None:
            yield f"{role} has no name in GGUF that is known here."
            continue
        met.add(name)
        if name not in stored:
            yield f"{name} is missing."
            continue
        values = _values(checkpoint, leaf)
        if engine.paired and role.partition(".bias")[0] in ("attn.q", "attn.k"):
            values = values[_in_pairs(len(values), facts["head_dim"])]
        yield from (
            f"{name}{'' if expert is None else f', expert {expert}'}: {text}" for text in _apart(stored[name], expert, values, dtype)
        )
    if ROTARY_FACTORS in stored:
        met.add(ROTARY_FACTORS)
        if not np.allclose(stored[ROTARY_FACTORS].data, _rotary_factors(facts), rtol=1e-5, atol=0):
            yield f"{ROTARY_FACTORS} are not those of rope_parameters."
    elif facts["rope_type"] == "llama3":
        yield f"{ROTARY_FACTORS} is missing, and rope_type is llama3."
    if extra := sorted(stored.keys() - met):
        yield f"{printable(some(extra))}: no tensor of the folder is stored so."


def _expected(checkpoint: Checkpoint, layout: Architecture, facts: Mapping[str, Any]) -> Iterator[tuple[str | None, int | None, str, Leaf]]:
    """Every role of the folder's tensors: its name in GGUF, with the expert that it is a part of, and where its bytes are."""
    walk = cells(layout, facts["num_hidden_layers"], facts["num_experts"])
    found = locate(checkpoint.tensors, walk, lambda cell: False)
    if found.extra:
        yield None, None, printable(some(found.extra)), Read("", found.extra[0], "F32", ())
    for cell, names, _ in found.met:
        entry = checkpoint.tensors[names[0]]
        pieces = parts_of(cell, Read("", entry.name, entry.dtype, entry.shape), facts)
        if pieces is None:
            yield None, None, printable(entry.name), Read("", entry.name, entry.dtype, entry.shape)
        for (role, expert), leaf in (pieces or {}).items():
            yield _name(role, cell), expert, role, leaf


def _name(role: str, cell: Cell) -> str | None:
    base, _, bias = role.partition(".bias") if role.endswith(".bias") else (role, "", None)
    if base not in STEMS:
        return None
    where = "" if cell.layer is None else f"blk.{cell.layer}."
    return f"{where}{STEMS[base]}.{'weight' if bias is None else 'bias'}"


def _values(checkpoint: Checkpoint, leaf: Leaf) -> Array:
    """The folder's values, in float32."""
    data = memoryview(bytearray(numel(leaf) * DTYPE_BITS[leaf.dtype] // 8))
    read_piece(checkpoint, leaf, data)
    return widen(data, leaf.dtype, np.empty(numel(leaf), np.float32)).reshape(leaf.shape)


def _in_pairs(rows: int, head_dim: int) -> Array:
    """The order of rows in which the two that turn together stand side by side, head by head: they are half a head apart in the folder."""
    half = head_dim // 2
    return np.array([head * head_dim + place // 2 + half * (place % 2) for head in range(rows // head_dim) for place in range(head_dim)])


def _apart(tensor: Any, expert: int | None, values: Array, dtype: str) -> Iterator[str]:
    """Why a stored tensor, or an expert's part of it, does not hold `values` in its dtype."""
    kind, data = tensor.tensor_type.name, tensor.data
    wanted = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    if kind not in ("F32", wanted):
        yield f"is {kind}, expected {wanted} or F32."
        return
    bits = data.view(np.uint16) if kind == "BF16" else data
    if expert is not None:
        if expert >= len(bits):
            yield "is missing."
            return
        bits = bits[expert]
    if bits.size != values.size or [n for n in bits.shape if n != 1] != [n for n in values.shape if n != 1]:
        yield f"has shape {list(bits.shape)}, expected {list(values.shape)}."
        return
    expected = _rounded(values, kind)
    if kind == "F16" and np.isinf(expected).any() and not np.isinf(values).any():
        yield f"holds values up to {np.abs(values).max():.3g}, beyond float16. Use --dtype bfloat16 or float32."
    if bits.reshape(-1).tobytes() != np.ascontiguousarray(expected).reshape(-1).tobytes():
        differ = int((bits.reshape(-1) != expected.reshape(-1)).sum())
        yield f"{differ} of {values.size} values differ."


def _rounded(values: Array, kind: str) -> Array:
    """float32 values as a kind of GGUF stores them, to the nearest."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16) if kind == "F16" else bfloat16_bits(values) if kind == "BF16" else values


def _rotary_factors(facts: Mapping[str, Any]) -> Array:
    """What llama3's scaling divides each frequency by: 1 for short waves, `factor` for long ones, and between them by how far they are."""
    rope, dim = facts["rope_parameters"], facts["head_dim"]
    waves = 2 * math.pi * float(rope["rope_theta"]) ** (np.arange(0, dim, 2) / dim)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    share = np.clip((rope["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
    factors: Array = 1 / ((1 - share) / factor + share)
    return factors
