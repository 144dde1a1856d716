"""What the routers of a mixture did with some tokens: which experts each chose, with which gates."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bam_merge.checkpoints.folder import read_small_file
from bam_merge.checkpoints.provenance import MANIFEST
from bam_merge.documents import load_json
from bam_merge.errors import BamMergeError
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

    @property
    def first_shares(self) -> list[float]:
        """Share of the tokens that have each expert first."""
        counts_N = self.first_counts()
        shares: list[float] = (counts_N / counts_N.sum()).tolist()
        return shares

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
def run_texts(
    model: StoredModel,
    texts: Sequence[Windows],
    computing: Computing,
    layers: Collection[int] | None = None,
    experts: Sequence[int | None] | None = None,
    ran: Callable[[int], None] = lambda layer: None,
) -> list[tuple[Windows, list[Choices]]]:
    """For each text its hidden states [B, T, D] after the last of `layers` (of all), and what every router of these did, layer by layer.

    One block is held at a time; `ran` hears of each. `experts`: for each text one that is forced, or None.
    """
    x: list[Windows] = [[streamed_embeddings(model, ids_BT, computing) for ids_BT in batches] for batches in texts]
    found: list[list[Choices]] = [[] for _ in texts]
    wanted = range(model.config.num_hidden_layers) if layers is None else layers
    for layer in range(max(wanted) + 1 if texts else 0):
        block = streamed_block(model, layer, computing)
        for text, expert in enumerate(experts or [None] * len(texts)):
            x[text], did = through(block, layer, x[text], expert)
            found[text] += did if layer in wanted else []
        ran(layer)
    return list(zip(x, found, strict=True))


def through(block: Block, layer: int, x: Windows, force_expert: int | None = None) -> tuple[list[Tensor], list[Choices]]:
    """Hidden states [B, T, D] of a text's batches after a block, and what its routers did with them."""
    outs = []
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for x_BTD in x:
        with router_logits(block) as logits_of:
            out = block(x_BTD, torch.arange(x_BTD.shape[1], device=x_BTD.device).expand(x_BTD.shape[:2]), force_expert=force_expert)
        outs.append(out.hidden)
        for router, pair in routed(out, logits_of).items():
            parts.setdefault(router, []).append(pair)
    return outs, [_together(layer, router, pairs) for router, pairs in parts.items()]


def _together(layer: int, router: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Choices:
    """The choices behind gates and logits [B, T, N] of several batches, one after the other."""
    gates_1MN, logits_1MN = (torch.cat([pair[which].cpu().flatten(0, 1) for pair in pairs])[None] for which in (0, 1))
    return choices(layer, router, gates_1MN, logits_1MN)


def expert_names(mixture: StoredModel) -> tuple[str, ...]:
    """The names of a mixture's experts by index: of its config.json, or of its manifest; else their numbers. A dense model has none."""
    count = max(mixture.config.num_experts, mixture.config.num_attention_experts)
    for names in (mixture.checkpoint.config.get("expert_names"), _recorded(mixture.checkpoint.path / MANIFEST)):
        if isinstance(names, list) and len(names) == count and all(isinstance(name, str) for name in names):
            return tuple(names)
    return tuple(map(str, range(count)))


def _recorded(manifest: Path) -> object:
    """The experts that a manifest names, where there is one that can be read: names are for people, so nothing else is asked of it."""
    try:
        document = load_json(read_small_file(manifest)) if manifest.is_file() else None
    except (ValueError, BamMergeError):
        return None
    recipe = document.get("recipe") if isinstance(document, dict) else None
    return recipe.get("experts") if isinstance(recipe, dict) else None
