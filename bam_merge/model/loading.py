"""Checkpoint folders as the reference model: every dense family, bam, and the public FFN mixture layouts. No transformers.

Tensors are found by role: a row of the folder's architecture table says which role a tensor has, bam's row of that role names the
parameter, and a fused tensor is cut by the slices that its row describes. So a new family is a table here too. Opening reads
headers only; tensors are read when asked for, so that a verifier can hold one block at a time.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from bam_merge.architectures.locate import Cell, cells, gathered, is_named_here, joined, locate, of_its_kind, parts_of, rows_of, shape_of
from bam_merge.architectures.opening import open_folder
from bam_merge.architectures.tables import Architecture, Row, find_by_model_type, load_architecture, names_of_the_head
from bam_merge.architectures.vocabulary import SYMBOLS
from bam_merge.architectures.wrappers import Wrapper
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.header import TensorEntry
from bam_merge.checkpoints.pieces import Joined, Leaf, Read, byte_runs, numel, stored
from bam_merge.checkpoints.reading import read_runs
from bam_merge.errors import CheckpointError
from bam_merge.model.config import model_config
from bam_merge.model.model import Block, Model, head, scaled_embeddings
from bam_merge.model.model_config import ModelConfig
from bam_merge.model.norms import Norm
from bam_merge.model.wrapped import own_names, text_config, wrapper_of
from bam_merge.text import printable, some
from bam_merge.values.tensors import TORCH_DTYPES, buffer, decode, read_tensor

HEAD_ROWS = 2**13
"""Vocabulary rows of the head that are in memory at a time, where a model is run block by block."""


Part = TypeVar("Part", bound=nn.Module)


@dataclass(frozen=True)
class StoredModel:
    """A folder opened by its headers. `leaves` says what each parameter of the reference model is read from.

    Methods raise CheckpointError when a file cannot be read, or is no longer the one that was opened.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    leaves: Mapping[str, Leaf]

    def read(self, parameter: str, dtype: torch.dtype | None = None) -> Tensor:
        """The values of a parameter, by its name in a bam checkpoint; in `dtype`, or as stored."""
        return read_tensor(self.checkpoint, self.leaves[parameter]).to(dtype)

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """(parameter, values as stored) of all parameters whose name begins with `prefix`, one at a time."""
        yield from ((name, self.read(name)) for name in self.leaves if name.startswith(prefix))

    def embed(self, input_ids_BT: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Hidden states [B, T, D] that the first block gets. Reads the rows of these tokens only."""
        ids, places = torch.unique(input_ids_BT, return_inverse=True)
        return scaled_embeddings(self.config, embedding(places, self.read_rows("model.embed_tokens.weight", ids.tolist(), dtype)))

    def read_rows(self, parameter: str, rows: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """The named rows of a parameter [len(rows), ...], as stored or in `dtype`."""
        leaf = self.leaves[parameter]
        row = numel(leaf) // leaf.shape[0]
        spans = [(rows[0], len(rows))] if isinstance(rows, range) else [(index, 1) for index in rows]
        bytes_B, view = buffer(len(rows) * row * TORCH_DTYPES[leaf.dtype].itemsize)
        if isinstance(leaf, Joined):
            values = read_tensor(self.checkpoint, leaf).view(leaf.shape[0], row)[list(rows)]
            return values.reshape(len(rows), *leaf.shape[1:]).to(dtype)
        runs = (run for first, count in spans for run in byte_runs(leaf, first * row, (first + count) * row))
        read_runs(self.checkpoint, self.checkpoint.tensors[stored(leaf).tensor], runs, view)
        return decode(bytes_B, leaf.dtype).reshape(len(rows), *leaf.shape[1:]).to(dtype)

    def equals_embeddings(self, parameter: str = "lm_head.weight") -> bool:
        """Whether a parameter holds what the embeddings hold: the same bytes, or the same values in another dtype.

        Apart from the plan's comparison (tied_heads.py), whose mistake verification must not share.
        """
        leaf, embeddings = self.leaves[parameter], self.leaves["model.embed_tokens.weight"]
        if leaf.shape != embeddings.shape or not {leaf.dtype, embeddings.dtype} <= TORCH_DTYPES.keys():
            return False
        for start in range(0, leaf.shape[0], HEAD_ROWS):
            rows = range(start, min(start + HEAD_ROWS, leaf.shape[0]))
            a, b = (self.read_rows(name, rows) for name in (parameter, "model.embed_tokens.weight"))
            if not (torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if a.dtype == b.dtype else torch.equal(a.double(), b.double())):
                return False
        return True

    def block(self, layer: int, dtype: torch.dtype = torch.float32) -> Block:
        """Block `layer` alone, with its weights; nothing else is read."""
        return self._filled(lambda: Block(self.config, layer), f"model.layers.{layer}.", dtype)

    def final_norm(self, dtype: torch.dtype = torch.float32) -> Norm:
        """The norm before the head."""
        return self._filled(lambda: Norm(self.config, self.config.hidden_size, bias=self.config.norm_bias), "model.norm.", dtype)

    @property
    def head_parameter(self) -> str:
        """The parameter that the head multiplies with: the embedding where it is tied."""
        return "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"

    def head(self, x_BTD: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Logits [B, T, V] of the last block's hidden states."""
        norm, V = self.final_norm(dtype), self.config.vocab_size
        spans = (range(start, min(start + HEAD_ROWS, V)) for start in range(0, V, HEAD_ROWS))
        bias_V = self.head_bias(dtype)
        parts = (
            head(self.config, norm, self.read_rows(self.head_parameter, rows, dtype), None if bias_V is None else bias_V[rows], x_BTD)
            for rows in spans
        )
        return torch.cat(list(parts), -1)

    def head_bias(self, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """The bias of the head [V], where the family has one."""
        return self.read("lm_head.bias", dtype) if self.config.head_bias else None

    def model(self, dtype: torch.dtype = torch.float32) -> Model:
        """The whole model."""
        return self._filled(lambda: Model(self.config), "", dtype)

    def _filled(self, build: Callable[[], Part], prefix: str, dtype: torch.dtype) -> Part:
        with torch.device("meta"):
            part = build()
        part.load_state_dict({name: self.read(prefix + name, dtype) for name in part.state_dict()}, assign=True)
        return part.eval()


def load_model(path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> Model:
    """The model in the folder `path`, computing in `dtype`: bam, a dense family, mixtral, qwen2_moe or qwen3_moe.

    Raises CheckpointError with every problem of the folder.
    """
    return open_model(path).model(dtype)


def open_model(path: str | os.PathLike[str], computes: bool = True) -> StoredModel:
    """Open the model in the folder `path` by its headers. Raises CheckpointError with every problem found.

    Without `computes` tensors may have dtypes that nothing is computed with.
    """
    return stored_model(open_folder(path), computes)


def stored_model(checkpoint: Checkpoint, computes: bool = True, head: str | None = None) -> StoredModel:
    """`open_model` of a folder that is open already: its headers and its config.json are not read again.

    `head` decides where a head is stored that differs from the embeddings it is tied to: "stored" takes it, "tied" the embeddings; None
    makes it a problem.
    """
    where = printable(str(checkpoint.path))
    wrapper = wrapper_of(checkpoint.config)
    try:
        has_head = any(name.rpartition(".lm_head.")[2] in ("weight", "lm_head.weight") for name in checkpoint.tensors)
        stated = checkpoint.config if wrapper is None else text_config(checkpoint.config, has_head)
        config = model_config(stated)
        architecture = find_by_model_type(stated["model_type"], stated)
        assert architecture is not None
        parameters = _Parameters(checkpoint, architecture, config, computes, wrapper)
        parameters.settle()
    except CheckpointError as error:
        raise CheckpointError(*(f"{where}: {problem}" for problem in error.problems)) from None
    if config.tie_word_embeddings and not parameters.problems and head != "tied":
        own = parameters.other_head()
        if own is not None and head == "stored" and own.shape == parameters.found["model.embed_tokens.weight"].shape:
            config = replace(config, tie_word_embeddings=False)
            parameters.found["lm_head.weight"] = own
        elif own is not None:
            parameters.problems.append(
                f"{printable(own.tensor)} is stored and differs from the embeddings, but config.json has tie_word_embeddings=true. Set it "
                f"to false, so that the stored head counts; or remove {printable(own.tensor)}, so that the embeddings count."
            )
    if parameters.problems:
        raise CheckpointError(*(f"{where}: {problem}" for problem in parameters.problems))
    return StoredModel(checkpoint, config, parameters.found)


# ---- the tensors -----------------------------------------------------------------------------------------------------------


@cache
def _bam_row(role: str) -> Row | None:
    """The row by which bam names a role; of two, the one that stands per expert."""
    rows = [row for row in load_architecture("bam").rows if role in row.roles]
    return next((row for row in rows if row.per_expert), rows[0] if rows else None)


BESIDES = {
    "router.ffn.bias": "choice_bias",
    "ffn.shared.router": "shared_expert_gate.weight",
    **{f"ffn.shared.{part}": f"shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")},
}
"""The reference model's names, under `mlp.`, for what layouts have beside the experts that bam has."""


def parameter_name(role: str, cell: Cell) -> str:
    """The reference model's name for `role`: bam's, less the experts' part where there is one for all; what bam has not, by `BESIDES`, or
    as its row says."""
    if role in BESIDES:
        return f"model.layers.{cell.layer}.mlp.{BESIDES[role]}"
    template = _bam_row(role) or (cell.row if cell.row.parameter is None else replace(cell.row, names=(cell.row.parameter,)))
    return template.name(cell.layer, cell.expert) if cell.expert is not None else template.name(cell.layer).replace("experts.None.", "")


@dataclass
class _Parameters:
    """What each parameter of the reference model is read from, and every problem: exactly its parameters are to be there."""

    checkpoint: Checkpoint
    architecture: Architecture
    config: ModelConfig
    computes: bool = True
    wrapper: Wrapper | None = None
    found: dict[str, Leaf] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unreadable: list[TensorEntry] = field(default_factory=list)
    heads: tuple[str, ...] = ()

    def settle(self) -> None:
        """Every parameter is found, or a problem; so is every tensor that is of none."""
        with torch.device("meta"):
            wanted = {name: tuple(tensor.shape) for name, tensor in Model(self.config).state_dict().items()}
        tensors, config = self.checkpoint.tensors, self.config

        def is_wanted_cell(cell: Cell) -> bool:
            named = bool(cell.row.roles) and all(name in wanted for name in self.parameters(cell)) and self.stands(cell.row)
            return named and of_its_kind(cell, vars(config))

        walked = list(cells(self.architecture, config.num_hidden_layers, max(config.num_experts, config.num_attention_experts)))
        beside = names_of_the_head(self.architecture)
        trunk = (tuple(cell.names) for cell in walked if is_wanted_cell(cell) and cell.names[0] not in beside)
        own_to_stored = own_names(tensors, trunk, beside, self.wrapper)
        known = gathered(own_to_stored, self.architecture, config.num_hidden_layers, self.facts_at)
        stored = known.names
        found = locate(stored, walked, is_wanted_cell)
        over = {stored[name] for name in found.extra}
        for cell, own, is_wanted in found.met:
            names = tuple(stored[name] for name in own)
            if is_wanted and len(names) == 1:
                entries = [tensors[name] for name in known.parts.get(names[0], names)]
                self.take(cell, entries, {name: wanted[name] for name in self.parameters(cell)})
            elif is_wanted:
                self.problems.append(f"{' and '.join(names)} are two spellings of one tensor. Keep one.")
            elif cell.row.roles == ("head",):  # tied: a copy that equals the embeddings is ignored, another one refused below
                self.heads = names
            elif cell.row.roles:
                over.update(names)
        homes = {name for cell in (*found.missing, *(item.cell for item in found.met if item.wanted)) for name in self.parameters(cell)}
        missing = [*(cell.names[0] for cell in found.missing), *known.lacking, *(name for name in wanted if name not in homes)]
        self.report("missing: {} tensor(s) that config.json implies. Is the download complete?", missing)
        extra = [name for name in tensors if name in over]
        self.report("present: {} tensor(s) that config.json does not imply. Correct config.json, or remove them.", extra)
        dtypes = ", ".join(sorted({entry.dtype for entry in self.unreadable}))
        known_dtypes = ", ".join(TORCH_DTYPES)
        unreadable = [entry.name for entry in self.unreadable]
        self.report(f"stored as {dtypes}: {{}} tensor(s); the reference model computes with {known_dtypes}. Convert them.", unreadable)

    def stands(self, row: Row) -> bool:
        """Whether a row's name is the one that its role has in this model, by the reference model's own reading of what it is."""
        both_norms = self.config.parallel_block and self.config.parallel_norms == 2
        return is_named_here(row, self.architecture, {**vars(self.config), "twin_norms": both_norms})

    def facts_at(self, layer: int | None) -> dict[str, Any]:
        """What the letters of sizes stand for in a layer."""
        return _facts(self.config if layer is None else self.config.at(layer))

    def take(self, cell: Cell, entries: Sequence[TensorEntry], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Take the parameters named in `shapes` from a tensor, in the order of the row's roles; or the one from several that hold it."""
        if cell.row.pieces:
            self.join(entries, *shapes.items())
            return
        (entry,) = entries
        row, facts, (first, *_) = cell.row, self.facts_at(cell.layer), shapes.values()
        expected = first if len(row.roles) == 1 else (rows_of(row, facts), *first[1:])
        if row.stacked:
            expected = (self.config.num_experts, *expected)
        flat = len(row.roles) == 1 and not row.stacked and len(row.shape) > len(first)  # a vector that is stored as a matrix of one row
        if flat:
            expected = shape_of(row, facts)
        if entry.shape != expected:
            self.problems.append(f"{entry.name} is {list(entry.shape)}, config.json implies {list(expected)}.")
            return
        if entry.dtype not in TORCH_DTYPES and self.computes:
            self.unreadable.append(entry)
        pieces = parts_of(cell, Read("model", entry.name, entry.dtype, first if flat else entry.shape), facts)
        assert pieces is not None  # its rows are those of the table
        for (parameter, shape), ((role, _), leaf) in zip(shapes.items(), pieces.items(), strict=True):
            if leaf.shape != shape:
                self.problems.append(f"{entry.name} holds {role} as {list(leaf.shape)}, config.json implies {list(shape)}.")
            self.found[parameter] = leaf

    def parameters(self, cell: Cell) -> list[str]:
        """What the tensor of a cell holds, in its order."""
        holds = [cell._replace(expert=expert) for expert in range(self.config.num_experts)] if cell.row.stacked else [cell]
        return [parameter_name(role, one) for one in holds for role in cell.row.roles]

    def join(self, entries: Sequence[TensorEntry], wanted: tuple[str, tuple[int, ...]]) -> None:
        """Take a parameter from the tensors that hold it together; where some are missing, that is said elsewhere."""
        parameter, (first, *rest) = wanted
        shape = (first // len(entries), *rest)
        for entry in entries:
            if entry.shape != shape or entry.dtype != entries[0].dtype:
                self.problems.append(f"{entry.name} is {entry.dtype} {list(entry.shape)}, expected {entries[0].dtype} {list(shape)}.")
                return
        if entries[0].dtype not in TORCH_DTYPES and self.computes:
            self.unreadable += entries
        self.found[parameter] = joined(tuple(Read("model", entry.name, entry.dtype, entry.shape) for entry in entries))

    def other_head(self) -> Read | None:
        """A stored head that differs from the embeddings it is tied to: transformers computes with it."""
        for name in self.heads:
            entry = self.checkpoint.tensors[name]
            read = Read("model", name, entry.dtype, entry.shape)
            if not StoredModel(self.checkpoint, self.config, {**self.found, name: read}).equals_embeddings(name):
                return read
        return None

    def report(self, problem: str, names: list[str]) -> None:
        if names:
            self.problems.append(f"{some(names)} {problem.format(len(names))}")


def _facts(config: ModelConfig) -> dict[str, Any]:
    """What the letters of a table's sizes stand for, by the reference model's configuration."""
    return {name: getattr(config, name, 0) for name in SYMBOLS.values()} | {
        "num_attention_heads": config.num_attention_heads_per_expert, "num_key_value_heads": config.num_key_value_heads_per_expert,
    }  # fmt: skip
