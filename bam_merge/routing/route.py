"""`bam-merge route`: which expert takes which token of a text, per router and layer."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bam_merge.errors import CheckpointError
from bam_merge.model.loading import StoredModel, open_model
from bam_merge.model.routes import ROUTERS, Choices, expert_names, run_texts
from bam_merge.model.streaming import computing_on
from bam_merge.recipe.rules import parse_layers
from bam_merge.routing.reading import GivenText, ReadText, read_texts
from bam_merge.sources.places import bring, find
from bam_merge.text import printable
from bam_merge.verifying.devices import open_device, torch_workers
from bam_merge.verifying.heldout import own_experts

FORMAT = 1
"""Version of the JSON document."""


TOKENS = 512
"""Tokens of each text that are looked at, unless one says otherwise."""


@dataclass(frozen=True)
class RouteOptions:
    """How to look. `layers` as in a recipe's rules, such as "0,4-7", or None for all; `tokens` of each text at most; `device` is one of
    torch's; `workers` the most threads; `progress` hears of layers done, and of all of them."""

    layers: int | str | None = None
    tokens: int = TOKENS
    device: str = "cpu"
    workers: int | None = None
    progress: Callable[[int, int], None] = lambda done, total: None


@dataclass(frozen=True)
class RoutedText:
    """A text, and what every router that was looked at did with its tokens, layer by layer."""

    text: ReadText
    choices: Sequence[Choices]
    experts: Sequence[int] = ()

    @property
    def name(self) -> str:
        return os.fsdecode(self.text.given.file)

    def of(self, router: str) -> list[Choices]:
        """What one of the routers did, layer by layer."""
        return [found for found in self.choices if found.router == router]

    def voted(self, router: str) -> list[int]:
        """For each token the expert that most of the layers have first; of several, the first of them."""
        experts_LM = torch.stack([found.experts_MK[:, 0] for found in self.of(router)])
        count = max(len(found.share) for found in self.of(router))
        votes_NM = torch.stack([(experts_LM == expert).sum(0) for expert in range(count)])
        winners: list[int] = votes_NM.max(0, keepdim=True).values.eq(votes_NM).long().argmax(0).tolist()
        return winners

    def accuracy(self, found: Choices) -> float | None:
        """Share of the tokens that have the domain's expert first; None where the domain is not known."""
        return found.accuracy(self.experts, self.text.scored) if self.experts else None

    def document(self) -> dict[str, Any]:
        return {
            "text": self.text.given.file.name,
            "domain": self.text.given.domain,
            "tokens": len(self.text.ids),
            "ids": list(self.text.ids),
            "pieces": list(self.text.pieces),
            "routing": [
                {
                    "layer": found.layer, "router": found.router, "entropy": found.entropy, "gate": [*found.gate], "share": [*found.share],
                    "accuracy": self.accuracy(found), "experts": found.experts_MK.tolist(),
                    "gates": [[round(gate, 6) for gate in row] for row in found.gates_MK.tolist()],
                }
                for found in self.choices
            ],
        }  # fmt: skip


@dataclass(frozen=True)
class Routes:
    """What `route` found. `names` are the experts', by index; `soft`: the routers that send a token to every expert."""

    path: str
    model_type: str
    names: tuple[str, ...]
    layers: tuple[int, ...]
    texts: tuple[RoutedText, ...]
    count: int
    soft: tuple[str, ...] = field(default=())

    @property
    def routers(self) -> list[str]:
        """The routers that this mixture has: attention, ffn."""
        return [router for router in ROUTERS if self.texts and self.texts[0].of(router)]

    def document(self) -> dict[str, Any]:
        """As `route --json` prints it."""
        return {
            "format": FORMAT,
            "path": self.path,
            "model_type": self.model_type,
            "experts": list(self.names),
            "layers": list(self.layers),
            "texts": [text.document() for text in self.texts],
        }


def route(
    path: str | os.PathLike[str],
    texts: Sequence[str | os.PathLike[str]] = (),
    domains: Mapping[str, Sequence[str | os.PathLike[str]]] | None = None,
    options: RouteOptions | None = None,
) -> Routes:
    """Which expert takes which token of `texts`, and of those of `domains`, by the name of the expert that is to take them.

    The mixture in the folder `path` (or on the hub) is read block by block; its sources are not needed. Raises CheckpointError for a model
    that is no mixture, or that the reference model cannot compute, and for a text that cannot be read; VerifyError for the device.
    """
    options = options or RouteOptions()
    device = open_device(options.device)
    found = find(path)
    bring([found])
    mixture = open_model(found.path)
    where = printable(os.fsdecode(path))
    names = expert_names(mixture)
    if not names:
        kind = printable(str(mixture.checkpoint.config["model_type"]))
        raise CheckpointError(f"{where}: a dense model (model_type {kind}), which has no routers. Give the folder of a mixture.")
    layers = _layers(options.layers, mixture, where)
    given = [GivenText(Path(file)) for file in texts]
    given += [GivenText(Path(file), name) for name, files in (domains or {}).items() for file in files]
    own = _own_experts(domains or {}, names, where)
    if not given:
        raise CheckpointError(f"{where}: no text to route. Give one with --text FILE.")
    read = read_texts(found.path, given, options.tokens, mixture.config.vocab_size)
    with computing_on(device, torch_workers(options.workers)) as computing:
        total = max(layers) + 1
        options.progress(0, total)
        batches = [text.windows for text in read]
        ran = run_texts(mixture, batches, computing, layers, ran=lambda layer: options.progress(layer + 1, total))
    routed = [(text, choices) for text, (_, choices) in zip(read, ran, strict=True)]
    if odd := next((one for _, choices in routed for one in choices if not math.isfinite(one.entropy)), None):
        what = f"the {odd.router} router of layer {odd.layer} gives NaN or infinity, so nothing can be said of its choices"
        raise CheckpointError(f"{where}: {what}. bam-merge inspect --stats says which weights are no numbers.")
    return Routes(
        os.fsdecode(path), str(mixture.checkpoint.config["model_type"]), names, tuple(sorted(layers)),
        tuple(RoutedText(text, one, own.get(text.given.domain or "", ())) for text, one in routed),
        mixture.config.num_hidden_layers, _soft(mixture),
    )  # fmt: skip


def _layers(text: int | str | None, mixture: StoredModel, where: str) -> range | frozenset[int]:
    try:
        return parse_layers(text, mixture.config.num_hidden_layers)
    except ValueError as error:
        raise CheckpointError(f"{where}: --layers: {error}") from None


def _soft(mixture: StoredModel) -> tuple[str, ...]:
    config = mixture.config
    soft_attention = config.num_attention_experts and config.attention_routing != "top_k"
    soft_ffn = config.num_experts and config.num_experts_per_tok == config.num_experts
    return tuple(router for router, soft in zip(ROUTERS, (soft_attention, soft_ffn), strict=True) if soft)


def _own_experts(domains: Mapping[str, object], names: Sequence[str], where: str) -> dict[str, tuple[int, ...]]:
    """The indices of the experts that are to take each domain's texts. Raises CheckpointError with every name that no expert has."""
    found: dict[str, tuple[int, ...]] = {}
    problems: list[str] = []
    for domain in domains:
        try:
            found[domain] = own_experts(domain, names, f"{where}: --texts {printable(domain)}")
        except CheckpointError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(*problems)
    return found
