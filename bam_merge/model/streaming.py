"""Blocks whose weights are never held: a product reads, widens and multiplies a few rows of its matrix at a time.

So a model of any size runs in the memory of its activations, and the time goes into reading and multiplying, not into fresh memory for
weights that are used once. What is computed is what model.py says: a streamed block is its `Block`, with another way to `nn.Linear`.
"""

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from bam_merge.model.loading import StoredModel
from bam_merge.model.model import Block, as_logits
from bam_merge.model.norms import Norm
from bam_merge.system import give_back_from
from bam_merge.values.torch_threads import one_torch_thread

CHUNK_ELEMENTS = 2**19
"""Elements of a matrix that a thread holds at a time: few enough for a processor's cache, where what is widened is multiplied."""


DEVICE_ELEMENTS = 2**24
"""The same for another device, where a transfer has to be worth its start."""


Part = TypeVar("Part", bound=nn.Module)


@dataclass(frozen=True)
class Computing:
    """Where a streamed model computes, and in what. `pool` are the threads that read, widen and multiply, with one of torch's own each."""

    pool: Executor
    device: torch.device
    dtype: torch.dtype = torch.float32

    def in_float64(self) -> "Computing":
        """The same in float64; on the CPU where the device has none, as Apple's has not."""
        return replace(self, dtype=torch.float64, device=torch.device("cpu") if self.device.type == "mps" else self.device)

    @property
    def elements(self) -> int:
        return CHUNK_ELEMENTS if self.device.type == "cpu" else DEVICE_ELEMENTS

    def taken(self, x: Tensor) -> Tensor:
        """A tensor of hidden states, where and as this computes."""
        return x.to(self.device, self.dtype)


@contextmanager
def computing_on(device: torch.device, workers: int) -> Iterator[Computing]:
    """Computing in float32 on `device`, with so many threads; while it is open torch has one thread in each, and starts none. From here on
    activations larger than a chunk of a matrix leave no holes in the process's memory."""
    give_back_from(4 * CHUNK_ELEMENTS + 2**16)
    with one_torch_thread() as single_threaded:
        single_threaded()
        with ThreadPoolExecutor(workers, initializer=single_threaded) as pool:
            yield Computing(pool, device)


class StreamedLinear(nn.Module):
    """x W^T + b, with W [rows, columns] read while it is multiplied. Where x has no row nothing is read."""

    def __init__(self, model: StoredModel, name: str, of: nn.Linear, computing: Computing) -> None:
        super().__init__()
        self.model, self.name, self.computing = model, f"{name}.weight", computing
        self.out_features, self.in_features = of.out_features, of.in_features
        self.bias = None if of.bias is None else computing.taken(model.read(f"{name}.bias"))

    def forward(self, x: Tensor) -> Tensor:
        flat_MC = x.reshape(-1, self.in_features)
        y_MR = product(self.model, self.name, self.out_features, flat_MC, self.computing)
        y_MR = y_MR if self.bias is None else y_MR + self.bias
        return y_MR.reshape(*x.shape[:-1], self.out_features)


def product(model: StoredModel, name: str, rows: int, x_MC: Tensor, computing: Computing) -> Tensor:
    """x W^T [M, rows] for the stored parameter W [rows, C] called `name`."""
    if not len(x_MC):
        return x_MC.new_empty(0, rows)
    y_RM = x_MC.new_empty(rows, len(x_MC))
    step = max(1, computing.elements // max(1, x_MC.shape[1]))

    def multiply(first: int) -> None:
        some = range(first, min(first + step, rows))
        torch.mm(computing.taken(model.read_rows(name, some)), x_MC.T, out=y_RM[some.start : some.stop])

    spans = range(0, rows, step)
    if len(spans) == 1:  # not worth a thread
        multiply(0)
    else:
        list(computing.pool.map(multiply, spans))
    return y_RM.T


def streamed_block(model: StoredModel, layer: int, computing: Computing) -> Block:
    """Block `layer` of a stored model. Norms are read now, matrices whenever it is called."""
    prefix = f"model.layers.{layer}."
    with torch.device("meta"):
        block = Block(model.config, layer)
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    for name, linear in linears.items():
        block.set_submodule(name, StreamedLinear(model, prefix + name, linear, computing))
    return _filled(block, model, prefix, computing)


def _filled(part: Part, model: StoredModel, prefix: str, computing: Computing) -> Part:
    """`part`, built without memory, with the parameters that it has itself."""
    part.load_state_dict({name: computing.taken(model.read(prefix + name)) for name in part.state_dict()}, assign=True)
    return part.eval()


def streamed_embeddings(model: StoredModel, ids_BT: Tensor, computing: Computing) -> Tensor:
    """Hidden states [B, T, D] that the first block gets, from the rows of these tokens alone."""
    return computing.taken(model.embed(ids_BT))


def streamed_head(model: StoredModel, x_BTD: Tensor, computing: Computing) -> Tensor:
    """Logits [B, T, V] of the last block's hidden states."""
    with torch.device("meta"):
        norm = Norm(model.config, model.config.hidden_size, bias=model.config.norm_bias)
    normed_MD = _filled(norm, model, "model.norm.", computing)(x_BTD).flatten(0, -2)
    logits_MV = product(model, model.head_parameter, model.config.vocab_size, normed_MD, computing)
    bias_V = model.head_bias()
    logits_MV = logits_MV if bias_V is None else logits_MV + computing.taken(bias_V)
    return as_logits(model.config, logits_MV.reshape(*x_BTD.shape[:-1], -1))
