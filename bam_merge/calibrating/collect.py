"""Texts through a model, block by block: hidden states of all texts, and the true inputs of a block's routers.

Shape suffixes:  B windows of a batch    T tokens of a window    M tokens    D hidden_size
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from bam_merge.calibrating.texts import Text, Window
from bam_merge.model.loading import StoredModel
from bam_merge.model.model import Block
from bam_merge.model.streaming import Computing, streamed_embeddings

BATCH_TOKENS = 1024
"""Tokens that go through a block together: few enough for bounded memory, enough for each weight to be read and widened once for all."""


ATTENTION, FFN = "router.attn", "router.ffn"
"""The routers of a block."""


@dataclass
class Batch:
    """Windows of one length, of one text, and their hidden states [B, T, D]. `further`: they are for trying the routers on."""

    text: str
    further: bool
    windows: Sequence[Window]
    x_BTD: Tensor

    @property
    def tokens(self) -> int:
        return self.x_BTD.shape[0] * self.x_BTD.shape[1]


def batches(texts: Sequence[Text], model: StoredModel, computing: Computing) -> list[Batch]:
    """Every text, once each, as the first block gets it. Which windows go together follows from the texts alone."""
    found = []
    for text in {text.digest: text for text in texts}.values():
        for further, windows in ((False, text.windows), (True, text.further)):
            for together in _alike(windows):
                ids_BT = torch.tensor(together)
                found.append(Batch(text.digest, further, together, streamed_embeddings(model, ids_BT, computing)))
    return found


def _alike(windows: Sequence[Window]) -> Iterator[Sequence[Window]]:
    """Neighbouring windows of one length, up to BATCH_TOKENS tokens."""
    start = 0
    while start < len(windows):
        length = len(windows[start])
        stop = start + 1
        while stop < len(windows) and len(windows[stop]) == length and (stop + 1 - start) * length <= BATCH_TOKENS:
            stop += 1
        yield windows[start:stop]
        start = stop


@contextmanager
def inputs_of(block: Block) -> Iterator[dict[str, Tensor]]:
    """What the block's attention and FFN are given [B, T, D], which is what their routers see, while the context is open."""
    seen: dict[str, Tensor] = {}

    def keep(router: str) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: seen.update({router: args[0]})

    handles = [part.register_forward_pre_hook(keep(router)) for router, part in ((ATTENTION, block.self_attn), (FFN, block.mlp))]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def advanced(block: Block, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """A batch's hidden states after the block [B, T, D], and its routers' inputs."""
    positions_BT = torch.arange(batch.x_BTD.shape[1], device=batch.x_BTD.device)[None].expand(batch.x_BTD.shape[:2])
    with inputs_of(block) as seen:
        hidden_BTD = block(batch.x_BTD, positions_BT).hidden
    return hidden_BTD, seen


def counted(x_BTD: Tensor) -> Tensor:
    """The inputs that say something of the text [M, D]: all but those of each window's first token."""
    return x_BTD[:, 1:].flatten(0, 1)


def shares_input(block: Block) -> bool:
    """Whether both routers of the block see the same: a parallel block with one norm."""
    return block.parallel and block.post_attention_layernorm is None
