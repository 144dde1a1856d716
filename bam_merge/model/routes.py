"""What the routers of a mixture did with some tokens: which experts each chose, with which gates."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from bam_merge.model.loading import StoredModel
from bam_merge.model.model import Block, BlockOutput
from bam_merge.model.streaming import Computing, streamed_block, streamed_embeddings

ROUTERS = ("attention", "ffn")


SHOWN = 2
"""Experts of a token that are kept: those with the largest gates."""


@dataclass(frozen=True)
class Choices:
    """What the router `router` (attention or ffn) of block `layer` did with M tokens, for K = min(SHOWN, N) of its N experts.

    `experts_MK` are those with the largest gates, the largest first, and `gates_MK` their gates; of experts with equal gates the first.
    `share`: of the tokens' choices, for each expert; a soft router chooses, in this sense, the expert with the largest gate. `gate`: mean
    gate of each expert. `entropy`: mean over the tokens, in nats, of the softmax over all experts.
    """

    layer: int
    router: str
    experts_MK: Tensor
    gates_MK: Tensor
    share: Sequence[float]
    gate: Sequence[float]
    entropy: float

    def accuracy(self, experts: Collection[int], scored_M: Tensor) -> float:
        """Share of the scored tokens whose first expert is one of `experts`."""
        return float(torch.isin(self.experts_MK[scored_M, 0], torch.tensor(sorted(experts))).double().mean())

    def first_counts(self, part: slice = slice(None)) -> Tensor:
        """How many of the tokens in `part` have each expert as their first [N]."""
        return torch.bincount(self.experts_MK[part, 0], minlength=len(self.share))


def choices(layer: int, router: str, gates_BTN: Tensor, logits_BTN: Tensor) -> Choices:
    """The choices behind gates and logits of tokens [B, T]."""
    gates_MN, p_MN = gates_BTN.flatten(0, 1), logits_BTN.float().softmax(-1).flatten(0, 1)
    chosen_MN = gates_MN > 0
    if bool(chosen_MN.all()):
        chosen_MN = p_MN == p_MN.amax(-1, keepdim=True)
    entropy = float(-(p_MN * p_MN.clamp(min=1e-12).log()).sum(-1).mean())
    order_MN = gates_MN.sort(dim=-1, descending=True, stable=True).indices[:, :SHOWN]
    return Choices(
        layer, router, order_MN, gates_MN.gather(-1, order_MN), (chosen_MN.sum(0) / chosen_MN.sum()).tolist(), gates_MN.mean(0).tolist(),
        entropy,
    )  # fmt: skip


@contextmanager
def router_logits(block: Block) -> Iterator[dict[str, Tensor]]:
    """The logits [B, T, N] that the block's routers give while the context is open, by router."""
    logits: dict[str, Tensor] = {}
    handles = []
    for name, part in zip(ROUTERS, (block.self_attn, block.mlp), strict=True):
        router = getattr(part, "router", None)
        if router is not None:
            handles.append(router.register_forward_hook(lambda module, args, out, name=name: logits.update({name: out})))
    yield logits
    for handle in handles:
        handle.remove()


def routed(out: BlockOutput, logits_of: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Gates and logits [B, T, N] of the routers of a block that has run."""
    found = zip(ROUTERS, (out.attention_gates, out.ffn_gates), strict=True)
    return {router: (gates_BTN, logits_of[router]) for router, gates_BTN in found if gates_BTN is not None}


Windows = Sequence[Tensor]
"""A text's token ids in sequences that are computed each by itself, in batches [B, T] of those of one length, in the text's order."""


@torch.no_grad()
def route_texts(
    mixture: StoredModel,
    texts: Sequence[Windows],
    layers: Collection[int],
    computing: Computing,
    ran: Callable[[int], None] = lambda layer: None,
) -> list[list[Choices]]:
    """For each text what every router of `layers` did with its tokens, layer by layer. One block is held at a time; `ran` hears of each.

    Blocks after the last of `layers` are not computed.
    """
    x = [[streamed_embeddings(mixture, ids_BT, computing) for ids_BT in windows] for windows in texts]
    found: list[list[Choices]] = [[] for _ in texts]
    for layer in range(max(layers) + 1):
        block = streamed_block(mixture, layer, computing)
        for text, windows in enumerate(x):
            parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
            for place, x_BTD in enumerate(windows):
                with router_logits(block) as logits_of:
                    out = block(x_BTD, torch.arange(x_BTD.shape[1], device=x_BTD.device).expand(x_BTD.shape[:2]))
                windows[place] = out.hidden
                for router, pair in routed(out, logits_of).items():
                    parts.setdefault(router, []).append(pair)
            if layer in layers:
                found[text] += [together(layer, router, pairs) for router, pairs in parts.items()]
        ran(layer)
    return found


def together(layer: int, router: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Choices:
    """The choices behind gates and logits [B, T, N] of several batches, one after the other."""
    gates_1MN, logits_1MN = (torch.cat([pair[which].cpu().flatten(0, 1) for pair in pairs])[None] for which in (0, 1))
    return choices(layer, router, gates_1MN, logits_1MN)
